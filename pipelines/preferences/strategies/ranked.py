"""Every candidate of a prompt with its reward, best first."""

import numpy as np
import pyarrow as pa

from pipelines.preferences.picks import Made, candidates, listed, sift
from pipelines.preferences.ranked import ranks
from pipelines.preferences.settings import BuildConfig


def ranked(table: pa.Table, build: BuildConfig) -> Made:
    """For listwise losses: listwise ADPO, RankDPO and their like. Ties share a rank ("1224"); a prompt whose candidates
    all tie is not used, and `build.min_margin` and `max_length_ratio` compare the best with the worst.
    """
    found = candidates(table, distinct=True)
    row = np.flatnonzero(np.diff(found.first) > 1)
    kept, causes = sift(found, found.first[row], found.first[row + 1] - 1, build)
    row = row[kept]
    places = np.flatnonzero(np.isin(found.row, row))
    lists = listed(found, places, row, "text", "reward", "model", "policy", "kind")
    columns = dict(zip(("completions", "rewards", "models", "policies", "kinds"), lists.values(), strict=True))
    place = pa.array(ranks(found.reward, found.row, found.first)[places])
    columns["ranks"] = pa.ListArray.from_arrays(columns["rewards"].offsets, place)
    return Made(columns, row, causes)
