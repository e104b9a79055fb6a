"""Writes the sample prompts, prompts.jsonl, as the Parquet shards that the sample run reads.

    python pipelines/sample/make_shards.py

The shards are committed; run this after a change to prompts.jsonl. The same pyarrow writes the same bytes again.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SAMPLE = Path(__file__).resolve().parent
NUM_SHARDS = 5
ROWS_PER_GROUP = 16
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("category", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)


def read_prompts(path: Path) -> pa.Table:
    """The prompts of a JSON Lines file, in its order; a plain string becomes one user message."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        if isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def split_shards(prompts: pa.Table) -> list[pa.Table]:
    """Row i goes to shard i modulo `NUM_SHARDS`, so that each shard has a share of each category."""
    return [prompts.take(list(range(first, prompts.num_rows, NUM_SHARDS))) for first in range(NUM_SHARDS)]


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.parquet"


def main() -> None:
    folder = SAMPLE / "prompts"
    folder.mkdir(exist_ok=True)
    for index, shard in enumerate(split_shards(read_prompts(SAMPLE / "prompts.jsonl"))):
        pq.write_table(shard, shard_path(folder, index), compression="zstd", row_group_size=ROWS_PER_GROUP)
        print(f"{shard_path(folder, index).relative_to(SAMPLE)}: {shard.num_rows} rows")


if __name__ == "__main__":
    main()
