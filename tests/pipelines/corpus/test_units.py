"""Units: their names, which of them count, and that concurrent jobs that cut differently still make each row once."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pipelines.corpus import units
from pipelines.corpus.plan import _cut as cut_shard
from pipelines.corpus.shards import Listed, Shard
from pipelines.corpus.units import Coverage, Unit

KEYS = ("0" * 12, "a" * 12)


def _ranges(most: int = 30) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, most), st.integers(1, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


UNITS = st.builds(lambda key, rows, retry: Unit(key, *rows, retry), st.sampled_from(KEYS), _ranges(), st.integers(0, 1))


def _rows(found: list[Unit]) -> list[tuple[str, int, int]]:
    return [(unit.shard, unit.retry, row) for unit in found for row in range(unit.start, unit.stop)]


# --- names ----------------------------------------------------------------------------------------------------------


@given(UNITS)
def test_a_unit_is_found_again_from_its_name_and_its_path(unit: Unit) -> None:
    assert Unit.parse(unit.name) == unit
    assert Unit.parse(unit.path.removeprefix("units/")) == unit


@given(st.lists(UNITS))
def test_names_sort_like_shards_and_rows(found: list[Unit]) -> None:
    first_passes = [unit for unit in found if unit.retry == 0]
    assert sorted(first_passes, key=lambda unit: unit.name) == sorted(first_passes)


@pytest.mark.parametrize(
    "name", ["", "README.md", "0123456789ab-0-5.parquet", "0123456789AB-0000000000-0000000005.parquet", ".scratch"]
)
def test_other_file_names_are_no_units(name: str) -> None:
    assert Unit.parse(name) is None
    with pytest.raises(ValueError, match="is not a unit name"):
        Unit.named(name)


# --- ranges ---------------------------------------------------------------------------------------------------------


@given(st.lists(_ranges()))
def test_merged_keeps_exactly_the_rows_and_is_sorted_disjoint_and_not_touching(ranges: list[tuple[int, int]]) -> None:
    merged = units.merged(ranges)
    assert {row for start, stop in merged for row in range(start, stop)} == {
        row for start, stop in ranges for row in range(start, stop)
    }
    assert all(before[1] < after[0] for before, after in itertools.pairwise(merged))


@given(_ranges(), st.lists(_ranges()), st.integers(1, 7))
def test_missing_then_cut_partitions_exactly_the_rows_that_are_not_done(
    wanted: tuple[int, int], done: list[tuple[int, int]], unit_rows: int
) -> None:
    pieces = [piece for gap in units.missing(*wanted, units.merged(done)) for piece in units.cut(*gap, unit_rows)]
    rows = [row for start, stop in pieces for row in range(start, stop)]
    assert rows == [
        row for row in range(*wanted) if not any(start <= row < stop for start, stop in done)
    ]  # in order, none twice, none left out
    assert all(0 < stop - start <= unit_rows for start, stop in pieces)


@given(st.lists(UNITS), st.lists(UNITS))
def test_add_is_the_union_of_rows(first: list[Unit], second: list[Unit]) -> None:
    both = units.add(units.add({}, first), second)
    assert both == units.add({}, [*second, *first])
    assert {
        (shard, retry, row) for (shard, retry), ranges in both.items() for span in ranges for row in range(*span)
    } == set(_rows([*first, *second]))


# --- cover ----------------------------------------------------------------------------------------------------------


@given(st.lists(UNITS), st.lists(UNITS))
def test_units_that_count_overlap_neither_each_other_nor_what_is_published(
    found: list[Unit], published: list[Unit]
) -> None:
    rows = _rows(units.cover(found, units.add({}, published)))
    assert len(rows) == len(set(rows))
    assert not set(rows) & set(_rows(published))


@given(st.lists(UNITS, unique=True).flatmap(lambda found: st.tuples(st.just(found), st.permutations(found))), st.data())
def test_which_units_count_does_not_depend_on_the_order_they_are_listed_in(
    orders: tuple[list[Unit], list[Unit]], data: st.DataObject
) -> None:
    published = units.add({}, data.draw(st.lists(UNITS, max_size=3)))
    assert units.cover(orders[0], published) == units.cover(orders[1], published)


@given(st.lists(UNITS), st.lists(UNITS))
def test_a_unit_that_does_not_count_overlaps_one_that_does_or_what_is_published(
    found: list[Unit], published: list[Unit]
) -> None:
    coverage = units.add({}, published)
    counting = units.cover(found, coverage)
    held = set(_rows([*counting, *published]))
    assert all(set(_rows([unit])) & held for unit in found if unit not in counting)


def test_of_two_units_with_one_start_the_longer_counts_and_retries_are_another_row_space() -> None:
    short, long, retry = Unit(KEYS[0], 0, 4), Unit(KEYS[0], 0, 8), Unit(KEYS[0], 2, 3, retry=1)
    assert units.cover([short, long, retry], {}) == [long, retry]


@given(st.lists(UNITS), st.lists(UNITS, max_size=4), st.lists(UNITS))
def test_units_planned_from_what_counts_never_change_what_counts(
    found: list[Unit], published: list[Unit], proposed: list[Unit]
) -> None:
    coverage = units.add({}, published)
    counting = units.cover(found, coverage)
    done = set(_rows([*counting, *published]))
    planned = [unit for unit in proposed if not set(_rows([unit])) & done]
    assert set(counting) <= set(units.cover([*found, *planned], coverage))


# --- jobs that cut differently, at the same time --------------------------------------------------------------------

GROUPS = (9, 0, 14, 3)
SHARD = Shard(Listed("prompts.parquet", 1, "1"), KEYS[0], GROUPS)
NUM_ROWS = sum(GROUPS)


class ConcurrentJobs(RuleBasedStateMachine):
    """Planners and publishers that look at the store at one moment and act at another, in any order."""

    @initialize()
    def begin(self) -> None:
        self.committed: set[Unit] = set()
        self.published: list[Unit] = []
        self.num_partitions = 0
        self.in_flight: list[Unit] = []
        self.snapshots: list[tuple[int, list[Unit]]] = []

    def coverage(self) -> Coverage:
        return units.add({}, self.published)

    @rule(unit_rows=st.integers(1, 12))
    def plan_what_is_not_done(self, unit_rows: int) -> None:
        published = self.coverage()
        done = units.add(published, units.cover(self.committed, published))
        self.in_flight += cut_shard(SHARD, [(0, NUM_ROWS)], done, unit_rows, [])

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def commit_some_unit_in_flight(self, data: st.DataObject) -> None:
        self.committed.add(self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1))))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def lose_some_unit_in_flight(self, data: st.DataObject) -> None:
        self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))

    @rule()
    def look_in_order_to_publish(self) -> None:
        self.snapshots.append((self.num_partitions, units.cover(self.committed, self.coverage())))

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def publish_what_was_seen_then(self, data: st.DataObject) -> None:
        number, seen = self.snapshots.pop(data.draw(st.integers(0, len(self.snapshots) - 1)))
        if seen and number == self.num_partitions:  # else plan.json of that number is there already
            self.num_partitions += 1
            self.published += seen

    @precondition(lambda self: self.published)
    @rule()
    def drop_published_units(self) -> None:
        self.committed -= set(self.published)

    def teardown(self) -> None:
        if not hasattr(self, "committed"):
            return
        while True:
            self.plan_what_is_not_done(unit_rows=5)
            if not units.missing(0, NUM_ROWS, self.coverage().get((SHARD.key, 0), [])):
                break
            self.committed.update(self.in_flight)
            self.in_flight = []
            seen = units.cover(self.committed, self.coverage())
            assert seen, "rows are missing and nothing more would ever be published"
            self.published += seen
        times = Counter(_rows(self.published))
        assert times == Counter((SHARD.key, 0, row) for row in range(NUM_ROWS))


ConcurrentJobs.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestConcurrentJobs = ConcurrentJobs.TestCase


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.lists(_ranges()), st.integers(1, 12))
def test_planned_units_never_cross_a_row_group(groups: list[int], done: list[tuple[int, int]], unit_rows: int) -> None:
    shard = Shard(Listed("prompts.parquet", 1, "1"), KEYS[0], tuple(groups))
    planned = cut_shard(shard, [(0, shard.num_rows)], {(shard.key, 0): units.merged(done)}, unit_rows, [])
    group_of = [group for group, rows in enumerate(groups) for _ in range(rows)]
    assert all(group_of[unit.start] == group_of[unit.stop - 1] for unit in planned)
