"""The checked facts: every rule finds what breaks it, and sums of units say what the whole would."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.preferences import checks, schema
from pipelines.preferences.picks import Candidates, candidates
from pipelines.preferences.ranked import rank
from pipelines.preferences.report import facts as lines_of
from pipelines.preferences.settings import BuildConfig
from pipelines.preferences.strategies import STRATEGIES
from tests.pipelines.preferences.fabricate import Row, candidate, row, table

NOTHING = dict.fromkeys(checks.BROKEN, 0)
WELL: dict[str, dict[str, Any]] = {
    "pairs": {"chosen": "a", "rejected": "b", "chosen_reward": 2.0, "rejected_reward": 1.0, "margin": 1.0},
    "unpaired": {"completion": "a", "label": True, "reward": 1.0},
    "ranked": {"completions": ["a", "b"], "rewards": [2.0, 1.0]},
    "curriculum": {"chosen": "a", "rejected": "b", "chosen_reward": 2.0, "rejected_reward": 1.0, "phase": 1},
    "triple": {
        "best": "a", "chosen": "b", "rejected": "c", "best_reward": 3.0, "chosen_reward": 2.0, "rejected_reward": 1.0
    },
    "steps": {"prefix": "", "chosen": "a", "rejected": "b", "full_chosen": "a", "full_rejected": "b"},
    "refinement": {"response": "b", "improved": "a", "response_reward": 1.0, "improved_reward": 2.0},
    "trajectory": {"states": ["b", "a"], "rewards": [1.0, 2.0]},
}  # fmt: skip


def broken(strategy: str, **changes: Any) -> dict[str, int]:
    """What one well row of a strategy and one with these changes break."""
    rows = [{**WELL[strategy], **more} for more in ({}, changes)]
    kept = [field for field in schema.STRATEGIES[strategy] if field.name in rows[0]]
    return checks.violations(strategy, pa.Table.from_pylist(rows, schema=pa.schema(kept)))


@pytest.mark.parametrize("strategy", WELL)
def test_well_rows_break_nothing(strategy: str) -> None:
    assert broken(strategy) == NOTHING


@pytest.mark.parametrize(
    ("strategy", "changes", "rule"),
    [
        ("pairs", {"chosen": " \n"}, "empty_side"),
        ("pairs", {"rejected": " a"}, "equal_pair"),
        ("pairs", {"chosen_reward": math.nan}, "non_finite_reward"),
        ("pairs", {"margin": math.inf}, "non_finite_reward"),
        ("pairs", {"chosen_reward": 0.5}, "wrong_order"),
        ("unpaired", {"completion": ""}, "empty_side"),
        ("unpaired", {"reward": -math.inf}, "non_finite_reward"),
        ("ranked", {"completions": ["a", ""]}, "empty_side"),
        ("ranked", {"rewards": [1.0, 2.0]}, "wrong_order"),
        ("triple", {"best": "c"}, "equal_pair"),
        ("triple", {"best_reward": 1.5}, "wrong_order"),
        ("steps", {"chosen": "b"}, "equal_pair"),
        ("steps", {"full_rejected": "a"}, "equal_pair"),
        ("refinement", {"improved_reward": 0.0}, "wrong_order"),
        ("curriculum", {"rejected": "a "}, "equal_pair"),
        ("curriculum", {"rejected_reward": 2.5}, "wrong_order"),
        ("trajectory", {"rewards": [2.0, 1.0]}, "wrong_order"),
        ("trajectory", {"states": ["", "a"]}, "empty_side"),
    ],
)
def test_a_row_that_breaks_a_rule_is_counted_under_it(strategy: str, changes: dict[str, Any], rule: str) -> None:
    assert broken(strategy, **changes) == {**NOTHING, rule: 1}


def facts(rows: list[Row], **options: Any) -> dict[str, Any]:
    build = BuildConfig(**{"reward": "q", **options})
    ranked = rank(table(rows), 1, build, []).table
    made = STRATEGIES[build.strategy](ranked, build)
    common = {"prompt_id": ranked["prompt_id"].take(pa.array(made.row))}
    dataset = pa.table({**common, **made.columns})
    return checks.facts(build.strategy, dataset, candidates(ranked), made, build.seed)


def rows(count: int = 60) -> list[Row]:
    """Prompts whose aligned texts are one better on average, and one word longer."""
    rng = np.random.default_rng(5)
    made = []
    for number in range(count):
        before, gain = float(rng.normal()), float(rng.normal(1.0))
        made.append(
            row(f"p{number}", ["a " * (number % 7 + 1)], ["b " * (number % 7 + 2)], q=([before], [before + gain]))
        )
    return made


def test_the_report_says_what_a_plain_computation_says() -> None:
    some = rows()
    before = np.array([each["rewards"][0]["response"][0] for each in some])
    after = np.array([each["rewards"][0]["aligned"][0] for each in some])
    told = checks.report(checks.summed([facts(some)]))
    assert told["reward_before"] == pytest.approx(before.mean())
    assert told["reward_after"] == pytest.approx(after.mean())
    assert told["reward_gain"] == pytest.approx((after - before).mean())
    assert told["share_aligned_lost"] == pytest.approx((after < before).mean())
    error = (after - before).std() / math.sqrt(len(some))
    assert told["reward_gain_95"] == pytest.approx(
        [told["reward_gain"] - 1.96 * error, told["reward_gain"] + 1.96 * error], abs=0.5 * error
    )
    words = np.concatenate([[number % 7 + 1 for number in range(60)], [number % 7 + 2 for number in range(60)]])
    rewards = np.concatenate([before, after])
    assert told["correlation_of_reward_with_tokens"] == pytest.approx(np.corrcoef(words, rewards)[0, 1])
    assert told["reward_slope_by_tokens"] == pytest.approx(np.polyfit(words, rewards, 1)[0])
    assert told["num_pairs"] == (after > before).sum()
    assert told["mean_chosen_minus_rejected_tokens"] == 1
    assert told["share_chosen_longer"] == 1


def test_units_add_up_to_the_whole() -> None:
    some = rows()
    whole = checks.report(checks.summed([facts(some)]))
    parts = checks.report(checks.summed([facts(some[17:]), facts(some[:17])]))
    assert parts == {name: pytest.approx(whole[name]) for name in whole}


def test_an_offset_of_all_rewards_changes_no_correlation() -> None:
    some = rows()
    far = [{**each, "rewards": [shifted(score, 1e7) for score in each["rewards"]]} for each in some]
    parts = [checks.report(checks.summed([facts(each[:20]), facts(each[20:])])) for each in (some, far)]
    for name in ("correlation_of_reward_with_tokens", "reward_slope_by_tokens"):
        assert parts[1][name] == pytest.approx(parts[0][name], rel=1e-6)
    same = [row(f"p{number}", ["a " * number], ["b"], q=([0.1], [0.1])) for number in range(1, 9)]
    assert not [name for name in checks.report(checks.summed([facts(same)])) if "slope" in name]


def shifted(score: dict[str, Any], by: float) -> dict[str, Any]:
    return {**score, **{side: [each + by for each in score[side]] for side in ("response", "aligned")}}


def test_tokens_and_characters_are_told_apart() -> None:
    """Four prompts whose texts all have a count, and two where one text is stored."""
    stored = {"num_tokens": None, "finish_reason": None}
    some = [
        *(row(f"p{at}", [candidate("a", num_tokens=at)], [candidate("b", num_tokens=at + 3)], q=([at], [at + 3]))
          for at in range(1, 5)),
        row("s", [candidate("four", **stored)], [candidate("sixsix", num_tokens=1)], q=([8], [16])),
        row("t", [candidate("no", num_tokens=1)], [candidate("sixsix", **stored)], q=([0], [16])),
    ]  # fmt: skip
    told = checks.report(checks.summed([facts(some[:2]), facts(some[2:])]))
    assert told["mean_chosen_minus_rejected_tokens"] == 3
    assert told["mean_chosen_minus_rejected_characters"] == 3
    assert told["reward_slope_by_tokens"] == pytest.approx(1)
    assert told["reward_slope_by_characters"] == pytest.approx(4)
    assert (
        told["correlation_of_reward_with_tokens"] == told["correlation_of_reward_with_characters"] == pytest.approx(1)
    )
    lines = "\n".join(lines_of(told))
    assert "chosen is +3.0 tokens (where texts are stored, +3.0 characters) longer" in lines
    assert "slope 1 per token (no one build.length_slope is right for both)" in lines
    assert "slope 4 per character" in lines
    alone = "\n".join(lines_of(checks.report(checks.summed([facts(some[4:])]))))
    assert "chosen is +3.0 characters longer" in alone
    assert "slope 4 per character (build.length_slope takes it out)" in alone


@pytest.mark.parametrize("num", [1, 2, 3])
def test_the_interval_of_a_few_equal_gains_is_that_gain(num: int) -> None:
    some = [row(f"p{number}", ["a"], ["b"], q=([number], [number + 5])) for number in range(num)]
    assert checks.report(checks.summed([facts(some)]))["reward_gain_95"] == [5, 5]


@pytest.mark.parametrize("num", [40, 600])  # fewer prompts than groups, and more
def test_the_interval_covers_the_true_gain_as_often_as_it_says(num: int) -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(200):
        told = checks.report({"aligned": checks.gains(one_to_one(rng.normal(1, 2, num)), 0)})
        low, high = told["reward_gain_95"]
        covered += low <= 1 <= high
    assert 180 <= covered <= 196


def one_to_one(gains: Any) -> Candidates:
    """Rows of one response of reward 0, and an aligned text that gains so much."""
    num = len(gains)
    kinds = pa.array(["aligned", "response"] * num)
    values = pa.StructArray.from_arrays([kinds, pa.array([0] * 2 * num)], ["kind", "candidate"])
    reward = np.stack([gains, np.zeros(num)], 1).ravel()
    values = pa.StructArray.from_arrays([*values.flatten(), pa.array(reward)], ["kind", "candidate", "reward"])
    places = np.arange(2 * num)
    return Candidates(values, places[::2], places // 2, reward, places, pa.array(map(str, range(num))), False)


def test_the_interval_goes_by_the_seed() -> None:
    def interval(**options: Any) -> Any:
        return checks.report(checks.summed([facts(rows(), **options)]))["reward_gain_95"]

    assert interval() == interval()
    assert interval(seed=1) != interval()


def test_which_pairs_a_response_won_is_told_where_that_can_be() -> None:
    some = [row("p", ["a"], ["b"], q=([2], [1])), row("q", ["a"], ["b"], q=([1], [2]))]
    told = checks.report(checks.summed([facts(some, prefer="best_worst")]))
    assert told["share_of_pairs_won_by_response"] == 0.5


def test_a_reward_that_is_no_number_is_refused_even_where_its_row_makes_nothing() -> None:
    cut = candidate("a", finish_reason="length")
    found = facts([row("p", [cut], ["b"], q=([1], [math.inf])), row("q", ["a"], ["b"], q=([1], [2]))])
    assert found["broken"]["non_finite_reward"] == 1
    assert checks.refusal(found) == "1 candidates or rows whose reward is not finite"
    assert checks.refusal(facts(rows())) is None


def test_without_rewards_nothing_is_told_of_them() -> None:
    told = checks.report(checks.summed([facts([row("p", ["a"], ["b c"])], reward=None)]))
    assert told == {
        "broken": NOTHING, "num_pairs": 1, "mean_chosen_minus_rejected_tokens": 1, "share_chosen_longer": 1,
        "share_of_pairs_won_by_response": 0,
    }  # fmt: skip
