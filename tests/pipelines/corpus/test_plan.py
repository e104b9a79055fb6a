"""Planning: what is not done, cut into units; nothing twice, nothing forgotten, finished shards not opened."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.aligner import AlignerConfig
from actors.contract import ConfigError
from actors.policy import PolicyConfig
from pipelines.corpus.plan import Plan
from pipelines.corpus.publish import OutputConfig, publish
from pipelines.corpus.runs import create_run
from pipelines.corpus.shards import Input, InputConfig
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit
from pipelines.corpus_job import CorpusJob
from pipelines.settings import AlignCorpusConfig, RunConfig
from tests.pipelines.corpus.fabricate import (
    check_exactly_once,
    check_published,
    manifests_of,
    plan_of,
    read_rows_of,
    run_plan,
    write_shard,
)
from tests.pipelines.corpus.interrupted import Killed, Stepped, at, kill

CONFIG = InputConfig(path="in")
OUT = OutputConfig(root="out", part_mib=0)


@pytest.fixture
def source(tmp_path: Path) -> Input:
    write_shard(tmp_path / "in" / "a.parquet", 10, row_group_size=7)
    write_shard(tmp_path / "in" / "b.parquet", 5)
    return Input(str(tmp_path / "in"))


ROWS = [("a.parquet", row) for row in range(10)] + [("b.parquet", row) for row in range(5)]


def planned(source: Input, output: Storage, config: InputConfig = CONFIG, **more: Any) -> list[tuple[str, int, int]]:
    plan = plan_of(source, config, output, **more)
    return [(span.shard.listed.path, unit.start, unit.stop) for span in plan.spans for unit in span.units]


def make(
    source: Input, output: Storage, config: InputConfig = CONFIG, fails: Any = lambda prompt: None, **more: Any
) -> None:
    run_plan(plan_of(source, config, output, **more), source, config, output, fails=fails)


def test_an_empty_root_plans_every_row_in_units_inside_row_groups(source: Input, local_output: Storage) -> None:
    plan = plan_of(source, CONFIG, local_output, unit_rows=4)
    assert planned(source, local_output) == [
        ("a.parquet", 0, 4), ("a.parquet", 4, 7), ("a.parquet", 7, 10), ("b.parquet", 0, 4), ("b.parquet", 4, 5)
    ]  # fmt: skip
    assert [span.row_group for span in plan.spans] == [0, 1, 0]
    assert (plan.num_units, plan.num_rows, plan.num_shards, plan.num_finished, plan.num_done_rows) == (5, 15, 2, 0, 0)


def test_the_plan_is_the_complement_of_what_is_committed_and_published(output: Storage, source: Input) -> None:
    make(source, output, limit=6)  # rows 0 to 7 of a
    publish(output, OUT)
    make(source, output, unit_rows=2, limit=1)  # rows 7 and 8
    plan = plan_of(source, CONFIG, output)
    assert planned(source, output) == [("a.parquet", 9, 10), ("b.parquet", 0, 4), ("b.parquet", 4, 5)]
    assert plan.num_done_rows == 9


@pytest.mark.parametrize(("limit", "rows"), [(1, 4), (4, 4), (5, 7), (8, 10), (15, 15), (99, 15)])
def test_a_limit_is_rounded_up_to_whole_units(source: Input, local_output: Storage, limit: int, rows: int) -> None:
    assert plan_of(source, CONFIG, local_output, unit_rows=4, limit=limit).num_rows == rows


def test_limits_and_other_unit_sizes_one_after_another_make_every_row_once(output: Storage, source: Input) -> None:
    for unit_rows, limit in ((4, 5), (3, 2), (100, 1), (1, 2)):
        make(source, output, unit_rows=unit_rows, limit=limit)
        publish(output, OUT)
    make(source, output)
    publish(output, OUT)
    check_exactly_once(output, ROWS)
    assert planned(source, output) == []


def test_finished_shards_are_not_opened_again_and_new_ones_are(
    source: Input, output: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(source, output, limit=10)  # all of a
    publish(output, OUT)
    write_shard(tmp_path / "in" / "c.parquet", 2)
    opened: list[str] = []
    cat_file = source.fs.cat_file

    def counting(path: str, *args: Any, **kwargs: Any) -> Any:
        if path.endswith(".parquet") and "/in/" in path:
            opened.append(path.rsplit("/", 1)[1])
        return cat_file(path, *args, **kwargs)

    monkeypatch.setattr(source.fs, "cat_file", counting)
    plan = plan_of(source, CONFIG, output)
    assert sorted(opened) == ["b.parquet", "c.parquet"]
    assert (plan.num_shards, plan.num_finished) == (3, 1)
    assert {span.shard.listed.path for span in plan.spans} == {"b.parquet", "c.parquet"}


def test_a_shard_finished_by_two_partitions_together_is_not_opened_again(source: Input, output: Storage) -> None:
    for _ in range(2):
        make(source, output, limit=7)
        publish(output, OUT)
    make(source, output)
    publish(output, OUT)
    assert plan_of(source, CONFIG, output).num_finished == 2


@pytest.mark.parametrize("publishes", [False, True], ids=["committed", "published"])
def test_a_changed_shard_is_refused_or_made_as_a_new_one(
    source: Input, local_output: Storage, tmp_path: Path, publishes: bool
) -> None:
    make(source, local_output)
    if publishes:
        publish(local_output, OUT)
    write_shard(tmp_path / "in" / "b.parquet", pa.table({"prompt": ["x", "y"]}))
    with pytest.raises(ConfigError, match=r"shard b\.parquet has changed since it was read"):
        plan_of(source, CONFIG, local_output)

    anew = dataclasses.replace(CONFIG, on_changed_shard="new")
    assert planned(source, local_output, anew) == [("b.parquet", 0, 2)]
    make(source, local_output, anew)
    publish(local_output, OUT)
    ok, _ = check_published(local_output)
    assert Counter(ok) == Counter([*ROWS, ("b.parquet", 0), ("b.parquet", 1)])


def test_bad_shards_are_told_and_the_others_planned(source: Input, local_output: Storage, tmp_path: Path) -> None:
    (tmp_path / "in" / "z.parquet").write_bytes(b"no Parquet at all")
    plan = plan_of(source, CONFIG, local_output)
    assert [shard.path for shard in plan.bad_shards] == ["z.parquet"]
    assert plan.num_rows == 15


# --- lost units -----------------------------------------------------------------------------------------------------


def _lose(source: Input, output: Storage, config: InputConfig = CONFIG) -> Unit:
    """Make all, begin to publish, and lose a unit of the unfinished partition."""
    make(source, output, config)
    with pytest.raises(Killed):
        publish(Stepped(output, at(1, kill)), OUT)  # plan.json is there and no part
    lost = read_state(output).committed or read_state(output).partitions[0].units
    output.delete([lost[3].path])
    return lost[3]


def test_a_lost_unit_is_planned_exactly_as_it_was_whatever_unit_rows_is_now(source: Input, output: Storage) -> None:
    lost = _lose(source, output)
    for unit_rows in (1, 3, 100):
        plan = plan_of(source, CONFIG, output, unit_rows=unit_rows)
        assert [unit for span in plan.spans for unit in span.units] == [lost]
        assert plan.num_done_rows == 15 - lost.num_rows
    make(source, output, unit_rows=2)
    assert publish(output, OUT).lost == ()
    check_exactly_once(output, ROWS)


def test_lost_units_come_before_new_ones_when_there_is_a_limit(
    source: Input, local_output: Storage, tmp_path: Path
) -> None:
    lost = _lose(source, local_output)
    write_shard(tmp_path / "in" / "0 new.parquet", 8)
    plan = plan_of(source, CONFIG, local_output, limit=1)
    assert [unit for span in plan.spans for unit in span.units] == [lost]


def test_a_lost_unit_whose_shard_is_gone_is_an_error_that_names_it(
    source: Input, local_output: Storage, tmp_path: Path
) -> None:
    lost = _lose(source, local_output)
    (tmp_path / "in" / "b.parquet").unlink()
    with pytest.raises(ConfigError, match=lost.name):
        plan_of(source, CONFIG, local_output)


# --- retries --------------------------------------------------------------------------------------------------------


def fails_on(*numbers: int, cause: str = "engine_crash") -> Any:
    return lambda prompt: cause if int(prompt.split()[-1]) in numbers else None


def retry(source: Input, output: Storage, cause: str = "engine_crash") -> list[tuple[str, int, int]]:
    return planned(source, output, retry_quarantined=cause)


def test_a_retry_plans_only_the_rows_with_that_cause_and_only_once(output: Storage, source: Input) -> None:
    make(source, output, fails=fails_on(1, 2, 3, 6, 7))
    publish(output, OUT)
    assert planned(source, output) == []
    assert retry(source, output, "timeout") == []
    assert retry(source, output) == [  # neighbours together, though never across row groups
        ("a.parquet", 1, 4), ("a.parquet", 6, 7), ("a.parquet", 7, 8), ("b.parquet", 1, 4)
    ]  # fmt: skip

    make(source, output, fails=fails_on(2), retry_quarantined="engine_crash")
    assert retry(source, output) == []  # committed
    publish(output, OUT)
    assert retry(source, output) == [("a.parquet", 2, 3), ("b.parquet", 2, 3)]  # quarantined a second time

    make(source, output, retry_quarantined="engine_crash")
    publish(output, OUT)
    assert retry(source, output) == []
    ok, _ = check_published(output)
    assert Counter(ok) == Counter(ROWS)
    first, second, third = manifests_of(output)
    assert (first["num_quarantined"], second["num_ok"], third["num_ok"]) == (8, 6, 2)


def test_a_retry_that_fails_for_another_reason_is_retried_by_that_reason(source: Input, local_output: Storage) -> None:
    make(source, local_output, fails=fails_on(3))
    publish(local_output, OUT)
    make(source, local_output, fails=fails_on(3, cause="timeout"), retry_quarantined="engine_crash")
    publish(local_output, OUT)
    assert retry(source, local_output) == []
    assert retry(source, local_output, "timeout") == [("a.parquet", 3, 4), ("b.parquet", 3, 4)]
    make(source, local_output, retry_quarantined="timeout")
    publish(local_output, OUT)
    ok, _ = check_published(local_output)
    assert Counter(ok) == Counter(ROWS)


def test_a_retried_row_is_made_from_the_input_again(source: Input, local_output: Storage) -> None:
    make(source, local_output, fails=fails_on(3))
    publish(local_output, OUT)
    make(source, local_output, retry_quarantined="engine_crash")
    publish(local_output, OUT)
    corpus = read_rows_of(local_output, manifests_of(local_output)[1]["corpus"][0]["path"])
    assert [chat[0]["content"] for chat in corpus["prompt"].to_pylist()] == ["a prompt 3", "b prompt 3"]
    assert [responses[0]["text"] for responses in corpus["responses"].to_pylist()] == [
        "v1: a prompt 3", "v1: b prompt 3"
    ]  # fmt: skip


def test_retrying_rows_of_a_shard_that_is_gone_is_an_error(
    source: Input, local_output: Storage, tmp_path: Path
) -> None:
    make(source, local_output, fails=fails_on(3))
    publish(local_output, OUT)
    (tmp_path / "in" / "b.parquet").unlink()
    with pytest.raises(ConfigError, match="retry_quarantined"):
        retry(source, local_output)


# --- the same input under another root ------------------------------------------------------------------------------


def _job(path: Path, output: Storage, **run: Any) -> tuple[CorpusJob, Plan]:
    config = AlignCorpusConfig(
        input=InputConfig(path=str(path)),
        policy=PolicyConfig(model="p", engine="openai"),
        aligner=AlignerConfig(model="a", engine="stored"),
        run=RunConfig(**run),
    )
    job = CorpusJob(config, Input(config.input.path), output)
    return job, job.planned(None)


def _run_job(path: Path, output: Storage, *, publishes: bool = True, **run: Any) -> int:
    job, plan = _job(path, output, **run)
    number = create_run(output, job.record(plan))
    run_plan(plan, job.source, CONFIG, output, run=number)
    if publishes:
        publish(output, OUT)
    return plan.num_rows


@pytest.mark.parametrize("publishes", [False, True], ids=["committed", "published"])
def test_the_same_shards_under_another_root_are_refused_instead_of_being_made_again(
    local_output: Storage, tmp_path: Path, publishes: bool
) -> None:
    write_shard(tmp_path / "in" / "2026" / "a.parquet", 3)
    assert _run_job(tmp_path / "in" / "2026", local_output, publishes=publishes) == 3
    roots = rf"rooted at file://{tmp_path}/in and was at file://{tmp_path}/in/2026 in the last run: .* output\.root"
    with pytest.raises(ConfigError, match=roots) as refusal:
        _job(tmp_path / "in", local_output)
    assert "\n" not in str(refusal.value)
    for same in ("in/2026/a.parquet", "in/2026/*.parquet", "in/2026/"):
        assert _job(tmp_path / same, local_output)[1].num_rows == 0


def test_data_that_was_moved_as_it_is_goes_on_when_that_is_accepted(local_output: Storage, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.parquet", 3)
    _run_job(tmp_path / "in", local_output)
    (tmp_path / "in").rename(tmp_path / "moved")
    write_shard(tmp_path / "moved" / "b.parquet", 2)
    with pytest.raises(ConfigError, match=r"run\.accept_changes=true"):
        _job(tmp_path / "moved", local_output)
    assert _run_job(tmp_path / "moved", local_output, accept_changes=True) == 2
    assert _job(tmp_path / "moved", local_output)[1].num_rows == 0  # its root is that of the run of the newest rows
    check_exactly_once(
        local_output, [("a.parquet", row) for row in range(3)] + [("b.parquet", row) for row in range(2)]
    )


def test_a_root_without_rows_may_be_given_another_input(local_output: Storage, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.parquet", 3)
    write_shard(tmp_path / "else" / "a.parquet", 2)
    job, plan = _job(tmp_path / "in", local_output)
    create_run(local_output, job.record(plan))  # and died before its first commit
    assert _job(tmp_path / "else", local_output)[1].num_rows == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt_column": "promt"},
            "input.prompt_column: no shard has that column (a.parquet: there is no column 'promt' among",
        ),
        ({"keep_columns": ["topic"]}, "input.keep_columns: no shard has that column"),
    ],
)
def test_a_column_that_no_shard_has_is_a_mistake_in_the_config(
    source: Input, local_output: Storage, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as told:
        planned(source, local_output, dataclasses.replace(CONFIG, **columns))
    assert message in str(told.value)


def test_a_column_that_some_shards_have_is_missing_in_the_others(source: Input, local_output: Storage) -> None:
    write_shard(Path(source.root) / "c.parquet", pa.table({"question": ["prompt"]}))
    (bad,) = plan_of(source, CONFIG, local_output).bad_shards
    assert (bad.path, bad.missing) == ("c.parquet", "prompt")
