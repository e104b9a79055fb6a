"""The lease on an output root: keeps two jobs apart, politely. Safety does not rest on it."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from actors.contract import ConfigError, TransientError
from pipelines.corpus.storage import Storage

HEARTBEATS_PER_TTL = 6
POLL_S = 0.25


class Held(Exception):
    """Another job holds the root and is alive; the message names it."""


class Lease:
    """A context manager: inside, this process is the one that writes to the root, and says so every few seconds.

    `leases/<epoch>.json` is created exclusively; whoever creates the highest epoch holds the root until
    `leases/<epoch>.released` is there. Its heartbeat is `leases/<epoch>.heartbeat`, overwritten. A newcomer takes over
    at once from a process that is certainly dead (same boot, same pid namespace, pid gone), and otherwise watches for
    up to `ttl_s` seconds: a heartbeat that changes means refusal, none means takeover.

    Args:
        output: the output root.
        ttl_s: how long a holder may be silent before it counts as dead.
        announce: told, once, that there is something to wait for.
    """

    def __init__(self, output: Storage, ttl_s: float, announce: Callable[[str], None]) -> None:
        self._output, self._ttl_s, self._announce = output, ttl_s, announce
        self._epoch = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)

    @property
    def is_first(self) -> bool:
        """Whether nobody has held the root before."""
        return self._epoch == 1

    def __enter__(self) -> "Lease":
        """Raises Held."""
        mine = json.dumps({**_identity(), "nonce": uuid.uuid4().hex, "taken_at": time.time()}).encode()
        while True:
            latest = self._latest()
            if latest:
                self._wait_for(latest)
            self._epoch = latest + 1
            if self._output.create(f"leases/{self._epoch:06d}.json", mine):
                break
        self._heartbeat(self._output)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lease, if the store lets it: the body's own end, good or bad, is never hidden by that."""
        self._stop.set()
        self._thread.join()
        patient = self._output.within(0 if error else self._ttl_s)  # no longer than the next job would wait for it
        try:
            patient.create(f"leases/{self._epoch:06d}.released", b"")
        except (TransientError, ConfigError) as away:
            self._announce(f"the lease on {self._output.url} is not released ({away}); it runs out by itself")

    def _latest(self) -> int:
        names = self._output.sizes("leases")
        return max((int(name[:6]) for name in names if name.endswith(".json")), default=0)

    def _wait_for(self, epoch: int) -> None:
        """Return when `epoch` no longer holds the root."""
        holder = json.loads(self._output.read(f"leases/{epoch:06d}.json"))
        deadline = time.monotonic() + self._ttl_s
        seen = self._pulse(epoch)
        announced = False
        while not self._output.exists(f"leases/{epoch:06d}.released") and not _certainly_dead(holder):
            if self._pulse(epoch) != seen:
                raise Held(f"{_name(holder)} is writing to {self._output.url}; run again when it has ended")
            if time.monotonic() > deadline:
                return
            if not announced:
                self._announce(
                    f"{_name(holder)} holds {self._output.url}; waiting up to {self._ttl_s:g} s for a sign of life"
                )
                announced = True
            time.sleep(POLL_S)

    def _pulse(self, epoch: int) -> bytes:
        try:
            return self._output.read(f"leases/{epoch:06d}.heartbeat")
        except FileNotFoundError:
            return b""

    def _heartbeat(self, output: Storage) -> None:
        output.put(f"leases/{self._epoch:06d}.heartbeat", f"{time.time():.3f} {uuid.uuid4().hex}".encode())

    def _beat(self) -> None:
        while not self._stop.wait(self._ttl_s / HEARTBEATS_PER_TTL):
            try:
                self._heartbeat(self._output.within(0))
            except Exception:  # a store that is away for a moment, whatever that looks like
                continue  # the next beat tries again, and safety is elsewhere


def _identity() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "scope": _scope()}


def _scope() -> str | None:
    """What a pid is unique within: this boot of this kernel and this pid namespace. None where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When the process started, in ticks since boot, for pids come round again; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _certainly_dead(holder: dict[str, Any]) -> bool:
    scope = _scope()
    return scope is not None and holder["scope"] == scope and _started(holder["pid"]) != holder["started"]


def _name(holder: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["taken_at"]))
    return f"another job (pid {holder['pid']} on {holder['host']}, since {since})"
