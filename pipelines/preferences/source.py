"""The corpus that a preference dataset is built from: the parts of its published partitions, as shards."""

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.contract import ConfigError
from pipelines.corpus.parquet import Watched, first_line, is_damage
from pipelines.corpus.published import CorpusInput
from pipelines.corpus.runs import latest_run
from pipelines.corpus.shards import InputConfig, Listed

ROWS_AT_ONCE = 1 << 14
COLUMNS = ["prompt_id", "prompt", "responses", "aligned", "rewards"]
"""What is read of a part, besides the kept columns; a corpus that is not scored has no `rewards`."""


class PublishedCorpus(CorpusInput):
    """The output root of a job that publishes a corpus. Its parts are named below the root; safe to pickle."""

    changed_advice = "the corpus has been made anew; take another output.root"

    def open(self, shard: Listed) -> Any:
        """The part's bytes as a seekable binary file. Raises ConfigError where it is not what its manifest says."""
        return self.fs.open(self._found(shard), cache_type="none")

    def batches(self, shard: Listed, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Columns of a part, ROWS_AT_ONCE rows at a time, those that it has. Raises ConfigError where it is damaged."""
        with self.open(shard) as raw:
            file = Watched(raw)
            try:
                found = pq.ParquetFile(pa.PythonFile(file, mode="r"), page_checksum_verification=True)
                yield from found.iter_batches(ROWS_AT_ONCE, columns=columns)
            except Exception as error:
                if file.error is not None or not is_damage(error):
                    raise
                raise ConfigError(f"{shard.path} is damaged ({first_line(error)}); restore it and run again") from error

    def _footer(self, shard: Listed) -> "tuple[pq.FileMetaData, str] | str":
        self._found(shard)
        return super()._footer(shard)

    def _found(self, shard: Listed) -> str:
        path = f"{self.root}/{shard.path}"
        try:
            size = self.fs.info(path)["size"]
        except FileNotFoundError:
            raise ConfigError(f"{shard.path} is in a manifest of the corpus, but it is gone; restore it") from None
        if size != shard.size:
            raise ConfigError(f"{shard.path} has {size} bytes, and its manifest says {shard.size}; restore it")
        return path

    def notes(self) -> list[str]:
        """What whoever uses its rows must know of how they were made; [] where there is no record of that."""
        run = latest_run(self._corpus)
        return [] if run is None else list(run.get("notes", []))


def shard_config(path: str, keep_columns: list[str]) -> InputConfig:
    """What planning wants to know of the corpus's columns."""
    return InputConfig(path, prompt_column="prompt", id_column="prompt_id", keep_columns=keep_columns)


def partition_of(path: str) -> int:
    """The partition that a part belongs to, from its path."""
    found = re.search(r"/run=(\d+)/", path)
    if found is None:
        raise ValueError(f"{path} is not a path of a partition")
    return int(found[1])
