"""All access to the output root, and the create-if-absent primitive that every guarantee of this project rests on."""

import contextlib
import copy
import errno
import hashlib
import os
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from actors.contract import ConfigError, TransientError
from pipelines.corpus.patience import PatientFileSystem, answered

Item = TypeVar("Item")
Result = TypeVar("Result")

SCRATCH = ".scratch"
SCRATCH_LIFE_S = 86_400.0
COMPARED_AT_ONCE = 1 << 22
HEX_DIGITS = "0123456789abcdef"
SENT_AT_ONCE = 128 << 20
"""Bytes of one request of a multipart upload, which an object of twice as many gets. Smaller ones, parts of the usual
size among them, go up in one conditional request, for not every store puts uploads in parts together exclusively:
SeaweedFS 4.48 has let two of four that raced believe that they had."""
RETRY_S = 300.0
WITHOUT_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class Storage:
    """A folder at a path or URL (`/data/out`, `s3://bucket/out`), reached through fsspec.

    Paths given to its methods are relative to that folder, with `/` between their parts. An object is either absent or
    whole: readers never see a part of one. Safe to pickle and to share between processes and nodes.

    Every method may raise TransientError, when the store was out for `retry_s` seconds or a disk is full, and
    ConfigError for what a person must see to first; see `PatientFileSystem`.

    Args:
        url: the folder. It is made on the first write.
        options: keyword arguments of the fsspec file system, such as `endpoint_url`. Never secrets: those come from the
            environment, where fsspec's file systems look for them.
        retry_s: seconds that the store may be out.
        partitions: name of the folder that holds the partitions, and of their parts in the manifests.
    """

    def __init__(
        self,
        url: str,
        options: dict[str, Any] | None = None,
        retry_s: float = RETRY_S,
        *,
        partitions: str = "corpus",
    ) -> None:
        self.url = url.rstrip("/") or "/"
        self.partitions = partitions
        try:
            raw, root = fsspec.core.url_to_fs(os.path.expanduser(url), **(options or {}))
        except (ValueError, ImportError) as error:
            raise ConfigError(f"cannot open {url!r}: {error}") from error
        self.root = root.rstrip("/")
        self.fs = PatientFileSystem(raw, self.url, retry_s)
        self.is_local = self.fs.is_local

    def within(self, retry_s: float) -> "Storage":
        """The same folder, with at most so much patience."""
        other = copy.copy(self)
        other.fs = self.fs.within(retry_s)
        return other

    def path(self, path: str) -> str:
        """The file system's own path of `path`. Raises ValueError where it would climb out of the root."""
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{path!r} is not a path below {self.url}")
        return f"{self.root}/{path}" if path else self.root

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError."""
        return self.fs.cat_file(self.path(path))

    def checksum(self, path: str) -> dict[str, Any]:
        """`num_bytes` and `sha256` (hex) of an object, as manifests tell them. Raises FileNotFoundError."""
        digest, size = hashlib.sha256(), 0
        with self.fs.open(self.path(path)) as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                size += len(chunk)
        return {"num_bytes": size, "sha256": digest.hexdigest()}

    def exists(self, path: str) -> bool:
        self.fs.invalidate_cache()
        return self.fs.exists(self.path(path))

    def sizes(self, folder: str) -> dict[str, int]:
        """Name -> bytes of every object directly in `folder`, in name order; {} where there is no such folder."""
        if self.is_local:  # scandir: fsspec's own listing asks twice for each file, and there may be 100,000

            def scanned() -> dict[str, int]:
                with os.scandir(self.path(folder)) as entries:
                    return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

            try:
                return dict(sorted(self.fs.persist(f"listing {folder}", scanned).items()))
            except FileNotFoundError:
                return {}
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(folder))
        except FileNotFoundError:
            return {}
        found = {entry["name"].rsplit("/", 1)[1]: entry["size"] for entry in entries if entry["type"] == "file"}
        return dict(sorted((name, size) for name, size in found.items() if name))

    def sizes_by_hex(self, folder: str) -> dict[str, int]:
        """`sizes` of those objects whose names begin with a hex digit, as units' do.

        An object store lists a thousand names at a time, one answer after the other: 100 for 100,000 units. By their
        first digit sixteen such lists go on side by side.
        """
        if self.is_local:
            return {name: size for name, size in self.sizes(folder).items() if name[0] in HEX_DIGITS}
        self.fs.invalidate_cache()
        start = len(self.path(folder)) + 1

        def listed(digit: str) -> dict[str, int]:
            found = self.fs.find(self.path(folder), prefix=digit)
            return {path[start:]: int(entry["size"]) for path, entry in found.items() if "/" not in path[start:]}

        return dict(sorted(pair for _, found in concurrently(listed, HEX_DIGITS) for pair in found.items()))

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in `folder`, in order."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(folder))
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[1] for entry in entries if entry["type"] == "directory")

    # --- writing ----------------------------------------------------------------------------------------------------

    def create(self, path: str, data: bytes) -> bool:
        """Write an object that must not be there yet. True when the object there is ours, False when another's is.

        Of any number of concurrent callers with different data exactly one gets True.
        """

        def write(scratch: Path) -> None:
            scratch.write_bytes(data)

        return self.create_file(path, write)

    def create_file(self, path: str, write: Callable[[Path], None]) -> bool:
        """`create`, for an object too large for memory: `write` fills the local scratch file that it is given."""
        with self._scratch(path, write) as scratch:
            if self.is_local:
                return self._told(path, lambda: self._link(scratch, path))
            return self._put_if_absent(scratch, path)

    def put(self, path: str, data: bytes) -> None:
        """Write an object, replacing one that is there: for heartbeats and the card, where the last one wins."""
        if not self.is_local:
            self.fs.pipe_file(self.path(path), data)
            return
        with self._scratch(path, lambda scratch: scratch.write_bytes(data)) as scratch:
            self._told(path, lambda: os.replace(scratch, self._made(path)))

    def delete(self, paths: list[str]) -> None:
        """Delete objects; one that is gone already is no error."""
        if not self.is_local:
            for start in range(0, len(paths), 1000):
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm([self.path(path) for path in paths[start : start + 1000]])
            return
        for path in paths:
            self.fs.told(f"deleting {path}", partial(Path(self.path(path)).unlink, missing_ok=True))

    def sweep(self) -> None:
        """Delete the scratch files that writers killed more than a day ago left at a local root."""
        for name in self.sizes(SCRATCH) if self.is_local else ():
            path = Path(self.path(f"{SCRATCH}/{name}"))
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > SCRATCH_LIFE_S:
                    path.unlink()

    # --- how --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _scratch(self, path: str, write: Callable[[Path], object]) -> Iterator[Path]:
        """A local file that `write` has filled: on the root's own file system where that is local, so that a link can
        publish it."""
        name = f"{uuid.uuid4().hex}-{path.rsplit('/', 1)[-1]}"
        folder = Path(self.path(SCRATCH)) if self.is_local else Path(tempfile.gettempdir())
        scratch = folder / name

        def fill() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            write(scratch)
            if self.is_local:
                _sync(scratch)

        try:
            if self.is_local:
                self._told(path, fill)
            else:
                PatientFileSystem(LocalFileSystem(), str(folder), 0).told(f"writing {name}", fill)
            yield scratch
        finally:
            with contextlib.suppress(OSError):  # what made writing fail may make this fail, too; `sweep` sees to it
                scratch.unlink(missing_ok=True)

    def _told(self, path: str, call: Callable[[], Result]) -> Result:
        """call(), once, its errors told as those of writing `path`."""
        return self.fs.told(f"writing {path}", call)

    def _made(self, path: str) -> Path:
        target = Path(self.path(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _link(self, scratch: Path, path: str) -> bool:
        target = self._made(path)
        try:
            os.link(scratch, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in WITHOUT_LINKS:
                raise
            raise ConfigError(f"{self.url} must be on a file system with hard links: {error}") from error
        _sync(target.parent)
        return True

    def _put_if_absent(self, scratch: Path, path: str) -> bool:
        """Conditional put. A refusal and a lost answer look alike to the caller, so both end in reading back.

        A put that stored nothing is made again while that may help. Should one that was given up arrive after all, the
        next is refused, and finds the object to be ours.
        """
        target = self.path(path)

        def put() -> bool:
            try:
                self.fs.raw.put_file(str(scratch), target, mode="create", **self._in_parts())
                return True
            except Exception as error:
                self.fs.invalidate_cache()
                held = None
                with contextlib.suppress(ConfigError, TransientError):  # then what the put said is told, or tried again
                    held = self.within(0)._holds(target, scratch)
                if held is not None:
                    return held
                code, status = answered(error)
                if code == "NoSuchUpload":  # which is made anew, unlike what else is not found
                    raise OSError("the store has forgotten the upload") from None
                if status == 412 or isinstance(error, FileExistsError):  # there was one, ours perhaps: look again
                    raise OSError("it is there already, and cannot be read") from None
                if isinstance(error, FileNotFoundError):
                    raise ConfigError(f"{self.url} cannot be written: there is no such bucket") from error
                raise  # neither ours nor another's: the put itself failed

        return self.fs.persist(f"writing {path}", put)

    def _in_parts(self) -> dict[str, int]:
        """How large objects go up to an S3 store; others have their own ways, and other names for them."""
        return {"chunksize": SENT_AT_ONCE, "max_concurrency": 4} if "s3" in self.fs.raw.protocol else {}

    def _holds(self, target: str, scratch: Path) -> bool | None:
        """Whether the object there has the scratch file's bytes; None where there is no object.

        Most of another's differ in size already.
        """
        try:
            if self.fs.info(target)["size"] != scratch.stat().st_size:
                return False
            with self.fs.open(target) as found, scratch.open("rb") as ours:
                while chunk := ours.read(COMPARED_AT_ONCE):
                    if found.read(COMPARED_AT_ONCE) != chunk:
                        return False
        except FileNotFoundError:
            return None
        return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def concurrently(
    function: Callable[[Item], Result], items: Iterable[Item], at_once: int = 16
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) for each, in order, at most `at_once` begun and not yet taken: for reads that wait."""
    with ThreadPoolExecutor(at_once) as pool:
        begun: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            begun.append((item, pool.submit(function, item)))
            if len(begun) == at_once:
                item, result = begun.popleft()
                yield item, result.result()
        for item, result in begun:
            yield item, result.result()
