"""The life of one output root: interrupted, resumed, and run again every night with new shards and a new config."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from actors.contract import candidate_seed
from tests.end_to_end.jobs import (
    CommandLine,
    CompletedJob,
    Row,
    corpus,
    files,
    manifests,
    num_units,
    partition,
    place,
    unit_facts,
    write_shard,
)

NUM_ROWS = 20
NOTHING_NEW_S = 5.0


@dataclass(frozen=True)
class Life:
    """Where it happens, and the command that is the same every night."""

    folder: Path
    arguments: list[str]

    @property
    def root(self) -> Path:
        return self.folder / "output"

    def add_shard(self, night: int, num_rows: int) -> None:
        prompts = [f"Question {number} of night {night}?" for number in range(num_rows)]
        responses = [f"<think>Number {number}.</think>\n\nAnswer {number}." for number in range(num_rows)]
        write_shard(self.folder / "prompts" / f"night-{night}.parquet", {"prompt": prompts, "response": responses})


@pytest.fixture(scope="module")
def life(new_folder: Callable[[], Path]) -> Life:
    folder = new_folder()
    arguments = [
        "policy=stored", "aligner=identity", f"input.path={folder / 'prompts'}", "input.response_column=response",
        f"output.root={folder / 'output'}", "output.keep_units=true", "run.unit_rows=1",
    ]  # fmt: skip
    found = Life(folder, arguments)
    found.add_shard(1, NUM_ROWS)
    return found


@dataclass(frozen=True)
class Interrupted:
    completed: CompletedJob
    processes: list[psutil.Process]
    leases: dict[str, bytes]
    committed: dict[str, dict[str, object]]
    listening_at: set[str]


@pytest.fixture(scope="module")
def interrupted(life: Life, lone_command_line: CommandLine) -> Interrupted:
    """Ctrl-C on a terminal, where the job has started a Ray of its own."""
    running = lone_command_line.start(*life.arguments)
    running.until(lambda: num_units(life.root) >= 2, "two units were committed")
    processes = psutil.Process(running.pid).children(recursive=True)
    listening_at = set().union(*map(addresses, [psutil.Process(running.pid), *processes]))
    os.killpg(running.pid, signal.SIGINT)
    return Interrupted(running.wait(), processes, files(life.root / "leases"), unit_facts(life.root), listening_at)


def addresses(process: psutil.Process) -> set[str]:
    """Where the process listens for connections from other machines or this one."""
    with contextlib.suppress(psutil.Error):
        found = process.net_connections("inet")
        return {each.laddr.ip.removeprefix("::ffff:") for each in found if each.status == psutil.CONN_LISTEN}
    return set()


def test_ctrl_c_ends_a_job_in_order(interrupted: Interrupted, life: Life) -> None:
    interrupted.completed.expect(130)
    kept, goodbye = interrupted.completed.errors
    assert goodbye == "interrupted; what is committed is kept, and the same command goes on from there"
    told = re.fullmatch(rf"committed until now: at least (\d+) units?, (\d+) of {NUM_ROWS} rows", kept)
    assert told
    assert int(told[1]) == int(told[2]) <= len(interrupted.committed), "what the driver had heard of"
    assert "000001.released" in interrupted.leases
    assert 2 <= len(interrupted.committed) < NUM_ROWS


def test_a_job_with_a_ray_of_its_own_is_reached_from_this_machine_alone(interrupted: Interrupted) -> None:
    assert interrupted.listening_at == {"127.0.0.1"}


def test_ctrl_c_leaves_no_process_of_its_own_ray(interrupted: Interrupted) -> None:
    assert len(interrupted.processes) > 5
    _, alive = psutil.wait_procs(interrupted.processes, timeout=15)
    assert not alive


@dataclass(frozen=True)
class Terminated:
    completed: CompletedJob
    leases: dict[str, bytes]


@pytest.fixture(scope="module")
def terminated(life: Life, interrupted: Interrupted, command_line: CommandLine) -> Terminated:
    """SIGTERM on a cluster, as a scheduler sends it."""
    before = num_units(life.root)
    running = command_line.start(*life.arguments)
    running.until(lambda: num_units(life.root) >= before + 2, "two more units were committed")
    running.process.terminate()
    return Terminated(running.wait(), files(life.root / "leases"))


@pytest.mark.long
def test_sigterm_ends_a_job_like_ctrl_c(terminated: Terminated) -> None:
    terminated.completed.expect(130)
    assert "000002.released" in terminated.leases


@dataclass(frozen=True)
class FirstNight:
    completed: CompletedJob
    committed: dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def first_night(life: Life, interrupted: Interrupted, command_line: CommandLine) -> FirstNight:
    committed = unit_facts(life.root)
    return FirstNight(command_line.run(*life.arguments), committed)


def test_the_same_command_makes_only_what_was_left(first_night: FirstNight, life: Life) -> None:
    first_night.completed.expect(0)
    assert f"made: {NUM_ROWS - len(first_night.committed)} units" in first_night.completed.stdout
    facts = unit_facts(life.root)
    assert {name: facts[name] for name in first_night.committed} == first_night.committed


def test_stored_answers_are_parted_from_their_reasoning(first_night: FirstNight, life: Life) -> None:
    rows = partition(life.root, manifests(life.root)[0], "corpus")
    assert [row["prompt"] for row in rows] == [
        [{"role": "user", "content": f"Question {number} of night 1?"}] for number in range(NUM_ROWS)
    ]
    assert [(row["responses"][0]["reasoning"], row["responses"][0]["text"]) for row in rows] == [
        (f"Number {number}.", f"Answer {number}.") for number in range(NUM_ROWS)
    ]
    assert [row["aligned"][0]["text"] for row in rows] == [f"Answer {number}." for number in range(NUM_ROWS)]


@dataclass(frozen=True)
class SecondNight:
    """A new shard of 25 rows: a limited run that cuts units otherwise, a look for more, and a run that is refused."""

    limited: CompletedJob
    first_before: dict[str, bytes]
    first_after: dict[str, bytes]


@pytest.fixture(scope="module")
def second_night(life: Life, first_night: FirstNight, command_line: CommandLine) -> SecondNight:
    first = life.root / "corpus" / "run=000001"
    before = files(first)
    life.add_shard(2, 25)
    limited = command_line.run(*life.arguments, "--limit", "10", "run.unit_rows=3")
    return SecondNight(limited, before, files(first))


def test_a_new_shard_makes_only_its_own_units(second_night: SecondNight, life: Life) -> None:
    second_night.limited.expect(0)
    # 8 rows a row group, 3 rows a unit: 3 + 3 + 2 + 3
    assert "made: 4 units, 11 rows" in second_night.limited.stdout
    rows = partition(life.root, manifests(life.root)[1], "corpus")
    assert [place(row) for row in rows] == [("night-2.parquet", number) for number in range(11)]


def test_a_published_partition_is_never_touched_again(second_night: SecondNight) -> None:
    assert {"_SUCCESS", "manifest.json", "plan.json", "part-00000.parquet"} == set(second_night.first_before)
    assert second_night.first_after == second_night.first_before


CHANGED = ["policy.temperature=0.5", "run.seed=7"]


def test_a_changed_config_is_refused_with_both_values(
    second_night: SecondNight, life: Life, lone_command_line: CommandLine
) -> None:
    before = len(manifests(life.root))
    completed = lone_command_line.run(*life.arguments, *CHANGED).expect(2)
    (message,) = completed.errors
    assert "policy.temperature was 0.0 and is 0.5; run.seed was 0 and is 7" in message
    assert "run.accept_changes=true" in message
    assert len(manifests(life.root)) == before


@dataclass(frozen=True)
class ThirdNight:
    """The rest of the second night's shard and another one, with an accepted change, in units of any size."""

    completed: CompletedJob
    rows_before: list[Row]


@pytest.fixture(scope="module")
def third_night(life: Life, second_night: SecondNight, command_line: CommandLine) -> ThirdNight:
    before = corpus(life.root)
    life.add_shard(3, 2)
    changed = [*CHANGED, "run.accept_changes=true", "run.unit_rows=256"]
    return ThirdNight(command_line.run(*life.arguments, *changed), before)


def test_an_accepted_change_holds_for_new_units_only(third_night: ThirdNight, life: Life) -> None:
    third_night.completed.expect(0)
    assert corpus(life.root)[: len(third_night.rows_before)] == third_night.rows_before
    one, two, three = manifests(life.root)
    assert one["fingerprints"] == two["fingerprints"] != three["fingerprints"]
    (run,) = three["runs"]
    record = json.loads((life.root / "runs" / f"{run:06d}.json").read_bytes())
    assert record["fingerprint"]["policy.temperature"] == 0.5
    seeds = [candidate_seed(7, row["prompt_id"], 0, "policy") for row in partition(life.root, three, "corpus")]
    assert [row["responses"][0]["seed"] for row in partition(life.root, three, "corpus")] == seeds


def test_after_a_limit_every_other_row_comes_once(third_night: ThirdNight, life: Life) -> None:
    rows = [row for row in corpus(life.root) if place(row)[0] != "night-1.parquet"]
    assert [place(row) for row in rows] == [
        *(("night-2.parquet", number) for number in range(25)),
        *(("night-3.parquet", number) for number in range(2)),
    ]
    assert [row["responses"][0]["text"] for row in rows[:25]] == [f"Answer {number}." for number in range(25)]


def test_a_night_without_new_shards_ends_at_once(
    third_night: ThirdNight, life: Life, lone_command_line: CommandLine
) -> None:
    def published() -> dict[str, bytes]:
        return {path: content for path, content in files(life.root).items() if not path.startswith("leases/")}

    before = published()
    completed = lone_command_line.run(*life.arguments, *CHANGED).expect(0)
    assert "nothing new: 47 rows in 3 partitions" in completed.stdout
    assert completed.seconds < NOTHING_NEW_S
    assert published() == before
