"""Commits: one object a unit, every input row in it, whole rows in the quarantine."""

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.contract import ALIGNED_LIST, REWARD_NOTES, pack, unpack, with_columns
from pipelines.corpus import schema
from pipelines.corpus.commit import METADATA_KEY, Committer, unit_facts, write_unit
from pipelines.corpus.parquet import Damaged
from pipelines.corpus.publish import OutputConfig, _read_unit, publish
from pipelines.corpus.read import read_spans, row_as_json
from pipelines.corpus.shards import Input, InputConfig, Listed
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit
from tests.pipelines.corpus.fabricate import (
    answer,
    check_published,
    commit_unit,
    fake_shard,
    manifests_of,
    plan_of,
    read_rows_of,
    run_plan,
    write_shard,
)

CONFIG = InputConfig(path="in", keep_columns=["topic"])


@pytest.fixture
def source(tmp_path: Path) -> Input:
    table = pa.table(
        {
            "prompt": ["a", None, "c", "  "],
            "topic": pa.array(["x", "y", None, "z"]).dictionary_encode(),
            "extra": pa.array([[1], [2], None, []]),
        }
    )
    write_shard(tmp_path / "in" / "a.parquet", table)
    return Input(str(tmp_path / "in"))


def packed_unit(source: Input, output: Storage) -> pa.Table:
    (packed,) = read_spans(source, CONFIG, list(plan_of(source, CONFIG, output).spans))
    return answer(packed)


def committer(source: Input, output: Storage) -> Committer:
    return Committer(output, source, ("topic",), run=3, fingerprint="abc")


def test_a_unit_file_holds_every_input_row_and_what_is_known_of_them(source: Input, local_output: Storage) -> None:
    packed = packed_unit(source, local_output)
    told = committer(source, local_output)(packed).to_pylist()
    (name,) = local_output.sizes("units")
    table = read_rows_of(local_output, f"units/{name}")

    assert table.column_names == [*schema.UNIT.names, "topic"]
    assert table["status"].to_pylist() == ["ok", "quarantined", "ok", "quarantined"]
    assert [where["row"] for where in table["source"].to_pylist()] == [0, 1, 2, 3]
    assert [row and json.loads(row) for row in table["input"].to_pylist()] == [
        None, {"prompt": None, "topic": "y", "extra": [2]}, None, {"prompt": "  ", "topic": "z", "extra": []}
    ]  # fmt: skip
    facts = json.loads(table.schema.metadata[METADATA_KEY])
    assert (facts["num_rows"], facts["num_quarantined"], facts["run"], facts["fingerprint"]) == (4, 2, 3, "abc")
    assert facts["causes"] == {"null_prompt": 1, "empty_prompt": 1}
    assert told == [
        {
            "unit": name.removesuffix(".parquet"), "rows": 4, "quarantined": 2, "won": True, "candidates": 2,
            "changed": 2, "iterations": [], "tokens": 0, "accepted": 0,
        }
    ]  # fmt: skip


def test_a_commit_tells_how_its_answers_were_aligned(source: Input, local_output: Storage) -> None:
    packed = packed_unit(source, local_output)
    aligned = unpack(packed)["aligned"].to_pylist()
    assert [row is None for row in aligned] == [False, True, False, True]
    (made,) = aligned[0]  # 4 tokens
    decoded = {**made, "iterations": 3, "accepted": 2, "num_tokens": 6, "changed": False}
    failed = {**made, "status": "failed", "changed": None, "num_tokens": None}
    aligned[0] = [decoded, {**decoded, "iterations": 5, "num_tokens": 5, "accepted": 0}, failed]
    packed = with_columns(packed, {"aligned": pa.array(aligned, ALIGNED_LIST)})
    (told,) = committer(source, local_output)(packed).to_pylist()
    assert (told["candidates"], told["changed"]) == (3, 1)
    assert (told["iterations"], told["tokens"], told["accepted"]) == ([3, 5], 11, 2)


def test_a_commit_tells_what_could_not_be_scored(source: Input, local_output: Storage) -> None:
    failed = {"reward": "r", "note": "reward_failed", "message": "m"}
    notes = [[{**failed, "note": "scored", "message": None}, failed], None, [failed], None]
    packed = with_columns(packed_unit(source, local_output), {"reward_notes": pa.array(notes, REWARD_NOTES)})
    (told,) = committer(source, local_output)(packed).to_pylist()
    table = read_rows_of(local_output, f"units/{told['unit']}.parquet")
    facts = json.loads(table.schema.metadata[METADATA_KEY])
    assert facts["reward_notes"] == {"r: scored": 1, "r: reward_failed": 2}
    assert facts["unscored"] == {
        "r: reward_failed": {"prompt_id": table["prompt_id"][0].as_py(), "message": "m"}
    }  # fmt: skip


def test_a_second_copy_of_a_unit_loses_and_the_first_ones_rows_stay(output: Storage, source: Input) -> None:
    packed = packed_unit(source, output)
    assert committer(source, output)(packed)["won"].to_pylist() == [True]
    (name,) = output.sizes("units")
    first = output.read(f"units/{name}")
    assert committer(source, output)(packed)["won"].to_pylist() == [False]  # equal rows, another nonce
    assert output.read(f"units/{name}") == first


def _reordered(unit: pa.Table) -> pa.Table:
    return unit.take([1, 0, 2, 3])


def _shortened(unit: pa.Table) -> pa.Table:
    return unit.slice(0, 3)


def _doubled(unit: pa.Table) -> pa.Table:
    return pa.concat_tables([unit, unit.slice(0, 1)])


@pytest.mark.parametrize("spoil", [_reordered, _shortened, _doubled])
def test_a_unit_whose_rows_a_stage_lost_added_or_moved_is_never_committed(
    source: Input, local_output: Storage, spoil: Any
) -> None:
    packed = packed_unit(source, local_output)
    labels = {name: packed[name][0].as_py() for name in ("unit", "shard")}
    with pytest.raises(ValueError, match="other rows than it set out with"):
        committer(source, local_output)(pack(spoil(unpack(packed)), **labels))
    assert local_output.sizes("units") == {}


def test_kept_columns_come_out_of_the_corpus_with_the_inputs_type(source: Input, local_output: Storage) -> None:
    run_plan(plan_of(source, CONFIG, local_output, unit_rows=1), source, CONFIG, local_output)
    publish(local_output, OutputConfig(root="out"))
    check_published(local_output)
    table = read_rows_of(local_output, manifests_of(local_output)[0]["corpus"][0]["path"])
    assert table["topic"].to_pylist() == ["x", None]
    assert pa.types.is_dictionary(table.schema.field("topic").type)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards opened from now on, one entry for each time."""
    found: list[str] = []
    whole = Input.open

    def counting(self: Input, shard: Listed) -> Any:
        found.append(shard.path)
        return whole(self, shard)

    monkeypatch.setattr(Input, "open", counting)
    return found


BIG = 4000
BAD = range(5, BIG, 40)


def _committed_inputs(output: Storage) -> dict[int, Any]:
    """Row -> input, of every row that has one."""
    tables = [read_rows_of(output, f"units/{name}") for name in output.sizes("units")]
    rows = [row for table in tables for row in table.select(["source", "input"]).to_pylist()]
    return {row["source"]["row"]: json.loads(row["input"]) for row in rows if row["input"]}


def test_a_big_row_group_is_read_once_more_however_many_of_its_prompts_are_bad(
    tmp_path: Path, local_output: Storage, opened: list[str]
) -> None:
    prompts = ["" if row in BAD else f"prompt {row}" for row in range(BIG)]
    write_shard(tmp_path / "in" / "a.parquet", pa.table({"prompt": prompts, "extra": list(range(BIG))}))
    source, config = Input(str(tmp_path / "in")), InputConfig(path="in")
    run_plan(plan_of(source, config, local_output, unit_rows=100), source, config, local_output)
    assert len(opened) == 2
    assert _committed_inputs(local_output) == {row: {"prompt": "", "extra": row} for row in BAD}


@pytest.mark.parametrize("behind", [0, 3], ids=["in order", "out of order"])
def test_rows_that_stages_after_reading_fail_share_one_more_reading_of_their_row_group(
    tmp_path: Path, local_output: Storage, opened: list[str], behind: int
) -> None:
    table = pa.table({"prompt": [f"prompt {row}." for row in range(BIG)], "extra": list(range(BIG))})
    write_shard(tmp_path / "in" / "a.parquet", table)
    source, config = Input(str(tmp_path / "in")), InputConfig(path="in")
    spans = list(plan_of(source, config, local_output, unit_rows=100).spans)
    bad = {f"prompt {row}." for row in BAD}
    packed = [
        answer(unit, fails=lambda p: "too_long" if p in bad else None) for unit in read_spans(source, config, spans)
    ]
    commit = Committer(local_output, source, (), run=1, fingerprint="abc")
    for number in sorted(range(len(packed)), key=lambda number: number - number % 5 * behind):
        commit(packed[number])
    assert len(opened) == 2
    assert _committed_inputs(local_output) == {row: {"prompt": f"prompt {row}.", "extra": row} for row in BAD}


def test_rows_of_an_unreadable_row_group_are_committed_as_quarantined_without_their_input(
    tmp_path: Path, local_output: Storage
) -> None:
    path = write_shard(tmp_path / "in" / "a.parquet", 10, row_group_size=5)
    source, config = Input(str(tmp_path / "in")), InputConfig(path="in")
    data = bytearray(path.read_bytes())
    offset = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data[offset : offset + 20] = b"\xff" * 20
    path.write_bytes(data)

    run_plan(plan_of(source, config, local_output, unit_rows=3), source, config, local_output)
    publish(local_output, OutputConfig(root="out"))

    ok, quarantined = check_published(local_output)
    assert ok == [("a.parquet", row) for row in range(5)]
    assert quarantined == [("a.parquet", row) for row in range(5, 10)]
    (manifest,) = manifests_of(local_output)
    assert manifest["causes"] == {"unreadable_row_group": 5}
    quarantine = read_rows_of(local_output, manifest["quarantine"][0]["path"])
    assert quarantine["input"].null_count == 5


# --- facts ----------------------------------------------------------------------------------------------------------

SHARD = fake_shard(row_groups=(8,))
UNIT = Unit(SHARD.key, 0, 4)


def _facts(output: Storage, unit: Unit = UNIT) -> dict[str, Any]:
    return unit_facts(output, unit, output.sizes("units")[f"{unit.name}.parquet"])


def test_facts_are_read_from_the_footer_alone(output: Storage) -> None:
    commit_unit(output, SHARD, UNIT, quarantined=[1])
    assert _facts(output)["num_quarantined"] == 1
    assert _facts(output)["shard"]["path"] == SHARD.listed.path


def test_facts_of_a_file_that_is_not_this_unit_are_damage(local_output: Storage) -> None:
    commit_unit(local_output, SHARD, UNIT)
    data = local_output.read(UNIT.path)
    for other in (Unit(SHARD.key, 0, 5), Unit(SHARD.key, 4, 8), Unit("f" * 12, 0, 4), Unit(SHARD.key, 0, 4, retry=1)):
        local_output.put(other.path, data)
        with pytest.raises(Damaged):
            _facts(local_output, other)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no Parquet file but long enough"])
def test_facts_of_what_is_no_parquet_are_damage(local_output: Storage, data: bytes) -> None:
    local_output.put(UNIT.path, data)
    with pytest.raises(Damaged):
        _facts(local_output)


def test_facts_of_a_parquet_file_that_no_committer_wrote_are_damage(local_output: Storage, tmp_path: Path) -> None:
    local_output.put(UNIT.path, write_shard(tmp_path / "x.parquet", 4).read_bytes())
    with pytest.raises(Damaged):
        _facts(local_output)


def test_facts_of_a_unit_that_is_gone_are_file_not_found(output: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        unit_facts(output, UNIT, 1000)


def test_columns_of_any_type_are_sealed_as_parquet_gives_them_back(local_output: Storage) -> None:
    commit_unit(local_output, SHARD, UNIT)
    facts, table = _facts(local_output), read_rows_of(local_output, UNIT.path)
    types = [
        pa.timestamp("s"), pa.time32("s"), pa.date64(), pa.decimal128(9, 2), pa.null(),
        pa.dictionary(pa.int8(), pa.large_string()), pa.map_(pa.string(), pa.int64()), pa.list_view(pa.int8()),
        pa.large_list(pa.large_string()), pa.list_(pa.float16(), 2),
        pa.struct([("a", pa.list_(pa.struct([("b", pa.duration("s"))])))]),
    ]  # fmt: skip
    for number, kind in enumerate(types):
        table = table.append_column(f"kept_{number}", pa.nulls(UNIT.num_rows, kind))
    local_output.delete([UNIT.path])
    assert write_unit(local_output, UNIT, table, facts)
    assert _facts(local_output) == facts
    assert _read_unit(local_output, UNIT).num_columns == table.num_columns


# --- input rows as JSON ---------------------------------------------------------------------------------------------


def _bad(dtype: str) -> pa.Array:
    raw = pa.array([b"\xfe"])
    string = pa.Array.from_buffers(pa.string(), 1, raw.buffers())
    return {
        "string": string,
        "list": pa.ListArray.from_arrays([0, 1], string),
        "fixed": pa.FixedSizeListArray.from_arrays(string, 1),
        "struct": pa.StructArray.from_arrays([string], ["x"]),
        "map": pa.MapArray.from_arrays(pa.array([0, 1], pa.int32()), pa.array(["k"]), string),
    }[dtype]


@pytest.mark.parametrize("dtype", ["string", "list", "fixed", "struct", "map"])
def test_text_that_is_not_utf8_is_kept_as_base64_at_any_depth(dtype: str) -> None:
    text = row_as_json(pa.table({"column": _bad(dtype)}))
    assert f'{{"base64": "{base64.b64encode(bytes([0xFE])).decode()}"}}' in text
    json.loads(text)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([10**18], pa.timestamp("us")),
        pa.array([[10**18]], pa.list_(pa.timestamp("us"))),
        pa.array([10**9], pa.date32()),
        pa.array([10**18], pa.duration("us")),
        pa.array([1], pa.timestamp("ns", "Europe/Berlin")),
        pa.array([1], pa.decimal128(20, 2)),
        pa.array([2**64 - 1], pa.uint64()),
        pa.array([1.5], pa.float16()),
        pa.array([b"\xff"]),
        pa.array([{"a": [{"b": None}]}]),
        pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        pa.array(["x"]).dictionary_encode(),
        pa.array(["x"], pa.string_view()),
        pa.nulls(1),
    ],
    ids=lambda column: str(column.type),
)
def test_a_row_of_any_type_becomes_json(column: pa.Array) -> None:
    table = pa.table({"prompt": pa.nulls(1), "column": column})
    assert set(json.loads(row_as_json(table))) == {"prompt", "column"}


def test_both_of_two_columns_with_one_name_are_kept() -> None:
    row = pa.table([pa.nulls(1), pa.array([1]), pa.array([2])], names=["prompt", "x", "x"])
    assert list(json.loads(row_as_json(row)).values()) == [None, 1, 2]
