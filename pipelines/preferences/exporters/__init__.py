"""Exporters: column mappings from what a strategy makes to what a trainer reads.

An exporter is a pure function from a table with the columns of one of its strategies (see `schema.STRATEGIES`, kept
columns after them) to a table with the trainer's columns, row by row in the same order. The split is not among them: a
part holds one split. It is applied where units are built, before they are committed.
"""

from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa

from pipelines.preferences.exporters import axolotl, kto, llamafactory, openrlhf, trl, ultrafeedback

PAIRS = frozenset({"pairs", "curriculum", "steps"})
TRL_READS = frozenset({"chat_template_kwargs", "image", "images", "messages", "tools"})


class Exporter(NamedTuple):
    """`convert`, the strategies whose tables it takes, and what the dataset's root says of it.

    Attributes:
        names: besides the columns of strategies, what it makes or the trainer gives a meaning: no kept column's name.
        read: Markdown for the dataset card, by strategy: how the trainer is told of the dataset.
        files: by strategy, what stands beside the card: content by file name.
    """

    convert: Callable[[pa.Table], pa.Table]
    strategies: frozenset[str]
    names: frozenset[str]
    read: Callable[[str], str]
    files: Callable[[str], dict[str, str]] = lambda strategy: {}


EXPORTERS = {
    "trl": Exporter(trl.trl, PAIRS | {"triple"}, TRL_READS | {"reference"}, lambda strategy: trl.READ),
    "kto": Exporter(kto.kto, frozenset({"unpaired"}), TRL_READS, lambda strategy: kto.READ),
    "axolotl": Exporter(axolotl.axolotl, PAIRS | {"unpaired"}, frozenset({"messages"}), axolotl.read),
    "llamafactory": Exporter(
        llamafactory.llamafactory,
        PAIRS | {"unpaired"},
        frozenset({"conversations", "kto_tag"}),
        lambda strategy: llamafactory.READ,
        lambda strategy: {"dataset_info.json": llamafactory.dataset_info(strategy)},
    ),
    "openrlhf": Exporter(openrlhf.openrlhf, PAIRS, frozenset(), lambda strategy: openrlhf.READ),
    "ultrafeedback": Exporter(
        ultrafeedback.ultrafeedback,
        PAIRS,
        frozenset({"messages", "score_chosen", "score_rejected"}),
        lambda strategy: ultrafeedback.READ,
    ),
}
"""By the name that `export=` takes."""
