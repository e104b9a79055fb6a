"""A job that is submitted to a cluster from a checkout."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import RayHead, start_head, tiny_pool
from tests.end_to_end.jobs import LIMIT_S, SCRIPT, CommandLine, corpus, num_units, unit_facts, write_shard

UPLOAD_BYTES = 5 << 20
"""But for the embedded aligner, which a job may name."""


@pytest.fixture(scope="module")
def ray_head() -> Iterator[RayHead]:
    """A head of these tests alone: once other clusters had come and gone, the session's had no agent to submit to."""
    with start_head(["--num-cpus=32"]) as head:
        yield head


@pytest.fixture(scope="module")
def command_line(ray_head: RayHead, new_folder: Callable[[], Path]) -> Iterator[CommandLine]:
    with CommandLine(ray_head.environment, ray_head.raylet, new_folder) as jobs:
        yield jobs


def test_a_submitted_job_makes_the_corpus_and_passes_on_what_it_prints_and_its_exit_code(
    ray_head: RayHead, command_line: CommandLine, tmp_path: Path
) -> None:
    write_shard(tmp_path / "prompts" / "good.parquet", {"prompt": ["How?", "Why?"], "response": ["So.", "Because."]})
    arguments = [
        f"input.path={tmp_path / 'prompts'}", "input.response_column=response", f"output.root={tmp_path / 'output'}",
        "input.on_bad_shard=skip", "policy=stored", "aligner=identity",
    ]  # fmt: skip
    ray = ["ray", "job", "submit", "--address", ray_head.dashboard, "--working-dir", "."]
    command = [*ray, "--", "python", SCRIPT, *arguments]
    followed = command_line.start_command(command).wait().expect(0)
    assert "published: run=000001: 2 rows in = 2 ok + 0 quarantined" in followed.stdout.splitlines()
    assert [row["responses"][0]["text"] for row in corpus(tmp_path / "output")] == ["So.", "Because."]

    (tmp_path / "prompts" / "bad.parquet").write_bytes(b"no shard")
    completed = command_line.start_command(command).wait()
    assert completed.returncode == 1, "Ray's own for a job that failed; its message says what the job's was"
    assert "Job entrypoint command failed with exit code 3" in completed.stdout

    uploads = list(ray_head.folder.glob("session_*/runtime_resources/working_dir_files/*"))
    assert uploads
    for folder in [path for path in uploads if path.is_dir()]:
        assert (folder / SCRIPT).is_file()
        assert not (folder / ".venv").exists()
        weights = list(folder.rglob("*.safetensors"))
        assert [path.parent.name for path in weights] == ["DiffPO-SmolLM2-135M"]
        files = [path for path in folder.rglob("*") if path.is_file() and path not in weights]
        assert sum(path.stat().st_size for path in files) < UPLOAD_BYTES


def test_a_stopped_job_leaves_a_resumable_root_and_no_engine(
    ray_head: RayHead, command_line: CommandLine, tiny_llama: Path, tmp_path: Path
) -> None:
    texts = [f"Text {number}." for number in range(40)]
    write_shard(tmp_path / "prompts.parquet", {"prompt": texts, "response": texts})
    arguments = [
        f"input.path={tmp_path / 'prompts.parquet'}", "input.response_column=response", "run.unit_rows=1",
        f"output.root={tmp_path / 'output'}", "policy=stored", *tiny_pool("aligner", tiny_llama, max_tokens=100),
        "aligner.template={{ question }} {{ answer }}", "aligner.max_num_seqs=1",
    ]  # fmt: skip
    name = f"stopped-{tmp_path.name}"
    at_head = ["--address", ray_head.dashboard]
    submit = ["ray", "job", "submit", *at_head, "--working-dir", ".", "--submission-id", name, "--no-wait"]
    before = engines(ray_head)
    running = command_line.start_command([*submit, "--", "python", SCRIPT, *arguments])
    running.wait().expect(0)
    deadline = time.monotonic() + LIMIT_S
    while num_units(tmp_path / "output") < 3:
        assert time.monotonic() < deadline, "the submitted job made nothing"
        time.sleep(0.05)
    assert engines(ray_head) - before, "an engine was at work"

    command_line.start_command(["ray", "job", "stop", *at_head, name]).wait().expect(0)
    while engines(ray_head) - before:
        assert time.monotonic() < deadline, "an engine outlived its job"
        time.sleep(0.05)
    committed = unit_facts(tmp_path / "output")
    assert 3 <= len(committed) < 40

    resumed = command_line.run(*arguments, "output.keep_units=true").expect(0)
    assert f"made: {40 - len(committed)} units" in resumed.stdout
    assert {unit: facts for unit, facts in unit_facts(tmp_path / "output").items() if unit in committed} == committed
    assert [row["source"]["row"] for row in corpus(tmp_path / "output")] == list(range(40))


def engines(head: RayHead) -> set[int]:
    """pids of the engines that the head's actors have in processes of their own."""
    found = set()
    for process in psutil.Process(head.raylet).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("actors.engines.process" in word for word in process.cmdline()):
                found.add(process.pid)
    return found
