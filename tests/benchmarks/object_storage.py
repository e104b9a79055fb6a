"""Measures reading shards and listing units on a real S3 server on the loopback.

    python tests/benchmarks/object_storage.py [--repeats 7] [--units 10000]

read: a shard's row groups through s3fs, as the job reads them, and through pyarrow's own S3 file system, in turns; the
ratio of each pair is printed, so that whatever else the machine does meanwhile befalls both.
list: the names of committed units with one LIST after the other, and by their first hex digit at the same time.
Figures are printed; nothing is asserted.
"""

import argparse
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from pipelines.corpus.shards import Input, Listed
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit
from tests.s3_server import BUCKET, ENVIRONMENT, S3Server, s3_server

GROUP_ROWS = 16_384
NUM_GROUPS = 16
BATCH_ROWS = 256


def write_shard(folder: Path) -> Path:
    """About 100 MB of prompts that do not compress well, and a column that nobody reads."""
    path = folder / "shard.parquet"
    writer: pq.ParquetWriter | None = None
    for group in range(NUM_GROUPS):
        rows = range(group * GROUP_ROWS, (group + 1) * GROUP_ROWS)
        prompts = [hashlib.sha512(str(row).encode()).hexdigest() * 3 for row in rows]
        table = pa.table({"prompt": prompts, "unread": [text[::-1] for text in prompts]})
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=GROUP_ROWS)
    assert writer is not None
    writer.close()
    return path


def by_s3fs(source: Input, shard: Listed) -> Callable[[int], int]:
    def read(group: int) -> int:
        file = source.open(shard)
        parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"), page_checksum_verification=True)
        return _num_rows(parquet, group)

    return read


def by_arrow(endpoint: str, path: str) -> Callable[[int], int]:
    fs = pyarrow.fs.S3FileSystem(endpoint_override=endpoint.removeprefix("http://"), scheme="http", region="us-east-1")

    def read(group: int) -> int:
        parquet = pq.ParquetFile(fs.open_input_file(path), page_checksum_verification=True)
        return _num_rows(parquet, group)

    return read


def _num_rows(parquet: pq.ParquetFile, group: int) -> int:
    batches = parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=["prompt"])
    return sum(batch.num_rows for batch in batches)


def seconds(read: Callable[[int], int], readers: int) -> float:
    begin = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        assert sum(pool.map(read, range(NUM_GROUPS))) == NUM_GROUPS * GROUP_ROWS
    return time.perf_counter() - begin


def compare_reads(server: S3Server, folder: Path, repeats: int) -> None:
    path = write_shard(folder)
    target = Storage(f"s3://{BUCKET}/read", {"endpoint_url": server.endpoint})
    target.create("shard.parquet", path.read_bytes())
    source = Input(f"s3://{BUCKET}/read/shard.parquet", {"endpoint_url": server.endpoint})
    (shard,) = source.listing()
    s3fs_read, arrow_read = by_s3fs(source, shard), by_arrow(server.endpoint, f"{BUCKET}/read/shard.parquet")
    mib = shard.size / 2**20 / 2  # one of two columns
    for readers in (1, 2, 4):
        seconds(s3fs_read, readers), seconds(arrow_read, readers)
        pairs = [(seconds(s3fs_read, readers), seconds(arrow_read, readers)) for _ in range(repeats)]
        ratios = sorted(s3fs_s / arrow_s for s3fs_s, arrow_s in pairs)
        fastest = [min(times) for times in zip(*pairs, strict=True)]
        print(
            f"read: {mib:.0f} MiB in {NUM_GROUPS} row groups, {readers} at once: s3fs {mib / fastest[0]:.0f} MiB/s, "
            f"pyarrow {mib / fastest[1]:.0f} MiB/s at best; s3fs takes "
            f"{statistics.median(ratios):.2f}x of its time ({ratios[0]:.2f} to {ratios[-1]:.2f} in {repeats} pairs)",
            flush=True,
        )


def compare_listings(server: S3Server, num_units: int, repeats: int) -> None:
    output = Storage(f"s3://{BUCKET}/list", {"endpoint_url": server.endpoint})
    names = [Unit(hashlib.sha256(str(n % 64).encode()).hexdigest()[:12], n, n + 1).path for n in range(num_units)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: output.put(name, b"unit"), names))
    pairs = []
    for _ in range(repeats):
        begin = time.perf_counter()
        assert len(output.sizes("units")) == num_units
        middle = time.perf_counter()
        assert len(read_state(output).sizes) == num_units
        pairs.append((middle - begin, time.perf_counter() - middle))
    ratios = sorted(one / by_prefix for one, by_prefix in pairs)
    print(
        f"list: {num_units} units: {min(one for one, _ in pairs):.2f} s with one LIST after the other, "
        f"{min(each for _, each in pairs):.2f} s for the whole state with LISTs by prefix: "
        f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f} in {repeats} pairs)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--units", type=int, default=10_000, help="to be listed; 0: leave it out")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with s3_server() as (server, folder):
        compare_reads(server, folder, arguments.repeats)
        if arguments.units:
            compare_listings(server, arguments.units, arguments.repeats)


if __name__ == "__main__":
    main()
