"""Preferences as trainers read them: a published dataset by its manifests, or Parquet files of one's own."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from actors.contract import ConfigError, RowError
from actors.engines.base import Messages
from pipelines.corpus.parquet import Watched, first_line, is_damage
from pipelines.corpus.shards import Input, Listed, is_prompt_type, missing_column
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import RETRY_S, Storage
from pipelines.preferences.dataset import FOLDER

COLUMNS = ["prompt", "chosen", "rejected"]
ROWS_AT_ONCE = 1024


class Preference(NamedTuple):
    """An answer that is preferred to another: `prompt` is a chat that ends with the user, the answers are texts."""

    prompt: Messages
    chosen: str
    rejected: str


class PreferenceFiles(Input):
    """The Parquet files at a path: those that the manifests of a preference dataset's finished partitions name, where
    build_preferences has made it, else every one below a folder, of a glob, or the one that is named.

    Errors name the file or folder, and `key`, the key that it came from.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] | None = None, retry_s: float = RETRY_S, *, key: str = "input.path"
    ) -> None:
        super().__init__(url, options, retry_s)
        self._key = key
        self._dataset = Storage(url, dict(options or {}), retry_s, partitions=FOLDER)
        self._is_published = self.fs.isdir(self._dataset.path(FOLDER))

    def listing(self) -> list[Listed]:
        if not self._is_published:
            try:
                return super().listing()
            except ConfigError as error:
                raise ConfigError(str(error).replace("input.path", self._key)) from None
        manifests = [partition.manifest for partition in read_state(self._dataset).partitions if partition.manifest]
        if not manifests:
            raise ConfigError(f"{self._key} {self.url!r} holds no published partition of a preference dataset")
        return [
            Listed(part["path"], part["num_bytes"], part["sha256"])
            for manifest in manifests
            for part in manifest[FOLDER]
        ]

    def by_split(self) -> dict[str, list[Listed]]:
        """The files by the split that their names tell; those of one's own are all `train`."""
        found: dict[str, list[Listed]] = {}
        for listed in self.listing():
            name = listed.path.rpartition("/")[2]
            found.setdefault(name.rpartition("-")[0] if self._is_published else "train", []).append(listed)
        return found

    def open(self, shard: Listed) -> Any:
        """As of every input, but for parts of a dataset, which are what their manifest says or nothing."""
        try:
            return super().open(shard)
        except ConfigError:
            if not self._is_published:
                raise
            raise ConfigError(f"{self._key}: {shard.path} is not what its manifest says; restore it") from None

    def is_still(self, shard: Listed, info: Mapping[str, Any]) -> bool:
        """Of a dataset by its size: parts never change, and their pages have checksums."""
        return int(info["size"]) == shard.size if self._is_published else super().is_still(shard, info)

    def rows(self, listed: Listed) -> Iterator[Preference | RowError]:
        """Each row of a file, in order, or why it is none. Raises ConfigError where the file does not hold pairs."""
        with self.open(listed) as file:
            watched = Watched(file)
            try:
                parquet = pq.ParquetFile(watched, page_checksum_verification=True)
                columns = parquet.schema_arrow
            except Exception as error:
                raise self._told(listed, watched, error) from error
            if told := _refusal(columns):
                raise ConfigError(f"{self._key}: {listed.path}: {told}")
            batches = parquet.iter_batches(ROWS_AT_ONCE, columns=COLUMNS)
            while True:
                try:
                    batch = next(batches, None)
                    rows = [] if batch is None else batch.to_pylist()
                except Exception as error:
                    raise self._told(listed, watched, error) from error
                if batch is None:
                    return
                for row in rows:
                    try:
                        yield preference_of(row)
                    except RowError as error:
                        yield error

    def _told(self, listed: Listed, watched: Watched, error: Exception) -> Exception:
        """What to raise for an error of reading."""
        if watched.error is not None or not is_damage(error):
            return watched.error if isinstance(watched.error, Exception) else error
        return ConfigError(f"{self._key}: {listed.path} is damaged ({first_line(error)}); restore it")


def preference_of(row: Mapping[str, Any]) -> Preference:
    """A row with `prompt`, a text or a chat, and `chosen` and `rejected`, each a text or the assistant's one message.

    Answers lose the white space around them, as those of a corpus have none.

    Raises RowError: `empty_prompt`, `empty_answer`, `invalid_roles` or `same_text`.
    """
    chat = row["prompt"]
    if isinstance(chat, str):
        chat = [{"role": "user", "content": chat}]
    if not chat or not all(each and each["role"] and (each["content"] or "").strip() for each in chat):
        raise RowError("empty_prompt", "the prompt or a message of it is null, empty or white space")
    if chat[-1]["role"] != "user":
        raise RowError("invalid_roles", "the prompt does not end with the user")
    chosen, rejected = _answer(row["chosen"]), _answer(row["rejected"])
    if chosen == rejected:
        raise RowError("same_text", "chosen and rejected are the same text")
    return Preference(tuple((each["role"], each["content"]) for each in chat), chosen, rejected)


def prompt_key(prompt: Messages) -> str:
    """16 hex digits that name a prompt; as in build_preferences, prompts that differ in case and white space alone are
    the same."""
    lines = [" ".join(f"{role}: {content}".lower().split()) for role, content in prompt]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a prompt is one of the share that is held out: by its text alone, so that no other seed or run trains on
    it either."""
    return int(hashlib.sha256(f"held out {key}".encode()).hexdigest()[:16], 16) < fraction * 2**64


def _answer(value: Any) -> str:
    if isinstance(value, list):
        if len(value) != 1 or not value[0] or value[0]["role"] != "assistant":
            raise RowError("invalid_roles", "an answer is not one message of the assistant")
        value = value[0]["content"]
    text = (value or "").strip()
    if not text:
        raise RowError("empty_answer", "an answer is null, empty or white space")
    return str(text)


def _refusal(columns: Any) -> str | None:
    """Why a file of such columns holds no pairs; None where it does."""
    if told := missing_column(columns, COLUMNS):
        return f"{told}; pairs have {', '.join(COLUMNS)}, as build_preferences.py makes them with build=pairs"
    if "prefix" in columns.names:
        return "these are steps of answers, and a reward scores whole ones: build them with build=pairs"
    wrong = [name for name in COLUMNS if not is_prompt_type(columns.field(name).type)]
    if wrong:
        return f"{wrong[0]!r} is {columns.field(wrong[0]).type}; a string or list<struct<role, content>> is needed"
    return None
