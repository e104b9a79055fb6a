"""How often a reward prefers the chosen answer of pairs that it was not trained on, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Accuracy:
    """The share of pairs whose chosen answer has the higher score, a tie counting half; every prompt counts the same.

    Attributes:
        low, high: the 95 % interval.
    """

    num_pairs: int
    num_prompts: int
    accuracy: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} (95%: {self.low:.1%} to {self.high:.1%})"


def accuracy_of(prompts: Sequence[str], margins: Sequence[float]) -> Accuracy:
    """The accuracy of pairs, of which there is at least one.

    Pairs of one prompt are not independent of each other, so prompts are what the interval counts: of each the mean
    over its pairs, a number in [0, 1], whose variance is at most that of a right-or-wrong answer of the same mean.
    The interval is therefore wide enough, and with one pair a prompt it is Wilson's.

    Args:
        prompts: what names each pair's prompt.
        margins: each pair's score of the chosen answer less that of the rejected one.
    """
    right = (np.sign(margins) + 1) / 2
    _, place, counts = np.unique(np.asarray(prompts), return_inverse=True, return_counts=True)
    mean = float((np.bincount(place, right) / counts).mean())
    low, high = wilson(mean, len(counts))
    return Accuracy(len(right), len(counts), mean, low, high)


def wilson(share: float, num: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `num` trials (Wilson 1927).

    It is every p that lies no more than z standard errors, those of p itself, from the share. Unlike the bootstrap's it
    is no point where all trials came out the same.
    """
    z2 = Z_95**2 / num
    centre = share + z2 / 2
    half = Z_95 * math.sqrt(share * (1 - share) / num + z2 / (4 * num))
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))
