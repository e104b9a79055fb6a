"""A prompt's candidates as a path from the worst to the best."""

import numpy as np
import pyarrow as pa

from pipelines.preferences.picks import Made, candidates, listed, sift
from pipelines.preferences.settings import BuildConfig


def trajectory(ranked: pa.Table, build: BuildConfig) -> Made:
    """y(0) … y(T) with rising rewards, from one or many policies, for training a DiffPO aligner.

    Of candidates with one reward the first of `ranked` stands for all; `build.min_margin` and `max_length_ratio`
    compare y(T) with y(0).
    """
    found = candidates(ranked, distinct=True)
    row = np.flatnonzero(np.diff(found.first) > 1)
    kept, causes = sift(found, found.first[row], found.first[row + 1] - 1, build)
    row = row[kept]
    is_new = np.append(True, (found.reward[1:] != found.reward[:-1]) | (found.row[1:] != found.row[:-1]))
    places = np.flatnonzero(is_new[: len(found.row)] & np.isin(found.row, row))
    places = places[np.lexsort((-places, found.row[places]))]
    lists = listed(found, places, row, "text", "reward", "model", "policy", "kind")
    columns = dict(zip(("states", "rewards", "models", "policies", "kinds"), lists.values(), strict=True))
    return Made(columns, row, causes)
