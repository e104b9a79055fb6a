"""What stops a job: a user's mistake, another job on the same root, an engine that hangs; and what only looks."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.reference import is_section, unwrap, walk
from pipelines.settings import AlignCorpusConfig
from tests.end_to_end.conftest import RayHead, Reference, tiny_pool
from tests.end_to_end.jobs import ROOT, SCRIPT, CommandLine, Job, files, stopped, write_shard

REFERENCE = ROOT / "conf" / "align_corpus.yaml"
STALL_MINUTES = 0.3  # longer than a slow machine takes to start an engine; the tests in between run meanwhile
LEASE_TTL_S = 6.0
NUM_UNITS = 1000  # more than are made before the aligner is stopped, however slow the machine
ON_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
MOST_AHEAD = 20  # what waits, and what either pool has in flight, read or not; without a bound it is all of them


@dataclass(frozen=True)
class Hanging:
    """A job whose aligner is going to do nothing any more, and how it was started."""

    running: Job
    arguments: list[str]


@pytest.fixture(scope="module", autouse=True)
def started(command_line: CommandLine, tiny_llama: Path, new_folder: Callable[[], Path]) -> Hanging:
    """The job of `hanging`, which starts while the tests that need no cluster run."""
    folder = new_folder()
    texts = [f"Text {number}." for number in range(NUM_UNITS)]
    write_shard(folder / "prompts.parquet", {"prompt": texts, "response": texts})
    arguments = [
        f"input.path={folder / 'prompts.parquet'}",
        f"output.root={folder / 'output'}",
        "policy=stored",
        "input.response_column=response",
        *tiny_pool("aligner", tiny_llama, max_tokens=400),
        "aligner.max_num_seqs=1",
        "aligner.template={{ question }} {{ answer }}",
        "run.unit_rows=1",
        f"run.stall_minutes={STALL_MINUTES}",
        f"run.lease_ttl_s={LEASE_TTL_S}",
        "site.log_every_s=0.1",
    ]
    return Hanging(command_line.start(*arguments), arguments)


@pytest.fixture(scope="module")
def hanging(started: Hanging) -> Iterator[Hanging]:
    running = started.running
    running.until(lambda: re.search(r"aligner: .* [1-9][0-9]* in flight", running.stderr), "the aligner was at work")
    (actor,) = running.actors("aligner")
    with stopped(actor):
        yield started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policy.temprature=0.5"], "unknown key 'policy.temprature'; did you mean policy.temperature"),
        (["policy.max_tokens=many"], "policy.max_tokens expects an integer, got 'many'"),
        (["policy.model=./no-such-model"], "policy.model: there is no folder ./no-such-model"),
        (["input.path=no-such-folder"], "input.path 'no-such-folder' does not exist"),
        (
            ["aligner.engine=vllm", "aligner.recipe=diffpo", "aligner.max_iterations=6"],
            "max_iterations=6 needs engine=torch: vllm can only decode until nothing changes; set max_iterations to",
        ),
        (["policy.replicas=100000"], "the pools do not fit into this machine's memory of "),
        (
            ["policy.num_gpus=512", "policy.tensor_parallel_size=512", "policy.engine=vllm"],
            "policy.tensor_parallel_size is 512, which does not divide the 4 attention heads of ",
        ),
        (
            ["policy.replicas=100", "policy.num_gpus=1", "--dry-run"],
            "the pools need 100 GPUs (policy: 100 x 1), and this",
        ),
        (
            ["policy=openai", "policy.model=m", "policy.api_key_env=NO_KEY", "--dry-run"],
            "policy: the environment variable",
        ),
    ],
    ids=[
        "unknown-key",
        "mistyped-value",
        "missing-model",
        "missing-input",
        "iterations-in-vllm",
        "no-memory",
        "no-split",
        "no-gpus",
        "no-key",
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, job: list[str], lone_command_line: CommandLine, tmp_path: Path
) -> None:
    completed = lone_command_line.run(*job, f"output.root={tmp_path / 'output'}", *arguments).expect(2)
    (line,) = completed.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert completed.stdout == ""


@pytest.mark.parametrize(
    "changed",
    [{"RAY_AUTH_TOKEN": "0" * 64, "RAY_NUM_REDIS_GET_RETRIES": "2"}, {"RAY_AUTH_TOKEN_PATH": "no-such-file"}],
    ids=["wrong", "missing"],
)
def test_a_wrong_or_missing_token_is_one_line_that_names_where_it_goes(
    changed: dict[str, str], ray_head: RayHead, job: list[str], new_folder: Callable[[], Path], tmp_path: Path
) -> None:
    with CommandLine({**ray_head.environment, **changed}, ray_head.raylet, new_folder) as stranger:
        completed = stranger.run(*job, f"output.root={tmp_path / 'output'}").expect(2)
    (line,) = completed.errors
    assert line.startswith(f"error: no Ray cluster at {ray_head.address} (site.ray_address or RAY_ADDRESS) lets ")
    assert "RAY_AUTH_MODE=token" in line and "`ray get-auth-token`" in line


def test_help_tells_every_key(lone_command_line: CommandLine) -> None:
    """Every key of the reference, each with its help; white space apart, as lines are filled."""
    completed = lone_command_line.run("--help").expect(0)
    told, documented = ("".join(text.replace("#", "").split()) for text in (completed.stdout, REFERENCE.read_text()))
    keys = [*dotted(yaml.safe_load(REFERENCE.read_text()))]
    assert len(keys) > 100
    entries = {entry.key: entry for entry in walk(AlignCorpusConfig)}
    for key in keys:
        doc = "".join(entries[key].doc.help.replace("#", "").split())
        assert doc in documented
        heading = ":" if is_section(unwrap(entries[key].hint)[0]) else ""
        assert f"{key}{heading}{doc}" in told, key
    assert completed.stderr == ""


def dotted(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key of a section and of those in it."""
    for name, value in section.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")


def test_a_second_job_waits_and_is_then_refused(hanging: Hanging, lone_command_line: CommandLine) -> None:
    second = lone_command_line.run(*hanging.arguments).expect(2)
    waiting, refusal = second.errors
    assert waiting.endswith(f"waiting up to {LEASE_TTL_S:g} s for a sign of life")
    assert refusal.startswith(f"error: another job (pid {hanging.running.pid} on ")
    assert "run again when it has ended" in refusal


@pytest.mark.long
def test_a_mistake_that_only_an_actor_can_find_is_one_line_too(
    command_line: CommandLine, prompts: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    speechless = tmp_path / "speechless"
    shutil.copytree(tiny_llama, speechless, ignore=shutil.ignore_patterns("tokenizer*"))
    pool = [*tiny_pool("policy", speechless), "aligner=identity", "site.log_every_s=600"]
    completed = command_line.run(f"input.path={prompts}", f"output.root={tmp_path / 'output'}", *pool)
    completed.expect(2)
    (line,) = completed.errors
    assert line.startswith(f"error: no tokenizer at '{speechless}': set `model` to")
    assert "Traceback" not in completed.stderr


def test_progress_lines_say_what_each_pool_does(reference: Reference) -> None:
    line = (
        r"{}: [0-9]+/36 rows, [0-9.]+ rows/s, [0-9]+ tokens/s, [0-9]+ in flight, [0-9]+ failed, ETA ([0-9:]+|unknown)"
    )
    for pool in ("policy", "aligner"):
        assert re.search(rf"^{line.format(pool)}$", reference.completed.stderr, re.MULTILINE)
    assert re.search(r"^committed: [0-9]+/36 rows, 0 quarantined, ETA ", reference.completed.stderr, re.MULTILINE)


@pytest.mark.long
def test_on_a_terminal_a_bar_a_pool_and_one_for_what_is_committed_reach_the_total(
    command_line: CommandLine, tmp_path: Path
) -> None:
    texts = [f"Text {number}." for number in range(12)]
    write_shard(tmp_path / "prompts.parquet", {"prompt": texts, "response": texts})
    arguments = [
        f"input.path={tmp_path / 'prompts.parquet'}", "input.response_column=response", "policy=stored",
        "aligner=identity", f"output.root={tmp_path / 'output'}", "run.unit_rows=2",
    ]  # fmt: skip
    command = [sys.executable, "-c", ON_A_TERMINAL, sys.executable, SCRIPT, *arguments]
    completed = command_line.start_command(command).wait().expect(0)
    for name in ("policy", "aligner", "committed"):
        states = re.findall(rf"{name} *: +([0-9]+)%.*?([0-9]+)/12 \[", completed.stdout)
        assert states[-1] == ("100", "12"), name


def test_a_dry_run_shows_what_each_model_will_see_and_take_and_writes_nothing(
    job: list[str], reference: Reference, lone_command_line: CommandLine, tmp_path: Path
) -> None:
    arguments = [*job, f"output.root={tmp_path / 'output'}", "plan.gpu_hour_price=2.5", "--dry-run"]
    completed = lone_command_line.run(*arguments).expect(0)
    assert "to do: 9 units, 36 rows" in completed.stdout
    asked = "Tell me more about number 0."
    policy, aligner = completed.stdout.split("prompt-0 as the policy sees it:")[1].split("as the aligner sees it:")[:2]
    assert f"<|im_start|>user\n  {asked}<|im_end|>\n  <|im_start|>assistant" in policy
    assert re.search(rf"<\|im_start\|>user\n.*{asked}.*\(the policy's answer\)", aligner, re.DOTALL)
    for pool in ("policy", "aligner"):
        line = rf"^{pool}: memory per rank: 641 KiB weights \+ .* 32 sequences as long as the longest here, .* at most "
        assert re.search(line, completed.stdout, re.MULTILINE)
        assert f"{pool}: at most 1152 generated tokens (72 answers of at most 16)" in completed.stdout
    asked_of = [[answer["num_prompt_tokens"] for answer in row["responses"]] for row in reference.rows]
    read = [next(count for count in counts if count is not None) for counts in asked_of]  # a failed candidate has none
    assert f"the longest {max(read)}; {sum(read)} in all (every row read)" in completed.stdout
    assert "nodes: not looked at, as no cluster is named (site.ray_address or RAY_ADDRESS)" in completed.stdout
    assert "time and cost: unknown, as no run on this root has come to its end; --limit N makes" in completed.stdout
    assert not (tmp_path / "output").exists()
    assert files(tmp_path) == {}


def test_a_run_keeps_how_fast_it_was(reference: Reference) -> None:
    pace = json.loads((reference.root / "runs" / "000001-pace.json").read_bytes())
    assert 0 < pace["startup_s"] < pace["seconds"] < reference.completed.seconds
    assert (pace["run"], pace["num_rows"]) == (1, 36)
    for name, column in (("policy", "responses"), ("aligner", "aligned")):
        made = sum(candidate["num_tokens"] or 0 for row in reference.rows for candidate in row[column])
        assert pace["pools"][name]["num_gpus"] == 0
        assert 0 < made <= pace["pools"][name]["num_tokens"] <= 72 * 16  # what failed for want of text was made, too
    assert pace["digest"] == json.loads((reference.root / "runs" / "000001.json").read_bytes())["digest"]


def test_a_hanging_engine_ends_the_job_with_a_diagnosis(hanging: Hanging) -> None:
    completed = hanging.running.wait().expect(4)
    assert re.search(
        r"^error: nothing has moved for 0\.[0-9] minutes \(run\.stall_minutes\)", completed.stderr, re.MULTILINE
    )
    assert re.search(r"  policy: engines running; .*; units in flight: none", completed.stderr)
    assert re.search(r"  aligner: engines running; .*; units in flight: [0-9a-f]{12}-[0-9]{10}-", completed.stderr)
    assert "the same command resumes" in completed.stderr


def test_a_fast_policy_does_not_run_ahead_of_a_slow_aligner(hanging: Hanging) -> None:
    stderr = hanging.running.wait().expect(4).stderr
    answered, aligned = (
        int(re.findall(rf"^{pool}: ([0-9]+)/{NUM_UNITS} rows", stderr, re.MULTILINE)[-1])
        for pool in ("policy", "aligner")
    )
    assert 0 < answered - aligned <= MOST_AHEAD
