"""A job on an object store behind a proxy that fails on request, and the corpus of the same job that nothing befell."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import RayHead, start_head
from tests.end_to_end.jobs import CommandLine, CompletedJob, Job, Row
from tests.faults.proxy import FaultProxy
from tests.faults.store import published, upload, write_prompts
from tests.s3_server import BUCKET, S3Server


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a fresh folder."""
    return lambda: tmp_path_factory.mktemp("job")


@pytest.fixture(scope="session")
def head(s3_server: S3Server) -> Iterator[RayHead]:
    """A Ray head whose workers have the store's credentials."""
    with start_head(["--num-cpus=16"]) as found:
        yield found


@pytest.fixture(scope="session")
def command_line(head: RayHead, new_folder: Callable[[], Path]) -> Iterator[CommandLine]:
    with CommandLine(head.environment, head.raylet, new_folder) as jobs:
        yield jobs


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@dataclass(frozen=True)
class Clean:
    """What a run on local folders published, and what it was told to do besides where."""

    arguments: list[str]
    rows: tuple[list[Row], list[Row]]


ARGUMENTS = [
    "policy=stored", "aligner=identity", "input.response_column=response", "input.id_column=id", "run.unit_rows=5",
    "run.lease_ttl_s=4", "site.log_every_s=1",
]  # fmt: skip


@pytest.fixture(scope="session")
def clean(command_line: CommandLine, prompts: Path, new_folder: Callable[[], Path]) -> Clean:
    root = new_folder() / "output"
    command_line.run(*ARGUMENTS, f"input.path={prompts}", f"output.root={root}").expect(0)
    rows = published(str(root))
    assert (len(rows[0]), len(rows[1])) == (118, 2)
    return Clean(ARGUMENTS, rows)


class Site:
    """One output root on the store, and the job that goes there through the proxy, prompts included."""

    def __init__(self, command_line: CommandLine, proxy: FaultProxy, server: S3Server, clean: Clean, name: str) -> None:
        self.proxy, self.server, self._clean, self._command_line = proxy, server, clean, command_line
        self.root = f"s3://{BUCKET}/{name}/output"
        options = {
            "endpoint_url": proxy.endpoint,
            "config_kwargs": {"connect_timeout": 5, "read_timeout": 5, "retries": {"max_attempts": 2}},
        }
        self.arguments = [
            *clean.arguments, f"input.path=s3://{BUCKET}/{name}/prompts", f"output.root={self.root}",
            f"site.storage_options={json.dumps(options)}",
        ]  # fmt: skip

    def start(self, *more: str) -> Job:
        return self._command_line.start(*self.arguments, *more)

    def run(self, *more: str) -> CompletedJob:
        return self.start(*more).wait()

    def check(self) -> None:
        """The corpus and the quarantine are those of the clean run, row for row."""
        assert published(self.root, self.server.endpoint) == self._clean.rows


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.port) as found:
        yield found


@pytest.fixture
def site(
    command_line: CommandLine, proxy: FaultProxy, s3_server: S3Server, clean: Clean, prompts: Path, tmp_path: Path
) -> Site:
    upload(prompts, f"s3://{BUCKET}/{tmp_path.name}/prompts", s3_server.endpoint)
    return Site(command_line, proxy, s3_server, clean, tmp_path.name)
