"""What is remembered of a unit that may kill its engine, its actor or its job: enough to try its rows ever more apart.

A note is one unit's at one stage. It is written when an engine dies, and before rows that are under suspicion are run:
whoever finds it after a death knows what ran. Plain overwriting is enough, for a unit is in one place at a time; and a
note that is lost costs time only.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

Rows = tuple[int, ...]


class Notes(Protocol):
    """Keeps notes where they outlive the job, as plain JSON values, by unit and stage. Nothing is raised."""

    def read(self, unit: str, stage: str) -> Any | None:
        """What is noted now."""
        ...

    def found(self, unit: str, stage: str) -> Any | None:
        """What was noted when the job began; costs nothing."""
        ...

    def write(self, unit: str, stage: str, note: Any) -> None: ...

    def forget(self, unit: str, stage: str) -> None: ...


@dataclass(frozen=True)
class Note:
    """How far the search for rows that kill has come.

    Attributes:
        groups: the rows of the unit that may still be run, parted: those of a group are run at the same time, and no
            other rows with them.
        running: whether the first group was running when this was written.
        kills: row -> times that something died while it ran alone.
        num_proofs: times in a row that an engine was asked something harmless first, and was not heard of again.
    """

    groups: tuple[Rows, ...]
    running: bool = False
    kills: dict[int, int] = field(default_factory=dict)
    num_proofs: int = 0

    @classmethod
    def of(cls, num_rows: int) -> "Note":
        """The first suspicion: nothing is known but that something died."""
        return cls((tuple(range(num_rows)),))

    @classmethod
    def parse(cls, value: Any, num_rows: int) -> "Note | None":
        """Undo `as_json`; None where it is none of a unit of so many rows, as one that a person has edited."""
        try:
            kills = {int(row): int(count) for row, count in value["kills"].items()}
            groups = tuple(tuple(map(int, group)) for group in value["groups"])
            note = cls(groups, bool(value["running"]), kills, int(value["num_proofs"]))
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        rows = sorted(row for group in note.groups for row in group)
        is_parted = len(set(rows)) == len(rows) and all(note.groups)
        return note if is_parted and {*rows, *kills} == {*range(num_rows)} else None

    def as_json(self) -> dict[str, Any]:
        kills = {str(row): count for row, count in self.kills.items()}
        groups = [list(group) for group in self.groups]
        return {"groups": groups, "running": self.running, "kills": kills, "num_proofs": self.num_proofs}

    def trying(self, group: Rows) -> "Note":
        """The note to be written before `group`, one of its groups, is run."""
        return replace(self, groups=(group, *(each for each in self.groups if each != group)), running=True)

    def after_death(self, max_attempts: int) -> "Note":
        """What it says after what ran has died: halves of a group, one kill more of a row that was alone."""
        if not self.running:
            return self
        first, *others = self.groups
        if len(first) > 1:
            middle = len(first) // 2
            return replace(self, groups=(first[:middle], first[middle:], *others), running=False)
        kills = {**self.kills, first[0]: self.kills.get(first[0], 0) + 1}
        again = [first] if kills[first[0]] < max_attempts else []
        return replace(self, groups=(*again, *others), running=False, kills=kills)

    def refined(self, running: Rows, waiting: list[Rows], kills: dict[int, int], max_attempts: int) -> "Note":
        """What it says while an engine's own search has come so far: all other rows stay grouped as they are."""
        kills = {**self.kills, **kills}
        taken = {row for row, count in kills.items() if count >= max_attempts}
        groups: list[Rows] = []
        for group in (running, *waiting, *self.groups):
            groups.append(tuple(row for row in dict.fromkeys(group) if row not in taken))
            taken.update(group)
        return replace(self, groups=tuple(filter(None, groups)), running=bool(groups[0]), kills=kills)


class Turns:
    """Units run side by side, but a suspected one by itself. For one event loop."""

    def __init__(self) -> None:
        self._gate = asyncio.Lock()
        self._inside = 0
        self._empty = asyncio.Event()

    @contextlib.asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        async with self._gate:
            self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._empty.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._gate:
            while self._inside:
                self._empty.clear()
                await self._empty.wait()
            yield
