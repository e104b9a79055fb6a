"""Killed at random moments, the same command at once makes the corpus of a run that nobody disturbed."""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import Reference
from tests.end_to_end.jobs import LIMIT_S, STAGES, CommandLine, Job, children, corpus, manifests, num_units, unit_facts
from tests.processes import assert_gone, is_alive

NUM_UNITS = 9
VICTIMS = ("driver", "policy", "aligner", "engine")
NUM_KILLS = 28  # 21 of them of the driver and of actors
NUM_STARTS = 8
SLOW = ["policy.max_num_seqs=2", "aligner.max_num_seqs=1", "policy.units_in_flight=1"]  # so that there is time to kill


def kill(job: Job, victim: str, rng: random.Random) -> bool:
    """kill -9 the driver, an actor of a pool, or any pool's engine, as soon as there is one.

    Returns whether that was what ended it: False where the job, or the victim, was faster.
    """
    deadline = time.monotonic() + LIMIT_S
    while job.process.poll() is None:
        if victim == "driver":
            found = [psutil.Process(job.pid)]
        elif victim == "engine":
            found = [engine for pool in STAGES for actor in job.actors(pool) for engine in children(actor)]
        else:
            found = job.actors(victim)
        if found:
            return shot(job, rng.choice(found))
        assert time.monotonic() < deadline, f"there was no process of the {victim} to be killed"
        time.sleep(0.02)
    return False


def shot(job: Job, process: psutil.Process) -> bool:
    """kill -9 a process of a job. Returns whether it lived until then, its job at work: one that is over kills, too."""
    try:
        process.suspend()  # so that nothing else can end it from here on
        struck = is_alive(process) and job.process.poll() is None
        process.kill()
    except psutil.NoSuchProcess:
        return False
    if process.pid == job.pid:
        return struck and job.process.wait() == -signal.SIGKILL
    assert_gone([process])
    return struck


def num_made(stdout: str) -> int:
    """Units that a run says it made."""
    found = re.search(r"made: ([0-9]+) units", stdout)
    return int(found[1]) if found else 0


def test_kills_of_both_pools_and_of_the_driver_change_nothing(
    command_line: CommandLine, job: list[str], reference: Reference, tmp_path: Path
) -> None:
    rng = random.Random(20)
    root = tmp_path / "output"
    arguments = [*job, *SLOW, f"output.root={root}"]
    running = command_line.start(*arguments)
    committed: dict[str, dict[str, object]] = {}

    def kill_later(victim: str, num_more: int) -> None:
        least = num_units(root) + num_more
        running.until(lambda: num_units(root) >= least, f"{least} units were committed")
        time.sleep(rng.uniform(0, 0.5))
        committed.update(unit_facts(root))
        assert kill(running, victim, rng), f"the job was over before its {victim} was killed"

    first, second = rng.sample(["policy", "aligner"], 2)
    kill_later(first, 1)
    kill_later(second, 0)
    kill_later("driver", 1)
    assert 2 <= len(committed) < NUM_UNITS, "the kills came too late to say anything"
    assert not manifests(root)

    changed = command_line.run(*arguments, "policy.temperature=0.5").expect(2)
    (message,) = changed.errors
    assert "policy.temperature was 0.8 and is 0.5" in message
    assert "wait to be published" in message

    resumed = command_line.run(*arguments).expect(0)
    assert "waiting" not in resumed.stderr, "a dead job's lease is taken over at once"
    assert corpus(root) == reference.rows
    after = unit_facts(root)
    assert {name: after[name] for name in committed} == committed
    assert num_made(resumed.stdout) <= NUM_UNITS - len(committed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_a_kill_at_any_moment_changes_nothing(
    seed: int, command_line: CommandLine, job: list[str], reference: Reference, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    root = tmp_path / "output"
    arguments = [*job, *SLOW, f"output.root={root}"]
    victim = VICTIMS[seed % len(VICTIMS)]
    latest_s = 1.3 * reference.completed.seconds  # SLOW takes longer: in all of its phases
    for _ in range(NUM_STARTS):
        running = command_line.start(*arguments)
        moment_s = rng.uniform(0, latest_s)
        time.sleep(moment_s)
        committed = unit_facts(root)
        if kill(running, victim, rng):
            break
        running.wait().expect(0)
        shutil.rmtree(root)
        latest_s = moment_s  # it was over by then: anew, and earlier
    else:
        pytest.fail(f"{NUM_STARTS} jobs were over before their {victim} was killed")
    if victim != "driver":
        running.wait().expect(0)

    resumed = command_line.run(*arguments).expect(0)
    assert "waiting" not in resumed.stderr, "a dead job's lease is taken over at once"
    assert corpus(root) == reference.rows
    after = unit_facts(root)
    assert {name: after[name] for name in committed} == committed
    assert num_made(resumed.stdout) <= NUM_UNITS - len(committed)
