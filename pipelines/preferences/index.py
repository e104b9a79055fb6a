"""The index of prompts: what each part of the corpus asks, kept beside the dataset so that later runs need not read it
again to know which prompts came before."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.shards import Listed
from pipelines.corpus.storage import Storage
from pipelines.preferences import schema
from pipelines.preferences.filters import exact_duplicates, near_duplicates, prompt_keys, prompt_texts, shingled
from pipelines.preferences.ranked import Bools
from pipelines.preferences.settings import PromptsConfig
from pipelines.preferences.source import PublishedCorpus

FOLDER = "prompts"


def index_name(listed: Listed, dedup: str) -> str:
    """Names what is indexed, by the part's checksum, and how."""
    part = listed.path.replace("/", "+").removesuffix(".parquet")
    return f"{part}-{listed.tag[:12]}.{dedup}-{schema.VERSION}.parquet"


def missing(output: Storage, listing: list[Listed], dedup: str) -> list[Listed]:
    """Parts that are not indexed yet."""
    there = output.sizes(FOLDER)
    return [listed for listed in listing if index_name(listed, dedup) not in there]


def write_index(source: PublishedCorpus, output: Storage, listed: Listed, dedup: str) -> pa.Table:
    """Index a part: `key` (uint64) of each prompt, for `near` its `shingled`. Returns a row: done (path), rows."""
    num_rows = 0

    def write(path: Path) -> None:
        nonlocal num_rows
        writer: pq.ParquetWriter | None = None
        for batch in source.batches(listed, ["prompt"]):
            texts = prompt_texts(batch["prompt"])
            columns = {"key": pa.array(prompt_keys(texts))}
            if dedup == "near":
                columns |= shingled(texts)
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True)
            writer.write_table(table)
            num_rows += table.num_rows
        if writer is None:
            raise ValueError(f"{listed.path} is published and has no rows")
        writer.close()

    output.create_file(f"{FOLDER}/{index_name(listed, dedup)}", write)
    return pa.table({"done": [listed.path], "rows": [num_rows]})


def duplicates(output: Storage, listing: list[Listed], prompts: PromptsConfig) -> dict[str, Bools]:
    """Of each part, by its path, which prompts are not the first of the corpus that ask the same.

    The first counts, not the first that something comes of: that would take every answer of the corpus, each night
    anew, and what a unit makes would depend on units that are built at the same time, and on what was published before.
    """
    columns = ["signature", "shingles"] if prompts.dedup == "near" else ["key"]

    def read(listed: Listed) -> pa.Table:
        with output.fs.open(output.path(f"{FOLDER}/{index_name(listed, prompts.dedup)}")) as file:
            return pq.read_table(file, columns=columns)

    parts = map(read, listing)
    found = near_duplicates(parts, prompts.overlap) if prompts.dedup == "near" else exact_duplicates(parts)
    return {listed.path: np.asarray(each) for listed, each in zip(listing, found, strict=True)}
