"""File systems whose outages are waited out, and whose errors are told apart: an answer, a mistake or an outage."""

import errno
import io
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from actors.contract import ConfigError, TransientError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 5.0
"""Between two tries: twice as long each time, less up to half of it by chance, so that those who wait do not march."""

ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError)
"""What a call may end with that is no failure of the store."""
TOLD = (ConfigError, TransientError)

CLIENTS = {"botocore", "aiobotocore", "aiohttp", "urllib3", "requests", "gcsfs", "google", "adlfs", "azure"}
"""Packages whose errors are no OSError and yet the store's."""

CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError", "InvalidRegionError",
    "TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "ParamValidationError",
}  # fmt: skip
"""botocore's errors for what a person has not set up."""

PASSING = {"RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "SlowDown"}
"""S3's codes that come with a status of 400 although the same request may succeed the next time."""

FULL = {errno.ENOSPC, errno.EDQUOT}
LOCAL_OUTAGES = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ECONNREFUSED, errno.EBUSY, errno.EAGAIN,
}  # fmt: skip
"""What a mounted network file system says when its server is away."""
LOCAL_MISTAKES = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}

Result = TypeVar("Result")


class PatientFileSystem:
    """The calls of an fsspec file system that this project makes, each made again while the store is out.

    Every one of them may raise TransientError, after `retry_s` seconds or at once where a disk is full, and ConfigError
    for what will be the same next time: credentials that are refused or not there, a bucket that does not exist, a
    folder that must not be written. Both name the store and what was being done, in one line. An absent object is
    FileNotFoundError, as ever; an error that is neither the store's nor its client's passes through as it is.

    A disk that is full is an outage and not a mistake: nothing is wrong with the command, and as soon as there is room
    the same one goes on.

    Args:
        raw: the file system.
        url: how a person named it.
        retry_s: seconds after the first failure for which a call is tried again.
    """

    def __init__(self, raw: Any, url: str, retry_s: float) -> None:
        self.raw, self._url, self._retry_s = raw, url, retry_s
        self.is_local = isinstance(raw, LocalFileSystem)
        self._is_out = False

    def within(self, retry_s: float) -> "PatientFileSystem":
        """The same file system, with at most so much patience."""
        return PatientFileSystem(self.raw, self._url, min(retry_s, self._retry_s))

    def persist(self, doing: str, call: Callable[[], Result]) -> Result:
        """call(), again while it fails for an outage; it must be one that may come through twice."""
        failed_at: float | None = None
        for num_tries in itertools.count(1):
            try:
                result = call()
            except Exception as error:
                reason = self._outage(doing, error)
                failed_at = failed_at or time.monotonic()
                wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(num_tries - 1, 20)) * random.uniform(0.5, 1)
                is_full = isinstance(error, OSError) and error.errno in FULL
                if is_full or time.monotonic() + wait > failed_at + self._retry_s:
                    times = f"{num_tries} tries" if num_tries > 1 else "1 try"
                    told = "is full" if is_full else f"is out ({times}, site.storage_retry_s {self._retry_s:g})"
                    raise TransientError(f"{self._url} {told}: {reason}") from error
                if not self._is_out:
                    self._is_out = True
                    logging.getLogger(__name__).warning(
                        "%s does not answer (%s); trying again for up to %g s", self._url, reason, self._retry_s
                    )
                time.sleep(wait)
            else:
                self._is_out = False
                return result
        raise AssertionError("unreachable")

    def told(self, doing: str, call: Callable[[], Result]) -> Result:
        """call(), once: for what takes too long to be made again."""
        return self.within(0).persist(doing, call)

    def _outage(self, doing: str, error: Exception) -> str:
        """What is out, in a line. Raises ConfigError for a mistake, and the error itself where it is neither."""
        if isinstance(error, TOLD) or (isinstance(error, ANSWERS) and answered(error)[0] != "NoSuchBucket"):
            raise error
        reason = f"{doing}: {_line(error)}"
        if isinstance(error, NotADirectoryError):
            raise ConfigError(f"{self._url} is a file, or lies below one: name a folder ({doing})") from error
        if answered(error)[1] == 412:  # s3fs reads on in the version that it began with
            raise ConfigError(
                f"{self._url}: {reason}; it was replaced meanwhile: run the same command again"
            ) from error
        if _is_mistake(error, self.is_local):
            fix = "its rights" if self.is_local else "the bucket's name, the credentials and their rights"
            raise ConfigError(f"{self._url} refuses: {reason}; see to {fix}") from error
        if not _is_outage(error, self.is_local):
            raise error
        return reason

    # --- the calls --------------------------------------------------------------------------------------------------

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        data: bytes = self.persist(f"reading {path}", lambda: self.raw.cat_file(path, start=start, end=end))
        return data

    def open(self, path: str, cache_type: str = "readahead") -> "PatientFile":
        """An object's bytes, for reading only."""
        raw = self.persist(f"reading {path}", lambda: self.raw.open(path, "rb", cache_type=cache_type))
        return PatientFile(self, raw, path)

    def info(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = self.persist(f"looking up {path}", lambda: self.raw.info(path))
        return found

    def exists(self, path: str) -> bool:
        return bool(self.persist(f"looking up {path}", lambda: self.raw.exists(path)))

    def isdir(self, path: str) -> bool:
        return bool(self.persist(f"looking up {path}", lambda: self.raw.isdir(path)))

    def ls(self, path: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.persist(f"listing {path}", lambda: self.raw.ls(path, detail=True))
        return entries

    def find(self, path: str, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Every object below a folder; on an object store only those whose path below it begins with `prefix`."""
        self._walk_strictly()
        narrowed = {"prefix": prefix} if prefix else {}
        found: dict[str, Any] = self.persist(f"listing {path}", lambda: self.raw.find(path, detail=True, **narrowed))
        return found

    def glob(self, pattern: str) -> dict[str, dict[str, Any]]:
        self._walk_strictly()
        found: dict[str, Any] = self.persist(f"listing {pattern}", lambda: self.raw.glob(pattern, detail=True))
        return found

    def _walk_strictly(self) -> None:
        """Make folders that cannot be listed an error: fsspec passes over them, with all that is in them.

        It has an argument for that, but does not hand it on from a folder to those in it.
        """
        self.raw.walk = partial(self.raw.walk, on_error=_raise_unless_gone)
        if self.raw.async_impl:
            self.raw._walk = partial(self.raw._walk, on_error=_raise_unless_gone)

    def pipe_file(self, path: str, data: bytes) -> None:
        """Write an object whole, replacing one that is there."""
        self.persist(f"writing {path}", lambda: self.raw.pipe_file(path, data))

    def rm(self, paths: list[str]) -> None:
        self.persist(f"deleting {paths[0]}", lambda: self.raw.rm(paths))

    def invalidate_cache(self) -> None:
        self.raw.invalidate_cache()


class PatientFile(io.IOBase):
    """A file that is open for reading, from which a read that fails is made again."""

    def __init__(self, fs: PatientFileSystem, raw: Any, path: str) -> None:
        self._fs, self._raw, self._path = fs, raw, path

    def read(self, size: int = -1) -> bytes:
        at = self._raw.tell()

        def again() -> bytes:
            self._raw.seek(at)
            data: bytes = self._raw.read(size)
            return data

        return self._fs.persist(f"reading {self._path}", again)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self._raw.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()


def _raise_unless_gone(error: Exception) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


# --- telling errors apart -------------------------------------------------------------------------------------------


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes: s3fs makes an OSError of what botocore raised."""
    while error is not None:
        yield error
        error = error.__cause__


def answered(error: BaseException) -> tuple[str, int]:
    """(code, HTTP status) with which an S3 store answered; ("", 0) where it did not, or the error is of another."""
    for each in _chain(error):
        response = getattr(each, "response", None)  # botocore's ClientError, which local runs need not import
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", "")), int(status)
    return "", 0


def _is_mistake(error: BaseException, is_local: bool) -> bool:
    if is_local:
        return isinstance(error, OSError) and error.errno in LOCAL_MISTAKES
    code, status = answered(error)
    if status:
        return 300 <= status < 500 and status not in (408, 409, 425, 429) and code not in PASSING
    return isinstance(error, PermissionError) or any(type(each).__name__ in CREDENTIALS for each in _chain(error))


def _is_outage(error: BaseException, is_local: bool) -> bool:
    if is_local:
        return isinstance(error, OSError) and error.errno in LOCAL_OUTAGES | FULL
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in CLIENTS


def _line(error: BaseException) -> str:
    """What it says, in one line of at most 300 characters; its name where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
