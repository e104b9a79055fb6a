"""Single answers, labelled desirable or not by a threshold of the reward."""

import numpy as np
import pyarrow as pa

from pipelines.preferences import schema
from pipelines.preferences.picks import Made, candidates, falls_short, why_none
from pipelines.preferences.settings import BuildConfig


def unpaired(ranked: pa.Table, build: BuildConfig) -> Made:
    """For KTO (arXiv:2402.01306). Desirable is a reward of `build.threshold` or more; without one, above the mean of
    the prompt's candidates, where one that equals it is a tie. Closer to it than `build.min_margin` none is used.
    """
    found = candidates(ranked, distinct=True)
    counts = np.diff(found.first)
    sums = np.bincount(found.row, found.reward, minlength=found.num_rows)
    mean = sums / np.maximum(counts, 1)
    bar = mean[found.row] if build.threshold is None else np.full(len(found.row), build.threshold)
    refused = np.full(len(found.row), "", object)
    refused[falls_short(np.maximum(found.reward, bar), np.minimum(found.reward, bar), build.min_margin)] = (
        "small_margin"
    )
    if build.threshold is None:
        refused[np.isclose(found.reward, bar, rtol=1e-12, atol=0)] = "tie"
        refused[(counts == 1)[found.row]] = "one_candidate"
    kept = refused == ""
    places = np.flatnonzero(kept)
    columns = {
        "completion": found.take("text", places),
        "label": pa.array(found.reward[kept] >= bar[kept]),
        **{name: found.take(name, places) for name in ("reward", *schema.PROVENANCE)},
    }
    return Made(columns, found.row[kept], why_none(found, found.row, refused))
