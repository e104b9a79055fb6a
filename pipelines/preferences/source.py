"""The corpus that a preference dataset is built from: the parts of its published partitions, as shards."""

import os
import re
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq

from actors.contract import ConfigError
from pipelines.corpus.shards import Input, InputConfig, Listed
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage

COLUMNS = ["prompt_id", "prompt", "responses", "aligned", "rewards"]
"""What is read of a part, besides the kept columns; a corpus that is not scored has no `rewards`."""


class PublishedCorpus(Input):
    """The output root of a job that publishes a corpus. Its parts are named below the root; safe to pickle."""

    changed_advice = "the corpus has been made anew; take another output.root"

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(url, options)
        self.corpus = Storage(url, dict(options or {}))

    def listing(self) -> list[Listed]:
        """The parts that the manifests of finished partitions list, in order; the tag is their checksum.

        Raises ConfigError where nothing is published.
        """
        found = [
            Listed(part["path"], part["num_bytes"], part["sha256"])
            for partition in read_state(self.corpus).partitions
            if partition.manifest
            for part in partition.manifest["corpus"]
        ]
        if not found:
            raise ConfigError(f"input.path {self.url!r} holds no published partition (corpus/run=…/_SUCCESS)")
        return found

    def refuse_own_output(self, output: Storage) -> None:
        """Raise ConfigError where the dataset would be written into the corpus: each has units and runs of its own."""
        roots = [os.path.realpath(each.root) if each.is_local else each.root for each in (self.corpus, output)]
        if type(self.corpus.fs) is type(output.fs) and roots[0] == roots[1]:
            raise ConfigError(f"output.root {output.url!r} is the corpus itself; take another folder")

    def open(self, shard: Listed) -> Any:
        """The part's bytes as a seekable binary file. Raises ConfigError where it is not what its manifest says."""
        return self.fs.open(self._found(shard), "rb", cache_type="none")

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


def shard_config(path: str, keep_columns: list[str]) -> InputConfig:
    """What planning wants to know of the corpus's columns."""
    return InputConfig(path, prompt_column="prompt", id_column="prompt_id", keep_columns=keep_columns)


def partition_of(path: str) -> int:
    """The partition that a part belongs to, from its path."""
    found = re.search(r"/run=(\d+)/", path)
    if found is None:
        raise ValueError(f"{path} is not a path of a partition")
    return int(found[1])
