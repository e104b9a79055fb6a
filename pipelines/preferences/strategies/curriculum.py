"""Several pairs a prompt, in phases from easy to hard."""

import numpy as np
import pyarrow as pa

from pipelines.preferences.picks import Made, candidates, pair_columns, sift
from pipelines.preferences.ranked import places
from pipelines.preferences.settings import BuildConfig


def curriculum(ranked: pa.Table, build: BuildConfig) -> Made:
    """The best candidate over the worst (phase 1, the largest margin), then over better ones, at last the second best.

    For Curry-DPO (arXiv:2403.07230), which trains on one phase after the other. At most `build.num_phases` pairs a
    prompt, evenly spread over those that may be used.
    """
    found = candidates(ranked, distinct=True)
    counts = np.maximum(np.diff(found.first) - 1, 0)
    row = np.repeat(np.arange(found.num_rows), counts)
    chosen, rejected = found.first[row], found.first[row + 1] - 1 - places(counts)
    kept, causes = sift(found, chosen, rejected, build)
    _, first, num_usable = np.unique(row[kept], return_index=True, return_counts=True)
    num_phases = np.minimum(num_usable, build.num_phases)
    phase = places(num_phases)
    last, last_phase = np.repeat(num_usable - 1, num_phases), np.repeat(np.maximum(num_phases - 1, 1), num_phases)
    taken = np.repeat(first, num_phases) + (2 * phase * last + last_phase) // (2 * last_phase)  # rounded
    chosen, rejected = chosen[kept][taken], rejected[kept][taken]
    columns = pair_columns(found, chosen, rejected) | {"phase": pa.array((phase + 1).astype(np.int32))}
    return Made(columns, found.row[chosen], causes, found.length[chosen], found.length[rejected])
