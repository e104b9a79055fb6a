"""`ranked` and `pairs` of 8 real policies against a plain computation.

Reads `alpaca_eval_responses.parquet` (prompt_id, prompt, model, response, win_rate) from the folder that
BURNISH_EVAL_DATA names, and is skipped without it: the data is for evaluation only (CC BY-NC 4.0) and is not kept here.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipelines.build_preferences import main
from tests.pipelines.preferences import examples
from tests.pipelines.preferences.fabricate import candidate, publish_corpus, row, table

FILE = "alpaca_eval_responses.parquet"
NUM_PROMPTS = 600
pytestmark = [examples.needs(FILE), pytest.mark.usefixtures("in_this_process")]


@pytest.fixture(scope="module")
def answers() -> pd.DataFrame:
    return pd.read_parquet(examples.EVAL_DATA / FILE)


@pytest.fixture(scope="module")
def corpus(answers: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One row per prompt: the 8 answers as stored responses, unchanged by the aligner, `win_rate` as the reward."""
    rows = []
    for prompt_id, group in answers.groupby("prompt_id", sort=False):
        stored = [
            candidate(text.strip(), model=model, finish_reason=None, num_tokens=None)
            for text, model in zip(group["response"], group["model"], strict=True)
        ]
        scores = [None if pd.isna(score) else score for score in group["win_rate"]]
        rows.append(row(group["prompt"].iloc[0], stored, stored, str(prompt_id), win_rate=(scores, scores)))
    return publish_corpus(tmp_path_factory.mktemp("alpaca") / "corpus", table(rows[:300]), table(rows[300:]))


def expected(answers: pd.DataFrame) -> pd.DataFrame:
    """Scored answers that are not empty, best first; of equal ones in the order of the file; of one text the best."""
    found = answers.assign(
        place=answers.groupby("prompt_id").cumcount(), text=answers["response"].str.split().str.join(" ")
    )
    found = found[found["win_rate"].notna() & (found["text"] != "")]
    found = found.sort_values(["prompt_id", "win_rate", "place"], ascending=[True, False, True], kind="stable")
    return found.drop_duplicates(["prompt_id", "text"])


def why_none(group: pd.DataFrame, min_margin: float = 0.0) -> str | None:
    """Why nothing comes of a prompt's answers, best first, when the first is compared with the last."""
    if len(group) < 2:
        return "one_candidate"
    best, worst = group["win_rate"].iloc[[0, -1]]
    if best == worst:
        return "tie"
    return "small_margin" if best - worst < min_margin else None


def check_counts(root: Path, answers: pd.DataFrame, causes: "Counter[str]") -> None:
    """Every prompt and every answer is used, or dropped with its cause."""
    manifest = json.loads((root / "preferences/run=000001/manifest.json").read_text())
    assert manifest["causes"] == causes
    assert (manifest["num_rows"], manifest["num_quarantined"]) == (NUM_PROMPTS, causes.total())
    assert manifest["num_made"] == NUM_PROMPTS - causes.total()
    is_empty = answers["response"].str.strip() == ""
    assert manifest["unused"] == {
        "other_kind": len(answers),  # what is aligned, which is not asked for
        "empty": is_empty.sum(),
        "not_scored": (answers["win_rate"].isna() & ~is_empty).sum(),
    }


def build(corpus: Path, root: Path, *more: str) -> list[dict[str, Any]]:
    given = [f"input.path={corpus}", f"output.root={root}", "build.reward=win_rate", "build.candidates=response", *more]
    assert main(given) == 0
    found = root / "preferences/run=000001/train-00000.parquet"
    return sorted(pq.read_table(found, partitioning=None).to_pylist(), key=lambda each: each["prompt_id"])


def test_ranked_is_what_pandas_sorts(answers: pd.DataFrame, corpus: Path, tmp_path: Path) -> None:
    made = build(corpus, tmp_path / "out", "build=ranked")
    found = dict(iter(expected(answers).groupby("prompt_id")))
    dropped = {name: why for name, group in found.items() if (why := why_none(group))}
    check_counts(tmp_path / "out", answers, Counter(dropped.values()))
    groups = {name: group for name, group in found.items() if name not in dropped}
    assert [each["prompt_id"] for each in made] == sorted(groups)
    assert len(made) > 590
    for each in made:
        group = groups[each["prompt_id"]]
        assert each["models"] == group["model"].tolist()
        assert each["rewards"] == group["win_rate"].tolist()
        assert each["ranks"] == group["win_rate"].rank(method="min", ascending=False).astype(int).tolist()


def test_pairs_are_the_best_and_the_worst_of_pandas(answers: pd.DataFrame, corpus: Path, tmp_path: Path) -> None:
    made = build(corpus, tmp_path / "out", "build.prefer=best_worst", "build.min_margin=0.01")
    ends = expected(answers).groupby("prompt_id").agg(
        chosen=("model", "first"), rejected=("model", "last"), best=("win_rate", "first"), worst=("win_rate", "last"),
    )  # fmt: skip
    ends = ends[ends["best"] - ends["worst"] >= 0.01].sort_index()
    assert [each["prompt_id"] for each in made] == ends.index.tolist()
    assert [each["chosen_model"] for each in made] == ends["chosen"].tolist()
    assert [each["rejected_model"] for each in made] == ends["rejected"].tolist()
    assert [each["margin"] for each in made] == (ends["best"] - ends["worst"]).tolist()
    dropped = Counter(why for _, group in expected(answers).groupby("prompt_id") if (why := why_none(group, 0.01)))
    check_counts(tmp_path / "out", answers, dropped)
    assert len(made) < NUM_PROMPTS, "some prompts have answers of one worth"
