"""What every test may need: output roots, local and on a real S3 server; and Hypothesis without a clock."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pipelines.corpus.storage import Storage
from tests.s3_server import BUCKET, ENVIRONMENT, S3Server

settings.register_profile("no deadline", deadline=None)  # what a machine does meanwhile is no bug
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running SeaweedFS server with an empty bucket; its credentials are in the environment."""
    folder = tmp_path_factory.mktemp("s3")
    server = S3Server(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        server.start()
        try:
            yield server
        finally:
            server.kill()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_endpoint(s3_server: S3Server) -> str:
    return s3_server.endpoint


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty output root: a local folder, then a prefix of a real bucket."""
    if request.param == "local":
        return Storage(str(tmp_path / "output"))
    return new_s3_root(request.getfixturevalue("s3_endpoint"), tmp_path)


@pytest.fixture
def local_output(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "output"))


@pytest.fixture
def s3_output(s3_endpoint: str, tmp_path: Path) -> Storage:
    return new_s3_root(s3_endpoint, tmp_path)


def new_s3_root(endpoint: str, tmp_path: Path) -> Storage:
    return Storage(f"s3://{BUCKET}/{tmp_path.name}-{time.monotonic_ns()}/output", {"endpoint_url": endpoint})
