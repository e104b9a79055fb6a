"""Publishing: committed units become a numbered partition, exactly once, whoever crashes or races on the way."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.contract import PROBLEM, ConfigError, option
from pipelines.corpus import schema, units
from pipelines.corpus.card import write_card
from pipelines.corpus.commit import unit_facts
from pipelines.corpus.parquet import Damaged, Watched, first_line
from pipelines.corpus.shards import BadShard, concurrently
from pipelines.corpus.state import Partition, State, coverage_record, partition_folder, read_state
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit

ROW_GROUP_BYTES = 32 << 20


@dataclass(frozen=True)
class OutputConfig:
    """Where the corpus goes and how it is cut."""

    root: str = option("???", "folder or URL of the output; the same command on the same root resumes")
    part_mib: int = option(128, "size near which corpus parts are cut, in MiB; 0: one part per partition")
    keep_units: bool = option(False, "keep unit files after they are published")
    title: str = option("Aligned corpus", "title of the dataset card")

    def __post_init__(self) -> None:
        if self.part_mib < 0:
            raise ConfigError(f"part_mib must be 0 or more, got {self.part_mib}")


@dataclass(frozen=True)
class Published:
    """What a call of `publish` did.

    Attributes:
        partitions: numbers of the partitions that it finished.
        lost: units that turned out damaged or gone; they have to be made again before the rest can be published.
        withheld: why nothing (more) was published; None when all is.
    """

    partitions: tuple[int, ...]
    lost: tuple[Unit, ...]
    withheld: str | None


def publish(
    output: Storage,
    config: OutputConfig,
    *,
    max_quarantined_fraction: float = 1.0,
    accept_quarantined: bool = False,
    bad_shards: tuple[BadShard, ...] = (),
) -> Published:
    """Publish every committed unit.

    Any number of publishers may run this at the same time and may be frozen or killed between any two steps: what a
    partition holds is fixed by its `plan.json`, which one of them creates; every object after it has a name that the
    plan determines, and is created if absent; and a plan is only ever made when all before it are finished, from a
    state read after that.
    """
    finished: list[int] = []
    while True:
        state = read_state(output)
        if state.lost:
            return Published(tuple(finished), state.lost, None)
        if state.unfinished:
            partition = state.unfinished[0]
            damaged = _finish(output, config, partition)
            if damaged:
                output.delete([unit.path for unit in damaged])
                return Published(tuple(finished), tuple(damaged), None)
            finished.append(partition.number)
            continue
        if not state.committed:
            if not config.keep_units:
                output.delete([unit.path for unit in state.stale])
            return Published(tuple(finished), (), None)
        plan, damaged = _plan(output, config, state, bad_shards)
        if damaged:
            output.delete([unit.path for unit in damaged])
            return Published(tuple(finished), tuple(damaged), None)
        share = plan["num_quarantined"] / plan["num_rows"]
        if share > max_quarantined_fraction and not accept_quarantined:
            return Published(tuple(finished), (), _withheld(plan, max_quarantined_fraction))
        output.create(f"{partition_folder(plan['number'])}/plan.json", json.dumps(plan).encode())  # or another's stands


def _withheld(plan: dict[str, Any], most: float) -> str:
    causes = ", ".join(f"{count} {cause}" for cause, count in sorted(plan["causes"].items()))
    return (
        f"{plan['num_quarantined']} of {plan['num_rows']} rows are quarantined ({causes}), more than "
        f"run.max_quarantined_fraction={most:g} allows; nothing is published. run.accept_quarantined=true publishes it"
    )


# --- the plan -------------------------------------------------------------------------------------------------------


def _plan(
    output: Storage, config: OutputConfig, state: State, bad_shards: tuple[BadShard, ...]
) -> tuple[dict[str, Any], list[Unit]]:
    """The next partition's plan, and the units that are damaged (then there is no plan)."""

    def facts_of(unit: Unit) -> dict[str, Any] | None:
        try:
            return unit_facts(output, unit, state.sizes[unit])
        except (Damaged, FileNotFoundError):
            return None

    read = concurrently(facts_of, state.committed)
    damaged = [unit for unit, facts in read if facts is None]
    if damaged:
        return {}, damaged
    named = {unit: found for unit, found in read if found is not None}
    facts = dict(sorted(named.items(), key=lambda item: (item[1]["shard"]["path"], item[0])))  # the input's own order
    causes: Counter[str] = Counter()
    for found in facts.values():
        causes.update(found["causes"])
    shards = {found["shard"]["key"]: found["shard"] for found in facts.values()}
    plan = {
        "number": max((partition.number for partition in state.partitions), default=0) + 1,
        "nonce": os.urandom(8).hex(),
        "planned_at": time.time(),
        "num_rows": sum(unit.num_rows for unit in facts),
        "num_quarantined": sum(causes.values()),
        "causes": dict(causes),
        "runs": sorted({found["run"] for found in facts.values()}),
        "fingerprints": sorted({found["fingerprint"] for found in facts.values()}),
        "shards": sorted(shards.values(), key=lambda record: (record["path"], record["key"])),
        "bad_shards": [{"path": shard.path, "reason": shard.reason} for shard in bad_shards],
        "parts": [_part(held, facts) for held in _cut(list(facts), state, config.part_mib << 20)],
    }
    return plan, []


def _part(held: list[Unit], facts: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
    num_quarantined = sum(facts[unit]["num_quarantined"] for unit in held)
    num_rows = sum(unit.num_rows for unit in held)
    return {
        "units": [unit.name for unit in held],
        "num_ok": num_rows - num_quarantined,
        "num_quarantined": num_quarantined,
    }


def _cut(found: list[Unit], state: State, part_bytes: int) -> Iterator[list[Unit]]:
    held: list[Unit] = []
    size = 0
    for unit in found:
        held.append(unit)
        size += state.sizes[unit]
        if part_bytes and size >= part_bytes:
            yield held
            held, size = [], 0
    if held:
        yield held


# --- finishing a plan -----------------------------------------------------------------------------------------------


def _finish(output: Storage, config: OutputConfig, partition: Partition) -> list[Unit]:
    """Carry out a plan: parts, quarantine parts, manifest, card, `_SUCCESS`. Returns damaged units, and then stops."""
    folder, plan = partition_folder(partition.number), partition.plan
    corpus, quarantine = [], []
    try:
        for number, part in enumerate(plan["parts"]):
            found = [unit for name in part["units"] if (unit := Unit.parse(name))]
            name = f"part-{number:05d}.parquet"
            if part["num_ok"]:
                corpus.append(_write_part(output, f"{folder}/{name}", found, _ok_rows, part["num_ok"]))
            if part["num_quarantined"]:
                path = f"quarantine/run={partition.number:06d}/{name}"
                quarantine.append(_write_part(output, path, found, _quarantined_rows, part["num_quarantined"]))
    except _DamagedUnit as damaged:
        if output.exists(f"{folder}/_SUCCESS"):  # another publisher was faster and has dropped the units since
            return []
        return [damaged.unit]
    if not output.exists(f"{folder}/manifest.json"):
        manifest = _manifest(output, partition, corpus, quarantine)
        output.create(f"{folder}/manifest.json", json.dumps(manifest).encode())
    write_card(output, config.title)
    output.create(f"{folder}/_SUCCESS", b"")
    if not config.keep_units:
        output.delete([unit.path for unit in partition.units])
    return []


class _DamagedUnit(Exception):
    def __init__(self, unit: Unit) -> None:
        self.unit = unit


def _write_part(output: Storage, path: str, found: list[Unit], rows_of: Any, num_rows: int) -> dict[str, Any]:
    """Create a part, or leave the one that is there, and describe it as the manifest does."""

    def write(scratch: Path) -> None:
        writer: pq.ParquetWriter | None = None
        written = 0
        for table in _row_groups(rows_of(unit, _read_unit(output, unit)) for unit in found):
            writer = writer or pq.ParquetWriter(scratch, table.schema, compression="zstd", write_page_checksum=True)
            writer.write_table(table)
            written += table.num_rows
        if writer is None or written != num_rows:
            raise ValueError(f"{path} would hold {written} rows where its plan says {num_rows}")
        writer.close()

    if not output.exists(path):
        output.create_file(path, write)
    checksum, size = hashlib.sha256(), 0
    with output.fs.open(output.path(path), "rb") as file:
        while chunk := file.read(1 << 22):
            checksum.update(chunk)
            size += len(chunk)
    return {"path": path, "num_rows": num_rows, "num_bytes": size, "sha256": checksum.hexdigest()}


def _row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables of units, which are small, brought together into row groups that read well."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        held.append(table)
        size += table.nbytes
        if size >= ROW_GROUP_BYTES:
            yield pa.concat_tables(held)
            held, size = [], 0
    if held and sum(table.num_rows for table in held):
        yield pa.concat_tables(held)


def _read_unit(output: Storage, unit: Unit) -> pa.Table:
    """A unit's rows, pages verified, each of its input rows exactly once. Raises _DamagedUnit."""
    try:
        raw = output.fs.open(output.path(unit.path), "rb")
    except FileNotFoundError as error:
        raise _DamagedUnit(unit) from error
    with raw:
        file = Watched(raw)
        try:
            table = pq.read_table(pa.PythonFile(file, mode="r"), page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            if file.error is not None:
                raise
            raise _DamagedUnit(unit) from Damaged(first_line(error))
    if table["source"].combine_chunks().field("row").to_pylist() != list(range(unit.start, unit.stop)):
        raise _DamagedUnit(unit)
    return table.replace_schema_metadata(None)


def _kept(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name not in schema.UNIT.names]


def _ok_rows(unit: Unit, table: pa.Table) -> pa.Table:
    kept = _kept(table)
    rows = table.filter(pc.equal(table["status"], "ok")).select([*schema.CORPUS.names, *kept])
    return rows.cast(pa.schema([*schema.CORPUS, *(table.schema.field(name) for name in kept)]))


def _quarantined_rows(unit: Unit, table: pa.Table) -> pa.Table:
    rows = table.filter(pc.equal(table["status"], "quarantined"))
    problem = rows["problem"].combine_chunks()
    columns = {name: rows[name] for name in rows.column_names}
    columns["unit"] = pa.array([unit.name] * rows.num_rows, pa.string())
    columns.update({field.name: problem.field(field.name) for field in PROBLEM})
    return pa.table({name: columns[name] for name in schema.QUARANTINE.names}).cast(schema.QUARANTINE)


def _manifest(
    output: Storage, partition: Partition, corpus: list[dict[str, Any]], quarantine: list[dict[str, Any]]
) -> dict[str, Any]:
    plan = partition.plan
    before = read_state(output)
    rows = units.add({}, partition.units)
    published = units.add(before.published, partition.units)
    complete = [
        record
        for record in plan["shards"]
        if not units.missing(0, sum(record["row_groups"]), published.get((record["key"], 0), []))
    ]
    return {
        **{
            key: plan[key]
            for key in ("number", "num_rows", "num_quarantined", "causes", "runs", "fingerprints", "bad_shards")
        },
        "num_ok": plan["num_rows"] - plan["num_quarantined"],
        "num_units": len(partition.units),
        "num_repeated_ids": _num_repeated_ids(output, corpus),
        "published_at": time.time(),
        "corpus": corpus,
        "quarantine": quarantine,
        "rows": coverage_record(rows),
        "finished_shards": complete,
    }


def _num_repeated_ids(output: Storage, corpus: list[dict[str, Any]]) -> int:
    """Rows whose prompt_id an earlier row of the partition has too, by 64-bit hashes: 8 bytes a row."""
    hashes = [np.empty(0, np.uint64)]
    for part in corpus:
        ids = pq.read_table(output.path(part["path"]), columns=["prompt_id"], filesystem=output.fs)["prompt_id"]
        hashes.append(pd.util.hash_array(ids.to_numpy().astype(object)))
    found = np.concatenate(hashes)
    return len(found) - len(np.unique(found))
