"""The board's totals, through the lives of a replica."""

import time
from dataclasses import replace

from actors.board import Board, Snapshot


def test_what_a_replica_counted_before_it_was_started_again_still_counts() -> None:
    board = Board()
    first, second = Snapshot(life="1", state="running"), Snapshot(life="2", state="running")
    board.report("policy", "a", replace(first, num_rows=10, num_failed=1, num_tokens=500, num_running=3))
    board.report("policy", "a", Snapshot(life="2"))
    board.report("policy", "a", replace(second, num_rows=4, num_tokens=100, num_running=2))
    board.report("policy", "b", Snapshot(num_rows=1))
    (a, _), (b, _) = board.read()["policy"]
    assert (a.num_rows, a.num_failed, a.num_tokens, a.num_running) == (14, 1, 600, 2)
    assert b.num_rows == 1


def test_a_count_that_falls_within_a_life_is_not_added_up() -> None:
    board = Board()
    for num_rows in (256, 512, 256, 768, 512, 1024):  # two threads report: one may be late
        board.report("policy", "a", Snapshot(life="1", num_rows=num_rows))
    ((total, _),) = board.read()["policy"]
    assert total.num_rows == 1024


def test_a_report_that_says_nothing_new_is_no_progress() -> None:
    board = Board()
    board.report("policy", "a", Snapshot(num_rows=1))
    time.sleep(0.05)
    board.report("policy", "a", Snapshot(num_rows=1))
    ((_, idle_s),) = board.read()["policy"]
    assert idle_s >= 0.05
    board.report("policy", "a", Snapshot(num_rows=2))
    ((_, moved_s),) = board.read()["policy"]
    assert moved_s < idle_s


def test_what_was_in_flight_on_a_replica_is_known_until_it_reports_anew() -> None:
    board = Board()
    assert board.units_of("policy", "a") == ()
    board.report("policy", "a", Snapshot(units=("u1", "u2")))
    assert board.units_of("policy", "a") == ("u1", "u2")
    assert board.units_of("aligner", "a") == board.units_of("policy", "b") == ()
