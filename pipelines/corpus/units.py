"""Units: their names, which of them cover a shard without overlap, and what is left of it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

Ranges = list[tuple[int, int]]
"""Half-open row ranges [start, stop) of one shard version: sorted, disjoint and not touching."""

_NAME = re.compile(r"([0-9a-f]{12})-(\d{10})-(\d{10})(?:-r(\d+))?")


@dataclass(frozen=True, order=True)
class Unit:
    """Rows [start, stop) of one shard version: the amount of work that is committed as one object.

    Attributes:
        shard: key of the shard version, 12 hex digits.
        start, stop: rows of the shard, counted from 0.
        retry: 0 for the first pass over these rows; n for their nth deliberate retry after a quarantine was published.
    """

    shard: str
    start: int
    stop: int
    retry: int = 0

    @property
    def name(self) -> str:
        """Sorts by shard and row: `0123456789ab-0000000256-0000000512`, with `-r1` for a retry."""
        name = f"{self.shard}-{self.start:010d}-{self.stop:010d}"
        return f"{name}-r{self.retry}" if self.retry else name

    @property
    def path(self) -> str:
        return f"units/{self.name}.parquet"

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @classmethod
    def parse(cls, name: str) -> "Unit | None":
        """The unit of a name or file name; None for anything else."""
        match = _NAME.fullmatch(name.removesuffix(".parquet"))
        if match is None:
            return None
        shard, start, stop, retry = match.groups()
        return cls(shard, int(start), int(stop), int(retry or 0))

    @classmethod
    def named(cls, name: str) -> "Unit":
        """The unit of a name that must be one, in a plan or a part: there a foreign name would be rows left out."""
        unit = cls.parse(name)
        if unit is None:
            raise ValueError(f"{name!r} is not a unit name")
        return unit


Coverage = dict[tuple[str, int], Ranges]
"""(shard key, retry) -> the rows that are done."""


def cover(units: Iterable[Unit], published: Coverage) -> list[Unit]:
    """The units that count: sorted, without overlap among themselves or with `published`.

    Two jobs that cut a shard differently at the same time may commit units that overlap. Everyone who looks at the
    same units must then agree on which of them count: the published ones always; after them, from the first row on,
    each unit that overlaps none before it, the longer of two with one start. Rows of a unit that does not count and
    that no other holds are planned again; those new units overlap none that counts, so they change no earlier choice.
    """
    chosen: list[Unit] = []
    at: tuple[str, int] | None = None
    reached = 0
    for unit in sorted(units, key=lambda u: (u.shard, u.retry, u.start, -u.stop)):
        if (unit.shard, unit.retry) != at:
            at, reached = (unit.shard, unit.retry), 0
        if unit.start >= reached and not overlaps(unit, published.get(at, [])):
            chosen.append(unit)
            reached = unit.stop
    return chosen


def overlaps(unit: Unit, ranges: Ranges) -> bool:
    return any(start < unit.stop and unit.start < stop for start, stop in ranges)


def add(coverage: Coverage, units: Iterable[Unit]) -> Coverage:
    """`coverage` and the rows of `units`, merged."""
    parts: dict[tuple[str, int], Ranges] = {}
    for unit in units:
        parts.setdefault((unit.shard, unit.retry), []).append((unit.start, unit.stop))
    return {key: merged([*coverage.get(key, []), *parts.get(key, [])]) for key in {**coverage, **parts}}


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same rows as sorted, disjoint ranges."""
    out: Ranges = []
    for start, stop in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        elif stop > start:
            out.append((start, stop))
    return out


def missing(start: int, stop: int, done: Ranges) -> Ranges:
    """What of [start, stop) is not in `done`."""
    gaps: Ranges = []
    for done_start, done_stop in done:
        if done_stop <= start:
            continue
        if done_start >= stop:
            break
        if done_start > start:
            gaps.append((start, done_start))
        start = max(start, done_stop)
    if start < stop:
        gaps.append((start, stop))
    return gaps


def cut(start: int, stop: int, unit_rows: int) -> Ranges:
    """[start, stop) cut into ranges of at most `unit_rows` rows."""
    return [(at, min(at + unit_rows, stop)) for at in range(start, stop, unit_rows)]
