"""The plan of a job: the complement of what is done, cut into units."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow.parquet as pq

from actors.contract import ConfigError
from pipelines.corpus import units
from pipelines.corpus.commit import unit_facts
from pipelines.corpus.parquet import Damaged
from pipelines.corpus.read import Span
from pipelines.corpus.shards import BadShard, Input, Listed, Shard, ShardsConfig, shard_of
from pipelines.corpus.state import State
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Coverage, Unit


@dataclass(frozen=True)
class Plan:
    """What a job is going to do.

    Attributes:
        spans: pending units by row group, in shard and row order.
        num_shards: shards listed; num_finished of them are published and were not opened.
        num_done_rows: rows of opened shards that are committed or published already.
        bad_shards: shards of which no row can be read.
        kept_types: Arrow type of each kept column, by name.
    """

    spans: tuple[Span, ...]
    num_shards: int
    num_finished: int
    num_done_rows: int
    bad_shards: tuple[BadShard, ...]
    kept_types: dict[str, str]

    @property
    def num_units(self) -> int:
        return sum(len(span.units) for span in self.spans)

    @property
    def num_rows(self) -> int:
        return sum(span.num_rows for span in self.spans)


def make_plan(
    source: Input,
    config: ShardsConfig,
    output: Storage,
    state: State,
    *,
    unit_rows: int,
    limit: int | None = None,
    retry_quarantined: str | None = None,
    kept_types: dict[str, str] | None = None,
) -> Plan:
    """Plan the rows that are not done.

    Reads the listing of the input and the footers of shards that are not finished; no row of any shard.

    Args:
        limit: plan whole units until they hold this many rows; None: all.
        retry_quarantined: plan, besides, the published quarantined rows with this cause again.
        kept_types: the kept columns' types that earlier runs fixed.

    Raises ConfigError where the input is not what earlier runs read.
    """
    listing = source.listing()
    finished = state.finished_shards
    opened = [listed for listed in listing if listed not in finished]
    shards, bad, types = source.footers(opened, config, kept_types or {})
    if config.on_changed_shard == "fail":
        _refuse_changed(source, shards, output, state)
    if bad and len(bad) == len(listing):
        _refuse_unknown_column(bad, config)
    versions = {shard.key: shard for shard in [*(finished[each] for each in listing if each in finished), *shards]}
    done = _without(state.done, state.lost)
    pending = [unit for shard in shards for unit in _cut(shard, [(0, shard.num_rows)], done, unit_rows, state.lost)]
    num_done = sum(shard.num_rows for shard in shards) - sum(unit.num_rows for unit in pending)
    num_done -= sum(unit.num_rows for unit in state.lost if unit.retry == 0)
    pending = [*state.lost, *pending]  # first, whatever the limit: nothing is published without them
    if retry_quarantined is not None:
        pending.extend(_retries(output, state, versions, done, retry_quarantined, unit_rows))
    return Plan(
        spans=tuple(_spans(versions, _limited(pending, limit))),
        num_shards=len(listing),
        num_finished=len(listing) - len(opened),
        num_done_rows=num_done,
        bad_shards=tuple(bad),
        kept_types=types,
    )


def _without(coverage: Coverage, lost: Iterable[Unit]) -> Coverage:
    """`coverage` less the rows of units that a partition counts on but that are gone."""
    out = dict(coverage)
    for unit in lost:
        key = (unit.shard, unit.retry)
        out[key] = [gap for start, stop in out[key] for gap in units.missing(start, stop, [(unit.start, unit.stop)])]
    return out


def _cut(
    shard: Shard, wanted: units.Ranges, done: Coverage, unit_rows: int, exact: Iterable[Unit], retry: int = 0
) -> list[Unit]:
    """The wanted rows that are neither done nor in `exact`, as units that do not cross a row group."""
    made_elsewhere = [(unit.start, unit.stop) for unit in exact if (unit.shard, unit.retry) == (shard.key, retry)]
    held = units.merged([*done.get((shard.key, retry), []), *made_elsewhere])
    pending: list[Unit] = []
    first = 0
    for num_rows in shard.row_groups:
        for start, stop in wanted:
            for gap in units.missing(max(start, first), min(stop, first + num_rows), held):
                pending.extend(Unit(shard.key, *piece, retry) for piece in units.cut(*gap, unit_rows))
        first += num_rows
    return pending


def _spans(versions: dict[str, Shard], pending: list[Unit]) -> list[Span]:
    """The units by row group, in the order of the shards' paths and of rows."""
    by_shard: dict[str, list[Unit]] = {}
    for unit in pending:
        if unit.shard not in versions:
            raise ConfigError(f"unit {unit.name} must be made again, but its shard is no longer in the input as it was")
        by_shard.setdefault(unit.shard, []).append(unit)
    spans: list[Span] = []
    for key in sorted(by_shard, key=lambda key: (versions[key].listed.path, key)):
        shard = versions[key]
        groups = itertools.groupby(sorted(by_shard[key]), key=lambda unit: shard.row_group_of(unit.start))
        spans.extend(Span(shard, group, tuple(found)) for group, found in groups)
    return spans


def _limited(pending: list[Unit], limit: int | None) -> list[Unit]:
    """The first units that hold `limit` rows together, the last of them whole."""
    if limit is None:
        return pending
    before = itertools.accumulate((unit.num_rows for unit in pending), initial=0)
    return [unit for unit, rows in zip(pending, before, strict=False) if rows < limit]


def _refuse_unknown_column(bad: list[BadShard], config: ShardsConfig) -> None:
    """A column that no shard has is a mistake in the config, not in the shards."""
    (name, *others) = {shard.missing for shard in bad}
    if name is None or others:
        return
    reason = bad[0].reason.partition(": ")[2]
    raise ConfigError(f"input.{config.key_of(name)}: no shard has that column ({bad[0].path}: {reason})")


def _refuse_changed(source: Input, shards: list[Shard], output: Storage, state: State) -> None:
    """A path that was read before with another size, tag or footer is another shard under an old name."""
    known: dict[str, dict[str, Listed]] = {}
    for partition in state.partitions:
        for record in partition.plan["shards"]:
            known.setdefault(record["path"], {})[record["key"]] = shard_of(record).listed
    current = {shard.key for shard in shards}
    for unit in {unit.shard: unit for unit in state.committed if unit.shard not in current}.values():
        try:
            record = unit_facts(output, unit, state.sizes[unit])["shard"]
        except (Damaged, FileNotFoundError):
            continue
        known.setdefault(record["path"], {})[record["key"]] = shard_of(record).listed
    for shard in shards:
        before = known.get(shard.listed.path, {})
        if before and shard.key not in before:
            was, now = list(before.values())[-1], shard.listed
            raise ConfigError(
                f"shard {now.path} has changed since it was read ({was.size} bytes, tag {was.tag}; now {now.size} "
                f"bytes, tag {now.tag}); {source.changed_advice}"
            )


def _retries(
    output: Storage, state: State, versions: dict[str, Shard], done: Coverage, cause: str, unit_rows: int
) -> list[Unit]:
    """Published quarantined rows with `cause` that no later retry holds yet."""
    rows: dict[tuple[str, int], list[int]] = {}
    for partition in state.partitions:
        for part in partition.manifest["quarantine"] if partition.manifest else []:
            with output.fs.open(output.path(part["path"])) as file:
                table = pq.read_table(file, columns=["unit", "source", "cause"])
            for name, where, found in zip(*(table[column].to_pylist() for column in table.column_names), strict=True):
                if found == cause:
                    unit = Unit.named(name)
                    rows.setdefault((unit.shard, unit.retry + 1), []).append(where["row"])
    pending: list[Unit] = []
    for (key, retry), numbers in sorted(rows.items()):
        if key not in versions:
            raise ConfigError(f"run.retry_quarantined: shard version {key} is no longer in the input")
        wanted = units.merged((number, number + 1) for number in numbers)
        pending.extend(_cut(versions[key], wanted, done, unit_rows, state.lost, retry))
    return pending
