"""The lease: a second job waits, then refuses a living first one, and takes over from a dead or silent one."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.contract import TransientError
from pipelines.corpus import lease as lease_module
from pipelines.corpus.lease import Held, Lease
from pipelines.corpus.storage import Storage

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "POLL_S", 0.02)


def lease(output: Storage, ttl_s: float = 30.0, told: list[str] | None = None) -> Lease:
    return Lease(output, ttl_s, announce=(told if told is not None else []).append)


def holds(output: Storage, **identity: Any) -> None:
    """Write the lease of some holder."""
    record = {**lease_module._identity(), "nonce": "n", "taken_at": 0.0, **identity}
    assert output.create("leases/000001.json", json.dumps(record).encode())


def seconds_to_take(output: Storage, ttl_s: float, told: list[str] | None = None) -> float:
    started = time.monotonic()
    with lease(output, ttl_s, told):
        return time.monotonic() - started


def test_a_second_job_waits_and_refuses_on_a_heartbeat_naming_the_first(output: Storage) -> None:
    told: list[str] = []
    with lease(output, ttl_s=3.0):
        with pytest.raises(Held) as refusal, lease(output, 3.0, told):
            raise AssertionError("two hold the root")
        assert f"pid {os.getpid()} on {socket.gethostname()}" in str(refusal.value)
        assert output.url in str(refusal.value)
        assert len(told) == 1
        assert "waiting up to 3 s" in told[0]


def test_a_released_lease_is_taken_at_once_and_silently(output: Storage) -> None:
    told: list[str] = []
    with lease(output) as held:
        assert held.is_first
    with lease(output, 30, told) as held:
        assert not held.is_first
    assert seconds_to_take(output, 30, told) < 5
    assert told == []
    assert [name for name in output.sizes("leases") if name.endswith(".json")] == [
        "000001.json", "000002.json", "000003.json"
    ]  # fmt: skip


def test_a_job_that_fails_releases_its_lease(local_output: Storage) -> None:
    with pytest.raises(RuntimeError, match="mistake"), lease(local_output):
        raise RuntimeError("mistake")
    assert seconds_to_take(local_output, 30) < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "lease-heartbeat"]


def test_a_waiting_job_goes_on_as_soon_as_the_first_releases(output: Storage) -> None:
    first = lease(output, ttl_s=60.0).__enter__()
    releaser = threading.Timer(0.3, lambda: first.__exit__(None, None, None))
    releaser.start()
    assert 0.2 < seconds_to_take(output, 60) < 10
    releaser.join()


TAKE_AND_DIE = (
    "import os, sys; from pipelines.corpus.lease import Lease; from pipelines.corpus.storage import Storage\n"
    "Lease(Storage(sys.argv[1]), 30.0, print).__enter__(); print('held', flush=True); os._exit(1)"
)


def test_a_process_of_this_boot_that_is_dead_is_succeeded_at_once_even_before_its_parent_notices(
    local_output: Storage,
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", TAKE_AND_DIE, local_output.root], stdout=subprocess.PIPE, cwd=ROOT)
    assert dead.stdout is not None
    assert dead.stdout.read() == b"held\n"
    while Path(f"/proc/{dead.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.01)
    assert seconds_to_take(local_output, 30) < 5  # a zombie
    dead.wait()
    local_output.delete(["leases/000002.json", "leases/000002.released", "leases/000002.heartbeat"])
    assert seconds_to_take(local_output, 30) < 5  # gone


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_pid_that_came_round_again_is_another_process(local_output: Storage) -> None:
    holds(local_output, started="1")  # this very pid, but of a process that began with the machine
    assert seconds_to_take(local_output, 30) < 5


@pytest.mark.parametrize(
    "identity",
    [
        {"host": "elsewhere", "scope": "another boot", "pid": 1},
        {"host": "elsewhere", "scope": None},
        {"scope": "same host, another pid namespace", "pid": 2**22 + 1},
        {},
    ],
    ids=["another host", "a host that cannot tell", "another container", "alive but stuck"],
)
def test_a_silent_holder_that_may_be_alive_is_succeeded_only_after_the_ttl(
    local_output: Storage, identity: dict[str, Any]
) -> None:
    holds(local_output, **identity)
    told: list[str] = []
    assert 0.5 <= seconds_to_take(local_output, 0.5, told) < 10
    assert len(told) == 1


def test_a_silent_holder_is_succeeded_on_s3_too(s3_output: Storage) -> None:
    holds(s3_output, host="elsewhere", scope="another boot")
    assert 0.5 <= seconds_to_take(s3_output, 0.5) < 20


@pytest.mark.parametrize("before", ["nobody", "a dead process", "a silent host"])
def test_of_eight_newcomers_exactly_one_holds_the_root(output: Storage, before: str) -> None:
    if before == "a dead process":
        holds(output, started="1")
    elif before == "a silent host":
        holds(output, host="elsewhere", scope="another boot")
    ttl_s = 1.5
    barrier, all_done = threading.Barrier(8), threading.Event()
    finished: list[str] = []

    def newcomer(_: int) -> str:
        barrier.wait()
        try:
            with lease(output, ttl_s):
                finished.append("held")
                assert all_done.wait(60)
                return "held"
        except Held:
            finished.append("refused")
            return "refused"
        finally:
            if len(finished) == 8:
                all_done.set()

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(newcomer, range(8)))
    assert sorted(said) == ["held"] + ["refused"] * 7


class _EndpointConnectionError(Exception):
    """As an S3 client's own: no OSError."""


def test_the_heart_beats_on_after_an_outage_of_the_store(
    local_output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = local_output.put
    failures = [_EndpointConnectionError("no route"), OSError("reset"), TimeoutError("slow")]

    def flaky(path: str, data: bytes) -> None:
        if failures and threading.current_thread().name == "lease-heartbeat":
            raise failures.pop()
        put(path, data)

    monkeypatch.setattr(local_output, "put", flaky)
    with lease(local_output, ttl_s=0.3):
        first = local_output.read("leases/000001.heartbeat")
        deadline = time.monotonic() + 10
        while local_output.read("leases/000001.heartbeat") == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not failures
        assert local_output.read("leases/000001.heartbeat") != first


@pytest.mark.parametrize("raised", [None, TransientError("s3://b is out"), RuntimeError("a bug")], ids=repr)
def test_a_store_that_is_away_at_the_end_hides_nothing(
    local_output: Storage, monkeypatch: pytest.MonkeyPatch, raised: Exception | None
) -> None:
    def away(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    told: list[str] = []
    expected = pytest.raises(type(raised)) if raised else contextlib.nullcontext()
    with expected as found, Lease(local_output, 0.5, announce=told.append):
        monkeypatch.setattr("os.link", away)
        if raised:
            raise raised
    assert found is None or found.value is raised
    (message,) = told
    assert message.startswith(f"the lease on {local_output.url} is not released ({local_output.url} is out (")
