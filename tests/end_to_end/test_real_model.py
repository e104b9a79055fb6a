"""A real small model as a policy, beside one whose answers the shards hold already, and the embedded DiffPO aligner."""

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.end_to_end.jobs import ROOT, CommandLine, CompletedJob, Row, corpus, write_shard

MAX_TOKENS = 8
MODEL = "SmolLM2-135M-Instruct"
ALIGNER = ROOT / "pipelines" / "sample" / "DiffPO-SmolLM2-135M"
STORED: list[list[str] | None] = [
    ["Yes.", "<think>Or not?</think>No."],
    None,
    ["<think>It never ends"],
    ["One.", "Two.", "Three."],
    *[None] * 4,
]


@pytest.fixture(scope="module")
def aligned(command_line: CommandLine, new_folder: Callable[[], Path]) -> tuple[CompletedJob, Path]:
    folder = new_folder()
    sample = pq.read_table(ROOT / "pipelines" / "sample" / "prompts" / "part-00000.parquet").slice(0, len(STORED))
    write_shard(folder / "prompts" / "shard.parquet", {"prompt": sample["prompt"], "answers": STORED})
    completed = command_line.run(
        f"input.path={folder / 'prompts'}", "input.response_column=answers", f"output.root={folder / 'output'}",
        "policy=stored", "policy.model=last-year", f"policies=[{{preset: smollm2, max_tokens: {MAX_TOKENS}}}]",
        "aligner=diffpo_smollm2", f"aligner.max_tokens={MAX_TOKENS}",
    )  # fmt: skip
    return completed, folder / "output"


@pytest.fixture(scope="module")
def rows(aligned: tuple[CompletedJob, Path]) -> list[Row]:
    return corpus(aligned[1])


def test_the_real_model_answers_and_aligns(aligned: tuple[CompletedJob, Path], rows: list[Row]) -> None:
    completed = aligned[0].expect(0)
    assert "published: run=000001: 8 rows in = 8 ok + 0 quarantined" in completed.stdout
    answers = [row["responses"][-1] for row in rows]
    aligned_answers = [each for row in rows for each in row["aligned"] if each["status"] == "ok"]
    assert len({answer["text"] for answer in answers}) == 8
    assert {answer["model"] for answer in answers} == {MODEL}
    assert {each["model"] for each in aligned_answers} == {ALIGNER.name}
    for made in [*answers, *aligned_answers]:
        assert 0 < made["num_tokens"] <= MAX_TOKENS
        assert made["num_prompt_tokens"] > 10
        assert sum(letter.isascii() for letter in made["text"]) > 0.9 * len(made["text"]) > 0, "it writes English"
    assert sum(each["changed"] for each in aligned_answers) > len(aligned_answers) / 2


def test_the_aligner_is_small_and_its_card_tells_all_of_its_making() -> None:
    assert sum(path.stat().st_size for path in ALIGNER.iterdir()) < 16e6
    assert not list(ALIGNER.glob("tokenizer*")), "its base has one"
    card = (ALIGNER / "README.md").read_text()
    commands = re.findall(r"pipelines/[\w/]+\.py|conf/\w+\.yaml", card)
    assert {
        "pipelines/sample/make_training_prompts.py", "conf/candidates_smollm2.yaml", "pipelines/score_corpus.py",
        "pipelines/build_preferences.py", "pipelines/train_aligner.py", "conf/train_smollm2.yaml",
    } <= set(commands)  # fmt: skip
    assert all((ROOT / path).is_file() for path in commands)
    assert "hours of training" in card and "license: apache-2.0" in card


def test_at_the_end_two_rows_are_shown(aligned: tuple[CompletedJob, Path], rows: list[Row]) -> None:
    """Of each its first candidate that came through, white space apart: the second row's first one did not."""
    summary, *shown = aligned[0].stdout[aligned[0].stdout.index("corpus: ") :].split("\n\n")
    first, note = summary.splitlines()
    assert first == f"corpus: {aligned[1]}/corpus (8 rows in 1 partition)"
    assert note.startswith("note: The aligned text does not depend on the response")
    expected = []
    for row, number in zip(rows, (0, 1), strict=False):
        prompt, response, better = row["prompt"][-1]["content"], row["responses"][number], row["aligned"][number]
        assert response["status"] == better["status"] == "ok"
        expected.append([row["prompt_id"], "prompt", prompt, "response", response["text"], "aligned", better["text"]])
    assert ["".join(each.split()) for each in shown] == ["".join("".join(each).split()) for each in expected]


def test_candidates_of_every_policy_stand_side_by_side(rows: list[Row]) -> None:
    models = [[response["model"] for response in row["responses"]] for row in rows]
    assert models == [["last-year"] * max(1, len(stored or [])) + [MODEL] for stored in STORED]
    assert all(len(row["aligned"]) == len(row["responses"]) for row in rows)


def test_stored_answers_come_out_in_order_without_their_reasoning(rows: list[Row]) -> None:
    stored = [[(each["reasoning"], each["text"]) for each in row["responses"][:-1]] for row in rows]
    assert stored[0] == [(None, "Yes."), ("Or not?", "No.")]
    assert stored[3] == [(None, "One."), (None, "Two."), (None, "Three.")]


def test_a_failed_candidate_does_not_quarantine_its_row(rows: list[Row]) -> None:
    missing, endless = rows[1]["responses"][0], rows[2]["responses"][0]
    assert (missing["status"], missing["text"]) == ("failed", "")
    assert missing["error"] == "missing_response: the input shard holds no answer for this candidate"
    assert (endless["status"], endless["error"].partition(":")[0]) == ("failed", "empty_answer")
    for row in rows[1:3]:
        assert [each["status"] for each in row["aligned"]] == ["failed", "ok"]
