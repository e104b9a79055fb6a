"""A published corpus as the input of a job that adds to it: its parts, by the manifests of finished partitions."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from actors.contract import REWARDS, ConfigError, option
from pipelines.corpus import schema
from pipelines.corpus.parquet import read_footer
from pipelines.corpus.shards import Input, Listed, changed_type, missing_column
from pipelines.corpus.state import Partition, kinds_of, read_state
from pipelines.corpus.storage import RETRY_S, Storage, concurrently

ALL = ["*"]
ADDED_LATER = ("rewards",)
"""Columns of the corpus that those of earlier versions do not have."""


@dataclass(frozen=True)
class CorpusConfig:
    """Which corpus, and what of it."""

    path: str = option("???", "root of the corpus: the output.root of the job that made it")
    keep_columns: list[str] = option(
        ALL, 'columns to carry along besides those of every corpus; ["*"]: all that there are', changes_rows=True
    )
    on_bad_shard: Literal["fail", "skip"] = option("fail", "a part that cannot be read: stop at once, or do the others")
    on_changed_shard: Literal["fail", "new"] = option("fail", "a known part with new content: stop, or take it as new")

    @property
    def columns(self) -> list[str]:
        """The columns that are read, those of ADDED_LATER where they are there."""
        return [*schema.CORPUS.names, *self.keep_columns]

    def key_of(self, column: str) -> str:
        return "keep_columns" if column in self.keep_columns else "path"

    def refusal(self, columns: pa.Schema, kept_types: Mapping[str, str]) -> str | None:
        needed = [name for name in self.columns if name not in ADDED_LATER]
        if "rewards" in columns.names and columns.field("rewards").type != REWARDS:
            return f"wrong_type: 'rewards' is {columns.field('rewards').type}, a column of another meaning"
        return missing_column(columns, needed) or changed_type(columns, kept_types)


class CorpusInput(Input):
    """The parts of a corpus. A partition counts from its `_SUCCESS` on; what is in it never changes. Safe to pickle."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, retry_s: float = RETRY_S) -> None:
        super().__init__(url, options, retry_s)
        self._corpus = Storage(url, dict(options or {}), retry_s)

    def listing(self) -> list[Listed]:
        """Every part of every finished partition, in order; its tag is its checksum, which a copy of it has, too.

        Raises ConfigError where there is none.
        """
        return [
            Listed(part["path"], part["num_bytes"], part["sha256"])
            for partition in self._partitions()
            for part in partition.manifest["corpus"]  # type: ignore[index]  # finished ones have one
        ]

    def is_still(self, shard: Listed, info: Mapping[str, Any]) -> bool:
        """By its size: a part is created once, and pages have checksums of their own."""
        return int(info["size"]) == shard.size

    def refuse_own_output(self, output: Storage) -> None:
        """Raise ConfigError where the output is the corpus itself."""
        roots = [os.path.realpath(each.root) if each.is_local else each.root for each in (self._corpus, output)]
        if type(self.fs.raw) is type(output.fs.raw) and roots[0] == roots[1]:
            raise ConfigError(f"output.root is the corpus that is read, {output.url}: take another folder")

    def kept_columns(self, keep_columns: list[str]) -> list[str]:
        """`keep_columns` with ALL written out. Raises ConfigError where partitions do not keep the same columns."""
        if keep_columns != ALL:
            return keep_columns
        firsts = [(each.number, each.manifest["corpus"][0]) for each in self._partitions() if each.manifest["corpus"]]  # type: ignore[index]

        def kept(first: tuple[int, dict[str, Any]]) -> list[str]:
            metadata, _ = read_footer(self.fs, f"{self.root}/{first[1]['path']}", first[1]["num_bytes"])
            return [name for name in metadata.schema.to_arrow_schema().names if name not in schema.CORPUS.names]

        found = [(number, names) for (number, _), names in concurrently(kept, firsts)]
        if len({tuple(sorted(names)) for _, names in found}) > 1:
            told = "; ".join(f"run={number:06d}: {', '.join(names) or 'none'}" for number, names in found)
            raise ConfigError(
                f"the partitions of {self.url} keep different columns ({told}): "
                "name in input.keep_columns those that all of them have"
            )
        return found[0][1] if found else []

    def _partitions(self) -> list[Partition]:
        found = [partition for partition in read_state(self._corpus).partitions if partition.manifest]
        if not found:
            raise ConfigError(f"input.path {self.url!r} {_why_no_corpus(self._corpus)}")
        return found


def _why_no_corpus(root: Storage) -> str:
    """Why a root has no published partition of a corpus, and what to do about it."""
    if not root.fs.exists(root.root):
        return "does not exist"
    kinds, files = kinds_of(root), root.sizes("")
    inside = re.fullmatch(r"(?:(.*)/)?corpus(?:/run=\d+)?", root.url)
    if inside and ("plan.json" in files or any(name.startswith("run=") for name in root.folders(""))):
        return f"lies inside a corpus: name its root, input.path={inside[1] or '.'}"
    if "preferences" in kinds:
        return "holds a preference dataset, no corpus: name the corpus that it was built from"
    if kinds or root.sizes("runs"):
        return (
            "holds no published partition yet, none with a _SUCCESS: the job that makes the corpus must come to its end"
        )
    if any(name.endswith((".parquet", ".pq")) for name in files):
        return "holds Parquet files, but no corpus: align_corpus.py makes one of prompts"
    return "holds no corpus: name the output.root of align_corpus.py or score_corpus.py"
