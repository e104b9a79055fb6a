"""Several pairs a prompt, in phases from easy to hard."""

import numpy as np
import pyarrow as pa

from pipelines.preferences.picks import Made, candidates, pair_columns, sift
from pipelines.preferences.settings import BuildConfig


def curriculum(ranked: pa.Table, build: BuildConfig) -> Made:
    """The best candidate over the worst (phase 1, the largest margin), the second worst (phase 2), and so on.

    For Curry-DPO (arXiv:2403.07230), which trains on one phase after the other. At most `build.num_phases` pairs a
    prompt; phases count the pairs that may be used.
    """
    found = candidates(ranked, distinct=True)
    counts = np.minimum(np.maximum(np.diff(found.first) - 1, 0), build.num_phases)
    row = np.repeat(np.arange(found.num_rows), counts)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen, rejected = found.first[row], found.first[row + 1] - 1 - place
    kept, causes = sift(found, chosen, rejected, build)
    chosen, rejected, row = chosen[kept], rejected[kept], row[kept]
    phase = np.arange(len(row)) - np.searchsorted(row, row) + 1
    columns = pair_columns(found, chosen, rejected) | {"phase": pa.array(phase.astype(np.int32))}
    return Made(columns, row, causes, found.length[chosen], found.length[rejected])
