"""Exporters: column mappings from what a strategy makes to what a trainer reads.

An exporter is a pure function from a table with the columns of one of its strategies (see `schema.STRATEGIES`, kept
columns after them) to a table with the trainer's columns, row by row in the same order. The split is not among them: a
part holds one split. It is applied where units are built, before they are committed.
"""

from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa

from pipelines.preferences.exporters.trl import trl


class Exporter(NamedTuple):
    """`convert`, and the strategies whose tables it takes."""

    convert: Callable[[pa.Table], pa.Table]
    strategies: frozenset[str]


EXPORTERS = {
    "trl": Exporter(trl, frozenset({"pairs", "curriculum"})),
}
"""By the name that `export=` takes."""
