"""What a forward costs, and how many guesses are worth it.

A forward reads all weights, however few positions it runs. Up to a knee the memory sets the pace, and more positions
cost next to nothing: every row gets all guesses that have a chance, LEAST_CHANCE at least. Beyond the knee the
arithmetic does, and a guess must earn its keep: it is worth the chance p that it stays, its price is the time dc/dn of
one more position, and where E tokens are made in c seconds it pays while p >= dc/dn * E / c. The choice that maximises
E / c does just that, whatever the shape of c, and is found by adding the guesses of all rows in order of their chances.
Where it is not LEAST_GAIN times what no guesses at all make, there are none: a gain so small may be an error of c.

With poor drafts beyond the knee that leaves one position a row, which is plain decoding.

So it is while a row that ends leaves its slot to another. When none waits any more, the batch takes as long as its
slowest row, and what a token of another row saves is worth less: `worth` says how much.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from actors.decoding.forward import STEP_TOKENS, Forward
from actors.decoding.sampling import greedy

LEAST_CHANCE = 0.01  # below it no guess is made, even where it seems to be free
LEAST_GAIN = 1.06  # times the pace without guesses
CONTEXT = 128  # tokens; what the measured rows have in the cache
SWEEPS = 2
FAR = 2.0  # times the seconds of one position a row; beyond it the curve is straight


class StepCost:
    """Seconds of a forward, by its number of rows and of positions.

    Args:
        table: seconds by positions, for some numbers of rows; the positions of `rows` rows begin at `rows`. Between the
            points lines; beyond the last the line through it and the last of half as many positions, or the first.
    """

    def __init__(self, table: Mapping[int, Mapping[int, float]]) -> None:
        self.table = {rows: dict(sorted(curve.items())) for rows, curve in sorted(table.items())}

    def seconds(self, rows: int, num_more: int) -> np.ndarray:
        """float64 [num_more + 1]: of rows, rows + 1, … rows + num_more positions."""
        positions = rows + np.arange(num_more + 1)
        below = max((each for each in self.table if each <= rows), default=min(self.table))
        above = min((each for each in self.table if each >= rows), default=max(self.table))
        part = (rows - below) / (above - below) if above > below else 0.0
        return (1 - part) * self._curve(below, positions) + part * self._curve(above, positions)

    def _curve(self, rows: int, positions: np.ndarray) -> np.ndarray:
        x, y = (np.array(list(values), float) for values in (self.table[rows], self.table[rows].values()))
        y = np.minimum.accumulate(y[::-1])[::-1]  # some kernels are slower at 2 rows than at 4: less is never dearer
        half = x <= x[-1] / 2  # a neighbour may be but one position away, and laid out otherwise
        before = max(0, int(half.sum()) - 1)
        slope = (y[-1] - y[before]) / (x[-1] - x[before]) if len(x) > 1 else 0.0
        curve: np.ndarray = np.interp(positions, x, y) + slope * (positions - x[-1]).clip(0)
        return curve

    @classmethod
    @torch.inference_mode()
    def measure(cls, forward: Forward, num_rows: int, block_size: int, max_positions: int) -> "StepCost":
        """Time forwards of one row and of `num_rows` rows. One of these or a quarter has 2, 4, … positions and each
        other row a single one, as rows differ in their guesses, and attention lays those out otherwise that do not;
        more positions than a quarter of the rows can take are shared out evenly. Takes seconds at most.

        Nothing may be in the cache yet, and nothing is afterwards.

        Args:
            block_size: most positions of a row in a forward.
            max_positions: bound on the positions of a row, those in the cache included.
        """
        block_size = min(block_size, max_positions)
        context = min(CONTEXT, max_positions - block_size)
        table: dict[int, dict[int, float]] = {}
        for rows in sorted({1, num_rows}):
            forward.cache.resize(rows, context + block_size, used=0)
            curve = table[rows] = {}
            for _ in range(SWEEPS):  # not one length after the other: what disturbs one point now spares it later
                for widths in _shapes(rows, block_size):
                    seconds, total = _seconds(forward, widths, context), sum(widths)
                    curve[total] = min(seconds, curve.get(total, seconds))
                    is_one_guessing = rows > 4 and widths[1] == 1  # of fewer, one is a quarter
                    if not is_one_guessing and (curve[total] > FAR * curve[rows] or 2 * total > STEP_TOKENS):
                        break
        forward.cache.resize(0, 0, used=0)
        return cls(table)


def _shapes(rows: int, block_size: int) -> list[list[int]]:
    """Positions of each row in the forwards that are measured, fewest in all first."""
    sizes = [2**i for i in range(block_size.bit_length())]
    quarter = -(-rows // 4)
    unlike = [[q] * some + [1] * (rows - some) for q in sizes[1:] for some in sorted({1, quarter})]
    most = max(map(sum, unlike), default=rows)
    alike = [[q] * rows for q in sizes if q == 1 or q * rows > most]
    return sorted([*alike, *unlike], key=sum)


def _seconds(forward: Forward, widths: list[int], context: int) -> float:
    begin = time.perf_counter()
    logits = forward(0, [[0] * width for width in widths], [context] * len(widths), widths)
    assert logits is not None
    greedy(logits).tolist()  # waits for the device
    return time.perf_counter() - begin


def worth(steps_left: Sequence[float]) -> np.ndarray:
    """float64 [rows]: what a token of each row is worth, at most 1, when no row takes the place of one that ends.

    It is the square of a row's steps as a share of the slowest row's. Played through on what several machines take, a
    higher power gives up too much where guesses are cheap, and a lower one holds up the slowest row too much.

    Args:
        steps_left: per row, how many steps it is likely to need still, more than 0.
    """
    left = np.array(steps_left)
    found: np.ndarray = (left / left.max()) ** 2
    return found


def block_sizes(chances: Sequence[np.ndarray], cost: StepCost, weights: np.ndarray | None = None) -> list[int]:
    """How many guesses of each row go into the next forward, so that it makes the most tokens a second; none where that
    is not LEAST_GAIN as many as without.

    Args:
        chances: per row, for each guess, that it and all before it are right: falling.
        weights: float64 [rows], what a token of each row is worth; None: all the same.
    """
    rows = len(chances)
    if weights is None:
        weights = np.ones(rows)
    flat = np.concatenate(chances)
    worth_a_look = flat >= LEAST_CHANCE
    owner = np.arange(rows).repeat([len(each) for each in chances])[worth_a_look]
    flat = flat[worth_a_look] * weights[owner]
    order = np.argsort(-flat, kind="stable")  # stable: of equal ones a row's earlier guess comes first
    tokens = weights.sum() + np.append(0.0, flat[order].cumsum())
    pace = tokens / cost.seconds(rows, len(order))
    best = int(pace.argmax())
    if pace[best] < LEAST_GAIN * pace[0]:
        best = 0
    sizes = np.bincount(owner[order[:best]], minlength=rows)
    found: list[int] = sizes.tolist()
    return found
