"""The reward stage on packed units, with scripted engines: which texts it asks about, and what becomes of failures."""

import asyncio
from typing import Any

import pyarrow as pa
import pytest

from actors.contract import ALIGNED_LIST, PROBLEM, PROMPT, RESPONSES, REWARDS, RowError, pack, unpack
from actors.engines.base import Completion, EngineStats, Messages, Request
from actors.reward import RewardConfig, RewardStage
from tests.actors.test_stages import Reports, shared

PROBLEM_ROW = {"stage": "read", "cause": "null_prompt", "error_class": "InputError", "message": "m", "attempts": 1}


class Lengths:
    """The score of a text is its length, or what is no number; one that says `fail` is an error of that request."""

    def __init__(self) -> None:
        self.asked: list[Messages | str] = []

    async def generate(self, request: Request) -> Completion:
        self.asked.append(request.prompt)
        text = request.prompt[-1][1]
        if "fail" in text:
            raise RowError("prompt_too_long", "9 tokens")
        score = float(text) if text in ("nan", "inf", "-inf") else float(len(text))
        return Completion("", None, None, None, score=score)

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0)

    def close(self) -> None: ...


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Lengths:
    lengths = Lengths()
    monkeypatch.setattr("actors.reward.build_reward", lambda config, *arguments: lengths)
    monkeypatch.setattr("actors.pool.Reporter", Reports)
    monkeypatch.setattr("actors.pool.units_before", lambda board, pool: ())
    return lengths


def candidate(text: str | None, **more: Any) -> dict[str, Any]:
    return {
        "text": text or "", "reasoning": None, "model": "m", "status": "failed" if text is None else "ok",
        "error": None, "finish_reason": None, "num_prompt_tokens": None, "num_tokens": None, "seed": 1, **more,
    }  # fmt: skip


def unit_of(*rows: tuple[list[str | None], list[str | None]] | None) -> pa.Table:
    """Rows of (responses, aligned); None is a row with a problem, a text of None a candidate that failed."""
    count = range(len(rows))
    responses = [[candidate(text) for text in row[0]] if row else [] for row in rows]
    aligned = [[candidate(text, changed=None) for text in row[1]] if row else [] for row in rows]
    return pack(
        pa.table(
            {
                "prompt": pa.array([[{"role": "user", "content": f"prompt {n}"}] for n in count], PROMPT),
                "responses": pa.array(responses, RESPONSES),
                "aligned": pa.array(aligned, ALIGNED_LIST),
                "problem": pa.array([None if row else PROBLEM_ROW for row in rows], PROBLEM),
            }
        ),
        unit="u",
    )


def reward(**keys: Any) -> RewardStage:
    arguments = {name: value for name, value in shared().items() if name != "run_seed"}
    return RewardStage(RewardConfig(engine="torch", model="m", **keys), name="reward", **arguments)


def run(packed: pa.Table, *names: str) -> list[dict[str, Any]]:
    async def through() -> pa.Table:
        unit = packed
        for name in names:
            stage = reward(name=name)
            (unit,) = [made async for made in stage(unit)]
        return unit

    rows: list[dict[str, Any]] = unpack(asyncio.run(through())).to_pylist()
    return rows


def told(row: dict[str, Any]) -> list[str]:
    """The row's notes, each with its message if it has one."""
    return [
        f"{each['reward']}: {each['note']}" + (f" ({each['message']})" if each["message"] else "")
        for each in row["reward_notes"]
    ]


def test_every_candidate_has_its_score_and_what_failed_has_none(engine: Lengths) -> None:
    (row,) = run(unit_of((["a", None, "ccc"], ["bb", None, None])), "r")
    assert row["rewards"] == [{"name": "r", "response": [1.0, None, 3.0], "aligned": [2.0, None, None]}]
    assert told(row) == ["r: scored"] * 3
    assert engine.asked[0] == (("user", "prompt 0"), ("assistant", "a"))


def test_a_text_that_comes_twice_in_a_row_is_asked_about_once(engine: Lengths) -> None:
    rows = run(unit_of((["same", "same"], ["same", "other!"]), (["same"], ["same"])), "r")
    assert [row["rewards"][0]["aligned"] for row in rows] == [[4.0, 6.0], [4.0]]
    assert len(engine.asked) == 3


def test_what_cannot_be_scored_loses_no_row_and_its_cause_is_told(engine: Lengths) -> None:
    first, second = run(unit_of((["fail"], ["well"]), (["ok"], ["ok"])), "r")
    assert first["rewards"] == [{"name": "r", "response": [None], "aligned": [4.0]}]
    assert told(first) == ["r: prompt_too_long (9 tokens)", "r: scored"]
    assert first["problem"] is None
    assert told(second) == ["r: scored"]


@pytest.mark.parametrize("score", ["nan", "inf", "-inf"])
def test_a_score_that_is_no_number_is_none(engine: Lengths, score: str) -> None:
    (row,) = run(unit_of((["ok"], [score])), "r")
    assert row["rewards"] == [{"name": "r", "response": [2.0], "aligned": [None]}]
    assert told(row) == ["r: scored", f"r: reward_failed (the score is {score})"]


@pytest.mark.parametrize(("verdict", "notes"), [("Hm.", ["unreadable_verdict"]), ("[[C]]", ["scored", "judged_tie"])])
def test_what_a_judge_compares_with_is_not_told_as_scored(
    verdict: str, notes: list[str], engine: Lengths, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def generate(request: Request) -> Completion:
        return Completion(verdict, "stop", None, None)

    monkeypatch.setattr(engine, "generate", generate)
    arguments = {name: value for name, value in shared().items() if name != "run_seed"}
    judge = RewardStage(RewardConfig(engine="openai", model="m", name="r"), name="reward", **arguments)

    async def through() -> pa.Table:
        (made,) = [made async for made in judge(unit_of((["a"], ["b"])))]
        return made

    (row,) = unpack(asyncio.run(through())).to_pylist()
    assert row["rewards"][0]["response"] == [0.5]
    assert [note["note"] for note in row["reward_notes"]] == [*notes, *notes[1:]]


def test_a_second_reward_stands_beside_the_first_and_one_of_the_same_name_in_its_place(engine: Lengths) -> None:
    (row,) = run(unit_of((["fail"], ["b"])), "r", "s", "r")
    assert [reward["name"] for reward in row["rewards"]] == ["s", "r"]
    assert told(row) == [each for name in "rsr" for each in (f"{name}: prompt_too_long (9 tokens)", f"{name}: scored")]


def test_a_row_with_a_problem_is_not_scored(engine: Lengths) -> None:
    rows = run(unit_of(None, (["a"], ["b"])), "r", "s")
    assert [row["rewards"] and len(row["rewards"]) for row in rows] == [None, 2]
    assert len(engine.asked) == 4


def test_the_column_has_the_type_of_the_corpus(engine: Lengths) -> None:
    async def through() -> pa.Table:
        (unit,) = [made async for made in reward()(unit_of(None, ([None], [None])))]
        return unit

    assert unpack(asyncio.run(through()))["rewards"].type == REWARDS
