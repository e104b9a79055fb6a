"""Runs the real command line as a user does, finds and kills its processes by pid, and reads what it published."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.commit import METADATA_KEY

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "pipelines/align_corpus.py"
LIMIT_S = 120.0
STAGES = {"policy": "PolicyStage", "aligner": "AlignerStage"}

Row = dict[str, Any]


# --- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompletedJob:
    """How a run of the command line ended. `seconds` count from its start."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that are the job's own; Ray's C++ log lines and what it relays from actors are not."""
        return [line for line in self.stderr.splitlines() if line and not line.startswith(("[", "\x1b[36m("))]

    def expect(self, returncode: int) -> "CompletedJob":
        """Itself. Raises AssertionError, showing all that the job said, where it ended with another code."""
        assert self.returncode == returncode, f"exit code {self.returncode}, not {returncode}\n{self}"
        return self

    def __str__(self) -> str:
        return f"--- stdout\n{self.stdout[-6000:]}\n--- stderr\n{self.stderr[-6000:]}"


class Job:
    """A run of the command line that has been started.

    Args:
        raylet: pid of the cluster's raylet, whose children its actors are; None where the job starts its own Ray.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], folder: Path, raylet: int | None) -> None:
        self._begin = time.monotonic()
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._raylet = raylet
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True,  # a foreground process group of its own, as on a terminal
                preexec_fn=heed_ctrl_c,
            )  # fmt: skip
        self.pid = self.process.pid

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self._err.read_text(errors="replace")

    def wait(self, limit_s: float = LIMIT_S) -> CompletedJob:
        """Wait for its end. Raises AssertionError, showing what it said, where it does not end: it is killed then."""
        try:
            returncode = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the job did not end in {limit_s} s\n{self._completed(-9)}") from None
        return self._completed(returncode)

    def _completed(self, returncode: int) -> CompletedJob:
        out = self._out.read_text(errors="replace")
        return CompletedJob(returncode, out, self.stderr, time.monotonic() - self._begin)

    def actors(self, pool: str) -> list[psutil.Process]:
        """The living processes of the actors of the pools `policy` (further policies included) or `aligner`."""
        parent = psutil.Process(self._raylet or self.pid)
        return [child for child in parent.children(recursive=True) if _is_actor(child, STAGES[pool])]

    def until(self, condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
        """Wait until `condition` gives something true, and return that. Raises AssertionError if the job ends first."""
        deadline = time.monotonic() + limit_s
        while not (found := condition()):
            assert self.process.poll() is None, f"the job ended before {what}\n{self._completed(self.process.poll())}"
            assert time.monotonic() < deadline, f"waited in vain for {what}\n{self._completed(-1)}"
            time.sleep(0.02)
        return found


def heed_ctrl_c() -> None:
    """In a new process: undo what a shell does to commands in the background, these tests perhaps among them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def children(process: psutil.Process) -> list[psutil.Process]:
    """Its children; [] where it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children()
    return []


def followers(ancestor: psutil.Process) -> list[psutil.Process]:
    """The ranks but the first of the tensor parallel torch engines below a process."""
    found = []
    for process in ancestor.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("follow(" in word for word in process.cmdline()):
                found.append(process)
    return found


def _is_actor(process: psutil.Process, stage: str) -> bool:
    with contextlib.suppress(psutil.Error):
        title = process.cmdline()
        return bool(title) and title[0].startswith("ray::") and stage in title[0]
    return False


class CommandLine:
    """Starts jobs in one environment. As a context manager it kills, at the end, those that still run.

    Args:
        environment: of the jobs; RAY_ADDRESS says which cluster they join.
        raylet: pid of that cluster's raylet.
        new_folder: makes a fresh folder for a job's stdout and stderr.
    """

    def __init__(self, environment: dict[str, str], raylet: int | None, new_folder: Callable[[], Path]) -> None:
        self._environment, self._raylet, self._new_folder = environment, raylet, new_folder
        self._jobs: list[Job] = []

    def __enter__(self) -> "CommandLine":
        return self

    def __exit__(self, *error: object) -> None:
        for job in self._jobs:
            if job.process.poll() is None:
                job.process.kill()
                job.process.wait()

    def start(self, *arguments: str) -> Job:
        """Start a job with these arguments."""
        return self.start_command([sys.executable, SCRIPT, *arguments])

    def start_command(self, command: Sequence[str]) -> Job:
        """Start any command in the same environment."""
        job = Job(command, self._environment, self._new_folder(), self._raylet)
        self._jobs.append(job)
        return job

    def run(self, *arguments: str, limit_s: float = LIMIT_S) -> CompletedJob:
        """Run a job with these arguments to its end."""
        return self.start(*arguments).wait(limit_s)


def plain_environment() -> dict[str, str]:
    """This process's environment without what would steer Ray or a job; model hubs are off."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """Inside, the process hangs: it is there, holds its connections and does nothing. Afterwards it is killed."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


# --- reading what is there ------------------------------------------------------------------------------------------


def manifests(root: Path) -> list[dict[str, Any]]:
    """The manifests of the finished partitions, in order."""
    finished = sorted(path.parent for path in root.glob("corpus/run=*/_SUCCESS"))
    return [json.loads((folder / "manifest.json").read_bytes()) for folder in finished]


def corpus(root: Path) -> list[Row]:
    """What is promised of every published row, in the order of the manifests. Raises AssertionError where they lie."""
    return [promised(row) for manifest in manifests(root) for row in partition(root, manifest, "corpus")]


def promised(row: Row) -> Row:
    """A row without what its decoding took: how far a forward pass comes depends on what else is in the batch."""
    kept = [{name: each[name] for name in each if name not in ("iterations", "accepted")} for each in row["aligned"]]
    return {**row, "aligned": kept}


def quarantine(root: Path) -> list[Row]:
    """Every row of the published quarantine."""
    return [row for manifest in manifests(root) for row in partition(root, manifest, "quarantine")]


def partition(root: Path, manifest: dict[str, Any], what: str) -> list[Row]:
    """The rows of one partition: `what` is `corpus` or `quarantine`."""
    rows: list[Row] = []
    for part in manifest[what]:
        path = root / part["path"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == part["sha256"], part["path"]
        found = pq.read_table(path, page_checksum_verification=True, partitioning=None).to_pylist()
        assert len(found) == part["num_rows"], part["path"]
        rows.extend(found)
    count = manifest["num_ok"] if what == "corpus" else manifest["num_quarantined"]
    assert len(rows) == count, f"{what} of partition {manifest['number']}"
    assert manifest["num_rows"] == manifest["num_ok"] + manifest["num_quarantined"]
    return rows


def place(row: Row) -> tuple[str, int]:
    """Where a row came from: shard and row of the shard."""
    return row["source"]["shard"], row["source"]["row"]


def by_place(rows: list[Row]) -> list[Row]:
    """The rows in the input's order: partitions of several runs hold them in another."""
    return sorted(rows, key=place)


def unit_facts(root: Path) -> dict[str, dict[str, Any]]:
    """Unit name -> facts of every unit file that is there: nonce and committed_at tell two copies apart."""
    found = {}
    for path in sorted((root / "units").glob("*.parquet")):
        facts = json.loads(pq.read_metadata(path).metadata[METADATA_KEY])
        found[path.stem] = {name: facts[name] for name in ("nonce", "committed_at", "num_rows", "fingerprint", "run")}
    return found


def num_units(root: Path) -> int:
    """Units that are committed and not dropped."""
    with contextlib.suppress(FileNotFoundError):
        return sum(name.endswith(".parquet") for name in os.listdir(root / "units"))
    return 0


def files(root: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write_shard(path: Path, columns: dict[str, Any], *, row_group_size: int = 8) -> Path:
    """A Parquet shard of these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path
