"""Commits: a finished unit becomes one Parquet object, created if absent, that says everything about its rows."""

import functools
import hashlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.contract import REWARDS, label, unpack
from pipelines.corpus import schema
from pipelines.corpus.parquet import Damaged, read_footer
from pipelines.corpus.read import WholeRows
from pipelines.corpus.scored import noted
from pipelines.corpus.shards import Input, Shard, shard_of
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit

METADATA_KEY = b"burnish.unit"
SEAL_KEY = b"burnish.unit.seal"
BEHIND_BYTES = 32 << 20
ROW_GROUPS_AT_ONCE = 4


@dataclass(frozen=True)
class Committer:
    """Writes units; a Ray Data stage. Everything it needs travels with it, so that any node can commit.

    Attributes:
        output: the output root.
        source: the input, read again for the whole rows of what a stage after reading quarantines.
        keep_columns: the kept columns, in order.
        run: number of the run record.
        fingerprint: digest of the run's fingerprint.
    """

    output: Storage
    source: Input
    keep_columns: tuple[str, ...]
    run: int
    fingerprint: str

    def __call__(self, packed: pa.Table) -> pa.Table:
        """Commit one packed unit. Returns one row: unit, rows, quarantined, won (this call's copy did), `_aligning`."""
        unit = Unit.named(label(packed, "unit"))
        shard = json.loads(label(packed, "shard"))
        unpacked = unpack(packed)
        table = self._table(unit, shard, unpacked)
        facts = self._facts(unit, shard, table) | noted(unpacked)
        won = write_unit(self.output, unit, table, facts)
        return pa.table(
            {
                "unit": [unit.name],
                "rows": [unit.num_rows],
                "quarantined": [facts["num_quarantined"]],
                "won": [won],
                **_aligning(table),
            }
        )

    def _table(self, unit: Unit, shard: dict[str, Any], rows: pa.Table) -> pa.Table:
        """The unit file's table. Raises ValueError where a stage lost, added or moved a row."""
        source_rows = rows["source"].combine_chunks().field("row")
        if source_rows.to_pylist() != list(range(unit.start, unit.stop)):
            raise ValueError(f"unit {unit.name} came through the stages with other rows than it set out with")
        well = pc.is_null(rows["problem"])
        columns = {name: rows[name] for name in ("prompt_id", "prompt", "responses", "aligned")}
        columns["rewards"] = _or_nulls(rows, "rewards", REWARDS)
        columns["source"] = rows["source"]
        columns["published_source"] = _or_nulls(rows, "published_source", schema.SOURCE)
        columns["status"] = pc.if_else(well, "ok", "quarantined")
        columns["problem"] = rows["problem"]
        columns["input"] = pa.array(self._inputs(unit, shard, rows), pa.string())
        kept = [pa.field(name, rows.schema.field(name).type) for name in self.keep_columns]
        columns.update({name: rows[name] for name in self.keep_columns})
        return pa.table(columns).cast(pa.schema([*schema.UNIT, *kept]))

    def _inputs(self, unit: Unit, shard: dict[str, Any], rows: pa.Table) -> list[str | None]:
        """The input row as JSON where it is quarantined, null elsewhere. Reading has seen to what it found itself.

        A row that failed later makes its row group be read again, up to that row. Units of a row group that come in
        about the order of its rows share one such reading (see `WholeRows`); where they come further out of order than
        BEHIND_BYTES, each may cost a reading from the row group's first row.
        """
        inputs: list[str | None] = rows["input"].to_pylist()
        problems = rows["problem"].to_pylist()
        late = [row for row, problem in enumerate(problems) if problem and problem["stage"] != "read"]
        if late:
            version = shard_of(shard)
            texts = _whole_rows(self.source, version, version.row_group_of(unit.start)).as_json(unit, late)
            for row in late:
                inputs[row] = texts[row]
        return inputs

    def _facts(self, unit: Unit, shard: dict[str, Any], table: pa.Table) -> dict[str, Any]:
        causes = Counter(problem["cause"] for problem in table["problem"].to_pylist() if problem)
        return {
            "unit": unit.name,
            "shard": shard,
            "num_rows": table.num_rows,
            "num_quarantined": sum(causes.values()),
            "causes": dict(causes),
            "run": self.run,
            "fingerprint": self.fingerprint,
            "committed_at": time.time(),
            "by": f"{socket.gethostname()}:{os.getpid()}",
            "nonce": os.urandom(8).hex(),
        }


def _or_nulls(rows: pa.Table, name: str, dtype: pa.DataType) -> pa.ChunkedArray:
    """A column that only some jobs have."""
    if name in rows.column_names:
        return rows[name]
    return pa.chunked_array([pa.array([None] * rows.num_rows, dtype)])  # pa.nulls would null a struct's fields as well


@functools.lru_cache(ROW_GROUPS_AT_ONCE)
def _whole_rows(source: Input, shard: Shard, row_group: int) -> WholeRows:
    """One reading of a row group for all commits of a process."""
    return WholeRows(source, shard, row_group, BEHIND_BYTES)


def write_unit(output: Storage, unit: Unit, table: pa.Table, facts: dict[str, Any]) -> bool:
    """Create the unit's file; False where another copy of it was there first (this one is then dropped).

    `facts` go into the file's key-value metadata, so that no second object has to agree with it; their nonce tells two
    copies with the same rows apart. Pages carry checksums; what the footer says is sealed.
    """
    told = json.dumps(facts).encode()
    table = table.replace_schema_metadata({METADATA_KEY: told, SEAL_KEY: _seal(told, _given_back(table.schema))})

    def write(path: Path) -> None:
        pq.write_table(  # read once, and whole: neither a dictionary nor statistics would pay
            table, path, compression="zstd", write_page_checksum=True, use_dictionary=False, write_statistics=False
        )

    return output.create_file(unit.path, write)


def _aligning(table: pa.Table) -> dict[str, Any]:
    """Columns of one row: `candidates` that were aligned, and those whose text `changed`; of those that a parallel
    decoder made, the `iterations` of each (int32), their `tokens`, and how many of these were guesses it `accepted`."""
    aligned = table["aligned"].combine_chunks().flatten()
    changed = aligned.field("changed")
    decoded = aligned.filter(aligned.field("iterations").is_valid())
    iterations = decoded.field("iterations")
    return {
        "candidates": [len(changed) - changed.null_count],
        "changed": [int(pc.sum(changed).as_py() or 0)],
        "iterations": pa.ListArray.from_arrays(pa.array([0, len(iterations)], pa.int32()), iterations),
        "tokens": [int(pc.sum(decoded.field("num_tokens")).as_py() or 0)],
        "accepted": [int(pc.sum(decoded.field("accepted")).as_py() or 0)],
    }


def unit_facts(output: Storage, unit: Unit, size: int) -> dict[str, Any]:
    """The facts of a committed unit of `size` bytes, from its footer. Raises Damaged, FileNotFoundError."""
    footer, _ = read_footer(output.fs, output.path(unit.path), size)
    facts = sealed_facts(unit, footer.metadata or {}, footer.schema.to_arrow_schema())
    if not facts["num_rows"] == footer.num_rows == unit.num_rows:
        raise Damaged(f"{unit.path} does not hold the {unit.num_rows} rows that its name says")
    return facts


def sealed_facts(unit: Unit, metadata: Mapping[bytes, bytes], columns: pa.Schema) -> dict[str, Any]:
    """The facts in a unit file's key-value metadata. Raises Damaged where they, or its columns, are not as written."""
    told = metadata.get(METADATA_KEY, b"")
    if metadata.get(SEAL_KEY) != _seal(told, columns):
        raise Damaged(f"{unit.path}: its footer is not as it was written")
    facts: dict[str, Any] = json.loads(told)
    if facts["unit"] != unit.name:
        raise Damaged(f"{unit.path} holds unit {facts['unit']}")
    return facts


def _seal(told: bytes, columns: pa.Schema) -> bytes:
    """What tells a changed footer, for Parquet has checksums for pages alone: SHA-256 of facts and columns.

    Args:
        columns: as Parquet gives them back.
    """
    types = repr([(each.name, str(each.type)) for each in columns])
    return hashlib.sha256(told + types.encode()).hexdigest().encode()


def _given_back(columns: pa.Schema) -> pa.Schema:
    """The columns as they come out of a Parquet file: some types are others then, and lists' items have other names."""
    file = pa.BufferOutputStream()
    pq.write_table(columns.empty_table(), file)
    return pq.read_metadata(pa.BufferReader(file.getvalue())).schema.to_arrow_schema()
