"""What a person sees while a job runs, and the watchdog that never lets it hang in silence."""

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from tqdm import tqdm

from actors.board import Snapshot

POLL_S = 1.0
STALLED = 4
COLUMNS = 100  # of a terminal that does not tell its size


@dataclass
class Tally:
    """What the driver has counted: committed units and what was in them. One thread writes, another reads.

    Attributes:
        iterations: forward passes -> answers that took a parallel decoder so many.
        num_decoded: tokens of these answers.
        num_accepted: of them, those that were right guesses.
    """

    num_units: int = 0
    num_rows: int = 0
    num_quarantined: int = 0
    num_candidates: int = 0
    num_changed: int = 0
    iterations: Counter[int] = field(default_factory=Counter)
    num_decoded: int = 0
    num_accepted: int = 0

    def add(self, report: dict[str, Any]) -> None:
        """Count one row of `Committer`'s report."""
        self.num_units += 1
        self.num_rows += report["rows"]
        self.num_quarantined += report["quarantined"]
        self.num_candidates += report["candidates"]
        self.num_changed += report["changed"]
        self.iterations.update(report["iterations"])
        self.num_decoded += report["tokens"]
        self.num_accepted += report["accepted"]


@dataclass(frozen=True)
class PoolTotals:
    """All replicas of a pool together; `idle_s` is the time since any of them last changed."""

    num_rows: int
    num_failed: int
    num_tokens: int
    num_running: int
    num_waiting: int
    units: tuple[str, ...]
    states: tuple[str, ...]
    idle_s: float

    @property
    def has_tokens(self) -> bool:
        """Whether there are tokens to be told: rules, stored answers and judges elsewhere count none."""
        return self.num_tokens > 0 or self.num_rows == 0


def read_board(board: Any) -> dict[str, PoolTotals]:
    """The pools' totals, by pool name. `board` is the handle of an `actors.board.Board`."""
    found: dict[str, list[tuple[Snapshot, float]]] = ray.get(board.read.remote(), timeout=30)
    return {
        name: PoolTotals(
            num_rows=sum(snapshot.num_rows for snapshot, _ in replicas),
            num_failed=sum(snapshot.num_failed for snapshot, _ in replicas),
            num_tokens=sum(snapshot.num_tokens for snapshot, _ in replicas),
            num_running=sum(snapshot.num_running for snapshot, _ in replicas),
            num_waiting=sum(snapshot.num_waiting for snapshot, _ in replicas),
            units=tuple(unit for snapshot, _ in replicas for unit in snapshot.units),
            states=tuple(snapshot.state for snapshot, _ in replicas),
            idle_s=min(idle for _, idle in replicas),
        )
        for name, replicas in found.items()
    }


@contextlib.contextmanager
def shown(
    board: Any, tally: Tally, pools: dict[str, str], num_rows: int, *, log_every_s: float, stall_s: float
) -> Iterator[None]:
    """Show progress while the body runs: live bars on a terminal, elsewhere a line a pool every `log_every_s` seconds
    and at the end.

    `pools` has what each pool asks of the nodes, by its name.
    Ends the process with exit code 4, after a diagnosis, when nothing has moved for `stall_s` seconds.
    """
    show = _bars([*pools], num_rows) if sys.stderr.isatty() else _lines([*pools], num_rows, log_every_s)
    totals: dict[str, PoolTotals] = {}
    committed, moved_at = -1, time.monotonic()

    def idle_s() -> float:
        nonlocal totals, committed, moved_at
        try:
            totals = read_board(board)
        except (ray.exceptions.RayError, TimeoutError):
            totals = {}  # the board is coming back somewhere; silence still counts towards a stall
        now = time.monotonic()
        if tally.num_units != committed:
            committed, moved_at = tally.num_units, now
        show(totals, tally)
        return min([now - moved_at, *(pool.idle_s for pool in totals.values())])

    last = None
    try:
        with watched(idle_s, lambda: _diagnosis(totals, pools, tally), stall_s):
            yield
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            last = read_board(board)
    finally:
        show(last, tally, ended=True)


def _diagnosis(totals: dict[str, PoolTotals], pools: dict[str, str], tally: Tally) -> Iterator[str]:
    for name, ask in pools.items():
        pool = totals.get(name)
        if pool is None:
            yield f"{name}: no replica has started (asked for {ask})"
            continue
        yield (
            f"{name}: engines {', '.join(pool.states)}; last progress {pool.idle_s:.0f} s ago; {pool.num_running} "
            f"candidates running, {pool.num_waiting} waiting; units in flight: {', '.join(pool.units) or 'none'}"
        )
    yield f"{tally.num_units} units were committed; the same command resumes"


# --- the watchdog ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(idle_s: Callable[[], float], diagnosis: Callable[[], Iterable[str]], stall_s: float) -> Iterator[None]:
    """Ask every second, while the body runs, for how many seconds nothing has moved.

    Ends the process with exit code 4, after a diagnosis, when they are more than `stall_s`.
    """
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(POLL_S):
            idle = idle_s()
            if idle > stall_s:
                _give_up(idle, diagnosis())

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _give_up(idle_s: float, diagnosis: Iterable[str]) -> None:
    print(f"error: nothing has moved for {idle_s / 60:.1f} minutes (run.stall_minutes); giving up", file=sys.stderr)
    for line in diagnosis:
        print(f"  {line}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(STALLED)  # a hanging engine would hang an orderly shutdown too; Ray ends its processes when we are gone


# --- lines and bars -------------------------------------------------------------------------------------------------


class Show(Protocol):
    """Shows the pools' totals, None where they cannot be had; `ended` with the last ones, whenever that is."""

    def __call__(self, totals: dict[str, PoolTotals] | None, tally: Tally, *, ended: bool = False) -> None: ...


def _bars(pools: list[str], num_rows: int) -> Show:
    names = [*pools, "committed"]
    width = max(map(len, names))
    has_size = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # those of containers and scripts often have none
    bars = {
        name: tqdm(
            total=num_rows,
            desc=name.ljust(width),
            unit="row",
            position=place,
            smoothing=0.1,
            dynamic_ncols=has_size,
            ncols=None if has_size else COLUMNS,
            nrows=None if has_size else len(names) + 1,
        )
        for place, name in enumerate(names)
    }
    last = {name: (0, time.monotonic()) for name in pools}

    def show(totals: dict[str, PoolTotals] | None, tally: Tally, *, ended: bool = False) -> None:
        bars["committed"].n = tally.num_rows
        bars["committed"].set_postfix_str(f"{tally.num_quarantined} quarantined")
        for name, pool in (totals or {}).items():
            tokens, at = last[name]
            now = time.monotonic()
            rate = (pool.num_tokens - tokens) / max(now - at, 1e-9)
            last[name] = (pool.num_tokens, now)
            bars[name].n = min(pool.num_rows, num_rows)
            tokens_told = f"{rate:.0f} tokens/s, " if pool.has_tokens else ""
            bars[name].set_postfix_str(f"{tokens_told}{pool.num_running} in flight, {pool.num_failed} failed")
        if ended:
            for bar in bars.values():
                bar.close()

    return show


def _lines(pools: list[str], num_rows: int, every_s: float) -> Show:
    start = time.monotonic()
    shown_at = start
    before: dict[str, tuple[int, int]] = {}

    def show(totals: dict[str, PoolTotals] | None, tally: Tally, *, ended: bool = False) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if totals is None or not (ended or now - shown_at >= every_s):
            return
        if ended:
            shown_at = start  # rates of the whole job
            before.clear()
        span, shown_at = now - shown_at, now
        for name in pools:
            pool = totals.get(name)
            if pool is None or (not pool.num_rows and "running" not in pool.states):
                print(f"{name}: starting", file=sys.stderr)
                continue
            rows, tokens = before.get(name, (0, 0))
            before[name] = (pool.num_rows, pool.num_tokens)
            tokens_told = f"{(pool.num_tokens - tokens) / span:.0f} tokens/s, " if pool.has_tokens else ""
            print(
                f"{name}: {pool.num_rows}/{num_rows} rows, {(pool.num_rows - rows) / span:.1f} rows/s, "
                f"{tokens_told}{pool.num_running} in flight, "
                f"{pool.num_failed} failed, ETA {_eta(pool.num_rows, num_rows, now - start)}",
                file=sys.stderr,
            )
        print(
            f"committed: {tally.num_rows}/{num_rows} rows, {tally.num_quarantined} quarantined, "
            f"ETA {_eta(tally.num_rows, num_rows, now - start)}",
            file=sys.stderr,
            flush=True,
        )

    return show


def _eta(done: int, total: int, elapsed_s: float) -> str:
    if not done:
        return "unknown"
    left = int(elapsed_s * max(0, total - done) / done)
    return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
