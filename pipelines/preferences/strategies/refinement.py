"""An answer and its improvement: the response and what was aligned from it."""

import pyarrow as pa

from pipelines.preferences.picks import Made, best_aligned, margin, provenance, rewards, texts
from pipelines.preferences.settings import BuildConfig


def refinement(ranked: pa.Table, build: BuildConfig) -> Made:
    """(prompt, response, improved), for training that improves a given answer, as SRPO's (arXiv:2406.01660)."""
    found, improved, response, causes = best_aligned(ranked, build)
    columns = texts(found, response=response, improved=improved)
    columns |= rewards(found, response_reward=response, improved_reward=improved)
    columns |= provenance(found, response=response, improved=improved)
    columns["margin"] = margin(found, improved, response)
    return Made(columns, found.row[improved], causes, found.length[improved], found.length[response])
