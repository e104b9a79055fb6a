"""The trajectories that are trained on: a published preference dataset, as its manifests list it."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.contract import ConfigError
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage
from pipelines.preferences.dataset import FOLDER
from pipelines.preferences.schema import STRATEGIES

COLUMNS = ("prompt", "states")
ROWS_AT_ONCE = 1024

Part = Mapping[str, Any]
"""As manifests tell it: path, num_rows, num_bytes, sha256."""


def published_parts(dataset: Storage) -> list[Part]:
    """Every part of every finished partition, in order. Raises ConfigError where there is none."""
    finished = [each.manifest for each in read_state(dataset).partitions if each.manifest is not None]
    parts = [part for manifest in finished for part in manifest.get(FOLDER, [])]
    if not parts:
        raise ConfigError(
            f"input.path {dataset.url!r} holds no published partition of a preference dataset, if it is there at all: "
            "make one with pipelines/build_preferences.py build=trajectory"
        )
    return parts


def of_split(parts: list[Part], split: str) -> list[Part]:
    """The parts of one split: train, validation or test."""
    return [part for part in parts if part["path"].rsplit("/", 1)[1].startswith(f"{split}-")]


def read_rows(dataset: Storage, parts: list[Part]) -> Iterator[dict[str, Any]]:
    """The rows of the parts, in order: `prompt`, messages; `states`, texts y(0) … y(T).

    Raises ConfigError where a part is not what its manifest says, or holds no trajectories.
    """
    for part in parts:
        table = _read(dataset, part)
        for batch in table.to_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _read(dataset: Storage, part: Part) -> pa.Table:
    try:
        data = dataset.read(part["path"])
    except FileNotFoundError:
        raise ConfigError(f"{part['path']} is in a manifest of the dataset, but it is gone; restore it") from None
    if hashlib.sha256(data).hexdigest() != part["sha256"]:
        raise ConfigError(f"{part['path']} is damaged: its checksum is not its manifest's; restore it")
    columns = pq.read_schema(pa.BufferReader(data))
    wanted = STRATEGIES["trajectory"]
    for name in COLUMNS:
        if name not in columns.names or columns.field(name).type != wanted.field(name).type:
            raise ConfigError(
                f"{part['path']} holds no trajectories: build the dataset with build=trajectory and export=null"
            )
    return pq.read_table(pa.BufferReader(data), columns=list(COLUMNS))
