"""Where two answers part: what they have in common, and the sentence with which each goes on."""

import re

import numpy as np
import pyarrow as pa

from pipelines.preferences.picks import Made, margin, preferred, provenance, rewards, texts
from pipelines.preferences.settings import BuildConfig

_END = r"(?<=[.!?।؟])\s+|(?<=[。！？])(?![。！？”’」』）])\s*|(?<=[。！？][”’」』）])\s*|\n+|\Z"
_SENTENCE = re.compile(rf"\s*\S.*?(?:{_END})", re.DOTALL)


def steps(ranked: pa.Table, build: BuildConfig) -> Made:
    """The pair of `pairs`, cut at the first sentence that differs, for Step-DPO (arXiv:2406.18629). `prefix` and
    `chosen` together begin `full_chosen`; a pair of which only one answer goes on is dropped (`no_step`)."""
    found, chosen, rejected, causes = preferred(ranked, build)
    full = texts(found, chosen=chosen, rejected=rejected)
    parted = [part(one, other) for one, other in zip(*(side.to_pylist() for side in full.values()), strict=True)]
    goes_on = np.array([all(step.strip() for step in steps) for _, *steps in parted], bool)
    causes[found.row[chosen[~goes_on]]] = "no_step"
    chosen, rejected = chosen[goes_on], rejected[goes_on]
    cut = pa.array(parted, pa.list_(pa.string(), 3)).filter(pa.array(goes_on)).flatten()
    columns = {name: cut[i::3] for i, name in enumerate(("prefix", "chosen", "rejected"))}
    columns |= texts(found, full_chosen=chosen, full_rejected=rejected)
    columns |= rewards(found, chosen_reward=chosen, rejected_reward=rejected)
    columns |= provenance(found, chosen=chosen, rejected=rejected)
    columns["margin"] = margin(found, chosen, rejected)
    return Made(columns, found.row[chosen], causes, found.length[chosen], found.length[rejected])


def part(one: str, other: str) -> tuple[str, str, str]:
    """The sentences that both begin with (as `normal` compares), as `one` writes them, and the next of each, or ""."""
    mine, others = (_SENTENCE.findall(text.rstrip()) for text in (one, other))
    both = list(zip(mine, others, strict=False))
    same = next((at for at, (a, b) in enumerate(both) if a.split() != b.split()), len(both))
    return "".join(mine[:same]), "".join(mine[same : same + 1]), "".join(others[same : same + 1])
