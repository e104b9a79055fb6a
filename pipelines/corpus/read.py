"""From row ranges of Parquet shards to units of checked prompts, streamed through Ray Data one row group at a time."""

import base64
import hashlib
import json
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ray.data.block import Block

from actors.contract import MESSAGE, PROBLEM, PROMPT, REWARDS, pack
from pipelines.corpus.parquet import Watched, first_line, is_damage
from pipelines.corpus.published import CorpusConfig
from pipelines.corpus.schema import SOURCE
from pipelines.corpus.shards import Input, InputConfig, Shard, is_string, shard_record
from pipelines.corpus.units import Unit, cut

_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
BATCH_ROWS = 256
"""Rows that are decoded at once, at least: damage costs its batch and those after it."""
ROLES_SHOWN, ROLE_SHOWN = 8, 20
"""Of a chat's wrong roles, and characters of each; a chat may be as long as it likes, and a role too."""


@dataclass(frozen=True)
class Span:
    """The pending units of one row group, in row order.

    Attributes:
        shard: the shard version.
        row_group: counted from 0.
        units: disjoint, all inside the row group.
    """

    shard: Shard
    row_group: int
    units: tuple[Unit, ...]

    @property
    def first_row(self) -> int:
        """Row of the shard with which the row group begins."""
        return self.shard.bounds[self.row_group]

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)


def read_spans(source: Input, config: InputConfig | CorpusConfig, spans: list[Span]) -> Iterator[Block]:
    """Packed units, labelled with `unit` (its name) and `shard` (its record as JSON).

    Besides the columns of `read_checked` they have `input`: the whole row as JSON where it has a problem, null where it
    is well or cannot be read. A row group with a problem in it is read once more for that, alongside, in all columns.
    """
    for span in spans:
        shard = json.dumps(shard_record(span.shard))
        whole = WholeRows(source, span.shard, span.row_group)
        for unit, table in read_checked(source, config, span):
            bad = pc.indices_nonzero(pc.is_valid(table["problem"])).to_pylist()
            table = table.append_column("input", pa.array(whole.as_json(unit, bad), pa.string()))
            yield pack(table, unit=unit.name, shard=shard)


def read_checked(source: Input, config: InputConfig | CorpusConfig, span: Span) -> Iterator[tuple[Unit, pa.Table]]:
    """The span's units with every row checked.

    Columns: prompt_id, prompt, stored (where there is a response column), the kept columns, source, problem. Of a
    published corpus, whose rows are well: all of its own, with what it calls source as `published_source`, too.
    """
    for unit, rows in read_rows(source, config.columns, span):
        if isinstance(config, CorpusConfig):
            yield unit, _published(config, span, unit, rows)
        else:
            make = _unreadable if isinstance(rows, Unreadable) else _checked
            yield unit, make(config, span, unit, rows)


@dataclass(frozen=True)
class Unreadable:
    """What stands for the rows of a unit whose row group is damaged: why, and the columns that there should be."""

    message: str
    schema: pa.Schema


# --- reading --------------------------------------------------------------------------------------------------------


def read_rows(source: Input, columns: list[str] | None, span: Span) -> Iterator[tuple[Unit, "pa.Table | Unreadable"]]:
    """(unit, its rows as stored), or (unit, Unreadable) from the first unit on that the file's damage touches."""
    file = Watched(source.open(span.shard.listed))
    parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"), page_checksum_verification=True)
    waiting = list(span.units)
    largest = max(unit.num_rows for unit in waiting)
    position, held = span.first_row, pa.table({})
    try:
        batches = parquet.iter_batches(
            batch_size=max(largest, BATCH_ROWS), row_groups=[span.row_group], columns=columns
        )
        for batch in batches:
            arrived = pa.Table.from_batches([batch])
            held = arrived if held.num_rows == 0 else pa.concat_tables([held, arrived])
            while waiting and waiting[0].stop <= position + held.num_rows:
                unit = waiting.pop(0)
                yield unit, held.slice(unit.start - position, unit.num_rows)
            keep_from = min(waiting[0].start, position + held.num_rows) if waiting else position + held.num_rows
            held = held.slice(keep_from - position)
            position = keep_from
            if not waiting:
                return
        raise OSError("the row group ends before the rows that the footer promises")
    except Exception as error:
        if file.error is not None:
            raise file.error from None
        if not is_damage(error):
            raise
        message = first_line(error)
    finally:
        file.close()
    for unit in waiting:
        yield unit, Unreadable(message, parquet.schema_arrow)


# --- whole rows -----------------------------------------------------------------------------------------------------


class WholeRows:
    """Every column of the rows of one row group, for the quarantine, which keeps whole rows.

    Parquet leads to a row only past those before it. The row group is therefore read once, from its first row on, for
    rows that are asked for in their order, or behind it by no more than `behind_bytes` of rows. For a row that lies
    further back reading begins anew. Threads may share it; they take turns.
    """

    def __init__(self, source: Input, shard: Shard, row_group: int, behind_bytes: int = 0) -> None:
        self._source, self._behind_bytes = source, behind_bytes
        self._first, stop = shard.bounds[row_group : row_group + 2]
        pieces = tuple(Unit(shard.key, *piece) for piece in cut(self._first, stop, BATCH_ROWS))
        self._span = Span(shard, row_group, pieces)
        self._lock = threading.Lock()
        self._begin()

    def as_json(self, unit: Unit, rows: list[int]) -> list[str | None]:
        """For each row of the unit its JSON text, where it is one of `rows` (counted from the unit's first row); null
        for the others, and where the row group cannot be read."""
        texts: list[str | None] = [None] * unit.num_rows
        with self._lock:
            for row in rows:
                number, at = divmod(unit.start + row - self._first, BATCH_ROWS)
                piece = self._piece(number)
                texts[row] = None if isinstance(piece, Unreadable) else row_as_json(piece.slice(at, 1))
        return texts

    def _begin(self) -> None:
        self._pieces = (rows for _, rows in read_rows(self._source, None, self._span))
        self._held: deque[pa.Table | Unreadable] = deque()
        self._num_bytes = self._num_read = 0

    def _piece(self, number: int) -> "pa.Table | Unreadable":
        if number < self._num_read - len(self._held):
            self._begin()
        while self._num_read <= number:
            try:
                piece = next(self._pieces)
            except BaseException:  # an outage: a generator that has raised has ended, so the next call begins anew
                self._begin()
                raise
            self._held.append(piece)
            self._num_read += 1
            self._num_bytes += _num_bytes(piece)
            while len(self._held) > 1 and self._num_bytes > self._behind_bytes:
                self._num_bytes -= _num_bytes(self._held.popleft())
        return self._held[number - self._num_read]


def _num_bytes(piece: "pa.Table | Unreadable") -> int:
    return 0 if isinstance(piece, Unreadable) else int(piece.nbytes)


def row_as_json(row: pa.Table) -> str:
    """One row as JSON text. Bytes that are not UTF-8 become {"base64": …}; times and the like become strings."""
    values: dict[str, Any] = {}
    for number, (name, column) in enumerate(zip(row.column_names, row.columns, strict=True)):
        values[name if name not in values else f"{name}#{number}"] = _value(column.cast(bytes_type(column.type)))
    return json.dumps(_plain(values), ensure_ascii=False, default=str)


def _value(column: pa.ChunkedArray) -> Any:
    try:
        return column[0].as_py()
    except (OverflowError, ValueError):  # a time that Python cannot hold
        return column.combine_chunks().to_string(skip_new_lines=True)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


# --- checking -------------------------------------------------------------------------------------------------------


def _checked(config: InputConfig, span: Span, unit: Unit, rows: pa.Table) -> pa.Table:
    num_rows = rows.num_rows
    chats, problems = _chats(rows[config.prompt_column])
    ids = _ids(config, rows, unit, chats, problems)
    columns: dict[str, Any] = {"prompt_id": pa.array(ids, pa.string()), "prompt": _prompt_array(chats, problems)}
    if config.response_column:
        stored, faults = _texts(rows[config.response_column])
        for row, fault in faults.items():
            problems.setdefault(row, ("invalid_utf8", fault))
        columns["stored"] = pa.array(stored, pa.list_(pa.string()))
    for name in config.keep_columns:
        columns[name] = rows[name]
        for row in _undecodable(rows[name]):
            problems.setdefault(row, ("invalid_utf8", f"{name} is not UTF-8"))
    columns["source"] = _source(span, unit)
    columns["problem"] = _problem_array(num_rows, problems)
    return pa.table(columns)


def _unreadable(config: InputConfig, span: Span, unit: Unit, rows: Unreadable) -> pa.Table:
    count = unit.num_rows
    columns: dict[str, Any] = {
        "prompt_id": pa.array([_row_id(unit, row) for row in range(count)]),
        "prompt": pa.nulls(count, PROMPT),
    }
    if config.response_column:
        columns["stored"] = pa.nulls(count, pa.list_(pa.string()))
    for name in config.keep_columns:
        columns[name] = pa.nulls(count, rows.schema.field(name).type)
    columns["source"] = _source(span, unit)
    columns["problem"] = _problem_array(count, dict.fromkeys(range(count), ("unreadable_row_group", rows.message)))
    return pa.table(columns)


def _published(config: CorpusConfig, span: Span, unit: Unit, rows: "pa.Table | Unreadable") -> pa.Table:
    """Rows of a corpus as they are: nothing is checked again. An older corpus has no column of rewards."""
    count = unit.num_rows
    columns: dict[str, Any] = {}
    problems: Problems = {}
    if isinstance(rows, Unreadable):
        problems = dict.fromkeys(range(count), ("unreadable_row_group", rows.message))
        columns = {
            name: pa.array(
                [None] * count, rows.schema.field(name).type
            )  # pa.nulls would null fields of structs as well
            for name in config.columns
            if name in rows.schema.names
        }
        columns["prompt_id"] = pa.array([_row_id(unit, row) for row in range(count)])
    else:
        columns = {name: rows[name] for name in rows.column_names}
    columns.setdefault("rewards", pa.nulls(count, REWARDS))
    columns["published_source"] = columns.pop("source")
    columns["source"] = _source(span, unit)
    columns["problem"] = _problem_array(count, problems)
    return pa.table(columns)


Problems = dict[int, tuple[str, str]]
"""Row of the unit -> (cause, message)."""

Chat = list[tuple[str, str]]


def _chats(column: pa.ChunkedArray) -> tuple[list[Chat], Problems]:
    """Each row's chat, checked; [] where there is a problem."""
    problems: Problems = {}
    dtype = column.type
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype):  # other fields of a message may hold anything
        column = column.cast(pa.large_list(pa.struct([("role", pa.large_binary()), ("content", pa.large_binary())])))
    values = _bytes(column).to_pylist()
    chats: list[Chat] = []
    for row, value in enumerate(values):
        try:
            chats.append(_chat(value))
        except _Bad as bad:
            problems[row] = (bad.cause, bad.message)
            chats.append([])
    return chats, problems


class _Bad(Exception):
    def __init__(self, cause: str, message: str) -> None:
        self.cause, self.message = cause, message


def _chat(value: Any) -> Chat:
    if value is None:
        raise _Bad("null_prompt", "the prompt is null")
    if isinstance(value, bytes):
        text = _text(value)
        if not text.strip():
            raise _Bad("empty_prompt", "the prompt is empty or white space")
        return [("user", text)]
    if not value:
        raise _Bad("empty_prompt", "the chat has no message")
    chat: Chat = []
    for turn, message in enumerate(value):
        if message is None or message["role"] is None or message["content"] is None:
            raise _Bad("null_prompt", f"message {turn} of the chat, its role or its content is null")
        role, content = _text(message["role"]), _text(message["content"])
        if not content.strip():
            raise _Bad("empty_prompt", f"message {turn} of the chat is empty or white space")
        chat.append((role, content))
    roles = [role for role, _ in chat]
    turns = roles[1:] if roles[0] == "system" else roles
    if (
        not turns
        or turns[-1] != "user"
        or any(role != ("user", "assistant")[turn % 2] for turn, role in enumerate(turns))
    ):
        raise _Bad("invalid_roles", f"roles are {_listed(roles)}; system (optional), then user, assistant, … user")
    return chat


def _listed(roles: list[str]) -> str:
    """The first of them, cut, and how many there are."""
    first = ", ".join(role[:ROLE_SHOWN] for role in roles[:ROLES_SHOWN])
    return first if len(roles) <= ROLES_SHOWN else f"{first}, … ({len(roles)} in all)"


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Bad("invalid_utf8", f"byte {error.start} of {len(value)} is not UTF-8") from None


def _texts(column: pa.ChunkedArray) -> tuple[list[list[str] | None], dict[int, str]]:
    """Stored answers as lists (null stays null), and which rows hold invalid UTF-8."""
    stored: list[list[str] | None] = []
    faults: dict[int, str] = {}
    for row, value in enumerate(_bytes(column).to_pylist()):
        try:
            answers = value if isinstance(value, list) else [value]
            stored.append(None if value is None else [_text(answer or b"") for answer in answers])
        except _Bad as bad:
            stored.append(None)
            faults[row] = bad.message
    return stored, faults


def _ids(config: InputConfig, rows: pa.Table, unit: Unit, chats: list[Chat], problems: Problems) -> list[str]:
    """The user's ids, or hashes of the prompts. An id that comes twice in the unit makes the later row a problem."""
    if config.id_column is None:
        return [_row_id(unit, row) if row in problems else prompt_hash(chat) for row, chat in enumerate(chats)]
    ids: list[str] = []
    seen: set[str] = set()
    for row, value in enumerate(_bytes(rows[config.id_column]).to_pylist()):
        try:
            found = _text(value) if isinstance(value, bytes) else "" if value is None else str(value)
        except _Bad as bad:
            problems.setdefault(row, (bad.cause, f"the id: {bad.message}"))
            found = ""
        if not found:
            problems.setdefault(row, ("null_id", f"{config.id_column} is null or empty"))
        elif found in seen:
            problems.setdefault(row, ("duplicate_id", f"{config.id_column} {found!r} is that of an earlier row"))
        seen.add(found)
        ids.append(found or _row_id(unit, row))
    return ids


def prompt_hash(chat: Chat) -> str:
    """`h:` and 32 hex digits: the id of a prompt without one. Equal chats have equal ids, wherever they are."""
    canonical = _COMPACT.encode(chat).encode()
    return f"h:{hashlib.sha256(canonical).hexdigest()[:32]}"


def _row_id(unit: Unit, row: int) -> str:
    return f"row:{unit.shard}:{unit.start + row}"


def _bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column with strings as bytes: Parquet does not check UTF-8, and to Python one bad row would fail them all."""
    return column.cast(bytes_type(column.type))


def _undecodable(column: pa.ChunkedArray) -> list[int]:
    """Rows that hold, at any depth, a string that is not UTF-8: readers of the corpus would stumble over them."""
    values, text = _bytes(column), _retyped(column.type, pa.large_string())

    def decodes(values: pa.ChunkedArray) -> bool:
        try:
            values.cast(text)
        except pa.ArrowInvalid:
            return False
        return True

    return [] if decodes(values) else [row for row in range(len(values)) if not decodes(values.take([row]))]


def bytes_type(dtype: pa.DataType) -> pa.DataType:
    """`dtype` with every string type in it, at any depth, replaced by binary."""
    return _retyped(dtype, pa.large_binary())


def _retyped(dtype: pa.DataType, string: pa.DataType) -> pa.DataType:
    if is_string(dtype):
        return string
    if pa.types.is_list(dtype):
        return pa.list_(_retyped(dtype.value_type, string))
    if pa.types.is_large_list(dtype):
        return pa.large_list(_retyped(dtype.value_type, string))
    if pa.types.is_fixed_size_list(dtype):
        return pa.list_(_retyped(dtype.value_type, string), dtype.list_size)
    if pa.types.is_map(dtype):
        return pa.map_(_retyped(dtype.key_type, string), _retyped(dtype.item_type, string))
    if pa.types.is_struct(dtype):
        return pa.struct([field.with_type(_retyped(field.type, string)) for field in dtype])
    return dtype


def _prompt_array(chats: list[Chat], problems: Problems) -> pa.Array:
    roles = [role for chat in chats for role, _ in chat]
    contents = [content for chat in chats for _, content in chat]
    offsets = [0]
    for chat in chats:
        offsets.append(offsets[-1] + len(chat))
    messages = pa.StructArray.from_arrays(
        [pa.array(roles, pa.string()), pa.array(contents, pa.string())], fields=list(MESSAGE)
    )
    mask = pa.array([not chat for chat in chats])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages, type=PROMPT, mask=mask)


def _problem_array(num_rows: int, problems: Problems) -> pa.Array:
    return pa.array([_problem(problems.get(row)) for row in range(num_rows)], PROBLEM)


def _problem(found: tuple[str, str] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    cause, message = found
    return {"stage": "read", "cause": cause, "error_class": "InputError", "message": message, "attempts": 1}


def _source(span: Span, unit: Unit) -> pa.Array:
    count = unit.num_rows
    return pa.StructArray.from_arrays(
        [
            pa.array([span.shard.listed.path] * count, pa.string()),
            pa.array([span.row_group] * count, pa.int32()),
            pa.array(range(unit.start, unit.stop), pa.int64()),
        ],
        fields=list(SOURCE),
    )
