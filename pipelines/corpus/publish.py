"""Publishing: committed units become a numbered partition, exactly once, whoever crashes or races on the way."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.contract import PROBLEM, ConfigError, option, refuse_secrets, refuse_unless
from pipelines.corpus import schema, scored, units
from pipelines.corpus.card import corpus_card, write_card
from pipelines.corpus.commit import sealed_facts, unit_facts
from pipelines.corpus.means import mean_rewards
from pipelines.corpus.parquet import Damaged, Watched, first_line, is_damage, read_footer
from pipelines.corpus.shards import BadShard
from pipelines.corpus.state import Partition, State, coverage_record, partition_folder, read_state
from pipelines.corpus.storage import Storage, concurrently
from pipelines.corpus.units import Unit

ROW_GROUP_BYTES = 32 << 20
ROWS_AT_ONCE = 1 << 14
UNITS_AHEAD = 4
LEFT_OUT_KEY = b"burnish.left_out"
MADE_AGAIN = pa.scalar(
    {
        "stage": "publish",
        "cause": "made_again",
        "error_class": "UnitError",
        "message": "well only after its unit, then damaged, was made again, which was too late for the corpus part",
        "attempts": 1,
    },
    PROBLEM,
)


@dataclass(frozen=True)
class OutputConfig:
    """Where the corpus goes and how it is cut."""

    root: str = option("???", "folder or URL of the output; the same command on the same root resumes")
    part_mib: int = option(128, "size near which corpus parts are cut, in MiB; 0: one part per partition")
    keep_units: bool = option(False, "keep unit files after they are published")
    title: str = option("Aligned corpus", "title of the dataset card")

    def __post_init__(self) -> None:
        refuse_secrets("root", self.root)
        refuse_unless(self, "0 or more", "part_mib")


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


@dataclass(frozen=True)
class Kind:
    """How the rows of unit files become those of partitions: where the jobs that publish differ.

    Attributes:
        left_out: folder, and key in the manifests, of what is made of rows that are not ok.
        names: of a unit's facts: with what the names of the parts begin that it has rows for.
        rows: of a unit's ok rows: the rows of its part of that name.
        left_out_rows: of a unit's rows that are not ok: those of its part in `left_out`, with a column `cause`.
        summed: of the facts of a plan's units: what the plan keeps of them; `num_made` where parts have other numbers
            of rows than there are ok rows.
        refusal: of a plan: why it must not be; None where it may.
        finished: of the plan and the records of its parts, which are there: what else the manifest tells.
        card: of title, manifests and last run record: the dataset card.
    """

    left_out: str
    names: Callable[[Mapping[str, Any]], Iterable[str]]
    rows: Callable[[pa.Table, str], pa.Table]
    left_out_rows: Callable[[Unit, pa.Table], pa.Table]
    summed: Callable[[list[dict[str, Any]]], dict[str, Any]]
    refusal: Callable[[Mapping[str, Any]], str | None]
    finished: Callable[[Storage, Mapping[str, Any], list[dict[str, Any]]], dict[str, Any]]
    card: Callable[[str, list[dict[str, Any]], dict[str, Any] | None], str]


def publish(
    output: Storage,
    config: OutputConfig,
    kind: Kind | None = None,
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
    kind = kind or CORPUS
    finished: list[int] = []
    while True:
        state = read_state(output)
        if state.lost:
            return Published(tuple(finished), state.lost, None)
        if state.unfinished:
            partition = state.unfinished[0]
            damaged = _finish(output, config, kind, partition)
            if damaged:
                _drop(output, damaged, state)
                return Published(tuple(finished), tuple(damaged), None)
            finished.append(partition.number)
            continue
        if not state.committed:
            if state.partitions:
                write_card(output, config.title, kind.card)  # one who died may have left an outdated one
            if not config.keep_units:
                output.delete([unit.path for unit in state.stale])
            return Published(tuple(finished), (), None)
        plan, damaged = _plan(output, config, kind, state, bad_shards)
        sizes = output.sizes("units") if damaged else {}
        if any(sizes.get(f"{unit.name}.parquet") != state.sizes[unit] for unit in damaged):
            continue  # not damaged: others have published it, or made it again, since we looked
        if damaged:
            _drop(output, damaged, state)
            return Published(tuple(finished), tuple(damaged), None)
        share = plan["num_quarantined"] / plan["num_rows"]
        too_many = share > max_quarantined_fraction and not accept_quarantined
        refusal = _withheld(plan, max_quarantined_fraction) if too_many else kind.refusal(plan)
        if refusal:
            if not state.partitions:  # without a card `datasets` would take the units for the rows
                write_card(output, config.title, kind.card)
            return Published(tuple(finished), (), refusal)
        folder = partition_folder(output, plan["number"])
        output.create(f"{folder}/plan.json", json.dumps(plan).encode())  # or another's stands


def _drop(output: Storage, damaged: list[Unit], state: State) -> None:
    """Delete damaged units, so that they are made again. Raises ConfigError where one stays, which a store that deletes
    many at once may do without an error: it would be found damaged for ever."""
    output.delete([unit.path for unit in damaged])
    sizes = output.sizes("units")
    for unit in damaged:
        if unit in state.sizes and sizes.get(f"{unit.name}.parquet") == state.sizes[unit]:
            raise ConfigError(
                f"{output.url}/{unit.path} is damaged and cannot be deleted, so it cannot be made again: see to the "
                "rights, or delete it by hand"
            )


def _withheld(plan: dict[str, Any], most: float) -> str:
    causes = ", ".join(f"{count} {cause}" for cause, count in sorted(plan["causes"].items()))
    return (
        f"{plan['num_quarantined']} of {plan['num_rows']} rows are quarantined ({causes}), more than "
        f"run.max_quarantined_fraction={most:g} allows; nothing is published. run.accept_quarantined=true publishes it"
    )


# --- the plan -------------------------------------------------------------------------------------------------------


def _plan(
    output: Storage, config: OutputConfig, kind: Kind, state: State, bad_shards: tuple[BadShard, ...]
) -> tuple[dict[str, Any], list[Unit]]:
    """The next partition's plan, and the units that are damaged (then there is no plan).

    One partition, one making: of units that differ in fingerprint, as two jobs at once may leave them, the plan takes
    those of the oldest run's; the others stay for the partitions after it.
    """

    def facts_of(unit: Unit) -> dict[str, Any] | None:
        try:
            return unit_facts(output, unit, state.sizes[unit])
        except (Damaged, FileNotFoundError):
            return None

    read = list(concurrently(facts_of, state.committed))
    damaged = [unit for unit, facts in read if facts is None]
    if damaged:
        return {}, damaged
    oldest = min((found for _, found in read if found), key=lambda found: found["run"])["fingerprint"]
    named = {unit: found for unit, found in read if found and found["fingerprint"] == oldest}
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
        "parts": [_part(kind, held, facts) for held in _cut(list(facts), state, config.part_mib << 20)],
        **kind.summed(list(facts.values())),
    }
    return plan, []


def _part(kind: Kind, held: list[Unit], facts: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
    names = {name for unit in held for name in kind.names(facts[unit])}
    return {"units": [unit.name for unit in held], "names": sorted(names)}


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


def _finish(output: Storage, config: OutputConfig, kind: Kind, partition: Partition) -> list[Unit]:
    """Carry out a plan: parts, quarantine parts, manifest, card, `_SUCCESS`. Returns damaged units, and then stops.

    A unit that is damaged now and made again may come out with other rows quarantined. What decides is therefore the
    corpus part, once it is there: it says which rows it leaves out, and the quarantine part holds exactly those.
    """
    folder, plan = partition_folder(output, partition.number), partition.plan
    corpus, quarantine = [], []
    num_left_out = 0
    try:
        for number, part in enumerate(plan["parts"]):
            found = [Unit.named(name) for name in part["units"]]
            left_out = {unit: [(unit.start, unit.stop)] for unit in found}
            for name in part["names"]:
                path = f"{folder}/{name}-{number:05d}.parquet"
                record, left_out = _write_corpus_part(output, kind, name, path, found)
                corpus.append(record)
            if any(left_out.values()):
                path = f"{kind.left_out}/run={partition.number:06d}/part-{number:05d}.parquet"
                quarantine.append(_write_quarantine_part(output, kind, path, left_out))
            num_left_out += sum(stop - start for ranges in left_out.values() for start, stop in ranges)
    except _DamagedUnit as damaged:
        if output.exists(f"{folder}/_SUCCESS"):  # another publisher was faster and has dropped the units since
            return []
        return [damaged.unit]
    if not output.exists(f"{folder}/manifest.json"):
        manifest = _manifest(output, kind, partition, corpus, quarantine, num_left_out)
        output.create(f"{folder}/manifest.json", json.dumps(manifest).encode())
    write_card(output, config.title, kind.card)
    output.create(f"{folder}/_SUCCESS", b"")
    if not config.keep_units:
        output.delete([unit.path for unit in partition.units])
    return []


class _DamagedUnit(Exception):
    def __init__(self, unit: Unit) -> None:
        self.unit = unit


def _write_corpus_part(
    output: Storage, kind: Kind, name: str, path: str, found: list[Unit]
) -> tuple[dict[str, Any], dict[Unit, units.Ranges]]:
    """Create a corpus part, or leave the one that is there. Returns its record and the rows that it leaves out."""
    left_out: dict[str, units.Ranges] = {}

    def ok_rows() -> Iterator[pa.Table]:
        for unit, table in concurrently(partial(_read_unit, output), found, UNITS_AHEAD):
            rows = pc.indices_nonzero(pc.not_equal(table["status"], "ok")).to_pylist()
            left_out[unit.name] = units.merged((unit.start + row, unit.start + row + 1) for row in rows)
            yield kind.rows(table.filter(pc.equal(table["status"], "ok")) if rows else table, name)

    if not output.exists(path):
        output.create_file(path, lambda scratch: _write(scratch, ok_rows(), lambda: {LEFT_OUT_KEY: left_out}))
    record, metadata = _described(output, path)
    held = json.loads(metadata[LEFT_OUT_KEY])
    return record, {unit: [(start, stop) for start, stop in held[unit.name]] for unit in found}


def _write_quarantine_part(
    output: Storage, kind: Kind, path: str, left_out: dict[Unit, units.Ranges]
) -> dict[str, Any]:
    """Create a quarantine part, or leave the one that is there. Returns its record."""

    def quarantined_rows() -> Iterator[pa.Table]:
        for unit, ranges in left_out.items():
            if ranges:
                table = _read_unit(output, unit)
                rows = [row - unit.start for start, stop in ranges for row in range(start, stop)]
                yield kind.left_out_rows(unit, table.take(rows))

    if not output.exists(path):
        output.create_file(path, lambda scratch: _write(scratch, quarantined_rows(), dict))
    return _described(output, path)[0]


def _write(path: Path, tables: Iterator[pa.Table], metadata: Callable[[], dict[bytes, Any]]) -> None:
    """Write a part; `metadata` is asked for when all tables have come."""
    writer: pq.ParquetWriter | None = None
    for table in _row_groups(tables):
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table)
    if writer is None:
        raise ValueError(f"{path.name} has no unit")
    writer.add_key_value_metadata({key: json.dumps(value) for key, value in metadata().items()})
    writer.close()


def _described(output: Storage, path: str) -> tuple[dict[str, Any], dict[bytes, bytes]]:
    """A part as the manifest records it, and its key-value metadata."""
    told = output.checksum(path)
    footer, _ = read_footer(output.fs, output.path(path), told["num_bytes"])
    return {"path": path, "num_rows": footer.num_rows, **told}, footer.metadata or {}


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
    if held:
        yield pa.concat_tables(held)


def _read_unit(output: Storage, unit: Unit) -> pa.Table:
    """A unit's rows, pages and columns verified, each of its input rows exactly once. Raises _DamagedUnit."""
    try:
        raw = output.fs.open(output.path(unit.path))
    except FileNotFoundError as error:
        raise _DamagedUnit(unit) from error
    with raw:
        file = Watched(raw)
        try:
            parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"), page_checksum_verification=True)
            table = parquet.read(use_threads=False)  # units are small, and several are read at the same time
            sealed_facts(unit, table.schema.metadata or {}, table.schema)
        except Damaged as error:
            raise _DamagedUnit(unit) from error
        except Exception as error:
            if file.error is not None:
                raise file.error from None
            if not is_damage(error):
                raise
            raise _DamagedUnit(unit) from Damaged(first_line(error))
    if table["source"].combine_chunks().field("row").to_pylist() != list(range(unit.start, unit.stop)):
        raise _DamagedUnit(unit)
    return table.replace_schema_metadata(None)


def _kept(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name not in schema.UNIT.names]


def _ok_rows(table: pa.Table, name: str) -> pa.Table:
    kept = _kept(table)
    source = pc.coalesce(table["published_source"], table["source"])
    table = table.set_column(table.column_names.index("source"), "source", source)
    rows = table.select([*schema.CORPUS.names, *kept])
    return rows.cast(pa.schema([*schema.CORPUS, *(table.schema.field(name) for name in kept)]))


def _quarantined_rows(unit: Unit, rows: pa.Table) -> pa.Table:
    problem = rows["problem"].combine_chunks().fill_null(MADE_AGAIN)
    columns = {name: rows[name] for name in rows.column_names}
    columns["unit"] = pa.array([unit.name] * rows.num_rows, pa.string())
    columns.update({field.name: problem.field(field.name) for field in PROBLEM})
    return pa.table({name: columns[name] for name in schema.QUARANTINE.names}).cast(schema.QUARANTINE)


def _manifest(
    output: Storage,
    kind: Kind,
    partition: Partition,
    corpus: list[dict[str, Any]],
    quarantine: list[dict[str, Any]],
    num_left_out: int,
) -> dict[str, Any]:
    plan = partition.plan
    causes: Counter[str] = Counter()
    for part in quarantine:
        with output.fs.open(output.path(part["path"])) as file:
            causes.update(pq.read_table(file, columns=["cause"])["cause"].to_pylist())
    num_ok = plan["num_rows"] - num_left_out
    if causes.total() != num_left_out:
        raise ValueError(f"{num_ok} ok + {causes.total()} left out rows are not the {plan['num_rows']} that came in")
    num_made = sum(part["num_rows"] for part in corpus)
    if num_made != plan.get("num_made", num_ok):
        raise ValueError(f"the parts hold {num_made} rows, not {plan.get('num_made', num_ok)}")
    before = read_state(output)
    rows = units.add({}, partition.units)
    published = units.add(before.published, partition.units)
    complete = [
        record
        for record in plan["shards"]
        if not units.missing(0, sum(record["row_groups"]), published.get((record["key"], 0), []))
    ]
    return {
        **{key: plan[key] for key in ("number", "num_rows", "runs", "fingerprints", "bad_shards")},
        "num_ok": num_ok,
        "num_quarantined": causes.total(),
        "causes": dict(causes),
        "num_units": len(partition.units),
        **kind.finished(output, plan, corpus),
        "published_at": time.time(),
        output.partitions: corpus,
        kind.left_out: quarantine,
        "rows": coverage_record(rows),
        "finished_shards": complete,
    }


def _told_of_corpus(output: Storage, plan: Mapping[str, Any], corpus: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "num_repeated_ids": _num_repeated_ids(output, corpus),
        "rewards": mean_rewards(output, corpus),
        **{key: plan.get(key, {}) for key in ("reward_notes", "unscored")},  # plans of earlier versions have none
    }


def _num_repeated_ids(output: Storage, corpus: list[dict[str, Any]]) -> int:
    """Rows whose prompt_id an earlier row of the partition has too, by 64-bit hashes: 8 bytes a row."""
    hashes = [np.empty(0, np.uint64)]
    for part in corpus:
        with output.fs.open(output.path(part["path"])) as file:
            for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE, columns=["prompt_id"]):
                hashes.append(pd.util.hash_array(batch["prompt_id"].to_numpy(zero_copy_only=False)))
    found = np.concatenate(hashes)
    return len(found) - len(np.unique(found))


CORPUS = Kind(
    left_out="quarantine",
    names=lambda facts: ["part"] if facts["num_quarantined"] < facts["num_rows"] else [],
    rows=_ok_rows,
    left_out_rows=_quarantined_rows,
    summed=scored.summed,
    refusal=lambda plan: None,
    finished=_told_of_corpus,
    card=corpus_card,
)
"""A corpus of aligned answers; the rows that are not ok are the quarantine."""
