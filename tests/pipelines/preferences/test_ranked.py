"""The `ranked` table: which candidates are usable, how they are ordered, and why a prompt has none."""

import math
from collections import Counter
from typing import Any

import pytest

from actors.contract import ConfigError
from pipelines.preferences import schema
from pipelines.preferences.ranked import Ranked, rank
from pipelines.preferences.settings import BuildConfig
from tests.pipelines.preferences.fabricate import Row, candidate, row, table


def ranked(*rows: Row, **build: Any) -> Ranked:
    options = {"reward": "q", "prefer": "best_worst"} | build
    return rank(table(list(rows)), 7, BuildConfig(**options), [])


def texts(found: Ranked, at: int = 0) -> list[str]:
    return [each["text"] for each in found.table["candidates"][at].as_py()]


def test_candidates_go_by_reward_and_equal_ones_share_a_rank() -> None:
    found = ranked(row("p", ["a", "b", "c"], ["d", "e", "f"], q=([1, 3, 2], [3, 0, 3])))
    (candidates,) = found.table["candidates"].to_pylist()
    assert [(each["text"], each["rank"]) for each in candidates] == [
        ("d", 1), ("b", 1), ("f", 1), ("c", 4), ("a", 5), ("e", 6)
    ]  # fmt: skip
    assert [(each["kind"], each["candidate"]) for each in candidates[:3]] == [
        ("aligned", 0), ("response", 1), ("aligned", 2)
    ]  # fmt: skip
    assert found.table["partition"].to_pylist() == [7]
    assert found.table.schema == schema.RANKED


def test_without_a_reward_what_is_aligned_comes_first_and_no_reward_is_told() -> None:
    found = ranked(row("p", ["a", "b"], ["c", "d"]), reward=None, prefer="aligned")
    (candidates,) = found.table["candidates"].to_pylist()
    assert [(each["text"], each["rank"], each["reward"]) for each in candidates] == [
        ("c", 1, None), ("d", 1, None), ("a", 3, None), ("b", 3, None)
    ]  # fmt: skip


def test_what_is_not_usable_is_counted_by_reason() -> None:
    responses = [
        "well",
        candidate("cut off", finish_reason="length"),
        candidate("", status="failed", finish_reason=None),
        candidate(" \n"),
        candidate("stored", finish_reason=None, num_tokens=None),
        "unscored",
    ]
    found = ranked(row("p", responses, ["x"] * 6, q=([1, 2, 3, 4, 5, None], [0] * 6)), candidates="response")
    assert texts(found) == ["stored", "well"]
    assert found.unused == Counter({"other_kind": 6, "unfinished": 1, "failed": 1, "empty": 1, "not_scored": 1})


def test_any_finish_is_taken_where_none_is_required() -> None:
    cut = candidate("cut off", finish_reason="length")
    assert texts(ranked(row("p", [cut], ["b"], q=([1], [0])), require_finish=[])) == ["cut off", "b"]


def test_a_prompt_without_candidates_says_why() -> None:
    cut = candidate("cut off", finish_reason="length")
    found = ranked(
        row("p", [cut], [cut], q=([1], [1])), row("q", ["a"], ["b"]), row("r", ["a"], ["b"], other=([1], [1])),
        row("s", ["a"], ["b"], q=([1], [1])),
    )  # fmt: skip
    assert found.causes.tolist() == ["unfinished", "not_scored", "not_scored", ""]
    assert [len(each) for each in found.table["candidates"].to_pylist()] == [0, 0, 0, 2]


def test_rewards_of_one_row_are_not_those_of_another() -> None:
    found = ranked(
        row("p", ["a", "b"], ["c", "d"], other=([9, 9], [9, 9]), q=([1, 2], [3, 4])),
        row("q", ["e"], ["f"]),
        row("r", ["g"], ["h"], q=([6], [5]), other=([0], [0])),
    )
    told = [[(each["text"], each["reward"]) for each in one] for one in found.table["candidates"].to_pylist()]
    assert told == [[("d", 4), ("c", 3), ("b", 2), ("a", 1)], [], [("g", 6), ("h", 5)]]


def test_a_weighted_sum_takes_every_reward_and_wants_all_of_them() -> None:
    rows = [row("p", ["a"], ["b"], q=([1], [2]), r=([10], [0])), row("q", ["a"], ["b"], q=([1], [2]))]
    found = ranked(*rows, reward=None, reward_weights={"q": 1.0, "r": 0.5})
    assert [each["reward"] for each in found.table["candidates"][0].as_py()] == [6.0, 2.0]
    assert found.causes.tolist() == ["", "not_scored"]


def test_what_length_explains_is_taken_out_of_the_reward() -> None:
    found = ranked(row("p", ["one two three four"], ["one"], q=([4.0], [2.0])), length_slope=1.0)
    assert [(each["text"], each["reward"]) for each in found.table["candidates"][0].as_py()] == [
        ("one", 1.0), ("one two three four", 0.0)
    ]  # fmt: skip


def test_a_prompts_lengths_are_in_one_unit_which_its_usable_texts_decide() -> None:
    stored = candidate("ten chars.", num_tokens=None)
    asked = [
        row("p", [candidate("two words"), stored], ["four", "x"], q=([2, 3], [1, 0])),
        row("q", [candidate("two words"), {**stored, "status": "failed"}], ["four", "x"], q=([2, None], [1, 0])),
        row("r", [candidate("two words"), {**stored, "model": "other"}], ["four", "x"], q=([2, 3], [1, 0])),
    ]
    found = ranked(*asked, length_slope=0.25, exclude_models=["other"]).table["candidates"].to_pylist()
    assert [[(each["text"], each["num_tokens"], each["reward"]) for each in one] for one in found] == [
        [("ten chars.", None, 0.5), ("four", None, 0.0), ("two words", None, -0.25), ("x", None, -0.25)],
        [("two words", 2, 1.5), ("four", 1, 0.75), ("x", 1, -0.25)],
        [("two words", 2, 1.5), ("four", 1, 0.75)],
    ]


def test_policies_are_those_of_the_responses_also_for_what_is_aligned() -> None:
    one, other = candidate("a", model="one"), candidate("b", model="other")
    asked = row("p", [one, other], ["c", "d"], q=([1, 2], [3, 4]))
    assert texts(ranked(asked, models=["one"])) == ["c", "a"]
    assert texts(ranked(asked, exclude_models=["one"])) == ["d", "b"]
    only_best = ranked(asked, single_policy=True)
    assert texts(only_best) == ["d", "b"]
    assert only_best.unused == Counter({"other_policy": 2})


def test_the_single_policy_is_one_that_has_something_to_compare() -> None:
    cut = candidate("cut off", finish_reason="length")
    small, large = ({**candidate(name), "model": name} for name in ("small", "large"))
    asked = row("p", [small, large], [cut, "d"], q=([9, 1], [0, 2]))
    assert texts(ranked(asked, single_policy=True)) == ["d", "large"]
    lone = row("p", [small, large], [cut, cut], q=([9, 1], [0, 2]))
    assert texts(ranked(lone, single_policy=True)) == ["small"]
    twice = row("p", [small, {**small, "text": "again"}, large], [cut, cut, "d"], q=([9, 8, 1], [0, 0, 2]))
    assert texts(ranked(twice, single_policy=True)) == ["small", "again"]
    assert texts(ranked(twice, single_policy=True, prefer="aligned")) == ["d", "large"]


def test_a_reward_that_is_no_number_stays_to_be_refused() -> None:
    found = ranked(row("p", ["a"], ["b"], q=([math.nan], [1.0])))
    assert math.isnan(found.table["candidates"][0].as_py()[1]["reward"])


def test_a_corpus_that_was_never_scored_has_no_such_column() -> None:
    unscored = table([row("p", ["a"], ["b"])]).drop_columns(["rewards"])
    assert rank(unscored, 1, BuildConfig(reward="q"), []).causes.tolist() == ["not_scored"]
    assert rank(unscored, 1, BuildConfig(), []).causes.tolist() == [""]


def test_rewards_that_do_not_fit_the_candidates_are_an_error() -> None:
    with pytest.raises(ConfigError, match="another number of candidates"):
        ranked(row("p", ["a", "b"], ["c", "d"], q=([1], [1, 2])))
