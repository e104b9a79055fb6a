"""Rewards through the command line: in the job that aligns, and for a corpus that is there; both must come to the same.

Stored answers and an aligner that leaves them as they are: what is scored is known.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from actors.rewards.rules import RULES
from pipelines.config import CONF
from tests.end_to_end.jobs import CommandLine, CompletedJob, Row, corpus, files, manifests, write_shard
from tests.end_to_end.scores import words
from tests.endpoint import serving

WEIGHTS = {"length": 0.2, "repetition": 0.3, "refusal": 0.2, "language": 0.1, "format": 0.2}
ANSWERS = [
    ["It is a number, and a small one at that.", "I'm sorry, but I can't say."],
    ["It is seven", "again and again and again and again."],
    ["", "Nobody knows what it is, neither you nor I."],
]
REWARDS = ["reward=rules", "rewards=[{model: words, rules: {'tests.end_to_end.scores:words': 1}, num_cpus: 0.5}]"]


@dataclass(frozen=True)
class Runs:
    """The same prompts aligned and scored in one job, and in two."""

    together: Path
    plain: Path
    scored: Path
    in_job: CompletedJob
    afterwards: CompletedJob


def score(command_line: CommandLine, *arguments: str) -> CompletedJob:
    return command_line.start_command([sys.executable, "pipelines/score_corpus.py", *arguments]).wait()


@pytest.fixture(scope="module")
def runs(command_line: CommandLine, new_folder: Callable[[], Path]) -> Runs:
    folder = new_folder()
    columns = {
        "prompt": [f"What do you think of the number {number}?" for number in range(9)],
        "response": [ANSWERS[number % 3] for number in range(9)],
        "topic": [f"topic {number}" for number in range(9)],
    }
    write_shard(folder / "prompts" / "a.parquet", columns, row_group_size=4)
    align = [
        "policy=stored", "aligner=identity", f"input.path={folder / 'prompts'}", "input.response_column=response",
        "input.keep_columns=[topic]", "run.unit_rows=2",
    ]  # fmt: skip
    in_job = command_line.run(*align, f"output.root={folder / 'together'}", *REWARDS)
    command_line.run(*align, f"output.root={folder / 'plain'}").expect(0)
    scored = [f"input.path={folder / 'plain'}", f"output.root={folder / 'scored'}", *REWARDS, "run.unit_rows=4"]
    afterwards = score(command_line, *scored)
    return Runs(folder / "together", folder / "plain", folder / "scored", in_job, afterwards)


def by_rules(row: Row, text: str) -> float:
    return sum(weight * RULES[name](row["prompt"], text) for name, weight in WEIGHTS.items())


def test_every_candidate_that_is_there_has_its_scores(runs: Runs) -> None:
    runs.in_job.expect(0)
    rows = corpus(runs.together)
    assert len(rows) == 9
    for row in rows:
        first, second = row["rewards"]
        assert (first["name"], second["name"]) == ("rules", "words")
        texts = [each["text"] if each["status"] == "ok" else None for each in row["responses"]]
        for side in ("response", "aligned"):
            assert first[side] == [None if text is None else pytest.approx(by_rules(row, text)) for text in texts]
            told = [None if text is None or "seven" in text else words(row["prompt"], text) for text in texts]
            assert second[side] == told


def test_scoring_a_corpus_comes_to_what_the_job_would_have_scored(runs: Runs) -> None:
    runs.afterwards.expect(0)
    assert corpus(runs.scored) == corpus(runs.together)
    assert all(row["rewards"] is None for row in corpus(runs.plain))


@pytest.mark.parametrize("job", ["in_job", "afterwards"])
def test_the_summary_tells_rewards_before_and_after_and_what_has_none(runs: Runs, job: str) -> None:
    completed: CompletedJob = getattr(runs, job)
    *lines, first = [line for line in completed.stdout.splitlines() if line.startswith("reward ")]
    (means,) = [manifest["rewards"] for manifest in manifests(runs.scored)]
    assert lines == [
        f"reward rules: {means['rules']['response']:.4g} -> {means['rules']['aligned']:.4g} (+0) over 15 candidates",
        f"reward words: {means['words']['response']:.4g} -> {means['words']['aligned']:.4g} (+0) over 12 candidates; "
        "texts without a score: 3 reward_failed",
    ]
    asked = next(row["prompt_id"] for row in corpus(runs.scored) if "seven" in row["responses"][0]["text"])
    cause = "tests.end_to_end.scores:words: ValueError: seven is too much"
    assert first == f"reward words: the first without a score is reward_failed of {asked}: {cause}"
    assert "not a measure of quality" in completed.stdout
    shown = corpus(runs.scored)[0]["rewards"]
    scores = ", ".join(f"{each['name']} {each['response'][0]:.4g} -> {each['aligned'][0]:.4g}" for each in shown)
    assert f"  rewards  {scores}" in completed.stdout.splitlines()
    assert ("answers changed" in completed.stdout) == (job == "in_job")


def test_what_a_reward_could_not_score_is_not_published_unless_told_to(
    runs: Runs, command_line: CommandLine, tmp_path: Path
) -> None:
    job = [f"input.path={runs.plain}", f"output.root={tmp_path / 'scored'}", "reward.model=words"]
    job += ["reward.engine=rules", "reward.rules={tests.end_to_end.scores:words: 1}"]
    told = score(command_line, *job, "run.max_unscored_fraction=0.1").expect(3).errors
    (message,) = [line for line in told if line.startswith("error: ")]
    assert message.startswith("error: reward words: 3 of 15 texts have no score, more than run.max_unscored_fraction")
    assert "ValueError: seven is too much. run.max_unscored_fraction=1 publishes them all the same" in message
    assert not (tmp_path / "scored" / "corpus").exists()
    score(command_line, *job).expect(0)
    assert len(corpus(tmp_path / "scored")) == 9


def test_the_card_tells_the_rewards(runs: Runs) -> None:
    card = (runs.scored / "README.md").read_text()
    (words,) = [line for line in card.splitlines() if line.startswith("| run=000001 | words | 12 |")]
    assert words.endswith(" | 3 reward_failed |")
    assert "not a measure of quality" in card


def test_a_judge_is_asked_in_both_orders_and_the_summary_tells_how_far_it_went_by_them(
    runs: Runs, command_line: CommandLine, tmp_path: Path
) -> None:
    """One that prefers the longer answer, but goes by the place alone where an answer repeats itself."""

    def parts(question: str) -> tuple[str, ...]:
        found = re.findall(r"<(conversation|answer_a|answer_b)>\n(.*)\n</\1>", question, re.DOTALL)
        return tuple(text for _, text in found)

    def verdict(question: str) -> str:
        _, first, second = parts(question)
        return "[[A]]" if "again" in first + second or len(first) > len(second) else "[[B]]"

    with serving(verdict) as endpoint:
        judge = ["reward=judge", "reward.model=m", "reward.name=judge", f"reward.base_url=http://{endpoint.address}/v1"]
        judge += [f"input.path={runs.plain}", f"output.root={tmp_path / 'judged'}"]
        completed = score(command_line, *judge).expect(0)
    asked = sorted(map(parts, endpoint.asked))
    assert asked == sorted((chat, second, first) for chat, first, second in asked)
    assert len(set(asked)) == len(asked) == 2 * 6, "of six rows a second answer, in both orders"
    rows = corpus(tmp_path / "judged")
    scores = {tuple(each["text"] for each in row["responses"]): row["rewards"][0]["response"] for row in rows}
    assert scores == {tuple(ANSWERS[0]): [0.5, 0.0], tuple(ANSWERS[1]): [0.5, 0.5], tuple(ANSWERS[2]): [None, 0.5]}
    assert [line for line in completed.stdout.splitlines() if line.startswith("reward ")] == [
        "reward judge: 0.4 -> 0.4 (+0) over 15 candidates",
        "reward judge: asked in both orders, the answer shown first won 9 of 12 times and lost 3; 50.0% of the pairs "
        "went by the place alone",
    ]


def test_a_scored_corpus_is_not_scored_again(runs: Runs, lone_command_line: CommandLine) -> None:
    before = files(runs.scored / "corpus")
    arguments = [f"input.path={runs.plain}", f"output.root={runs.scored}", *REWARDS]
    completed = score(lone_command_line, *arguments).expect(0)
    assert "nothing new: 9 rows in 1 partition" in completed.stdout
    assert files(runs.scored / "corpus") == before


def test_another_reward_is_refused_with_both_values(runs: Runs, lone_command_line: CommandLine) -> None:
    arguments = [f"input.path={runs.plain}", f"output.root={runs.scored}", *REWARDS, "reward.rules.length=0.4"]
    (message,) = score(lone_command_line, *arguments).expect(2).errors
    assert "reward.rules was {'length': 0.2" in message and "is {'length': 0.4" in message
    assert "run.accept_changes=true" in message


def test_a_dry_run_shows_the_reward_pools(runs: Runs, lone_command_line: CommandLine) -> None:
    arguments = [f"input.path={runs.plain}", f"output.root={runs.scored}-new", *REWARDS, "rewards.0.replicas=2"]
    completed = score(lone_command_line, *arguments, "--dry-run").expect(0)
    assert "to do: 1 unit, 9 rows" in completed.stdout
    assert "reward: 1 x rules rules (0 GPUs, 0.5 CPUs each)" in completed.stdout
    assert "reward_2: 2 x rules words (0 GPUs, 0.5 CPUs each)" in completed.stdout


def test_a_mistake_in_a_reward_is_one_line(runs: Runs, lone_command_line: CommandLine) -> None:
    arguments = [f"input.path={runs.plain}", f"output.root={runs.scored}-new"]
    (message,) = (
        score(lone_command_line, *arguments, "reward.model=r", "reward.rules={'nowhere:f': 1}").expect(2).errors
    )
    assert message.startswith("error: reward.rules.nowhere:f: cannot be imported (No module named 'nowhere')")
    (message,) = score(lone_command_line, *arguments, "reward=rules", "rewards=[rules]").expect(2).errors
    assert message == "error: rewards: 2 of them are called 'rules'; give each a name of its own"


def test_a_reward_model_scores_the_same_whatever_its_batches(
    runs: Runs, command_line: CommandLine, new_folder: Callable[[], Path]
) -> None:
    """Two pools of one model, one of which takes text by text."""
    from tests.tiny_models import build_tiny_reward  # torch and transformers take seconds to import

    folder = new_folder()
    model = build_tiny_reward(folder / "model", pad_token_id=0)
    shared = f"engine: torch, model: {model}, dtype: float32, device: cpu, num_threads: 1"
    completed = score(
        command_line, f"input.path={runs.plain}", f"output.root={folder / 'scored'}",
        f"reward={{{shared}, name: one, max_num_seqs: 1}}", f"rewards=[{{{shared}, name: many, max_num_seqs: 64}}]",
    ).expect(0)  # fmt: skip
    rows = corpus(folder / "scored")
    one, many = ([score for row in rows for score in row["rewards"][at]["response"]] for at in (0, 1))
    assert [score is None for score in one] == [score is None for score in many]
    assert [score for score in one if score is not None] == pytest.approx(
        [score for score in many if score is not None], abs=1e-5
    )
    assert len(set(one)) > 10
    assert "reward many: " in completed.stdout and "reward one: " in completed.stdout


def test_the_preset_is_the_documented_combination() -> None:
    text = (CONF / "reward" / "rules.yaml").read_text()
    assert "NOT a measure of quality" in text
    assert sum(WEIGHTS.values()) == pytest.approx(1.0)
