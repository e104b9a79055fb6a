"""What the output root says has been done: units, partitions and runs, read anew from storage each time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.corpus import units
from pipelines.corpus.shards import Listed, Shard, shard_of
from pipelines.corpus.storage import Storage, concurrently
from pipelines.corpus.units import Coverage, Unit

KINDS = {"corpus": "a corpus", "preferences": "a preference dataset"}
"""What a root may hold, by the name of the folder of its partitions."""


@dataclass(frozen=True)
class Partition:
    """One `run=` partition.

    Attributes:
        number: counted from 1.
        plan: plan.json: which units, cut into which parts.
        manifest: manifest.json; None until the partition is finished, that is until `_SUCCESS` is there.
    """

    number: int
    plan: Mapping[str, Any]
    manifest: Mapping[str, Any] | None

    @property
    def units(self) -> list[Unit]:
        """The units of the plan, in its order. Raises ValueError for a name that is none."""
        return [Unit.named(name) for part in self.plan["parts"] for name in part["units"]]


@dataclass(frozen=True)
class State:
    """The output root at one moment.

    Attributes:
        committed: units that count and that no partition holds, sorted.
        sizes: bytes of each unit file, by unit.
        published: rows that a partition holds or has planned to hold; they are done for good.
        lost: units of an unfinished partition whose file is gone: they must be made again, exactly.
        stale: unit files that do not count: published by now, or overlapping a unit that counts.
        partitions: by number.
    """

    committed: tuple[Unit, ...]
    sizes: Mapping[Unit, int]
    published: Coverage
    lost: tuple[Unit, ...]
    stale: tuple[Unit, ...]
    partitions: tuple[Partition, ...]

    @property
    def done(self) -> Coverage:
        """Rows that are published (planned ones, even lost ones, count) or committed in a unit that counts."""
        return units.add(self.published, self.committed)

    @property
    def unfinished(self) -> tuple[Partition, ...]:
        return tuple(partition for partition in self.partitions if partition.manifest is None)

    @property
    def finished_shards(self) -> dict[Listed, Shard]:
        """Shards whose every row is published, as listed then: their footers need not be read again."""
        return {
            shard.listed: shard
            for partition in self.partitions
            if partition.manifest
            for record in partition.manifest["finished_shards"]
            for shard in [shard_of(record)]
        }


def kinds_of(root: Storage) -> set[str]:
    """The keys of KINDS of which the root has partitions, finished or not."""
    return {name for name in KINDS if any(each.startswith("run=") for each in root.folders(name))}


def partition_folder(output: Storage, number: int) -> str:
    return f"{output.partitions}/run={number:06d}"


def read_state(output: Storage) -> State:
    """The state. What looks lost is looked for again: others may have committed and planned it between two listings."""
    state = _read_state(output)
    while state.lost:
        again = _read_state(output)
        if again.lost == state.lost:
            return again
        state = again
    return state


def _read_state(output: Storage) -> State:
    """Units first, partitions second: a unit that is published in between is then seen twice, never not at all.

    A file in `units/` whose name is no unit's is a person's own and is left alone; in a plan such a name is an error.
    """
    sizes = {unit: size for name, size in output.sizes_by_hex("units").items() if (unit := Unit.parse(name))}
    partitions = _partitions(output)
    finished = [unit for each in partitions if each.manifest for unit in _manifest_units(each.manifest)]
    planned = [unit for partition in partitions if partition.manifest is None for unit in partition.units]
    published = units.add({}, [*finished, *planned])
    counting = units.cover(sizes, published)
    keep = {*counting, *planned}
    return State(
        committed=tuple(counting),
        sizes=sizes,
        published=published,
        lost=tuple(unit for unit in planned if unit not in sizes),
        stale=tuple(unit for unit in sizes if unit not in keep),
        partitions=partitions,
    )


def coverage_record(covered: Coverage) -> list[dict[str, Any]]:
    """A coverage as manifests keep it: merged row ranges, so that it stays small however many units there were."""
    return [{"shard": shard, "retry": retry, "ranges": ranges} for (shard, retry), ranges in sorted(covered.items())]


def _manifest_units(manifest: Mapping[str, Any]) -> list[Unit]:
    return [
        Unit(each["shard"], start, stop, each["retry"]) for each in manifest["rows"] for start, stop in each["ranges"]
    ]


def _partitions(output: Storage) -> tuple[Partition, ...]:
    numbers = sorted(
        int(name[4:]) for name in output.folders(output.partitions) if name.startswith("run=") and name[4:].isdigit()
    )
    return tuple(found for _, found in concurrently(lambda number: _partition(output, number), numbers) if found)


def _partition(output: Storage, number: int) -> Partition | None:
    folder = partition_folder(output, number)
    try:
        plan = json.loads(output.read(f"{folder}/plan.json"))
    except FileNotFoundError:
        return None  # a local folder made by a writer that died before it could create the plan
    finished = output.exists(f"{folder}/_SUCCESS")
    return Partition(number, plan, json.loads(output.read(f"{folder}/manifest.json")) if finished else None)


def manifests(output: Storage) -> list[dict[str, Any]]:
    """Every manifest there is, in partition order: of finished partitions, and of one whose `_SUCCESS` is to come."""

    def manifest(name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(output.read(f"{output.partitions}/{name}/manifest.json"))
        except FileNotFoundError:
            return None
        return found

    return [found for _, found in concurrently(manifest, output.folders(output.partitions)) if found]
