"""Reading units: every input row comes out once, well or with its problem; damage and outages are not confused."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.contract import PROBLEM, PROMPT, ConfigError, label, unpack
from pipelines.corpus import schema
from pipelines.corpus.read import Span, WholeRows, prompt_hash, read_checked, read_spans
from pipelines.corpus.shards import Input, InputConfig, Shard
from pipelines.corpus.tasks import Tasks, grouped
from pipelines.corpus.units import Unit
from tests.pipelines.corpus.fabricate import only_shard, whole_groups, write_shard

CONFIG = InputConfig(path="in")
TEXT = pa.string()


def raw_strings(values: list[bytes], dtype: pa.DataType = TEXT) -> pa.Array:
    """Strings that need not be UTF-8."""
    held = pa.array(values, pa.binary() if dtype != pa.large_string() else pa.large_binary())
    return pa.Array.from_buffers(dtype, len(held), held.buffers())


def read(folder: Path, config: InputConfig = CONFIG) -> pa.Table:
    source = Input(str(folder))
    shard = only_shard(source, config)
    read = [table for span in whole_groups(shard) for _, table in read_checked(source, config, span)]
    return pa.concat_tables(read)


def check(tmp_path: Path, table: pa.Table, **config: Any) -> pa.Table:
    write_shard(tmp_path / "a.parquet", table)
    found = read(tmp_path, dataclasses.replace(CONFIG, **config))
    assert found["source"].to_pylist() == [
        {"shard": "a.parquet", "row_group": 0, "row": row} for row in range(table.num_rows)
    ]
    found.validate(full=True)
    return found


def causes(found: pa.Table) -> list[str | None]:
    return [problem and problem["cause"] for problem in found["problem"].to_pylist()]


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [TEXT, pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), TEXT), pa.dictionary(pa.int8(), TEXT)],
    ids=str,
)
def test_a_string_prompt_of_any_string_type_is_one_user_message(tmp_path: Path, dtype: pa.DataType) -> None:
    prompts = ["say hi", None, "  \n\t", "", "say hi", "grüße 你好 🙂"]
    table = pa.table({"prompt": pa.array(prompts).cast(dtype)})
    found = check(tmp_path, table)

    assert causes(found) == [None, "null_prompt", "empty_prompt", "empty_prompt", None, None]
    assert found["prompt"].to_pylist() == [
        [{"role": "user", "content": "say hi"}], None, None, None,
        [{"role": "user", "content": "say hi"}], [{"role": "user", "content": "grüße 你好 🙂"}],
    ]  # fmt: skip
    assert found.schema.field("prompt").type == PROMPT
    assert found.schema.field("problem").type == PROBLEM
    assert found.schema.field("source").type == schema.SOURCE


def chats(*chats: Any) -> list[Any]:
    return [[{"role": role, "content": content} for role, content in chat] for chat in chats]


WELL_CHATS = chats(
    [("user", "a")],
    [("system", "s"), ("user", "a")],
    [("user", "a"), ("assistant", "b"), ("user", "c")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
)
BAD_CHATS = [
    (None, "null_prompt"),
    ([], "empty_prompt"),
    ([None], "null_prompt"),
    *zip(
        chats(
            [(None, "a")],
            [("user", None)],
            [("user", "a"), ("assistant", None), ("user", "c")],
            [("user", "  \n")],
            [("system", ""), ("user", "a")],
            [("assistant", "a")],
            [("system", "s")],
            [("user", "a"), ("assistant", "b")],
            [("user", "a"), ("user", "b")],
            [("user", "a"), ("system", "s"), ("user", "b")],
            [("system", "s"), ("system", "s"), ("user", "b")],
            [("system", "s"), ("assistant", "a"), ("user", "b")],
            [("USER", "a")],
            [("tool", "a"), ("user", "b")],
        ),
        [*["null_prompt"] * 3, *["empty_prompt"] * 2, *["invalid_roles"] * 9],
        strict=True,
    ),
]
MESSAGE_TYPES = {
    "role, content": pa.struct([("role", TEXT), ("content", TEXT)]),
    "content, role": pa.struct([("content", pa.large_string()), ("role", TEXT)]),
    "dictionary roles": pa.struct([("role", pa.dictionary(pa.int32(), TEXT)), ("content", TEXT)]),
    "more fields": pa.struct(
        [("name", TEXT), ("role", TEXT), ("at", pa.timestamp("us")), ("content", TEXT), ("tools", pa.list_(TEXT))]
    ),
}


@pytest.mark.parametrize("message", MESSAGE_TYPES.values(), ids=list(MESSAGE_TYPES))
@pytest.mark.parametrize("listed", [pa.list_, pa.large_list])
def test_chats_of_any_layout_are_taken_when_well_and_named_when_not(
    tmp_path: Path, message: pa.DataType, listed: Any
) -> None:
    column = pa.array([*WELL_CHATS, *(chat for chat, _ in BAD_CHATS)], listed(message))
    found = check(tmp_path, pa.table({"prompt": column}))
    assert causes(found) == [None] * len(WELL_CHATS) + [cause for _, cause in BAD_CHATS]
    assert found["prompt"].to_pylist() == WELL_CHATS + [None] * len(BAD_CHATS)


def test_a_message_field_that_nobody_reads_may_hold_anything(tmp_path: Path) -> None:
    message = pa.struct([("role", TEXT), ("content", TEXT), ("at", pa.timestamp("us"))])
    year_33658 = [{"role": "user", "content": "when?", "at": 10**18}]
    found = check(tmp_path, pa.table({"prompt": pa.array([year_33658], pa.list_(message))}))
    assert found["prompt"].to_pylist() == [[{"role": "user", "content": "when?"}]]


@pytest.mark.parametrize("dtype", [TEXT, pa.large_string()], ids=str)
def test_a_prompt_that_is_not_utf8_is_its_own_problem_only(tmp_path: Path, dtype: pa.DataType) -> None:
    surrogate, cut = b"\xed\xa0\x80", "é".encode()[:1]
    found = check(tmp_path, pa.table({"prompt": raw_strings([b"a", b"b\xff", surrogate, cut, b"c\x00d"], dtype)}))
    assert causes(found) == [None, "invalid_utf8", "invalid_utf8", "invalid_utf8", None]
    assert "byte 1 of 2" in found["problem"][1].as_py()["message"]
    assert found["prompt"][4].as_py() == [{"role": "user", "content": "c\x00d"}]


def test_a_role_or_content_that_is_not_utf8_is_its_own_problem_only(tmp_path: Path) -> None:
    roles, contents = raw_strings([b"user", b"us\xffer", b"user"]), raw_strings([b"a", b"b", b"\xffc"])
    messages = pa.StructArray.from_arrays([roles, contents], ["role", "content"])
    found = check(tmp_path, pa.table({"prompt": pa.ListArray.from_arrays([0, 1, 2, 3], messages)}))
    assert causes(found) == [None, "invalid_utf8", "invalid_utf8"]


def test_a_dictionary_with_an_entry_that_is_not_utf8_loses_no_row(tmp_path: Path) -> None:
    values = raw_strings([b"a", b"\xff"])
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), values)  # Arrow refuses to read the whole column
    found = check(tmp_path, pa.table({"prompt": column}))
    assert causes(found) == ["unreadable_row_group"] * 3


def test_a_column_of_nothing_but_nulls_is_null_prompts(tmp_path: Path) -> None:
    assert causes(check(tmp_path, pa.table({"prompt": pa.nulls(3)}))) == ["null_prompt"] * 3


def test_a_shard_without_rows_makes_no_unit(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", pa.table({"prompt": pa.array([], TEXT)}))
    source = Input(str(tmp_path))
    assert only_shard(source, CONFIG).num_rows == 0


# --- ids ------------------------------------------------------------------------------------------------------------


def test_without_an_id_column_equal_prompts_have_equal_ids_wherever_they_are(tmp_path: Path) -> None:
    found = check(tmp_path, pa.table({"prompt": ["a", "b", "a", None]}))
    ids = found["prompt_id"].to_pylist()
    assert ids[0] == ids[2] == prompt_hash([("user", "a")]) != ids[1]
    assert ids[3].startswith("row:")
    assert causes(found) == [None, None, None, "null_prompt"]  # hashes may repeat: only a user's id is unique


def test_prompt_hashes_tell_apart_what_a_join_would_not() -> None:
    hashes = {
        prompt_hash([("user", "a")]),
        prompt_hash([("user", "a"), ("assistant", "b"), ("user", "c")]),
        prompt_hash([("system", "a"), ("user", "b")]),
        prompt_hash([("user", "a\nassistant: b")]),
        prompt_hash([("user", 'a"],["assistant","b')]),
    }
    assert len(hashes) == 5


@pytest.mark.parametrize(
    "dtype", [TEXT, pa.large_string(), pa.dictionary(pa.int32(), TEXT), pa.int64(), pa.uint8()], ids=str
)
def test_a_repeated_or_missing_id_is_quarantined_and_the_first_of_its_kind_goes_on(
    tmp_path: Path, dtype: pa.DataType
) -> None:
    values = pa.array(["7", "8", "7", None, "0"]).cast(pa.int64() if pa.types.is_integer(dtype) else TEXT).cast(dtype)
    found = check(tmp_path, pa.table({"prompt": list("abcde"), "id": values}), id_column="id")
    assert causes(found) == [None, None, "duplicate_id", "null_id", None]
    ids = found["prompt_id"].to_pylist()
    assert ids[:3] == ["7", "8", "7"]
    assert ids[3].startswith("row:")
    assert ids[4] == "0"


def test_ids_that_are_empty_or_not_utf8_are_problems_and_do_not_count_as_each_others_repeats(tmp_path: Path) -> None:
    ids = raw_strings([b"", b"", b"\xff", b"\xff", b"x"])
    found = check(tmp_path, pa.table({"prompt": list("abcde"), "id": ids}), id_column="id")
    assert causes(found) == ["null_id", "null_id", "invalid_utf8", "invalid_utf8", None]
    assert len(set(found["prompt_id"].to_pylist())) == 5


# --- answers and kept columns ---------------------------------------------------------------------------------------


def test_stored_answers_are_lists_whatever_the_column_holds(tmp_path: Path) -> None:
    config = {"response_column": "answer"}
    one = check(tmp_path, pa.table({"prompt": ["a", "b"], "answer": ["x", None]}), **config)
    many = check(tmp_path, pa.table({"prompt": ["a", "b"], "answer": [["x", "y"], None]}), **config)
    assert one["stored"].to_pylist() == [["x"], None]
    assert many["stored"].to_pylist() == [["x", "y"], None]


def test_a_stored_answer_that_is_not_utf8_is_its_own_problem_only(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b", None], "answer": raw_strings([b"x", b"\xff", b"\xff"])})
    found = check(tmp_path, table, response_column="answer")
    assert causes(found) == [None, "invalid_utf8", "null_prompt"]


def test_kept_columns_come_through_with_their_types_and_values(tmp_path: Path) -> None:
    kept = {
        "topic": pa.array(["x", None, "y"]).dictionary_encode(),
        "at": pa.array([1, None, 10**18], pa.timestamp("us")),
        "raw": pa.array([b"\xff", None, b"ok"]),
        "tree": pa.array([[{"a": ["ä"]}], None, []]),
        "pairs": pa.array([[("k", "v")], None, []], pa.map_(TEXT, TEXT)),
        "none": pa.nulls(3),
    }
    found = check(tmp_path, pa.table({"prompt": list("abc"), **kept}), keep_columns=list(kept))
    assert causes(found) == [None] * 3
    for name, column in kept.items():
        assert found.schema.field(name).type.equals(column.type)
        assert found[name].combine_chunks().equals(column)


@pytest.mark.parametrize("nested", ["flat", "large", "list", "struct", "map"])
def test_a_kept_column_that_is_not_utf8_would_make_the_corpus_unreadable_so_its_row_is_quarantined(
    tmp_path: Path, nested: str
) -> None:
    values = [b"fine", b"\xff", b"also fine"]
    strings = raw_strings(values)
    column = {
        "flat": strings,
        "large": raw_strings(values, pa.large_string()),
        "list": pa.ListArray.from_arrays([0, 1, 2, 3], strings),
        "struct": pa.StructArray.from_arrays([strings], ["topic"]),
        "map": pa.MapArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), pa.array(list("abc")), strings),
    }[nested]
    write_shard(tmp_path / "a.parquet", pa.table({"prompt": list("abc"), "topic": column}))
    found = read(tmp_path, dataclasses.replace(CONFIG, keep_columns=["topic"]))
    assert causes(found) == [None, "invalid_utf8", None]
    assert "topic" in found["problem"][1].as_py()["message"]


# --- damage ---------------------------------------------------------------------------------------------------------

NUM_ROWS, UNIT_ROWS = 3000, 300


def _paged_shard(path: Path, **options: Any) -> Path:
    """Two row groups of many small data pages each."""
    prompts = [f"prompt {row} {row * 7919 % 104729:x}" for row in range(NUM_ROWS)]
    return write_shard(
        path, pa.table({"prompt": prompts}), row_group_size=NUM_ROWS // 2, use_dictionary=False, data_page_size=2000,
        write_batch_size=50, **options,
    )  # fmt: skip


def _units(shard: Shard) -> list[Span]:
    half = NUM_ROWS // 2
    return [
        Span(
            shard, group,
            tuple(Unit(shard.key, at, at + UNIT_ROWS) for at in range(group * half, (group + 1) * half, UNIT_ROWS)),
        )
        for group in range(2)
    ]  # fmt: skip


def _damage(path: Path, at: float, data: bytes) -> None:
    """Overwrite bytes of the first row group, keeping the modification time."""
    stat = path.stat()
    column = pq.read_metadata(path).row_group(0).column(0)
    whole = bytearray(path.read_bytes())
    offset = column.data_page_offset + int(column.total_compressed_size * at)
    whole[offset : offset + len(data)] = data
    path.write_bytes(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (b"\xff" * 3000, {"compression": "zstd"}),
        (b"\x00" * 3000, {"compression": "snappy"}),
        (b"\xff" * 3000, {"compression": "none", "data_page_version": "2.0"}),
    ],
    ids=["zstd", "snappy", "plain"],
)
def test_damage_in_a_row_group_quarantines_its_rows_from_there_on_and_no_others(
    tmp_path: Path, data: bytes, options: dict[str, Any]
) -> None:
    path = _paged_shard(tmp_path / "a.parquet", **options)
    source = Input(str(tmp_path))
    spans = _units(only_shard(source, CONFIG))
    _damage(path, 0.5, data)

    units: list[Unit] = []
    survived = 0
    for span in spans:
        is_damaged = False
        for unit, table in read_checked(source, CONFIG, span):
            units.append(unit)
            where = table["source"].to_pylist()
            assert [each["row"] for each in where] == list(range(unit.start, unit.stop))
            assert {(each["shard"], each["row_group"]) for each in where} == {("a.parquet", span.row_group)}
            found = set(causes(table))
            if found == {None}:
                assert not is_damaged  # what follows damage is not trusted
                assert [chat[0]["content"].split()[1] for chat in table["prompt"].to_pylist()] == [
                    str(row) for row in range(unit.start, unit.stop)
                ]
                survived += unit.num_rows
            else:
                assert found == {"unreadable_row_group"}
                assert table["prompt"].null_count == unit.num_rows
                assert len(set(table["prompt_id"].to_pylist())) == unit.num_rows
                is_damaged = True
        assert is_damaged == (span.row_group == 0)

    assert units == [unit for span in spans for unit in span.units]
    assert NUM_ROWS // 2 <= survived < NUM_ROWS


def test_rows_well_before_the_damage_survive(tmp_path: Path) -> None:
    path = _paged_shard(tmp_path / "a.parquet")
    source = Input(str(tmp_path))
    span = _units(only_shard(source, CONFIG))[0]
    _damage(path, 0.9, b"\xff" * 100)
    found = Counter(cause for _, table in read_checked(source, CONFIG, span) for cause in causes(table))
    assert found[None] >= UNIT_ROWS
    assert found["unreadable_row_group"] >= 1
    assert found.total() == NUM_ROWS // 2


def test_a_changed_letter_that_only_a_page_checksum_can_tell_is_not_read_as_a_prompt(tmp_path: Path) -> None:
    path = _paged_shard(tmp_path / "a.parquet", compression="none", write_page_checksum=True)
    source = Input(str(tmp_path))
    span = _units(only_shard(source, CONFIG))[0]
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"prompt 777 ", b"prOmpt 777 "))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = Counter(cause for _, table in read_checked(source, CONFIG, span) for cause in causes(table))
    assert found == {None: 2 * UNIT_ROWS, "unreadable_row_group": 3 * UNIT_ROWS}


def test_an_unreadable_row_group_keeps_the_units_columns_so_that_units_fit_together(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"] * 600, "answer": ["b"] * 600, "topic": pa.array(range(600), pa.int16())})
    path = write_shard(tmp_path / "a.parquet", table, row_group_size=300)
    config = dataclasses.replace(CONFIG, response_column="answer", keep_columns=["topic"])
    _damage(path, 0.0, b"\xff" * 12)
    bad, good = (table for _, table in _both(tmp_path, config))
    assert causes(bad) == ["unreadable_row_group"] * 300
    assert causes(good) == [None] * 300
    assert bad.schema.remove_metadata().equals(good.schema.remove_metadata())


def _both(folder: Path, config: InputConfig) -> Iterator[tuple[Unit, pa.Table]]:
    source = Input(str(folder))
    for span in whole_groups(only_shard(source, config)):
        yield from read_checked(source, config, span)


def test_reading_whole_rows_of_a_damaged_row_group_says_so_too(tmp_path: Path) -> None:
    path = _paged_shard(tmp_path / "a.parquet")
    source = Input(str(tmp_path))
    shard = only_shard(source, CONFIG)
    _damage(path, 0.0, b"\xff" * 100)
    assert WholeRows(source, shard, 0).as_json(Unit(shard.key, 0, 10), [3]) == [None] * 10


# --- outages --------------------------------------------------------------------------------------------------------


class _FailingFile:
    """A shard whose store goes away before the nth read."""

    def __init__(self, file: Any, reads: int, error: BaseException) -> None:
        self._file, self._left, self._error = file, reads, error

    def read(self, size: int = -1) -> Any:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize(
    "error", [ConnectionError("reset by peer"), TimeoutError("too slow"), PermissionError("token expired")], ids=repr
)
def test_an_outage_in_the_middle_of_a_read_propagates_and_quarantines_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    _paged_shard(tmp_path / "a.parquet")
    source = Input(str(tmp_path))
    span = _units(only_shard(source, CONFIG))[0]
    whole = source.open

    num_failures = 0
    for reads in range(100):
        monkeypatch.setattr(source, "open", lambda path, reads=reads: _FailingFile(whole(path), reads, error))
        rows: list[str | None] = []
        try:
            for _, table in read_checked(source, CONFIG, span):
                rows += causes(table)
        except type(error) as raised:
            num_failures += str(error) in str(raised) and set(rows) <= {None}
            continue
        assert rows == [None] * (NUM_ROWS // 2)
        break
    assert num_failures == reads >= 2  # at the footer's read, and at the pages'


@pytest.mark.parametrize(
    "error", [pa.ArrowMemoryError("malloc of size 64 failed"), pa.ArrowCancelled("Ctrl-C"), MemoryError()], ids=repr
)
def test_a_full_memory_or_a_cancelled_read_propagates_and_quarantines_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    _paged_shard(tmp_path / "a.parquet")
    source = Input(str(tmp_path))
    span = _units(only_shard(source, CONFIG))[0]

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(type(error)):
        list(read_checked(source, CONFIG, span))


def test_a_shard_that_was_replaced_after_planning_is_not_read_as_what_it_was(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.parquet", pa.table({"prompt": ["old 1", "old 2"]}))
    source = Input(str(tmp_path))
    spans = whole_groups(only_shard(source, CONFIG))
    write_shard(path, pa.table({"prompt": ["new 1", "new 2"]}))
    os.utime(path, ns=(1, 1))
    with pytest.raises(ConfigError, match=r"a\.parquet has changed"):
        list(read_spans(source, CONFIG, spans))


# --- pending gaps ---------------------------------------------------------------------------------------------------

GROUPS = (700, 5, 600)


@pytest.fixture(scope="module")
def gap_shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Input, Shard]:
    folder = tmp_path_factory.mktemp("gaps")
    with pq.ParquetWriter(folder / "a.parquet", pa.schema([("prompt", TEXT)])) as writer:
        first = 0
        for rows in GROUPS:
            writer.write_table(pa.table({"prompt": [str(row) for row in range(first, first + rows)]}))
            first += rows
    source = Input(str(folder))
    return source, only_shard(source, CONFIG)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(group=st.integers(0, 2), cuts=st.lists(st.integers(0, 700), min_size=2, max_size=16, unique=True))
def test_any_pattern_of_pending_units_reads_exactly_its_rows(
    gap_shard: tuple[Input, Shard], group: int, cuts: list[int]
) -> None:
    source, shard = gap_shard
    first = sum(GROUPS[:group])
    ends = sorted({first + min(cut, GROUPS[group]) for cut in cuts})
    pieces = [(start, stop) for start, stop in zip(ends[::2], ends[1::2], strict=False) if start < stop]
    pieces += [(ends[1], ends[2])] if len(ends) > 2 else []  # two that touch
    units = tuple(Unit(shard.key, *piece) for piece in sorted(set(pieces)))
    if not units:
        return
    found = list(read_checked(source, CONFIG, Span(shard, group, units)))
    assert [unit for unit, _ in found] == list(units)
    for unit, table in found:
        rows = list(range(unit.start, unit.stop))
        assert [chat[0]["content"] for chat in table["prompt"].to_pylist()] == [str(row) for row in rows]
        assert [where["row"] for where in table["source"].to_pylist()] == rows


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, 599), min_size=1, max_size=8), behind=st.sampled_from([0, 3000, 1 << 20]))
def test_whole_rows_asked_for_in_any_order_are_those_rows(
    gap_shard: tuple[Input, Shard], rows: list[int], behind: int
) -> None:
    source, shard = gap_shard
    whole = WholeRows(source, shard, 2, behind)
    first = sum(GROUPS[:2])
    for row in rows:
        (found,) = whole.as_json(Unit(shard.key, first + row, first + row + 1), [0])
        assert found is not None
        assert json.loads(found) == {"prompt": str(first + row)}


def test_whole_rows_are_read_anew_after_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _paged_shard(tmp_path / "a.parquet")
    source = Input(str(tmp_path))
    shard = only_shard(source, CONFIG)
    whole, opened = WholeRows(source, shard, 0), source.open
    error = ConnectionError("reset by peer")
    monkeypatch.setattr(source, "open", lambda path: _FailingFile(opened(path), 1, error))
    with pytest.raises(ConnectionError):
        whole.as_json(Unit(shard.key, 0, 1000), [999])
    monkeypatch.undo()
    assert (whole.as_json(Unit(shard.key, 0, 1000), [999])[999] or "").startswith('{"prompt": "prompt 999 ')


def test_units_travel_one_a_row_with_their_name_and_shard_and_unpack_to_their_rows(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", pa.table({"prompt": ["a", None, "c", "d"], "k": [1, 2, 3, 4]}), 2)
    config = dataclasses.replace(CONFIG, keep_columns=["k"])
    source = Input(str(tmp_path))
    shard = only_shard(source, config)
    spans = tuple(whole_groups(shard))

    packed = list(read_spans(source, config, list(spans)))

    assert [each.num_rows for each in packed] == [1, 1]
    assert [label(each, "unit") for each in packed] == [unit.name for span in spans for unit in span.units]
    assert {json.loads(label(each, "shard"))["key"] for each in packed} == {shard.key}
    assert [unpack(each)["k"].to_pylist() for each in packed] == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="one unit at a time"):
        unpack(pa.concat_tables(packed))


def test_a_read_task_holds_many_small_row_groups_and_every_unit_once(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", 200, row_group_size=1)
    source = Input(str(tmp_path))
    spans = whole_groups(only_shard(source, CONFIG))
    calls = [partial(read_spans, source, CONFIG, group) for group in grouped(spans, 64)]
    tasks = Tasks(calls).get_read_tasks(1)
    assert len(tasks) == 4
    rows = [row for task in tasks for block in task() for row in unpack(block)["source"].to_pylist()]
    assert [row["row"] for row in rows] == list(range(200))
