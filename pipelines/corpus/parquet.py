"""Reading Parquet so that a damaged file and an unreachable store are never mistaken for each other."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_TAIL = 1 << 16


class Damaged(Exception):
    """The bytes are there, but they are not the Parquet file that they should be."""


def is_damage(error: BaseException) -> bool:
    """Whether an error of Arrow's Parquet reader is the file's fault: not that of a full memory, nor a person's wish.

    Arrow reports what it cannot decode as OSError, too; whether that came from the store, `Watched` knows.
    """
    if isinstance(error, (MemoryError, pa.ArrowCancelled)):
        return False
    return isinstance(error, (pa.ArrowException, OSError, ValueError))


def read_footer(fs: Any, path: str, size: int) -> tuple[pq.FileMetaData, bytes]:
    """The parsed footer of a file of `size` bytes and its raw bytes, in one or two small reads.

    Raises Damaged; errors of the store, FileNotFoundError among them, pass through as they are.
    """
    if size < 12:
        raise Damaged(f"{size} bytes are too few for a Parquet file")
    tail = fs.cat_file(path, start=max(0, size - _TAIL), end=size)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1" or length > size:
        raise Damaged("the file does not end like a Parquet file")
    if length > len(tail):
        tail = fs.cat_file(path, start=size - length, end=size)
    footer = tail[-length:]
    try:
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
        metadata.schema.to_arrow_schema()
    except Exception as error:
        if not is_damage(error):
            raise
        raise Damaged(first_line(error)) from error
    return metadata, footer


class Watched:
    """A binary file that remembers an error of its store, for Arrow reports its own decoding errors as OSError too."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: BaseException | None = None

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def read(self, size: int = -1) -> bytes:
        try:
            data: bytes = self._file.read(size)
        except BaseException as error:
            self.error = error
            raise
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
