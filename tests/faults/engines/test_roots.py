"""A root that is full, read-only or not there, through the command line: one line, the right code, and nothing lost."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.jobs import CommandLine, by_place, corpus, num_units, plain_environment, write_shard

NUM_ROWS = 12


def arguments(tmp_path: Path, root: str) -> list[str]:
    texts = [f"row {row}" for row in range(NUM_ROWS)]
    write_shard(tmp_path / "in" / "a.parquet", {"prompt": texts, "answer": texts})
    return [
        f"input.path={tmp_path / 'in'}",
        "input.response_column=answer",
        f"output.root={root}",
        "policy=stored",
        "aligner=identity",
        "run.unit_rows=4",
        "site.storage_retry_s=1",
    ]


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        (".full", 5, " is full: writing units/{}: [Errno 28] No space left on device"),
        (".readonly", 2, " refuses: writing units/{}: [Errno 30] Read-only file system"),
    ],
)
@pytest.mark.long
def test_a_local_root_that_takes_no_more_is_told_and_the_same_command_goes_on_later(
    name: str, code: int, told: str, command_line: CommandLine, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    command = arguments(tmp_path, str(root))
    command_line.run(*command, "--limit=4", "output.keep_units=true").expect(0)
    (root / name).touch()
    (line,) = command_line.run(*command).expect(code).errors
    before, _, after = told.partition("{}")
    assert line.startswith(f"error: {root}{before}") and after in line
    assert num_units(root) == 1
    (root / name).unlink()
    command_line.run(*command).expect(0)
    rows = by_place(corpus(root))
    assert [row["aligned"][0]["text"] for row in rows] == [f"row {row}" for row in range(NUM_ROWS)]


def test_a_bucket_that_does_not_exist_is_the_users_mistake(
    s3_endpoint: str, new_folder: Callable[[], Path], tmp_path: Path
) -> None:
    url = f"s3://no-such-bucket/{tmp_path.name}"
    with CommandLine(plain_environment(), None, new_folder) as jobs:
        command = [*arguments(tmp_path, url), f"site.storage_options.endpoint_url={s3_endpoint}"]
        (line,) = jobs.run(*command).expect(2).errors
    assert line.startswith(f"error: {url} ") and "bucket" in line
