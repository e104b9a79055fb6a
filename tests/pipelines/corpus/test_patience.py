"""Errors of a store: waited out, told in one line, and never taken for one another."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import ClientConnectionError
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from s3fs.errors import translate_boto_error

from actors.contract import ConfigError, TransientError
from pipelines.corpus.patience import FIRST_WAIT_S, LONGEST_WAIT_S, PatientFileSystem
from pipelines.corpus.shards import Input
from pipelines.corpus.storage import SCRATCH, Storage


def answered(code: str, status: int) -> OSError:
    """What s3fs raises where an S3 store answered so."""
    response = {"Error": {"Code": code, "Message": "said"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    translated: OSError = translate_boto_error(ClientError(response, "PutObject"))  # type: ignore[arg-type]
    return translated


OUTAGES = [
    answered("SlowDown", 503),
    answered("InternalError", 500),
    answered("RequestTimeout", 400),
    answered("429", 429),
    EndpointConnectionError(endpoint_url="http://x"),
    ClientConnectionError("reset"),
    TimeoutError(),
    ConnectionResetError(errno.ECONNRESET, "reset"),
]
MISTAKES = [
    answered("ExpiredToken", 400),
    answered("InvalidToken", 400),
    answered("SignatureDoesNotMatch", 403),
    answered("RequestTimeTooSkewed", 403),
    answered("403", 403),
    answered("400", 400),
    answered("PermanentRedirect", 301),
    answered("NoSuchBucket", 404),
    NoCredentialsError(),
    PermissionError("no"),
]


class Fake:
    """A file system whose `info` raises these errors, one a call, and then answers."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)

    def info(self, path: str) -> dict[str, Any]:
        if self.errors:
            raise self.errors.pop(0)
        return {"name": path}


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries; the clock runs by them alone."""
    waits: list[float] = []
    monkeypatch.setattr("pipelines.corpus.patience.time.sleep", waits.append)
    monkeypatch.setattr("pipelines.corpus.patience.time.monotonic", lambda: 1000 + sum(waits))
    return waits


@pytest.mark.parametrize("error", OUTAGES, ids=repr)
def test_an_outage_is_waited_out(error: Exception, slept: list[float]) -> None:
    assert PatientFileSystem(Fake(error, error), "s3://b", 60).info("x") == {"name": "x"}
    assert len(slept) == 2


@pytest.mark.parametrize("error", OUTAGES, ids=repr)
def test_an_outage_that_lasts_is_told_in_one_line(error: Exception, slept: list[float]) -> None:
    with pytest.raises(TransientError, match=r"^s3://b is out \(.* tries, site.storage_retry_s 60\): looking up x: ."):
        PatientFileSystem(Fake(*[error] * 1000), "s3://b", 60).info("x")
    assert 60 - LONGEST_WAIT_S <= sum(slept) <= 60
    assert slept[0] <= FIRST_WAIT_S
    assert max(slept) <= LONGEST_WAIT_S


@pytest.mark.parametrize("error", MISTAKES, ids=repr)
def test_a_mistake_is_told_at_once_in_one_line(error: Exception, slept: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"^s3://b refuses: looking up x: .+$"):
        PatientFileSystem(Fake(error), "s3://b", 60).info("x")
    assert not slept


def test_an_object_that_is_replaced_while_it_is_read_is_no_matter_of_rights(slept: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"it was replaced meanwhile: run the same command again$"):
        PatientFileSystem(Fake(answered("PreconditionFailed", 412)), "s3://b", 60).info("x")


@pytest.mark.parametrize("error", [FileNotFoundError("x"), answered("NoSuchKey", 404), TypeError("a bug")], ids=repr)
def test_what_is_no_failure_of_the_store_passes_through(error: Exception, slept: list[float]) -> None:
    with pytest.raises(type(error)) as raised:
        PatientFileSystem(Fake(error), "s3://b", 60).info("x")
    assert raised.value is error
    assert not slept


def test_an_outage_is_announced_once(slept: list[float], caplog: pytest.LogCaptureFixture) -> None:
    fs = PatientFileSystem(Fake(*OUTAGES[:4]), "s3://b", 60)
    with caplog.at_level(logging.WARNING):
        fs.info("x")
    (record,) = caplog.records
    assert record.getMessage() == "s3://b does not answer (looking up x: [Errno 16] said); trying again for up to 60 s"


def test_a_read_that_breaks_off_goes_on_where_it_was(tmp_path: Path, slept: list[float]) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    fs = PatientFileSystem(fsspec.filesystem("file"), str(tmp_path), 60)
    with fs.open(f"{tmp_path}/x") as file:
        assert file.read(10) == bytes(range(10))
        read, failures = file._raw.read, [OSError(errno.EIO, "away"), OSError(errno.ESTALE, "away")]

        class Flaky:
            def __getattr__(self, name: str) -> Any:
                return getattr(raw, name)

            def read(self, size: int) -> bytes:
                data: bytes = read(size)  # which moves on before it fails
                if failures:
                    raise failures.pop()
                return data

        raw, file._raw = file._raw, Flaky()
        assert file.read(10) == bytes(range(10, 20))
        file._raw = raw
    assert len(slept) == 2


def test_arrow_reads_parquet_through_it(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": list(range(1000))}), tmp_path / "x", row_group_size=100)
    fs = PatientFileSystem(fsspec.filesystem("file"), str(tmp_path), 0)
    with fs.open(f"{tmp_path}/x") as file:
        assert pq.read_table(file)["a"].to_pylist() == list(range(1000))


# --- local roots ----------------------------------------------------------------------------------------------------


def writes(output: Storage) -> list[Callable[[], object]]:
    return [lambda: output.create("units/a", b"x"), lambda: output.put("units/a", b"x")]


@pytest.mark.parametrize("step", ["os.link", "os.replace", "Path.write_bytes", "Path.mkdir"])
@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, TransientError, "{} is full: writing units/a: .*No space left on device"),
        (errno.EDQUOT, TransientError, "{} is full: writing units/a: .*quota exceeded"),
        (errno.EIO, TransientError, r"{} is out \(1 try, site.storage_retry_s 0\): writing units/a: .*error"),
        (errno.EROFS, ConfigError, "{} refuses: writing units/a: .*Read-only file system"),
        (errno.EACCES, ConfigError, "{} refuses: writing units/a: .*Permission denied"),
    ],
)
def test_a_local_root_that_cannot_be_written_is_told_in_one_line(
    step: str, number: int, kind: type[Exception], message: str, local_output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_output.put("leases/000001.json", b"x")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number), str(args[0]))

    monkeypatch.setattr(f"pathlib.{step}" if step.startswith("Path") else step, fail)
    for write in writes(local_output)[slice(1) if step == "os.link" else slice(step == "os.replace", 2)]:
        with pytest.raises(kind, match=message.format(local_output.url)) as told:
            write()
        assert "\n" not in str(told.value)
    monkeypatch.undo()
    assert local_output.sizes("units") == local_output.sizes(SCRATCH) == {}
    assert local_output.create("units/a", b"x")  # nothing is lost, and the same call succeeds


def test_a_subfolder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / name / "x.parquet")
    for url in (str(tmp_path), f"{tmp_path}/*/*.parquet"):
        source = Input(url, retry_s=0)
        ls = source.fs.raw.ls

        def partly(path: str, *args: Any, ls: Any = ls, **kwargs: Any) -> Any:
            if path.endswith("/b"):
                raise OSError(errno.EIO, "Input/output error")
            return ls(path, *args, **kwargs)

        monkeypatch.setattr(source.fs.raw, "ls", partly)
        with pytest.raises(TransientError, match="Input/output error"):
            source.listing()
        monkeypatch.undo()


def test_a_subfolder_of_a_bucket_that_cannot_be_listed_is_not_passed_over(
    s3_output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        s3_output.put(f"{name}/x.parquet", b"x")
    source = Input(f"{s3_output.url}/*/*.parquet", {"endpoint_url": s3_output.fs.raw.endpoint_url}, retry_s=0)
    assert len(source.listing()) == 2
    lsdir = source.fs.raw._lsdir

    async def partly(path: str, *args: Any, **kwargs: Any) -> Any:
        if path.endswith("/b"):
            raise answered("InternalError", 500)
        return await lsdir(path, *args, **kwargs)

    monkeypatch.setattr(source.fs.raw, "_lsdir", partly)
    with pytest.raises(TransientError, match="said"):
        source.listing()
