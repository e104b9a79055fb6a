"""build_preferences through its command line, on Ray: killed and resumed, and the next night."""

import contextlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from tests.end_to_end.conftest import RayHead
from tests.end_to_end.jobs import CommandLine, CompletedJob, Job, children, num_units, unit_facts
from tests.pipelines.preferences.fabricate import Row, damage, publish_corpus, row, table

SCRIPT = "pipelines/build_preferences.py"
NUM_ROWS = 600


def rows(first: int, count: int) -> list[Row]:
    return [
        row(
            f"Tell me of number {number}.", [f"It is {number}.", "It is a number."],
            [f"It is {number}, which is nice.", "It is a number, which is nice."],
            q=([number % 5, 1.0], [number % 3 + 2, 2.5]),
        )
        for number in range(first, first + count)
    ]  # fmt: skip


def start(command_line: CommandLine, corpus: Path, root: Path, *more: str) -> Job:
    given = [f"input.path={corpus}", f"output.root={root}", "build=curriculum", "build.reward=q", "export=trl"]
    given += ["prompts.test_fraction=0.2", "run.unit_rows=4", "run.num_workers=2"]
    return command_line.start_command([sys.executable, SCRIPT, *given, *more])


def run(command_line: CommandLine, corpus: Path, root: Path, *more: str) -> CompletedJob:
    return start(command_line, corpus, root, *more).wait().expect(0)


def published(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by split, as the manifests list them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for done in sorted(root.glob("preferences/run=*/_SUCCESS")):
        for part in json.loads((done.parent / "manifest.json").read_text())["preferences"]:
            split = Path(part["path"]).name.partition("-")[0]
            found.setdefault(split, []).extend(pq.read_table(root / part["path"], partitioning=None).to_pylist())
    return found


@pytest.mark.long
def test_killed_and_run_again_it_makes_the_dataset_of_an_undisturbed_run(
    command_line: CommandLine, tmp_path: Path
) -> None:
    some = rows(0, NUM_ROWS)
    corpus = publish_corpus(tmp_path / "corpus", table(some[:200]), table(some[200:]), row_group_size=100)
    whole = run(command_line, corpus, tmp_path / "whole")
    assert f"{NUM_ROWS} prompts in = {NUM_ROWS} used + 0 dropped" in whole.stdout

    root = tmp_path / "out"
    running = start(command_line, corpus, root, "output.keep_units=true")
    running.until(lambda: num_units(root) >= 5, "5 units were committed")
    running.process.kill()
    running.process.wait()
    time.sleep(1)  # what tasks of the dead job still commit is theirs to commit
    committed = unit_facts(root)
    assert len(committed) < NUM_ROWS / 4 and not (root / "preferences").exists(), "the kill came too late"

    resumed = run(command_line, corpus, root, "output.keep_units=true")
    after = unit_facts(root)
    assert {name: after[name] for name in committed} == committed
    assert len(after) == NUM_ROWS / 4
    assert f"built: {NUM_ROWS // 4 - len(committed)} units" in resumed.stdout
    assert published(root) == published(tmp_path / "whole")

    publish_corpus(corpus, table(rows(NUM_ROWS - 10, 20)), number=2)
    night = run(command_line, corpus, root)
    assert "run=000002: 20 prompts in = 10 used + 10 dropped (10 duplicate_prompt)" in night.stdout
    assert "nothing new" in run(command_line, corpus, root).stdout


def test_damage_that_a_worker_finds_is_one_line(command_line: CommandLine, tmp_path: Path) -> None:
    corpus = publish_corpus(tmp_path / "corpus", table(rows(0, 8)), table(rows(8, 8)))
    damage(corpus / "corpus/run=000001/part-00001.parquet")
    (message,) = start(command_line, corpus, tmp_path / "out").wait().expect(2).errors
    assert message.startswith("error: corpus/run=000001/part-00001.parquet is damaged (")


@pytest.mark.long
def test_workers_that_hang_end_the_job_with_4(command_line: CommandLine, ray_head: RayHead, tmp_path: Path) -> None:
    corpus = publish_corpus(tmp_path / "corpus", table(rows(0, NUM_ROWS)), row_group_size=100)
    running = start(command_line, corpus, tmp_path / "out", "run.stall_minutes=0.1")
    running.until(lambda: num_units(tmp_path / "out") >= 5, "5 units were committed")
    stopped = set()
    try:
        while running.process.poll() is None:  # Ray starts others
            for worker in set(children(psutil.Process(ray_head.raylet))) - stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "".join(worker.cmdline()[:1]).startswith(("ray::ReadUnits", "ray::IDLE")):
                        worker.suspend()
                        stopped.add(worker)
            time.sleep(0.1)
        completed = running.wait().expect(4)
    finally:
        for worker in stopped:
            worker.kill()
    assert re.search(r"^error: nothing has moved for 0\.[12] minutes", completed.stderr, re.MULTILINE)
    assert re.search(r"^  [0-9]+ of 150 are done; the first that are not: corpus/run=", completed.stderr, re.MULTILINE)
    assert "the same command resumes" in completed.stderr
