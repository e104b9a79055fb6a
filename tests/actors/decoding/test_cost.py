"""Blocks are as long as makes the most tokens a second, by the costs that were measured or given, where that is worth
the risk that these are not quite true."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from actors.decoding import cost as cost_module
from actors.decoding.cost import LEAST_GAIN, StepCost, _shapes, block_sizes, worth
from actors.decoding.forward import STEP_TOKENS, Forward

KNEE = StepCost({1: {1: 10.0, 64: 10.0, 128: 20.0}})


def pace(sizes: tuple[int, ...], chances: list[np.ndarray], cost: StepCost, weights: np.ndarray) -> float:
    """What the expected tokens are worth, a second."""
    tokens = sum(w * (1 + chance[:size].sum()) for w, size, chance in zip(weights, sizes, chances, strict=True))
    return float(tokens / cost.seconds(len(sizes), sum(sizes))[-1])


@settings(derandomize=True, max_examples=200)
@given(
    st.lists(st.lists(st.floats(0.02, 1.0), max_size=4), min_size=1, max_size=4),
    st.lists(st.floats(0.1, 5.0), min_size=1, max_size=6),
    st.lists(st.floats(0.1, 1.0), min_size=4, max_size=4),
)
def test_no_other_blocks_are_faster_than_a_little(
    chances: list[list[float]], seconds: list[float], steps_left: list[float]
) -> None:
    falling = [np.array(row).cumprod() for row in chances]
    falling = [row[row >= 0.01] for row in falling]
    cost = StepCost({1: dict(enumerate(seconds, 1))})
    weights = worth(steps_left[: len(falling)])
    found = pace(tuple(block_sizes(falling, cost, weights)), falling, cost, weights)
    best = max(pace(each, falling, cost, weights) for each in product(*(range(len(row) + 1) for row in falling)))
    none = pace((0,) * len(falling), falling, cost, weights)
    assert found == pytest.approx(best if best >= LEAST_GAIN * none else none)


def test_below_the_knee_blocks_are_whole_and_beyond_it_they_earn_their_keep() -> None:
    good, poor = 0.95 ** np.arange(1, 32), 0.3 ** np.arange(1, 32)
    assert block_sizes([good], KNEE) == [31]
    assert block_sizes([poor], KNEE) == [3]  # 0.3 ** 4 is not worth a look
    assert sum(block_sizes([good] * 4 + [poor], KNEE)) + 5 >= 64
    crowd = block_sizes([good] * 60 + [poor] * 60, StepCost({1: {1: 1.0, 128: 1.5, 256: 2.5}}))
    assert min(crowd[:60]) > 0
    assert crowd[60:] == [0] * 60


def test_guesses_that_cost_as_much_as_a_token_are_not_made() -> None:
    steep = StepCost({1: {1: 1.0, 2: 2.0}})
    assert block_sizes([0.9 ** np.arange(1, 9)] * 5, steep) == [0] * 5


def test_rows_without_guesses_have_none() -> None:
    assert block_sizes([np.empty(0), np.array([0.9]), np.empty(0)], KNEE) == [0, 1, 0]


def test_costs_between_and_beyond_what_was_measured() -> None:
    cost = StepCost({1: {1: 1.0, 5: 3.0}, 4: {4: 2.0, 8: 1.0, 12: 4.0}})
    assert cost.seconds(1, 6).tolist() == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    assert cost.seconds(4, 8).tolist()[::4] == [1.0, 1.0, 4.0]  # less is never dearer
    assert cost.seconds(9, 4)[-1] == pytest.approx(4.375)
    assert cost.seconds(3, 0).tolist() == [pytest.approx(1 / 3 * 2.0 + 2 / 3 * 1.0)]


@pytest.mark.parametrize(("rows", "block_size"), [(1, 1), (1, 64), (2, 16), (8, 16), (32, 64)])
def test_rows_are_measured_as_unlike_as_their_guesses_make_them(rows: int, block_size: int) -> None:
    shapes = _shapes(rows, block_size)
    assert shapes == sorted(shapes, key=sum)
    assert (shapes[0], shapes[-1]) == ([1] * rows, [block_size] * rows)
    assert all(len(widths) == rows for widths in shapes)
    unlike = [max(widths) > min(widths) for widths in shapes[1:]]
    assert unlike == sorted(unlike, reverse=True), "rows of as many guesses are cheaper, and would hide the price"
    assert any(unlike) == (rows > 1)


@pytest.mark.parametrize("rows", [1, 4, 8, 32])
def test_measuring_stops_where_arithmetic_sets_the_pace(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(cost_module, "_seconds", lambda forward, widths, context: 1 + max(0, sum(widths) - 2 * rows))
    cost = StepCost.measure(Forward(llama), rows, block_size=64, max_positions=200)
    beyond = [total for total, seconds in cost.table[rows].items() if seconds > 2]
    alone = {rows - 1 + 2**n for n in range(1, 7)} if rows > 4 else set()
    assert len(set(beyond) - alone) == 1


def test_measuring_goes_no_further_than_one_forward_makes_logits_for(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_module, "_seconds", lambda forward, widths, context: 1.0)
    cost = StepCost.measure(Forward(llama), 32, block_size=64, max_positions=200)
    assert STEP_TOKENS / 2 < max(cost.table[32]) <= STEP_TOKENS
    crowd = StepCost.measure(Forward(llama), STEP_TOKENS, block_size=64, max_positions=200)
    assert max(crowd.table[STEP_TOKENS]) == 1.25 * STEP_TOKENS  # one more position each of a quarter: it has a slope


def test_a_token_counts_by_the_steps_that_its_row_still_needs() -> None:
    assert worth([10, 5, 1]).tolist() == [1.0, 0.25, pytest.approx(0.01)]
    same = [np.array([0.8])] * 2
    dear = StepCost({1: {1: 0.6, 2: 1.0, 3: 1.5, 4: 2.0}})
    assert block_sizes(same, dear, worth([2, 10])) == [0, 1]
    assert block_sizes(same, dear, worth([10, 2])) == [1, 0]


def test_measuring_leaves_no_trace(llama: PreTrainedModel) -> None:
    forward = Forward(llama)
    cost = StepCost.measure(forward, 6, block_size=16, max_positions=100)
    assert list(cost.table) == [1, 6]
    for rows, curve in cost.table.items():
        assert min(curve) == rows
        assert rows == 1 or min(set(curve) - {rows}) == rows + 1  # a single guess makes the rows unlike
        assert max(curve) <= rows * 16
        assert all(seconds > 0 for seconds in curve.values())
    assert forward.cache.slots == forward.cache.capacity == 0
    assert all(not tensor.numel() for tensor in (*forward.cache.keys, *forward.cache.values))
    short = StepCost.measure(forward, 1, block_size=16, max_positions=10)
    assert list(short.table) == [1]
    assert max(short.table[1]) <= 8
