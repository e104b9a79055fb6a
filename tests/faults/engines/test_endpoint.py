"""An endpoint that is away for a while, for good, or for one row only, through the command line."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.jobs import CommandLine, by_place, corpus, quarantine, write_shard
from tests.endpoint import Endpoint, serving

NUM_ROWS = 12


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """Answers in capitals; fails at prompts with `POISON`, always."""
    with serving(lambda text: 500 if "POISON" in text else text.upper()) as server:
        yield server


def arguments(tmp_path: Path, endpoint: Endpoint, *poison: int, retry_s: float) -> list[str]:
    texts = [f"POISON {row}" if row in poison else f"row {row}" for row in range(NUM_ROWS)]
    write_shard(tmp_path / "in" / "a.parquet", {"prompt": texts})
    return [
        f"input.path={tmp_path / 'in'}",
        f"output.root={tmp_path / 'out'}",
        "policy=openai",
        "policy.model=m",
        f"policy.base_url=http://{endpoint.address}/v1",
        f"policy.retry_s={retry_s}",
        "aligner=identity",
        "run.unit_rows=4",
    ]


def check(root: Path, *poison: int) -> None:
    rows = by_place(corpus(root))
    assert [row["aligned"][0]["text"] for row in rows] == [f"ROW {row}" for row in range(NUM_ROWS) if row not in poison]
    assert [row["source"]["row"] for row in quarantine(root)] == [*poison]


def test_an_outage_of_the_endpoint_is_waited_out_and_quarantines_nothing(
    command_line: CommandLine, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.is_down = True
    running = command_line.start(*arguments(tmp_path, endpoint, retry_s=60))
    running.until(lambda: endpoint.asked, "it was asked")
    time.sleep(4)
    endpoint.is_down = False
    running.wait().expect(0)
    check(tmp_path / "out")


@pytest.mark.long
def test_an_outage_that_lasts_ends_the_job_with_5_and_the_same_command_goes_on(
    command_line: CommandLine, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.is_down = True
    command = arguments(tmp_path, endpoint, retry_s=1)
    (line,) = command_line.run(*command).expect(5).errors
    assert line.startswith(f"error: {endpoint.address} is out (")
    assert "status 503" in line and line.endswith("the same command goes on from there")
    endpoint.is_down = False
    command_line.run(*command).expect(0)
    check(tmp_path / "out")


@pytest.mark.long
def test_a_row_that_the_endpoint_always_fails_at_is_quarantined_alone(
    command_line: CommandLine, endpoint: Endpoint, tmp_path: Path
) -> None:
    command_line.run(*arguments(tmp_path, endpoint, 5, retry_s=2)).expect(0)
    check(tmp_path / "out", 5)
    (bad,) = quarantine(tmp_path / "out")
    assert (bad["stage"], bad["cause"]) == ("policy", "failed_by_endpoint")
    assert bad["attempts"] == len(endpoint.asked) - (NUM_ROWS - 1) - 3  # which were asked in between, to tell
