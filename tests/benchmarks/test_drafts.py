"""The drafts of the decoder's benchmark are as right as they say, and its oracle is not beaten."""

from itertools import product

import pytest

from tests.benchmarks.drafts import Costs, cost_of, shortest_s, spoil

ANSWERS = [[row * 31 + 7 * i % 30 for i in range(36)] for row in range(4)]  # twelve runs in all


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_right_runs_is_the_overlap_and_wrong_runs_are_wrong_everywhere(overlap: float) -> None:
    drafts = spoil(ANSWERS, overlap, vocabulary=200, seed=1)
    rights = [
        [g == t for g, t in zip(draft, answer, strict=True)] for draft, answer in zip(drafts, ANSWERS, strict=True)
    ]
    runs = [right[first : first + 12] for right in rights for first in range(0, 36, 12)]
    assert all(len(set(run)) == 1 for run in runs)
    assert sum(run[0] for run in runs) == overlap * 12


def fastest(rights: list[list[bool]], costs: Costs, done: tuple[int, ...]) -> float:
    """The least seconds over every way to forward right guesses, one row's number of them whatever another's is."""
    rows = [row for row, right in enumerate(rights) if done[row] < len(right)]
    if not rows:
        return 0.0
    choices = []
    for row in rows:
        rest = rights[row][done[row] :]
        most = min(rest.index(False) if False in rest else len(rest), len(rest) - 1)
        choices.append(range(most + 1))
    best = float("inf")
    for guesses in product(*choices):
        after = list(done)
        for row, num in zip(rows, guesses, strict=True):
            after[row] += num + 1
        best = min(best, cost_of(sum(guesses) + len(rows), costs) + fastest(rights, costs, tuple(after)))
    return best


@pytest.mark.parametrize("costs", [{1: 1.0, 2: 1.0, 4: 1.5}, {1: 1.0, 2: 1.1}], ids=["a knee", "nearly free"])
def test_no_schedule_without_wrong_guesses_beats_the_oracle(costs: Costs) -> None:
    answers = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]]
    for wrong in ([], [2], [0, 3], [4], [0, 1, 2, 3, 4]):
        drafts = [[0 if i in wrong else token for i, token in enumerate(answer)] for answer in answers]
        rights = [[g == t for g, t in zip(d, a, strict=True)] for d, a in zip(drafts, answers, strict=True)]
        assert shortest_s(answers, drafts, costs, block=8) == pytest.approx(fastest(rights, costs, (0, 0)))


def test_dear_positions_make_the_oracle_take_shorter_steps() -> None:
    answers = [[1, 2, 3, 4]]
    assert shortest_s(answers, answers, {1: 1.0, 2: 1.0, 3: 9.0}, block=8) == 2.0
    assert shortest_s(answers, answers, {1: 1.0, 2: 1.0, 3: 9.0}, block=8, num_before=2) == 12.0


def test_what_was_seen_of_more_positions_bounds_fewer() -> None:
    costs = {1: 2.0, 2: 9.0, 4: 3.0, 8: 5.0}
    assert [cost_of(total, costs) for total in (1, 2, 3, 4, 6, 8, 10)] == [2.0, 3.0, 3.0, 3.0, 4.0, 5.0, 6.0]
