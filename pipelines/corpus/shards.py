"""Input shards: finding them, telling one version of a shard from another, and refusing those that cannot be read."""

import difflib
import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, Protocol

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from actors.contract import ConfigError, option, refuse_secrets
from pipelines.corpus import schema
from pipelines.corpus.parquet import Damaged, read_footer
from pipelines.corpus.patience import PatientFileSystem
from pipelines.corpus.storage import RETRY_S, Storage, concurrently


class ShardsConfig(Protocol):
    """What planning and reading ask of a config of shards, whatever is in them: `columns` are those that are read."""

    @property
    def columns(self) -> list[str]: ...
    @property
    def keep_columns(self) -> list[str]: ...
    @property
    def on_changed_shard(self) -> str: ...

    def key_of(self, column: str) -> str:
        """The key that names a column."""
        ...

    def refusal(self, columns: pa.Schema, kept_types: Mapping[str, str]) -> str | None:
        """Why a shard of such columns cannot be read; None where it can. `kept_types` are those of earlier shards."""
        ...


@dataclass(frozen=True)
class InputConfig:
    """Where the prompts are and what their columns mean."""

    path: str = option("???", "Parquet file, folder (searched below) or glob, local or by URL")
    prompt_column: str = option("prompt", "column of strings, or of chats: lists of {role, content}", changes_rows=True)
    id_column: str | None = option(None, "column that names each prompt; null: a hash of the prompt", changes_rows=True)
    response_column: str | None = option(
        None, "column of answers for `policy=stored`: string or list", changes_rows=True
    )
    keep_columns: list[str] = option([], "columns carried into the corpus unchanged", changes_rows=True)
    on_bad_shard: Literal["fail", "skip"] = option(
        "fail", "a shard that cannot be read: stop at once, or do the others"
    )
    on_changed_shard: Literal["fail", "new"] = option("fail", "a known path with new content: stop, or align it as new")

    def __post_init__(self) -> None:
        refuse_secrets("path", self.path)
        taken = sorted(set(self.keep_columns) & {*schema.UNIT.names, *schema.RESERVED})
        if taken:
            raise ConfigError(f"keep_columns may not name {', '.join(taken)}: that name has a meaning of its own here")
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise ConfigError("keep_columns names a column twice")

    @property
    def columns(self) -> list[str]:
        """The columns that are read, each once."""
        named = [self.prompt_column, self.id_column, self.response_column, *self.keep_columns]
        return list(dict.fromkeys(name for name in named if name))

    def key_of(self, column: str) -> str:
        keys = ("prompt_column", "id_column", "response_column")
        return next((key for key in keys if getattr(self, key) == column), "keep_columns")

    def refusal(self, columns: pa.Schema, kept_types: Mapping[str, str]) -> str | None:
        return missing_column(columns, self.columns) or _wrong_type(columns, self) or changed_type(columns, kept_types)


@dataclass(frozen=True)
class Listed:
    """A shard as a listing shows it.

    Attributes:
        path: below the input root (the longest literal folder of a glob).
        size: bytes.
        tag: ETag where the store has one, else the modification time in nanoseconds: changes when the content does.
    """

    path: str
    size: int
    tag: str


@dataclass(frozen=True)
class Shard:
    """One version of an input shard.

    Attributes:
        listed: as listed.
        key: 12 hex digits of a hash over path, size, tag and footer: names this version in unit names.
        row_groups: rows of each row group.
    """

    listed: Listed
    key: str
    row_groups: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.bounds[-1]

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """The row with which each row group begins, and the end of the last one."""
        return tuple(accumulate(self.row_groups, initial=0))

    def row_group_of(self, row: int) -> int:
        """The row group that holds a row of the shard."""
        return bisect_right(self.bounds, row) - 1


@dataclass(frozen=True)
class BadShard:
    """A shard of which no row can be read, and why; `missing` is the column that it should have and has not."""

    path: str
    reason: str
    missing: str | None = None


class Input:
    """The folder, file or glob that the prompts come from. Safe to pickle.

    Its methods may raise TransientError and ConfigError, as those of `Storage` may.
    """

    changed_advice = "input.on_changed_shard=new aligns it as a new shard, besides the old rows"
    """What to do about a shard that is another one under an old name."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, retry_s: float = RETRY_S) -> None:
        self.url = url
        try:
            raw, path = fsspec.core.url_to_fs(os.path.expanduser(url), **(options or {}))
        except (ValueError, ImportError) as error:
            raise ConfigError(f"input.path {url!r} cannot be opened: {error}") from error
        self.fs = PatientFileSystem(raw, url, retry_s)
        self._pattern = path.rstrip("/") if len(path) > 1 else path
        self._is_folder = not _is_glob(self._pattern) and self.fs.isdir(self._pattern)
        self._is_searched = self._is_folder or _is_glob(self._pattern)
        self.root = self._pattern if self._is_folder else _literal_folder(self._pattern)

    @property
    def root_url(self) -> str:
        """The folder that shards are named below, with its protocol."""
        url: str = self.fs.raw.unstrip_protocol(self.root)
        return url

    def listing(self) -> list[Listed]:
        """Every Parquet shard, in path order. Raises ConfigError where there is none.

        A search below a folder or by a glob passes over hidden files (`_x`, `.x`); one that is named is taken.
        """
        self.fs.invalidate_cache()
        if _is_glob(self._pattern):
            found = self.fs.glob(self._pattern)
        elif self._is_folder:
            found = self.fs.find(self._pattern)
            found = {path: info for path, info in found.items() if path.endswith((".parquet", ".pq"))}
        elif self.fs.exists(self._pattern):
            found = {self._pattern: self.fs.info(self._pattern)}
        else:
            raise ConfigError(f"input.path {self.url!r} does not exist")
        shards = [
            Listed(path[len(self.root) :].lstrip("/"), int(info["size"]), _tag(info))
            for path, info in found.items()
            if info["type"] == "file" and not (self._is_searched and _is_hidden(path[len(self.root) :]))
        ]
        if not shards:
            raise ConfigError(f"input.path {self.url!r} holds no Parquet file")
        return sorted(shards, key=lambda shard: shard.path)

    def refuse_own_output(self, output: Storage) -> None:
        """Raise ConfigError where the search for shards would find what is written to `output`: it would align that."""
        if type(self.fs.raw) is not type(output.fs.raw):
            return
        root = os.path.realpath(output.root) if output.is_local else output.root
        for path in ("units/x.parquet", "corpus/run=000001/part-00000.parquet", "quarantine/run=000001/part-0.parquet"):
            if self._would_find(f"{root}/{path}"):
                raise ConfigError(
                    f"output.root {output.url!r} lies where input.path {self.url!r} is searched: the next run would "
                    f"align the corpus itself. Take an output.root outside, or one whose name begins with _ or ."
                )

    def _would_find(self, path: str) -> bool:
        """Whether a Parquet file at the file system's own path would be listed."""
        root = os.path.realpath(self.root) if self.fs.is_local else self.root
        below = path.removeprefix(root.rstrip("/") + "/")
        if below == path or _is_hidden(below) or not self._is_searched:
            return False
        pattern = self._pattern[len(self.root) :].lstrip("/")
        return self._is_folder or re.fullmatch(glob_translate(pattern), below) is not None

    def open(self, shard: Listed) -> Any:
        """The shard's bytes as a seekable binary file, unbuffered: Parquet reads whole column chunks.

        Raises ConfigError where the path holds another version by now, or nothing.
        """
        path = f"{self.root}/{shard.path}"
        try:
            file = self.fs.open(path, cache_type="none")
        except FileNotFoundError:
            raise ConfigError(f"shard {shard.path} has gone since it was planned; run again") from None
        info = self.fs.info(path)
        if not self.is_still(shard, info):
            file.close()
            raise ConfigError(f"shard {shard.path} has changed since it was planned; run again when it is in place")
        return file

    def is_still(self, shard: Listed, info: Mapping[str, Any]) -> bool:
        """Whether the file that `info` describes is the version of the shard that was listed."""
        return (int(info["size"]), _tag(info)) == (shard.size, shard.tag)

    def footers(
        self, listed: Iterable[Listed], config: ShardsConfig, kept_types: Mapping[str, str]
    ) -> tuple[list[Shard], list[BadShard], dict[str, str]]:
        """Read footers, many at a time: the shards, those that must be refused, and the kept columns' types.

        `kept_types` are the Arrow types that earlier runs fixed; where there are none, the first good shard fixes them.
        """
        read = concurrently(self._footer, listed)
        shards, bad = [], []
        types = {name: kept_types[name] for name in config.keep_columns if name in kept_types}
        for found, result in read:
            if isinstance(result, str):
                bad.append(BadShard(found.path, result))
                continue
            metadata, digest = result
            columns = metadata.schema.to_arrow_schema()
            reason = config.refusal(columns, types)
            if reason:
                lacking = next((name for name in config.columns if name not in columns.names), None)
                bad.append(BadShard(found.path, reason, lacking if reason.startswith("missing_column") else None))
                continue
            for name in config.keep_columns:
                types.setdefault(name, str(columns.field(name).type))
            key = hashlib.sha256(f"{found.path}\n{found.size}\n{found.tag}\n{digest}".encode()).hexdigest()[:12]
            groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
            shards.append(Shard(found, key, groups))
        return shards, bad, types

    def _footer(self, shard: Listed) -> "tuple[pq.FileMetaData, str] | str":
        try:
            metadata, footer = read_footer(self.fs, f"{self.root}/{shard.path}", shard.size)
        except Damaged as error:
            return f"broken_footer: {error}"
        return metadata, hashlib.sha256(footer).hexdigest()


def shard_record(shard: Shard) -> dict[str, Any]:
    """The shard as manifests and unit files keep it."""
    return {**asdict(shard.listed), "key": shard.key, "row_groups": list(shard.row_groups)}


def shard_of(record: Mapping[str, Any]) -> Shard:
    """Undo `shard_record`."""
    listed = Listed(record["path"], record["size"], record["tag"])
    return Shard(listed, record["key"], tuple(record["row_groups"]))


def is_prompt_type(dtype: pa.DataType) -> bool:
    """Whether a column may hold prompts: strings, or lists of structs with role and content; all-null counts too."""
    if is_string(dtype) or pa.types.is_null(dtype):
        return True
    if not (pa.types.is_list(dtype) or pa.types.is_large_list(dtype)) or not pa.types.is_struct(dtype.value_type):
        return False
    fields = {
        dtype.value_type.field(index).name: dtype.value_type.field(index).type
        for index in range(dtype.value_type.num_fields)
    }
    return all(
        name in fields and (is_string(fields[name]) or pa.types.is_null(fields[name])) for name in ("role", "content")
    )


def is_string(dtype: pa.DataType) -> bool:
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype))


def missing_column(columns: pa.Schema, wanted: Iterable[str]) -> str | None:
    """Why not all wanted columns can be read from a shard; None where they can."""
    for name in wanted:
        if name not in columns.names:
            near = difflib.get_close_matches(name, columns.names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"missing_column: there is no column {name!r} among {', '.join(columns.names) or 'none'}{hint}"
        if len(columns.get_all_field_indices(name)) > 1:
            return f"schema_mismatch: there are two columns {name!r}"
    return None


def changed_type(columns: pa.Schema, kept_types: Mapping[str, str]) -> str | None:
    """Which kept column has another type than in the shards before; None where none has."""
    for name, before in kept_types.items():
        found = str(columns.field(name).type)
        if found != before:
            return f"schema_mismatch: column {name!r} is {found} here and {before} in the shards before"
    return None


def _wrong_type(columns: pa.Schema, config: InputConfig) -> str | None:
    prompt = columns.field(config.prompt_column).type
    if not is_prompt_type(prompt):
        return f"wrong_type: {config.prompt_column!r} is {prompt}; a string or list<struct<role, content>> is needed"
    if config.id_column:
        id_type = columns.field(config.id_column).type
        if not (is_string(id_type) or pa.types.is_integer(id_type)):
            return f"wrong_type: {config.id_column!r} is {id_type}; a string or an integer is needed"
    if config.response_column:
        response = columns.field(config.response_column).type
        inner = response.value_type if pa.types.is_list(response) or pa.types.is_large_list(response) else response
        if not (is_string(inner) or pa.types.is_null(inner)):
            return f"wrong_type: {config.response_column!r} is {response}; a string or a list of strings is needed"
    return None


def _is_glob(path: str) -> bool:
    return any(wild in path for wild in "*?[")


def _literal_folder(pattern: str) -> str:
    """The longest folder of a path or glob that holds no wildcard."""
    parts = pattern.split("/")
    literal = []
    for part in parts[:-1]:
        if _is_glob(part):
            break
        literal.append(part)
    return "/".join(literal)


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/") if part)


def _tag(info: Mapping[str, Any]) -> str:
    for name in ("ETag", "etag", "md5Hash"):
        if info.get(name):
            return str(info[name]).strip('"')
    stamp = info.get("mtime", info.get("LastModified", info.get("last_modified", "")))
    return str(int(stamp * 1e9)) if isinstance(stamp, float) else str(stamp)
