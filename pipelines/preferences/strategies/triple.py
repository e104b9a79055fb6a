"""Three answers a prompt: the best, the second best as chosen, and the worst as rejected."""

import numpy as np
import pyarrow as pa

from pipelines.preferences.picks import Made, candidates, margin, provenance, rewards, sift, texts, why_none
from pipelines.preferences.settings import BuildConfig


def triple(ranked: pa.Table, build: BuildConfig) -> Made:
    """For Triple Preference Optimization (arXiv:2405.16681): fine-tunes on `best`, prefers `chosen` to `rejected`.

    Their rewards fall strictly from one to the next.
    """
    found = candidates(ranked, distinct=True)
    row = np.flatnonzero(np.diff(found.first) > 2)
    best, chosen, rejected = found.first[row], found.first[row] + 1, found.first[row + 1] - 1
    kept, causes = sift(found, chosen, rejected, build)
    refused = np.where(found.reward[best] == found.reward[chosen], "tie", causes[row])
    kept, causes = kept & (refused == ""), why_none(found, row, refused)
    best, chosen, rejected = best[kept], chosen[kept], rejected[kept]
    columns = texts(found, best=best, chosen=chosen, rejected=rejected)
    columns |= rewards(found, best_reward=best, chosen_reward=chosen, rejected_reward=rejected)
    columns |= provenance(found, best=best, chosen=chosen, rejected=rejected)
    columns["margin"] = margin(found, chosen, rejected)
    return Made(columns, row[kept], causes, found.length[chosen], found.length[rejected])
