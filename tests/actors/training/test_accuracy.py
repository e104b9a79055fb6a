"""Accuracy counts prompts, and its interval holds every share that the held-out pairs do not rule out, and no other."""

from statistics import NormalDist

import numpy as np
import pytest

from actors.training.accuracy import accuracy_of, wilson

SHARES = np.linspace(0, 1, 1_000_001)


@pytest.mark.parametrize(("num_right", "num"), [(0, 1), (1, 1), (0, 12), (5, 12), (12, 12), (171, 280), (1399, 1400)])
def test_the_interval_is_every_share_that_is_near_enough(num_right: int, num: int) -> None:
    share = num_right / num
    near = np.abs(share - SHARES) <= NormalDist().inv_cdf(0.975) * np.sqrt(SHARES * (1 - SHARES) / num)
    assert wilson(share, num) == pytest.approx((SHARES[near].min(), SHARES[near].max()), abs=2e-6)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """By the exact probability of each number of right pairs."""
    num, truth = 60, 0.65
    probability = np.ones(1)
    for _ in range(num):
        probability = np.convolve(probability, [1 - truth, truth])
    covered = [low <= truth <= high for low, high in (wilson(right / num, num) for right in range(num + 1))]
    assert 0.93 < probability[covered].sum() < 0.97


def test_every_prompt_counts_the_same_and_a_tie_half() -> None:
    found = accuracy_of(["a", "a", "a", "b", "c"], [1.0, 2.0, -0.5, 0.0, 3.0])
    assert (found.num_pairs, found.num_prompts) == (5, 3)
    assert found.accuracy == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert (found.low, found.high) == wilson(found.accuracy, 3)
    assert str(found) == f"72.2% (95%: {found.low:.1%} to {found.high:.1%})"


def test_many_pairs_of_a_prompt_that_say_the_same_make_it_no_surer() -> None:
    rng = np.random.default_rng(0)
    covered = {1: 0, 40: 0}
    for _ in range(1000):
        right = rng.random(40) < 0.7
        for pairs_each, names in ((1, np.repeat(np.arange(40), 5)), (40, np.arange(200))):
            found = accuracy_of([str(name) for name in names], np.repeat(np.where(right, 1.0, -1.0), 5).tolist())
            covered[pairs_each] += found.low <= 0.7 <= found.high
    assert covered[1] > 920, "by prompts"
    assert covered[40] < 750, "by pairs, as if they were independent"
