"""Pairs of a chosen and a rejected answer, one a prompt."""

import pyarrow as pa

from pipelines.preferences.picks import Made, pair_columns, preferred
from pipelines.preferences.settings import BuildConfig


def pairs(ranked: pa.Table, build: BuildConfig) -> Made:
    """What is aligned over its response, or the best candidate over the worst or a random one (`build.prefer`).

    For DPO (arXiv:2305.18290), IPO (2310.12036), SimPO (2405.14734), APO (2408.06266) and their like; `margin` is what
    margin-aware losses such as MADPO read, `build.max_length_ratio` and `length_slope` serve LD-DPO's concern
    (2409.06411), `build.single_policy` that of "More is Less" (2504.02193).
    """
    found, chosen, rejected, causes = preferred(ranked, build)
    columns = pair_columns(found, chosen, rejected)
    return Made(columns, found.row[chosen], causes, found.length[chosen], found.length[rejected])
