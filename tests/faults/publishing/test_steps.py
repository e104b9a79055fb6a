"""A job that is killed or frozen before any step of its publishing, through the command line: one correct partition."""

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import lone_command_line, new_folder
from tests.end_to_end.jobs import (
    LIMIT_S,
    CommandLine,
    Job,
    Row,
    corpus,
    files,
    manifests,
    num_units,
    plain_environment,
    quarantine,
    write_shard,
)

__all__ = ["lone_command_line", "new_folder"]
HERE = Path(__file__).parent
NUM_ROWS, UNIT_ROWS, BAD = 8, 2, 5
NUM_STEPS = 10
"""The plan, a corpus part, a quarantine part, the manifest, the card, _SUCCESS, four units that go."""
NEVER = NUM_STEPS
SECOND_STEPS = (NEVER, 0, 4, 2)

pytestmark = pytest.mark.long
Start = Callable[..., Job]


@dataclass(frozen=True)
class Unpublished:
    """A root whose units are all committed, and the command that has nothing left to do but to publish them."""

    root: Path
    arguments: list[str]


@pytest.fixture(scope="module")
def unpublished(lone_command_line: CommandLine, new_folder: Callable[[], Path]) -> Unpublished:
    folder = new_folder()
    prompts = [None if row == BAD else f"Text {row}." for row in range(NUM_ROWS)]
    write_shard(folder / "prompts.parquet", {"prompt": prompts, "response": [f"Answer {row}." for row in range(8)]})
    arguments = [
        f"input.path={folder / 'prompts.parquet'}", "input.response_column=response", "policy=stored",
        "aligner=identity", f"run.unit_rows={UNIT_ROWS}", "run.lease_ttl_s=0.5",
    ]  # fmt: skip
    root = folder / "output"
    withheld = lone_command_line.run(*arguments, f"output.root={root}", "run.max_quarantined_fraction=0").expect(3)
    assert "nothing is published" in withheld.stderr
    assert num_units(root) == NUM_ROWS / UNIT_ROWS
    return Unpublished(root, [*arguments, "run.max_quarantined_fraction=0.5"])


@pytest.fixture
def start(unpublished: Unpublished, new_folder: Callable[[], Path]) -> Iterator[Start]:
    """Starts the command on a copy of the root; before its change number `step` it gets a signal."""
    with contextlib.ExitStack() as ended:

        def started(root: Path, step: int = NEVER, by: signal.Signals = signal.SIGKILL) -> Job:
            stop = {"PYTHONPATH": str(HERE), "STOP_ROOT": str(root), "STOP_AT": str(step), "STOP_BY": str(int(by))}
            jobs = ended.enter_context(CommandLine({**plain_environment(), **stop}, None, new_folder))
            return jobs.start(*unpublished.arguments, f"output.root={root}")

        yield started


@pytest.fixture
def root(unpublished: Unpublished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unpublished.root, tmp_path / "output"))


def check(root: Path) -> None:
    """One finished partition that holds every row exactly once, no unit left, and no file that nobody knows."""
    (manifest,) = manifests(root)
    assert manifest["number"] == 1
    rows: list[Row] = corpus(root)
    assert [row["source"]["row"] for row in rows] == [row for row in range(NUM_ROWS) if row != BAD]
    assert [row["aligned"][0]["text"] for row in rows] == [f"Answer {row['source']['row']}." for row in rows]
    assert [row["source"]["row"] for row in quarantine(root)] == [BAD]
    assert num_units(root) == 0
    published = {path for path in files(root) if path.startswith(("corpus/", "quarantine/"))}
    parts = {part["path"] for part in (*manifest["corpus"], *manifest["quarantine"])}
    assert published == parts | {f"corpus/run=000001/{name}" for name in ("plan.json", "manifest.json", "_SUCCESS")}


def wait_until_frozen_or_over(job: Job) -> bool:
    """Whether it is frozen."""
    deadline = time.monotonic() + LIMIT_S
    while job.process.poll() is None:
        if psutil.Process(job.pid).status() == psutil.STATUS_STOPPED:
            return True
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return False


def test_publishing_has_the_steps_that_are_tried(start: Start, root: Path) -> None:
    start(root, NUM_STEPS).wait().expect(0)
    check(root)


@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_killed_before_a_step_the_same_command_completes_the_partition(step: int, start: Start, root: Path) -> None:
    start(root, step).wait().expect(-signal.SIGKILL)
    start(root).wait().expect(0)
    check(root)


@pytest.mark.parametrize("first_step", range(NUM_STEPS))
def test_two_publishers_that_freeze_before_their_steps_do_no_harm(first_step: int, start: Start, root: Path) -> None:
    """Where one is frozen another takes over, and freezes in its turn; the first one ends, then the second one."""
    first = start(root, first_step, signal.SIGSTOP)
    assert wait_until_frozen_or_over(first)
    second = start(root, SECOND_STEPS[first_step % len(SECOND_STEPS)], signal.SIGSTOP)
    if wait_until_frozen_or_over(second):  # it has fewer steps where the first one has done some
        first.process.send_signal(signal.SIGCONT)
        first.wait().expect(0)
        second.process.send_signal(signal.SIGCONT)
        second.wait().expect(0)
    else:
        second.wait().expect(0)
        check(root)
        first.process.send_signal(signal.SIGCONT)
        first.wait().expect(0)
    check(root)
