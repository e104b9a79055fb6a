"""The state of an output root, read while others change it, and the records of its runs."""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.contract import ConfigError
from pipelines.corpus import units
from pipelines.corpus.publish import OutputConfig, publish
from pipelines.corpus.runs import check_fingerprint, create_run, digest, latest_run, refuse_other_kind
from pipelines.corpus.state import partition_folder, read_state
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit
from tests.pipelines.corpus.fabricate import commit_unit, commit_units, fake_shard
from tests.pipelines.corpus.interrupted import Killed, Stepped, at, kill

CONFIG = OutputConfig(root="out", part_mib=0)
SHARD = fake_shard(row_groups=(8, 4))
CONFIGS_OF = {"corpus": {"aligner": {}}, "preferences": {"build": {}}}


def test_an_empty_root_has_nothing(output: Storage) -> None:
    state = read_state(output)
    assert (state.committed, state.lost, state.stale, state.partitions) == ((), (), (), ())
    assert state.done == {}


def test_committed_planned_published_lost_and_stale_units_are_told_apart(output: Storage) -> None:
    made = commit_units(output, SHARD)
    assert read_state(output).committed == tuple(made)

    with pytest.raises(Killed):
        publish(Stepped(output, at(1, kill)), CONFIG)  # plan.json is there
    late = Unit(SHARD.key, 2, 6)
    commit_unit(output, SHARD, late)
    output.delete([made[0].path])
    state = read_state(output)
    assert state.committed == ()
    assert state.published == state.done == {(SHARD.key, 0): [(0, 12)]}
    assert state.lost == (made[0],)
    assert state.stale == (late,)
    assert [partition.number for partition in state.unfinished] == [1]
    assert state.finished_shards == {}

    commit_unit(output, SHARD, made[0])
    publish(output, CONFIG)
    state = read_state(output)
    assert (state.committed, state.lost, state.stale, state.unfinished) == ((), (), (), ())
    assert state.done == {(SHARD.key, 0): [(0, 12)]}
    assert state.finished_shards == {SHARD.listed: SHARD}


def test_units_that_are_committed_planned_and_published_while_the_state_is_read_are_not_lost(
    local_output: Storage,
) -> None:
    for step in range(5):
        output = Storage(f"{local_output.root}/{step}")
        for finishes in (False, True):
            shard = fake_shard(f"{finishes}.parquet", (4,))

            def meanwhile(output: Storage = output, shard: object = shard, finishes: bool = finishes) -> None:
                commit_units(output, shard)  # type: ignore[arg-type]
                try:
                    publish(output if finishes else Stepped(output, at(1, kill)), CONFIG)
                except Killed:
                    return

            state = read_state(Stepped(output, at(step, meanwhile), reads=True))
            assert state.lost == ()
            publish(output, CONFIG)


def test_units_that_are_published_and_dropped_while_the_state_is_read_are_still_done(local_output: Storage) -> None:
    for step in range(5):
        output = Storage(f"{local_output.root}/{step}")
        commit_units(output, SHARD)
        during = Stepped(output, at(step, lambda output=output: publish(output, CONFIG) and None), reads=True)
        assert read_state(during).done == {(SHARD.key, 0): [(0, 12)]}


def test_a_partition_folder_without_a_plan_is_no_partition(local_output: Storage) -> None:
    commit_units(local_output, SHARD)
    local_output.create(f"{partition_folder(local_output, 1)}/.scratch-left-by-a-dead-writer", b"")
    assert read_state(local_output).partitions == ()
    assert publish(local_output, CONFIG).partitions == (1,)


def test_each_published_row_range_is_merged_once_however_many_partitions_there_are(
    local_output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        commit_units(local_output, fake_shard(f"{number}.parquet", (4,)))
        publish(local_output, CONFIG)
    num_merged = 0
    merged = units.merged

    def counting(ranges: Iterable[tuple[int, int]]) -> units.Ranges:
        nonlocal num_merged
        held = list(ranges)
        num_merged += len(held)
        return merged(held)

    monkeypatch.setattr(units, "merged", counting)
    assert len(read_state(local_output).published) == 6
    assert num_merged == 6


# --- runs -----------------------------------------------------------------------------------------------------------


def test_runs_are_numbered_in_order_and_the_last_is_found(output: Storage) -> None:
    assert latest_run(output) is None
    assert [create_run(output, {"fingerprint": {"model": name}}) for name in "ab"] == [1, 2]
    assert latest_run(output) == {"number": 2, "fingerprint": {"model": "b"}}


def test_jobs_that_start_at_once_get_numbers_of_their_own(local_output: Storage) -> None:
    barrier = threading.Barrier(8)

    def start(job: int) -> int:
        barrier.wait()
        return create_run(local_output, {"job": job})

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(start, range(8))) == list(range(1, 9))


def test_a_fingerprints_digest_does_not_depend_on_the_order_of_its_keys() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1}) != digest({"a": 1})


def _check(before: dict[str, object], now: dict[str, object], **more: bool) -> None:
    flags = {"has_unpublished": False, "has_published": False, "accept_changes": False, **more}
    check_fingerprint(before, now, **flags)


def test_a_changed_config_is_refused_while_units_wait_even_when_changes_are_accepted() -> None:
    with pytest.raises(ConfigError, match="model was 'a' and is 'b'") as refusal:
        _check({"model": "a", "seed": 1}, {"model": "b", "seed": 1}, has_unpublished=True, accept_changes=True)
    assert "seed" not in str(refusal.value)


def test_a_changed_config_needs_to_be_accepted_once_there_are_partitions() -> None:
    with pytest.raises(ConfigError, match=r"run\.accept_changes=true"):
        _check({"model": "a"}, {"model": "b"}, has_published=True)
    _check({"model": "a"}, {"model": "b"}, has_published=True, accept_changes=True)
    _check({"model": "a"}, {"model": "b"})  # nothing is there yet
    _check({"model": "a"}, {"model": "a"}, has_published=True, has_unpublished=True)


def test_a_key_that_is_new_or_gone_is_a_change_and_is_told() -> None:
    with pytest.raises(ConfigError, match=r"seed was '\(not there\)' and is 1"):
        _check({}, {"seed": 1}, has_published=True)


@pytest.mark.parametrize(("there", "told"), [("corpus", "a corpus"), ("preferences", "a preference dataset")])
@pytest.mark.parametrize("by", ["partition", "run"])
def test_a_root_of_the_other_kind_is_refused(there: str, told: str, by: str, local_output: Storage) -> None:
    if by == "partition":
        local_output.create(f"{there}/run=000001/plan.json", b"{}")
    else:  # one that has not come to a partition yet
        create_run(local_output, {"config": CONFIGS_OF[there]})
    for kind in CONFIGS_OF:
        output = Storage(local_output.url, partitions=kind)
        if kind == there:
            refuse_other_kind(output)
        else:
            with pytest.raises(ConfigError, match=f"output.root .* holds {told}: take another folder"):
                refuse_other_kind(output)


def test_a_new_root_and_one_below_a_file_are_told_apart(local_output: Storage) -> None:
    refuse_other_kind(local_output)
    local_output.create("taken", b"")
    with pytest.raises(ConfigError, match="is a file, or lies below one: name a folder"):
        refuse_other_kind(Storage(f"{local_output.url}/taken"))
