"""Drafts that are right in whole runs, and the least time in which an oracle could decode with them."""

import random
from bisect import bisect_left

RUN = 12
"""Tokens that are right or wrong together."""

Tokens = list[list[int]]
Costs = dict[int, float]
"""Positions of a forward, over all rows -> seconds."""


def spoil(answers: Tokens, overlap: float, vocabulary: int, seed: int) -> Tokens:
    """Drafts whose runs of `RUN` tokens are those of the answers, or other tokens at random, at every position.

    Of all runs the share `overlap` stays right, to the nearest run: drawn over all rows, not row by row, so that two
    rows have as much as two hundred.
    """
    draw = random.Random(seed)
    runs = [(row, first) for row, answer in enumerate(answers) for first in range(0, len(answer), RUN)]
    drafts = [list(answer) for answer in answers]
    for row, first in draw.sample(runs, len(runs) - round(overlap * len(runs))):
        for position in range(first, min(first + RUN, len(answers[row]))):
            drafts[row][position] = (answers[row][position] + draw.randrange(1, vocabulary)) % vocabulary
    return drafts


def shortest_s(answers: Tokens, drafts: Tokens, costs: Costs, block: int, num_before: int = 0) -> float:
    """Seconds from the first step to the last token, for an oracle that forwards only guesses that are right.

    All rows begin together. A step forwards for each row its last token and guesses, up to the draft's next wrong token
    and at most so many; it makes one token more than it had guesses, and takes what `costs` says of the positions that
    it forwards, whichever rows they belong to. "So many" is from 0 to `block`, for the whole run: the best is returned,
    because where positions are dear, longer steps are not always cheaper ones.
    """
    rights = [[guess == token for guess, token in zip(*row, strict=True)] for row in zip(drafts, answers, strict=True)]
    return min(
        _seconds(rights, costs, most, num_before) for most in {*range(min(block, 16)), *range(16, block, 8), block}
    )


def _seconds(rights: list[list[bool]], costs: Costs, most: int, num_before: int) -> float:
    """Of a run whose steps take `most` guesses a row, as long as they are right."""
    done = [0] * len(rights)
    seconds = 0.0
    while active := [row for row, right in enumerate(rights) if done[row] < len(right)]:
        total, num_before = num_before, 0
        for row in active:
            right, end = rights[row], min(done[row] + most, len(rights[row]) - 1)
            stop = next((position for position in range(done[row], end) if not right[position]), end)
            total += stop - done[row] + 1
            done[row] = stop + 1
        seconds += cost_of(total, costs)
    return seconds


def cost_of(total: int, costs: Costs) -> float:
    """Seconds of a forward of `total` positions: on straight lines through what was measured, and beyond it too.

    What was seen of more positions holds for fewer: padding would do it.
    """
    known = sorted(costs)
    least = {each: min(costs[more] for more in known if more >= each) for each in known}
    if len(known) == 1:
        return least[known[0]]
    upper = min(max(bisect_left(known, total), 1), len(known) - 1)
    low, high = known[upper - 1], known[upper]
    return least[low] + (least[high] - least[low]) * (total - low) / (high - low)
