"""How far a stage gets ahead of one whose engines are still starting."""

import re
import time
from pathlib import Path

import pytest

from tests.end_to_end.jobs import CommandLine, Job, stopped, write_shard

NUM_UNITS = 400
MOST_AHEAD = 20  # as test_guards has it of an aligner that works
STILL_S = 3.0  # rows are told every second


def answered(job: Job) -> int:
    """Rows that the policy has done, by the last line that says so."""
    lines = re.findall(rf"^policy: ([0-9]+)/{NUM_UNITS} rows", job.stderr, re.MULTILINE)
    return int(lines[-1]) if lines else 0


@pytest.mark.long
def test_a_fast_policy_does_not_run_ahead_of_an_aligner_that_is_still_starting(
    command_line: CommandLine, tmp_path: Path
) -> None:
    texts = [f"Text {number}." for number in range(NUM_UNITS)]
    write_shard(tmp_path / "prompts.parquet", {"prompt": texts, "response": texts})
    running = command_line.start(
        f"input.path={tmp_path / 'prompts.parquet'}", "input.response_column=response", "policy=stored",
        "aligner=identity", f"output.root={tmp_path / 'output'}", "run.unit_rows=1", "site.log_every_s=0.1",
    )  # fmt: skip
    (aligner,) = running.until(lambda: running.actors("aligner"), "the aligner's process was there")
    with stopped(aligner):
        running.until(lambda: answered(running), "the policy had answered")
        rows, moved_at = 0, time.monotonic()
        while time.monotonic() < moved_at + STILL_S:
            if answered(running) > rows:
                rows, moved_at = answered(running), time.monotonic()
            assert rows <= MOST_AHEAD
            time.sleep(0.1)
        running.process.kill()
