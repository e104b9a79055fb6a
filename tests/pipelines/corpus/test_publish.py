"""Publishing: whoever crashes, freezes, races or loses files, each row is published once and everything agrees."""

import contextlib
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from actors.contract import ConfigError
from pipelines.corpus import publish as publish_module
from pipelines.corpus import schema
from pipelines.corpus.card import write_card
from pipelines.corpus.commit import unit_facts, write_unit
from pipelines.corpus.parquet import Damaged
from pipelines.corpus.publish import OutputConfig, Published, publish
from pipelines.corpus.shards import BadShard
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit
from tests.pipelines.corpus.fabricate import (
    card_header,
    check_exactly_once,
    check_published,
    commit_unit,
    commit_units,
    fake_shard,
    manifests_of,
    read_rows_of,
    rows_of,
    sources,
    unit_table,
    write_shard,
)
from tests.pipelines.corpus.interrupted import Killed, Stepped, at, kill

CONFIG = OutputConfig(root="out", part_mib=0)
SHARD = fake_shard(row_groups=(8, 4))
OTHER = fake_shard("other.parquet", row_groups=(4,))
NEW = fake_shard("0 new.parquet", row_groups=(5,))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that publish hundreds of times: starting threads would be half of the time."""

    def one_by_one(function: Callable[[Any], Any], items: Iterable[Any], at_once: int = 1) -> Iterator[tuple[Any, Any]]:
        return ((item, function(item)) for item in items)

    monkeypatch.setattr("pipelines.corpus.state.concurrently", one_by_one)
    monkeypatch.setattr("pipelines.corpus.publish.concurrently", one_by_one)


def new_root(folder: Path, name: object) -> Storage:
    return Storage(str(folder / str(name)))


def files_of(output: Storage, kind: str) -> dict[str, bytes]:
    """Path -> bytes of everything under corpus/ or quarantine/."""
    return {
        f"{kind}/{folder}/{name}": output.read(f"{kind}/{folder}/{name}")
        for folder in output.folders(kind)
        for name in output.sizes(f"{kind}/{folder}")
    }


def all_files(output: Storage) -> dict[str, bytes]:
    return files_of(output, "corpus") | files_of(output, "quarantine")


# --- what a partition is --------------------------------------------------------------------------------------------


def test_committed_units_become_a_partition_that_holds_each_row_once(output: Storage) -> None:
    commit_units(output, SHARD, quarantined=[1, 6, 7, 11])
    commit_units(output, OTHER)

    assert publish(output, CONFIG) == Published((1,), (), None)

    ok, quarantined = check_published(output)
    assert Counter(ok + quarantined) == Counter(rows_of(SHARD, OTHER))
    assert quarantined == [("prompts.parquet", row) for row in (1, 6, 7, 11)]
    assert output.sizes("units") == {}
    (manifest,) = manifests_of(output)
    assert manifest["num_units"] == 4
    assert manifest["causes"] == {"engine_crash": 4}
    assert [record["path"] for record in manifest["finished_shards"]] == ["other.parquet", "prompts.parquet"]
    assert publish(output, CONFIG) == Published((), (), None)  # nothing more


def test_parts_are_in_the_inputs_order_whatever_order_units_were_committed_in(local_output: Storage) -> None:
    shards = [fake_shard(f"{name}.parquet", (6,)) for name in "dbac"]
    for shard in shards:
        for start in (4, 0, 2):
            commit_unit(local_output, shard, Unit(shard.key, start, start + 2))
    publish(local_output, CONFIG)
    ok, _ = check_published(local_output)
    assert ok == [(f"{name}.parquet", row) for name in "abcd" for row in range(6)]


def test_rows_come_through_unchanged_and_in_the_documented_schema(local_output: Storage) -> None:
    commit_unit(local_output, OTHER, Unit(OTHER.key, 0, 4), quarantined=[2])
    publish(local_output, CONFIG)
    (manifest,) = manifests_of(local_output)
    made = unit_table(OTHER, Unit(OTHER.key, 0, 4), quarantined=[2])

    corpus = read_rows_of(local_output, manifest["corpus"][0]["path"])
    assert corpus.schema.remove_metadata().equals(schema.CORPUS)
    assert corpus.to_pylist() == made.take([0, 1, 3]).select(schema.CORPUS.names).to_pylist()

    quarantine = read_rows_of(local_output, manifest["quarantine"][0]["path"])
    assert quarantine.schema.remove_metadata().equals(schema.QUARANTINE)
    (row,) = quarantine.to_pylist()
    assert row["unit"] == Unit(OTHER.key, 0, 4).name
    assert (row["stage"], row["cause"], row["attempts"]) == ("policy", "engine_crash", 3)
    assert json.loads(row["input"]) == {"prompt": "prompt 2"}


def test_a_partition_of_which_every_row_is_quarantined_has_no_corpus_part(local_output: Storage) -> None:
    commit_units(local_output, OTHER, quarantined=range(4))
    publish(local_output, CONFIG)
    (manifest,) = manifests_of(local_output)
    assert manifest["corpus"] == []
    check_exactly_once(local_output, rows_of(OTHER))
    assert [config["config_name"] for config in card_header(local_output)["configs"]] == ["quarantine", "default"]


def test_part_size_cuts_parts_at_units_and_zero_makes_one(tmp_path: Path) -> None:
    shard = fake_shard(row_groups=(3000,))
    counts = {}
    for part_mib in (0, 1):
        output = new_root(tmp_path, part_mib)
        for start in range(0, 3000, 500):
            unit = Unit(shard.key, start, start + 500)
            table = unit_table(shard, unit)
            noise = pa.array([random.Random(row).randbytes(1200) for row in range(start, start + 500)])
            table = table.append_column("noise", noise)
            facts = {
                "unit": unit.name, "num_rows": 500, "num_quarantined": 0, "causes": {}, "run": 1, "fingerprint": "f",
                "shard": {"path": "p", "size": 1, "tag": "t", "key": shard.key, "row_groups": [3000]},
            }  # fmt: skip
            write_unit(output, unit, table, facts)
        publish(output, OutputConfig(root="out", part_mib=part_mib))
        check_exactly_once(output, rows_of(shard))
        counts[part_mib] = len(manifests_of(output)[0]["corpus"])
    assert counts == {0: 1, 1: 3}  # units of 0.6 MB each


def test_units_are_kept_on_demand_and_never_published_again(output: Storage) -> None:
    config = OutputConfig(root="out", keep_units=True)
    units = commit_units(output, SHARD)
    publish(output, config)
    before = all_files(output)
    assert publish(output, config) == Published((), (), None)
    check_exactly_once(output, rows_of(SHARD), num_units_left=len(units))
    assert all_files(output) == before


def test_units_of_two_makings_become_a_partition_each_the_oldest_runs_first(output: Storage) -> None:
    for start, run, fingerprint in ((0, 3, "b"), (4, 2, "a"), (8, 3, "b")):
        unit = Unit(SHARD.key, start, start + 4)
        commit_unit(output, SHARD, unit, [start] if start == 8 else [], run=run, fingerprint=fingerprint)
    commit_unit(output, OTHER, Unit(OTHER.key, 0, 4), run=4, fingerprint="a")  # back to the old values

    assert publish(output, CONFIG) == Published((1, 2), (), None)

    told = [(found["fingerprints"], found["runs"], found["num_rows"]) for found in manifests_of(output)]
    assert told == [(["a"], [2, 4], 8), (["b"], [3], 8)]
    assert [len(found["finished_shards"]) for found in manifests_of(output)] == [1, 1]
    check_exactly_once(output, rows_of(SHARD, OTHER))


def test_a_second_partition_leaves_the_first_as_it_was_byte_for_byte(output: Storage) -> None:
    commit_units(output, SHARD, quarantined=[0])
    publish(output, CONFIG)
    first = all_files(output)
    commit_units(output, OTHER, quarantined=[3])
    assert publish(output, CONFIG).partitions == (2,)
    both = all_files(output)
    assert {path: data for path, data in both.items() if "run=000001" in path} == first
    assert any("run=000002" in path for path in both)
    check_exactly_once(output, rows_of(SHARD, OTHER))


def test_repeated_ids_are_counted_and_kept(local_output: Storage) -> None:
    for unit in (Unit(SHARD.key, 0, 4), Unit(SHARD.key, 4, 8)):
        table = unit_table(SHARD, unit)
        table = table.set_column(0, schema.PROMPT_ID, pa.array(["a", "b", "c", "d"]))
        _write(local_output, unit, table)
    publish(local_output, CONFIG)
    assert manifests_of(local_output)[0]["num_repeated_ids"] == 4
    check_exactly_once(local_output, rows_of(SHARD)[:8])


def _write(output: Storage, unit: Unit, table: pa.Table) -> None:
    facts = {
        "unit": unit.name, "num_rows": unit.num_rows, "num_quarantined": 0, "causes": {}, "run": 1,
        "fingerprint": "f", "shard": {"path": SHARD.listed.path, "size": 1, "tag": "tag", "key": SHARD.key,
                                      "row_groups": list(SHARD.row_groups)},
    }  # fmt: skip
    write_unit(output, unit, table, facts)


def test_bad_shards_and_unfinished_shards_are_in_the_manifest(local_output: Storage) -> None:
    commit_unit(local_output, SHARD, Unit(SHARD.key, 0, 4))
    commit_units(local_output, OTHER)
    publish(local_output, CONFIG, bad_shards=(BadShard("x.parquet", "broken_footer: cut"),))
    (manifest,) = manifests_of(local_output)
    assert manifest["bad_shards"] == [{"path": "x.parquet", "reason": "broken_footer: cut"}]
    assert [record["path"] for record in manifest["finished_shards"]] == ["other.parquet"]

    commit_unit(local_output, SHARD, Unit(SHARD.key, 4, 8))
    commit_unit(local_output, SHARD, Unit(SHARD.key, 8, 12))
    publish(local_output, CONFIG)
    assert [record["path"] for record in manifests_of(local_output)[1]["finished_shards"]] == ["prompts.parquet"]


def test_too_much_quarantine_is_withheld_until_it_is_accepted(local_output: Storage) -> None:
    commit_units(local_output, OTHER, quarantined=[0, 1])
    published = publish(local_output, CONFIG, max_quarantined_fraction=0.4)
    assert published.partitions == ()
    assert published.withheld is not None
    assert "2 of 4 rows are quarantined (2 engine_crash)" in published.withheld
    assert local_output.folders("corpus") == []
    assert len(local_output.sizes("units")) == 1

    accepted = publish(local_output, CONFIG, max_quarantined_fraction=0.4, accept_quarantined=True)
    assert accepted == Published((1,), (), None)
    check_exactly_once(local_output, rows_of(OTHER))


def test_a_quarantined_share_at_the_limit_is_not_above_it(local_output: Storage) -> None:
    commit_units(local_output, OTHER, quarantined=[0, 1])
    assert publish(local_output, CONFIG, max_quarantined_fraction=0.5).partitions == (1,)


# --- overlapping and late units -------------------------------------------------------------------------------------


def test_units_that_overlap_publish_each_row_once_and_what_is_left_is_planned_again(output: Storage) -> None:
    for start, stop in ((0, 6), (4, 8), (0, 3), (8, 12)):
        commit_unit(output, SHARD, Unit(SHARD.key, start, stop))
    publish(output, CONFIG)
    check_exactly_once(output, [(SHARD.listed.path, row) for row in (*range(6), *range(8, 12))])
    assert read_state(output).done == {(SHARD.key, 0): [(0, 6), (8, 12)]}
    commit_unit(output, SHARD, Unit(SHARD.key, 6, 8))
    publish(output, CONFIG)
    check_exactly_once(output, rows_of(SHARD))


def test_a_zombies_late_commit_of_published_rows_changes_nothing_and_is_dropped(output: Storage) -> None:
    commit_units(output, SHARD)
    publish(output, CONFIG)
    before = all_files(output)
    assert commit_unit(output, SHARD, Unit(SHARD.key, 0, 4), version="zombie")
    assert commit_unit(output, SHARD, Unit(SHARD.key, 2, 7), version="zombie")

    assert publish(output, CONFIG) == Published((), (), None)

    assert all_files(output) == before
    assert output.sizes("units") == {}


def test_a_zombies_commit_while_a_partition_is_unfinished_is_no_part_of_it(output: Storage) -> None:
    commit_units(output, SHARD)
    with pytest.raises(Killed):
        publish(Stepped(output, at(2, kill)), CONFIG)  # plan.json and a part are there
    commit_unit(output, SHARD, Unit(SHARD.key, 0, 3), version="zombie")
    publish(output, CONFIG)
    check_exactly_once(output, rows_of(SHARD))


# --- crashes --------------------------------------------------------------------------------------------------------


def _prepare_crash(output: Storage) -> None:
    commit_units(output, SHARD, quarantined=[1, 9])
    publish(output, CONFIG)
    commit_units(output, OTHER, quarantined=[0])
    commit_unit(output, fake_shard("all ok.parquet", (2,)), Unit(fake_shard("all ok.parquet").key, 0, 2))


CRASH_ROWS = rows_of(SHARD, OTHER, fake_shard("all ok.parquet", (2,)))


def _crash_everywhere(roots: Callable[[], Storage]) -> int:
    """Kill a publisher before each of its changes in turn, until one gets through; the next one must put it right."""
    untouched = roots()
    _prepare_crash(untouched)
    publish(untouched, CONFIG)
    expected = _tables(untouched)
    step = 0
    while True:
        output = roots()
        _prepare_crash(output)
        try:
            publish(Stepped(output, at(step, kill)), CONFIG)
        except Killed:
            _check_card_lists_finished_partitions(output)
            publish(output, CONFIG)
            check_exactly_once(output, CRASH_ROWS)
            assert _tables(output) == expected
            step += 1
            continue
        check_exactly_once(output, CRASH_ROWS)
        return step


def _check_card_lists_finished_partitions(output: Storage) -> None:
    listed = {path for config in card_header(output)["configs"] for path in config["data_files"]}
    for partition in read_state(output).partitions:
        if partition.manifest:
            assert listed >= {part["path"] for kind in ("corpus", "quarantine") for part in partition.manifest[kind]}


def _tables(output: Storage) -> dict[str, list[dict[str, object]]]:
    return {path: read_rows_of(output, path).to_pylist() for path in all_files(output) if path.endswith(".parquet")}


@pytest.mark.usefixtures("quick")
def test_a_publisher_killed_before_any_change_leaves_what_the_next_one_completes(tmp_path: Path) -> None:
    numbers = iter(range(100))
    assert _crash_everywhere(lambda: new_root(tmp_path, next(numbers))) >= 7


@pytest.mark.long
def test_a_publisher_killed_before_any_change_on_s3_leaves_what_the_next_one_completes(
    s3_output: Storage,
) -> None:
    numbers = iter(range(100))
    options = {"endpoint_url": s3_output.fs.raw.endpoint_url}
    assert _crash_everywhere(lambda: Storage(f"{s3_output.url}/{next(numbers)}", options)) >= 7


def test_publishers_that_are_killed_again_and_again_get_there(output: Storage) -> None:
    _prepare_crash(output)
    for _ in range(50):
        try:
            publish(Stepped(output, at(1, kill)), CONFIG)  # one change each
        except Killed:
            continue
        break
    publish(output, CONFIG)
    check_exactly_once(output, CRASH_ROWS)


# --- races ----------------------------------------------------------------------------------------------------------


def _more_arrives(output: Storage) -> None:
    """Another job: new units of a new shard, and a unit of the old one cut otherwise; then it publishes."""
    commit_units(output, NEW, quarantined=[4])
    commit_unit(output, SHARD, Unit(SHARD.key, 2, 9), version="cut otherwise")
    publish(output, CONFIG)


@pytest.fixture(scope="module")
def crash_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crash")
    _prepare_crash(Storage(str(folder)))
    return folder


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("arrives", [False, True], ids=["same units", "new units"])
@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "dies one step later"])
def test_a_publisher_frozen_before_any_operation_wakes_up_and_does_no_harm(
    tmp_path: Path, crash_root: Path, arrives: bool, dies: bool
) -> None:
    step = 0
    while True:
        output = Storage(str(shutil.copytree(crash_root, tmp_path / str(step))))
        was_frozen: list[int] = []

        def others(output: Storage = output, was_frozen: list[int] = was_frozen) -> None:
            was_frozen.append(1)
            _more_arrives(output) if arrives else publish(output, CONFIG)

        def before(number: int, step: int = step, others: Callable[[], None] = others) -> None:
            if number == step:
                others()
            elif dies and number == step + 1:
                raise Killed

        with contextlib.suppress(Killed):
            assert publish(Stepped(output, before, reads=True), CONFIG).lost == ()
        publish(output, CONFIG)
        expected = CRASH_ROWS + (rows_of(NEW) if was_frozen and arrives else [])
        check_exactly_once(output, expected)
        if not was_frozen:
            break
        step += 1
    assert step >= 20


@pytest.mark.usefixtures("quick")
def test_two_publishers_that_freeze_each_other_at_every_pair_of_changes_do_no_harm(
    tmp_path: Path, crash_root: Path
) -> None:
    num_steps = _num_changes(Storage(str(shutil.copytree(crash_root, tmp_path / "count"))))
    for first in range(num_steps):
        for second in range(num_steps):
            output = Storage(str(shutil.copytree(crash_root, tmp_path / f"{first}-{second}")))
            _interleave(output, first, second)
            publish(output, CONFIG)
            check_exactly_once(output, CRASH_ROWS + rows_of(NEW))


def _num_changes(output: Storage) -> int:
    counted = Stepped(output, lambda number: None)
    publish(counted, CONFIG)
    return counted.num_steps


def _interleave(output: Storage, first: int, second: int) -> None:
    """A runs to its step `first`; B, which knows of more units, to its step `second`; A to its end; B to its end."""
    b_waits, b_goes_on = threading.Event(), threading.Event()

    def hold_b() -> None:
        b_waits.set()
        assert b_goes_on.wait(30)

    def run_b() -> None:
        try:
            publish(Stepped(output, at(second, hold_b)), CONFIG)
        finally:
            b_waits.set()

    b = threading.Thread(target=run_b)

    def start_b() -> None:
        commit_units(output, NEW, quarantined=[4])
        b.start()
        assert b_waits.wait(30)

    publish(Stepped(output, at(first, start_b)), CONFIG)
    b_goes_on.set()
    if b.ident is not None:
        b.join(30)


def test_publishers_that_run_at_once_publish_each_row_once(output: Storage) -> None:
    _prepare_crash(output)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            publish(output, CONFIG)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    publish(output, CONFIG)
    check_exactly_once(output, CRASH_ROWS)


# --- damage ---------------------------------------------------------------------------------------------------------


def _truncate(output: Storage, unit: Unit) -> None:
    output.put(unit.path, output.read(unit.path)[:-40])


def _corrupt_page(output: Storage, unit: Unit) -> None:
    data = bytearray(output.read(unit.path))
    data[60:64] = bytes(byte ^ 0xFF for byte in data[60:64])
    output.put(unit.path, bytes(data))


def _delete(output: Storage, unit: Unit) -> None:
    output.delete([unit.path])


def _swap(output: Storage, unit: Unit) -> None:
    """Another unit's rows under this one's name."""
    other = Unit(SHARD.key, 8, 12)
    output.put(unit.path, output.read(other.path))


DAMAGES = [_truncate, _corrupt_page, _swap]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_unit_is_reported_dropped_and_published_once_it_is_made_again(
    output: Storage, damage: Callable[[Storage, Unit], None]
) -> None:
    units = commit_units(output, SHARD, quarantined=[5])
    damage(output, units[1])

    published = publish(output, CONFIG)

    assert published == Published((), (units[1],), None)
    assert not output.exists(units[1].path)
    assert commit_unit(output, SHARD, units[1], quarantined=[5])
    assert publish(output, CONFIG) == Published((1,), (), None)
    check_exactly_once(output, rows_of(SHARD))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("damage", [*DAMAGES, _delete])
@pytest.mark.parametrize("again", [[5], [], [4, 5, 6, 7]], ids=["same", "all well now", "all bad now"])
@pytest.mark.parametrize("step", range(1, 6))
def test_a_unit_that_is_damaged_when_a_plan_counts_on_it_is_made_again_whatever_comes_out_of_it(
    tmp_path: Path, damage: Callable[[Storage, Unit], None], again: list[int], step: int
) -> None:
    output = new_root(tmp_path, "out")
    units = commit_units(output, SHARD, quarantined=[5])
    config = OutputConfig(root="out", part_mib=0)
    with pytest.raises(Killed):
        publish(Stepped(output, at(step, kill)), config)
    damage(output, units[1])

    for _ in range(3):
        published = publish(output, config)
        if not published.lost:
            break
        assert published.lost == (units[1],)
        assert read_state(output).lost == (units[1],)
        assert commit_unit(output, SHARD, units[1], again, version="v2")

    check_exactly_once(output, rows_of(SHARD))
    assert publish(output, config) == Published((), (), None)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("before", [[], [5], [4, 5, 6, 7]])
@pytest.mark.parametrize("again", [[], [5], [4, 5, 6, 7]])
@pytest.mark.parametrize("step", range(1, 5))
def test_a_publisher_that_read_a_unit_before_it_was_made_again_agrees_with_one_that_read_it_after(
    tmp_path: Path, before: list[int], again: list[int], step: int
) -> None:
    output = new_root(tmp_path, "out")
    shard = fake_shard(row_groups=(8,))
    units = [Unit(shard.key, 0, 4), Unit(shard.key, 4, 8)]
    commit_unit(output, shard, units[0], before and [0])
    commit_unit(output, shard, units[1], before)

    def remake() -> None:
        output.delete([units[1].path])
        commit_unit(output, shard, units[1], again, version="v2")
        publish(output, CONFIG)

    publish(Stepped(output, at(step, remake)), CONFIG)
    publish(output, CONFIG)
    check_exactly_once(output, rows_of(shard))


def test_a_damaged_unit_that_cannot_be_deleted_is_told_and_not_made_again_for_ever(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = commit_units(output, SHARD)
    _truncate(output, units[1])
    monkeypatch.setattr(Storage, "delete", lambda self, paths: None)  # as of a store that answers 200 with errors in it
    with pytest.raises(ConfigError, match=rf"{units[1].path} is damaged and cannot be deleted"):
        publish(output, CONFIG)


def test_any_bit_of_a_unit_that_is_flipped_is_damage_or_changes_nothing(local_output: Storage) -> None:
    (unit,) = commit_units(local_output, OTHER, quarantined=[1])
    whole = local_output.read(unit.path)
    facts, rows = unit_facts(local_output, unit, len(whole)), publish_module._read_unit(local_output, unit)
    path, draw, found = Path(local_output.path(unit.path)), random.Random(0), Counter[str]()
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        try:
            assert unit_facts(local_output, unit, len(whole)) == facts
        except Damaged:
            found["footer"] += 1
        try:
            assert publish_module._read_unit(local_output, unit).equals(rows)
        except publish_module._DamagedUnit:
            found["file"] += 1
        except MemoryError:  # asked for by a size that is flipped: a full memory is no damage, and the job ends loudly
            found["memory"] += 1
    assert found["file"] > found["footer"] > 100
    assert found["memory"] < 10


def test_a_changed_letter_that_only_a_page_checksum_can_tell_is_damage(local_output: Storage, tmp_path: Path) -> None:
    (unit,) = commit_units(local_output, OTHER)
    table = read_rows_of(local_output, unit.path)
    plain = write_shard(tmp_path / "plain", table, compression="none", use_dictionary=False, write_page_checksum=True)
    local_output.put(unit.path, plain.read_bytes())
    assert publish_module._read_unit(local_output, unit).num_rows == 4
    local_output.put(unit.path, plain.read_bytes().replace(b"v1 of 2", b"v1 of 7"))
    assert publish(local_output, CONFIG).lost == (unit,)


def test_a_store_error_while_units_are_read_is_not_damage(
    local_output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = commit_units(local_output, SHARD)
    opened = local_output.fs.open

    class Away:
        closed, at, size = False, 0, 4096

        def read(self, size: int = -1) -> bytes:
            raise ConnectionError("the store is away")

        def seek(self, offset: int, whence: int = 0) -> int:
            self.at = offset + (self.size if whence == 2 else 0)
            return self.at

        def tell(self) -> int:
            return self.at

        def close(self) -> None:
            pass

        def __enter__(self) -> "Away":
            return self

        def __exit__(self, *args: object) -> None:
            pass

    monkeypatch.setattr(
        local_output.fs,
        "open",
        lambda path, *args, **kwargs: Away() if "units/" in path else opened(path, *args, **kwargs),
    )
    with pytest.raises(ConnectionError, match="the store is away"):
        publish(local_output, CONFIG)
    monkeypatch.undo()
    assert len(local_output.sizes("units")) == len(units)
    publish(local_output, CONFIG)
    check_exactly_once(local_output, rows_of(SHARD))


@pytest.mark.parametrize(
    "error", [pa.ArrowMemoryError("malloc of size 64 failed"), pa.ArrowCancelled("Ctrl-C"), MemoryError()], ids=repr
)
def test_a_full_memory_or_a_cancelled_read_is_not_damage_and_deletes_no_unit(
    local_output: Storage, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    units = commit_units(local_output, SHARD)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr("pyarrow.parquet.ParquetFile.read", fail)
    with pytest.raises(type(error)):
        publish(local_output, CONFIG)
    assert len(local_output.sizes("units")) == len(units)
    monkeypatch.undo()
    monkeypatch.setattr("pyarrow.parquet.read_metadata", fail)  # with which planning reads a footer
    with pytest.raises(type(error)):
        unit_facts(local_output, units[0], local_output.sizes("units")[f"{units[0].name}.parquet"])


def test_a_foreign_file_among_the_units_is_left_alone(local_output: Storage) -> None:
    commit_units(local_output, OTHER)
    local_output.create("units/notes.txt", b"mine")
    publish(local_output, CONFIG)
    check_exactly_once(local_output, rows_of(OTHER), num_units_left=1)
    assert local_output.read("units/notes.txt") == b"mine"


def test_a_plan_that_names_what_is_no_unit_is_never_finished_without_it(local_output: Storage) -> None:
    (unit,) = commit_units(local_output, OTHER)
    with pytest.raises(Killed):
        publish(Stepped(local_output, at(1, kill)), CONFIG)  # plan.json is there
    path = "corpus/run=000001/plan.json"
    local_output.put(path, local_output.read(path).replace(unit.name.encode(), b"another version's name"))
    with pytest.raises(ValueError, match="is not a unit name"):
        publish(local_output, CONFIG)
    assert not local_output.exists("corpus/run=000001/_SUCCESS")


# --- reading it -----------------------------------------------------------------------------------------------------


@pytest.fixture
def published_twice(local_output: Storage) -> Storage:
    commit_units(local_output, SHARD, quarantined=[1, 9])
    publish(local_output, OutputConfig(root="out", part_mib=0, title='A "corpus": ä'))
    commit_units(local_output, OTHER, quarantined=[0])
    publish(local_output, OutputConfig(root="out", part_mib=0, title='A "corpus": ä'))
    return local_output


def test_the_corpus_and_the_quarantine_read_as_pyarrow_datasets(published_twice: Storage) -> None:
    files = [part["path"] for manifest in manifests_of(published_twice) for part in manifest["corpus"]]
    by_manifest = ds.dataset([published_twice.path(path) for path in files])
    by_folder = ds.dataset(
        published_twice.path("corpus"), partitioning="hive", exclude_invalid_files=True, format="parquet"
    )
    quarantine = ds.dataset(published_twice.path("quarantine"), partitioning="hive")
    assert by_manifest.count_rows() == by_folder.count_rows() == 13
    assert sorted(by_folder.to_table()["run"].to_pylist()) == [1] * 10 + [2] * 3
    assert Counter(sources(by_manifest.to_table()) + sources(quarantine.to_table())) == Counter(rows_of(SHARD, OTHER))


def test_the_corpus_and_the_quarantine_load_with_datasets_through_the_card(
    published_twice: Storage, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset(published_twice.root, split="train", cache_dir=cache)
    assert rows.column_names == schema.CORPUS.names
    assert len(rows) == 13
    assert rows[0]["prompt"] == [{"role": "user", "content": "prompt 0"}]
    assert rows[0]["aligned"][0]["text"] == "v1 of 0"
    quarantine = datasets.load_dataset(published_twice.root, "quarantine", split="train", cache_dir=cache)
    assert sorted((row["source"]["shard"], row["source"]["row"]) for row in quarantine) == [
        ("other.parquet", 0), ("prompts.parquet", 1), ("prompts.parquet", 9)
    ]  # fmt: skip


def test_another_root_of_the_same_name_is_not_loaded_from_a_cache(tmp_path: Path) -> None:
    """`datasets` keeps what it has loaded by the folder's last name and the card's header."""
    found = []
    for place, quarantined in (("a", [1]), ("b", [1, 2])):
        output = Storage(str(tmp_path / place / "aligned"))
        commit_units(output, SHARD, quarantined=quarantined)
        publish(output, OutputConfig(root=output.url))
        found.append(len(datasets.load_dataset(output.root, split="train", cache_dir=str(tmp_path / "cache"))))
    assert found == [11, 10]


def test_a_corpus_without_rows_does_not_load_its_quarantine_instead(tmp_path: Path) -> None:
    output = Storage(str(tmp_path / "out"))
    commit_units(output, SHARD, quarantined=range(SHARD.num_rows))
    publish(output, OutputConfig(root=output.url))
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match="data_files are invalid"):
        datasets.load_dataset(output.root, cache_dir=cache)
    quarantined = datasets.load_dataset(output.root, "quarantine", split="train", cache_dir=cache)
    assert len(quarantined) == SHARD.num_rows


def test_a_root_of_which_nothing_may_be_published_loads_nothing(tmp_path: Path) -> None:
    output = Storage(str(tmp_path / "out"))
    commit_units(output, SHARD, quarantined=[1, 2])
    assert publish(output, OutputConfig(root=output.url), max_quarantined_fraction=0.1).withheld
    with pytest.raises(datasets.exceptions.DataFilesNotFoundError):
        datasets.load_dataset(output.root, cache_dir=str(tmp_path / "cache"))


def test_the_card_says_what_is_there(published_twice: Storage) -> None:
    header = card_header(published_twice)
    assert header["pretty_name"] == 'A "corpus": ä'
    assert header["size_categories"] == ["n<1K"]
    text = published_twice.read("README.md").decode()
    assert "| run=000001 | 10 | 2 | 0 | 1 |" in text
    assert "| run=000002 | 3 | 1 | 0 | 1 |" in text


def test_a_card_that_is_written_late_does_not_take_back_what_came_in_between(published_twice: Storage) -> None:
    published_twice.delete(["README.md"])

    def another_partition() -> None:
        commit_units(published_twice, NEW)
        publish(published_twice, CONFIG)

    write_card(Stepped(published_twice, at(0, another_partition)), "Aligned corpus")
    check_exactly_once(published_twice, rows_of(SHARD, OTHER, NEW))


def test_a_card_that_a_dying_publisher_left_outdated_is_put_right_by_the_next_publisher(
    published_twice: Storage,
) -> None:
    current = published_twice.read("README.md")
    published_twice.put("README.md", current.replace(b"run=000002", b"run=000001"))
    publish(published_twice, OutputConfig(root="out", part_mib=0, title='A "corpus": ä'))
    assert published_twice.read("README.md") == current
