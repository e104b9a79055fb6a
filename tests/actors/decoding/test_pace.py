"""Guesses never make a full batch slow: decoding played through on steps that take what a real machine's were seen to.

The model is a script and the time is counted, not measured: each forward is worth what a table says of its positions.
Rows come and go, as in a job, where a row that ends early leaves its slot to the next; or all begin together, and the
batch lasts as long as its slowest.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from actors.decoding import parallel
from actors.decoding.cost import StepCost
from actors.decoding.forward import SlotCache
from actors.decoding.loop import DecodeLoop, Row
from tests.benchmarks.drafts import spoil

VOCABULARY = 512
BLOCK = 32
PARTING = -1.0
"""In place of an overlap: each draft is right up to some point and wrong from there on, one early, another late."""
ALONE = {1: 49.0, 8: 49.0, 16: 50.0, 32: 55.0}
ALONE_IN_FLOAT32 = {1: 67.0, 2: 110.0, 4: 90.0, 16: 110.0, 32: 150.0}
MACHINES = {  # SmolLM2 on two cores, milliseconds of a forward of one row and of as many as there are slots
    "bfloat16": {1: ALONE, 8: {8: 50.0, 32: 61.0, 64: 75.0, 128: 87.0, 256: 124.0}},
    "float32": {1: ALONE_IN_FLOAT32, 8: {8: 95.0, 16: 110.0, 64: 230.0, 128: 400.0}},
    "bfloat16, 32 rows": {1: ALONE, 32: {32: 98.0, 33: 108.0, 39: 118.0, 63: 157.0, 95: 187.0, 128: 220.0, 256: 350.0}},
    "float32, 32 rows": {1: ALONE_IN_FLOAT32, 32: {32: 115.0, 64: 165.0, 128: 270.0, 256: 470.0, 512: 880.0}},
    "beyond the knee": {1: ALONE, 8: {8: 50.0, 9: 55.5, 64: 358.0}},  # every position costs what it did before
}


class Played:
    """Stands in for the model: says each row's answer behind its right beginning, nothing sensible behind another."""

    def __init__(self, answers: list[list[int]], cost: StepCost) -> None:
        self.answers, self.cost, self.cache = answers, cost, SlotCache()
        self.loop: DecodeLoop
        self.elapsed = 0.0

    def __call__(self, first: int, tokens: Any, starts: list[int], num_logits: list[int]) -> torch.Tensor | None:
        if not any(num_logits):
            return None  # prompts of one token: there is nothing to read
        self.elapsed += float(self.cost.seconds(len(tokens), sum(map(len, tokens)) - len(tokens))[-1])
        says = []
        for row, forwarded, start in zip(self.loop.active[first:], tokens, starts, strict=False):
            answer, right = self.answers[row.seed], True
            for i, token in enumerate(forwarded):
                place = start + i  # of what follows this token
                right = right and (place == 0 or token == answer[place - 1])
                says.append(answer[place] if right and place < len(answer) else 7 + place)
        return F.one_hot(torch.tensor(says), VOCABULARY).float()


def elapsed(
    machine: str,
    overlap: float | None,
    *,
    seed: int,
    auto: bool = True,
    refilled: bool = True,
    before: float | None = None,
    told: Callable[[StepCost], StepCost] = lambda true: true,
) -> float:
    """Milliseconds that rows take with drafts of which such a share of runs is right; None: without any.

    Args:
        before: overlap of as many rows that are decoded first and not counted: what the loop learns from.
        told: the costs that the loop takes for true.
    """
    generator = random.Random(seed)
    slots = max(MACHINES[machine])
    lengths = [generator.randrange(24, 73) for _ in range(4 * slots)] if refilled else [120] * slots
    num_before = 0 if before is None else len(lengths)
    lengths += lengths[:num_before]
    answers = [[generator.randrange(64, VOCABULARY) for _ in range(length)] for length in lengths]
    drafts = spoil(answers, max(overlap or 0.0, 0.0), VOCABULARY, seed)
    drafts[:num_before] = spoil(answers[:num_before], before or 0.0, VOCABULARY, seed)
    if overlap == PARTING:
        parts = [generator.randrange(len(answer)) for answer in answers]
        drafts = [answer[:part] + wrong[part:] for answer, wrong, part in zip(answers, drafts, parts, strict=True)]
    model = Played(answers, StepCost(MACHINES[machine]))
    kind: dict[str, Any] = (
        {"block_size": BLOCK, "cost": told(model.cost) if auto else None} if overlap is not None else {}
    )
    loop = model.loop = DecodeLoop(model, str, eos=[2], max_num_seqs=slots, kv_cache_tokens=1 << 20, **kind)  # type: ignore[arg-type]
    rows = [Row((1,), len(answer), i, drafts[i] if kind else None) for i, answer in enumerate(answers)]
    for group in (rows[:num_before], rows[num_before:]):
        begin = model.elapsed
        for row in group:
            loop.submit(row)
        while loop.busy:
            loop.step()
    assert [row.tokens for row in rows] == answers
    return model.elapsed - begin


def faster(machine: str, overlap: float, **how: Any) -> float:
    """Times as fast as without drafts, over some rows drawn."""
    plain = sum(elapsed(machine, None, seed=seed, **how) for seed in (0, 1))
    return plain / sum(elapsed(machine, overlap, seed=seed, **how) for seed in (0, 1))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("overlap", [PARTING, 0, 0.25, 0.5, 0.75, 1])
def test_no_draft_makes_a_full_batch_slower(machine: str, overlap: float) -> None:
    assert faster(machine, overlap) >= 0.95


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("overlap", [PARTING, 0, 0.25, 0.5, 0.75, 1])
def test_no_draft_makes_a_batch_that_is_not_refilled_slower_by_a_tenth(machine: str, overlap: float) -> None:
    assert faster(machine, overlap, refilled=False) >= 0.9


@pytest.mark.parametrize("machine", MACHINES)
def test_drafts_that_become_poor_are_soon_trusted_no_more(machine: str) -> None:
    assert faster(machine, 0, before=1) >= 0.95


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("refilled", [True, False])
def test_poor_drafts_are_left_alone_though_costs_are_known_to_a_tenth_only(machine: str, refilled: bool) -> None:
    plain = elapsed(machine, None, seed=0, refilled=refilled)
    for seed in range(6):
        assert plain / elapsed(machine, 0, seed=0, refilled=refilled, told=partial(a_tenth_off, seed)) >= 0.97


def a_tenth_off(seed: int, true: StepCost) -> StepCost:
    draw = random.Random(seed)
    off = {rows: {n: s * draw.uniform(0.9, 1.1) for n, s in curve.items()} for rows, curve in true.table.items()}
    return StepCost(off)


def test_where_guesses_are_cheap_good_drafts_make_it_several_times_faster() -> None:
    assert faster("bfloat16", 0.5) >= 1.3
    assert faster("bfloat16", 0.9) >= 3
    assert faster("float32", 1) >= 3


def test_a_block_that_is_always_full_would_make_it_slower() -> None:
    assert faster("float32", 0.25, auto=False) < 0.7


def test_a_rule_that_trusts_drafts_too_much_would_make_it_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PRIOR", [0.99] * len(parallel.PRIOR))
    monkeypatch.setattr(parallel, "PRIOR_WEIGHT", 1e6)
    assert faster("float32", 0.25) < 0.9
