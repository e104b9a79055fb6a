"""An engine that hangs: the job ends with a diagnosis, and nothing of it stays behind."""

import re
import signal
from pathlib import Path

import pytest

from tests.end_to_end.jobs import CommandLine, children, write_shard
from tests.processes import assert_gone


@pytest.mark.long
def test_a_hanging_engine_process_ends_the_job_with_4_and_is_gone_then(
    command_line: CommandLine, model: Path, tmp_path: Path
) -> None:
    write_shard(tmp_path / "in" / "a.parquet", {"prompt": [f"SLOW {row}" for row in range(4)]})
    running = command_line.start(
        f"input.path={tmp_path / 'in'}",
        f"output.root={tmp_path / 'out'}",
        f"policy.model={model}",
        "aligner=identity",
        "run.stall_minutes=0.15",
        "site.log_every_s=0.2",
    )
    running.until(lambda: re.search(r"policy: .* [1-4] in flight", running.stderr), "the engine was at work")
    (actor,) = running.actors("policy")
    engines = children(actor)
    assert engines
    for process in engines:
        process.send_signal(signal.SIGSTOP)
    completed = running.wait().expect(4)
    assert re.search(r"^error: nothing has moved for 0\.[12] minutes", completed.stderr, re.MULTILINE)
    unit = r"[0-9a-f]{12}-0000000000-0000000004"
    diagnosis = rf"  policy: engines running; last progress [0-9]+ s ago; 4 candidates running, .* in flight: {unit}"
    assert re.search(diagnosis, completed.stderr)
    assert "the same command resumes" in completed.stderr
    assert_gone([actor, *engines])
