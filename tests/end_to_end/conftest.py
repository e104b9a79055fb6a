"""One Ray head on the loopback for all end-to-end tests, the command line that joins it, tiny models and prompts."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.jobs import CommandLine, CompletedJob, Row, corpus, heed_ctrl_c, plain_environment, write_shard

NUM_CPUS = 32  # logical: more than any two jobs of these tests take together
NUM_GPUS = 4
OBJECT_STORE_BYTES = 128 << 20


@dataclass(frozen=True)
class RayHead:
    """A running head.

    Attributes:
        address: what RAY_ADDRESS names.
        dashboard: URL of the dashboard, where jobs are submitted.
        environment: that reaches it, its token included.
        folder: of its sessions.
        raylet: its pid; every worker is a child of it.
    """

    address: str
    dashboard: str
    environment: dict[str, str]
    folder: Path
    raylet: int


@pytest.fixture(scope="session")
def ray_head(request: pytest.FixtureRequest) -> Iterator[RayHead]:
    """A head with logical CPUs and GPUs."""
    with start_head(
        [f"--num-cpus={NUM_CPUS}", f"--num-gpus={NUM_GPUS}"],
        meanwhile=lambda: request.getfixturevalue("tiny_llama"),
    ) as head:
        yield head


@contextlib.contextmanager
def start_head(
    arguments: Sequence[str],
    environment: dict[str, str] | None = None,
    gcs_port: int | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[RayHead]:
    """A head with its own ports and its own token. Stopped by pid, as are its workers and the nodes that it added."""
    folder = Path(tempfile.mkdtemp(prefix="e2e-"))  # short: the paths of Unix sockets may have 107 bytes
    port, client, dashboard, agent = free_ports(4)
    port = gcs_port or port
    environment = {**plain_environment(), **(environment or {})}
    (folder / "token").write_text(secrets.token_hex(32))
    environment.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "token"))
    scripts = Path(sys.executable).parent
    environment["PATH"] = f"{scripts}{os.pathsep}{environment.get('PATH', '')}"  # whose `python` submitted jobs run
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder / 'ray'}"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", *arguments]
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=heed_ctrl_c
        )
    try:
        meanwhile()
        _wait_until_up(head, folder / "log")
        raylet = next(child.pid for child in psutil.Process(head.pid).children() if child.name() == "raylet")
        address = f"127.0.0.1:{port}"
        environment["RAY_ADDRESS"] = address
        yield RayHead(address, f"http://127.0.0.1:{dashboard}", environment, folder / "ray", raylet)
    finally:
        _stop(head)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(head: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 90
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if head.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the Ray head did not start:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.05)


def _stop(head: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in reversed(processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
    head.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a fresh folder."""
    return lambda: tmp_path_factory.mktemp("job")


@pytest.fixture(scope="session")
def command_line(ray_head: RayHead, new_folder: Callable[[], Path]) -> Iterator[CommandLine]:
    """The command line; its jobs join the session's head."""
    with CommandLine(ray_head.environment, ray_head.raylet, new_folder) as jobs:
        yield jobs


@pytest.fixture(scope="session")
def lone_command_line(new_folder: Callable[[], Path]) -> Iterator[CommandLine]:
    """The command line where no cluster is named: a job that has something to make starts a Ray of its own."""
    with CommandLine(plain_environment(), None, new_folder) as jobs:
        yield jobs


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose answers differ from prompt to prompt; at most 512 tokens."""
    from tests.tiny_models import assert_answers_differ, build_tiny_llama  # torch and transformers take seconds

    return assert_answers_differ(build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama"))


# --- the job that most tests compare with -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three shards: 36 prompts, strings and chats, with ids and a column to keep."""
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def write_prompts(folder: Path, order: Sequence[int] = (0, 1, 2)) -> Path:
    """The shards of `prompts`, written to `folder` in the given order."""
    for shard in order:
        numbers = range(12 * shard, 12 * shard + 12)
        asked: list[Any] = [f"Tell me {'more and ' * (number % 5)}more about number {number}." for number in numbers]
        if shard == 1:
            asked = [
                [
                    {"role": "system", "content": f"You are helper {number % 3}."},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": "Which of them?"},
                    {"role": "user", "content": f"The one after {number - 1}."},
                ]
                for number, text in zip(numbers, asked, strict=True)
            ]
        ids = [f"prompt-{number}" for number in numbers]
        columns = {"id": ids, "prompt": asked, "topic": [f"topic {number % 4}" for number in numbers]}
        write_shard(folder / f"shard-{shard}.parquet", columns)
    return folder


@pytest.fixture(scope="session")
def job(prompts: Path, tiny_llama: Path) -> list[str]:
    """The job: two sampled candidates per prompt, aligned greedily, in float32, 4 rows a unit."""
    return [
        f"input.path={prompts}",
        "input.id_column=id",
        "input.keep_columns=[topic]",
        *tiny_pool("policy", tiny_llama),
        "policy.num_candidates=2",
        "policy.temperature=0.8",
        "policy.top_p=0.9",
        *tiny_pool("aligner", tiny_llama),
        "run.unit_rows=4",
        "output.keep_units=true",
    ]


def tiny_pool(pool: str, model: Path, max_tokens: int = 16) -> list[str]:
    """Overrides that put the tiny model into a pool, where equal inputs give equal texts."""
    values = {"model": model, "max_tokens": max_tokens, "dtype": "float32", "device": "cpu", "num_threads": 1}
    return [f"{pool}.{key}={value}" for key, value in values.items()]


@dataclass(frozen=True)
class Reference:
    """A run of `job` that nobody disturbed, and what it published."""

    completed: CompletedJob
    root: Path
    rows: list[Row]


@pytest.fixture(scope="session")
def reference(command_line: CommandLine, job: list[str], new_folder: Callable[[], Path]) -> Reference:
    root = new_folder() / "output"
    completed = command_line.run(*job, f"output.root={root}", "run.task_mib=1", "site.log_every_s=1").expect(0)
    return Reference(completed, root, corpus(root))
