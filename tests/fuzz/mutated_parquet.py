"""Reads mutations of a Parquet shard as the job does, in a process that may die of it.

    python tests/fuzz/mutated_parquet.py FIRST COUNT

Every mutation must end as a shard that is refused, or in all of its rows, each well or with a problem. Prints which
one it is at, and at last how they ended.
"""

import json
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.read import Span, WholeRows, read_checked
from pipelines.corpus.shards import Input, InputConfig, Shard
from pipelines.corpus.units import Unit

ADDRESS_SPACE = 6 << 30
LIMIT_S = 20
CONFIG = InputConfig(path="", id_column="id", response_column="response", keep_columns=["topic"])


def bases(folder: Path) -> list[bytes]:
    """Shards in the layouts that writers use: compressed or not, dictionaries or not, chats or strings, two pages."""
    found = []
    for number, compression in enumerate(("none", "snappy", "zstd", "gzip")):
        rows = range(40)
        prompts = [f"Prompt {row} " * (row % 5 + 1) for row in rows]
        chats = [[{"role": "user", "content": text}] for text in prompts]
        table = pa.table(
            {
                "id": [f"id-{row}" for row in rows],
                "prompt": chats if number % 2 else prompts,
                "response": [[f"Answer {row}", "Another"] for row in rows],
                "topic": pa.array([{"a": [row, None], "b": "x" * row} for row in rows]),
                "unread": [row / 7 for row in rows],
            }
        )
        path = folder / f"base-{number}.parquet"
        pq.write_table(
            table, path, row_group_size=16, compression=compression, use_dictionary=number < 2,
            write_page_checksum=number % 2 == 0, data_page_size=300, data_page_version="2.0" if number > 1 else "1.0",
        )  # fmt: skip
        found.append(path.read_bytes())
    return found


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Up to four things done to the bytes: half of the time to the footer, which is small and steers the reader."""
    out = bytearray(data)
    footer = len(out) - 8 - int.from_bytes(out[-8:-4], "little")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(footer, len(out) - 8) if rng.random() < 0.5 and footer < len(out) - 8 else 0
        at = at or rng.randrange(len(out))
        at = min(at, len(out) - 1)
        length = rng.choice((1, 1, 1, 2, 8, 100))
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + length] = rng.randbytes(len(out[at : at + length]))
            case 2:
                out[at : at + length] = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * len(out[at : at + length])
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = rng.randbytes(length)
            case 5 if rng.random() < 0.2:
                del out[at:]
                out.extend(data[-8 - (len(data) - 8 - footer) :] if rng.random() < 0.5 else b"")
        if len(out) < 20:
            break
    return bytes(out)


def read(path: Path) -> str:
    """How a shard ends: `refused`, `well`, or `quarantined`. Raises AssertionError where rows are lost."""
    source = Input(str(path))
    shards, bad, _ = source.footers(source.listing(), CONFIG, {})
    if bad:
        return "refused"
    (shard,) = shards
    num_problems = 0
    for span in spans(shard):
        whole = WholeRows(source, shard, span.row_group)
        for unit, table in read_checked(source, CONFIG, span):
            assert table.num_rows == unit.num_rows
            problems = [row for row, problem in enumerate(table["problem"].to_pylist()) if problem]
            whole.as_json(unit, problems)
            num_problems += len(problems)
    return "quarantined" if num_problems else "well"


def spans(shard: Shard) -> list[Span]:
    """Every row group in units of 8 rows; of those that claim more rows than a shard here can hold, the first."""
    found = []
    for group, (first, stop) in enumerate(zip(shard.bounds, shard.bounds[1:], strict=False)):
        stops = range(first, min(stop, first + 1000), 8)
        if stops:
            found.append(Span(shard, group, tuple(Unit(shard.key, at, min(at + 8, stop)) for at in stops)))
    return found


def main(first: int, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        originals = bases(Path(name))
        path = Path(name) / "mutated.parquet"
        for number in range(first, first + count):
            print(f"at {number}", flush=True)
            rng = random.Random(number)
            path.write_bytes(mutated(originals[number % len(originals)], rng))
            signal.alarm(LIMIT_S)  # its default action ends the process
            ends[read(path)] += 1
            signal.alarm(0)
    print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
