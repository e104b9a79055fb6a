"""The board: where every replica of every pool says how far it is, for progress lines and the stall watchdog."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray

REPORT_EVERY_S = 1.0


@dataclass(frozen=True)
class Snapshot:
    """One replica's totals since it started.

    Attributes:
        num_rows: rows that left the pool here, failed ones included.
        num_failed: of these, rows that were or became quarantined here.
        num_tokens: tokens made.
        num_running, num_waiting: candidates in the engine, and those waiting for a place in it.
        units: names of the units in flight.
        state: `starting` until the engine is up, then `running`.
        life: tells the process from those in which Ray may start the same replica again.
    """

    num_rows: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    units: tuple[str, ...] = ()
    state: str = "starting"
    life: str = ""


@dataclass
class Replica:
    """What the board keeps of one replica: its last snapshot, when that last changed, its totals of lives before, and
    when its engine was first up."""

    snapshot: Snapshot = field(default_factory=Snapshot)
    changed_at: float = field(default_factory=time.monotonic)
    before: Snapshot = field(default_factory=Snapshot)
    running_at: float | None = None

    def report(self, snapshot: Snapshot) -> None:
        if snapshot == self.snapshot:
            return
        if snapshot.life != self.snapshot.life:
            self.before = self.totals()  # Ray has started the actor again, which counts from 0
        self.snapshot, self.changed_at = snapshot, time.monotonic()
        if self.running_at is None and snapshot.state == "running":
            self.running_at = self.changed_at

    def totals(self) -> Snapshot:
        """The last snapshot, with what was counted in lives before it."""
        return replace(
            self.snapshot,
            num_rows=self.before.num_rows + self.snapshot.num_rows,
            num_failed=self.before.num_failed + self.snapshot.num_failed,
            num_tokens=self.before.num_tokens + self.snapshot.num_tokens,
        )


class Board:
    """A Ray actor that lives as long as the job. Reports are whole snapshots: one lost or come twice does no harm."""

    def __init__(self) -> None:
        self._pools: dict[str, dict[str, Replica]] = {}

    def report(self, pool: str, replica: str, snapshot: Snapshot) -> None:
        self._pools.setdefault(pool, {}).setdefault(replica, Replica()).report(snapshot)

    def read(self) -> dict[str, list[tuple[Snapshot, float]]]:
        """Pool -> (snapshot, seconds since it last changed) of each replica there ever was."""
        now = time.monotonic()
        return {
            pool: [(replica.totals(), now - replica.changed_at) for replica in replicas.values()]
            for pool, replicas in self._pools.items()
        }

    def units_of(self, pool: str, replica: str) -> tuple[str, ...]:
        """Units that were in flight on a replica when it last reported; none where it never has."""
        found = self._pools.get(pool, {}).get(replica)
        return () if found is None else found.snapshot.units

    def running_s(self) -> float:
        """Seconds since every pool had an engine that was up; 0 where one has none."""
        firsts = [
            min((replica.running_at for replica in replicas.values() if replica.running_at is not None), default=None)
            for replicas in self._pools.values()
        ]
        return 0.0 if not firsts or None in firsts else time.monotonic() - max(at for at in firsts if at is not None)


def units_before(board: Any, pool: str) -> tuple[str, ...]:
    """What was in flight on this actor when it died and Ray started it again; nothing in its first life."""
    found: tuple[str, ...] = ray.get(board.units_of.remote(pool, ray.get_runtime_context().get_actor_id()))
    return found


class Reporter:
    """Reports for one replica, from a thread of its own: a busy or hanging engine cannot keep it from speaking."""

    def __init__(self, board: Any, pool: str, snapshot: Callable[[], Snapshot]) -> None:
        self._board, self._pool, self._snapshot = board, pool, snapshot
        self._replica = ray.get_runtime_context().get_actor_id()
        self._turn = threading.Lock()
        threading.Thread(target=self._run, name="board-reporter", daemon=True).start()

    def report(self) -> Any:
        """Report now. Returns what to await before an end that the thread might not live to report."""
        with self._turn:  # what is sent last must be what was seen last
            return self._board.report.remote(self._pool, self._replica, self._snapshot())

    def _run(self) -> None:
        last: Snapshot | None = None
        while True:
            snapshot = self._snapshot()
            if snapshot != last:
                self.report()
                last = snapshot
            time.sleep(REPORT_EVERY_S)
