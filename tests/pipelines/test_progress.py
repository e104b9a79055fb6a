"""Progress lines, totals of a pool, and the watchdog's diagnosis."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import progress
from pipelines.progress import STALLED, PoolTotals, Tally, _lines, shown
from pipelines.report import print_throughput

ROOT = Path(__file__).resolve().parents[2]


def totals(num_rows: int, num_tokens: int) -> dict[str, PoolTotals]:
    return {"policy": PoolTotals(num_rows, 2, num_tokens, 5, 1, ("u1",), ("running",), 3.0)}


def test_a_line_a_pool_and_one_for_what_is_committed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 10.0, 15.0, 20.0, 25.0])
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: next(now))
    show = _lines(["policy", "aligner"], 100, every_s=10)
    tally = Tally(num_units=1, num_rows=20, num_quarantined=3)
    show(totals(40, 1000), tally)
    show(totals(50, 1100), tally)
    show(totals(60, 3000), tally)
    show(totals(100, 5000), replace(tally, num_rows=100), ended=True)  # at once, with the rates of the whole job
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "policy: 40/100 rows, 4.0 rows/s, 100 tokens/s, 5 in flight, 2 failed, ETA 0:00:15",
        "aligner: starting",
        "committed: 20/100 rows, 3 quarantined, ETA 0:00:40",
        "policy: 60/100 rows, 2.0 rows/s, 200 tokens/s, 5 in flight, 2 failed, ETA 0:00:13",
        "aligner: starting",
        "committed: 20/100 rows, 3 quarantined, ETA 0:01:20",
        "policy: 100/100 rows, 4.0 rows/s, 200 tokens/s, 5 in flight, 2 failed, ETA 0:00:00",
        "aligner: starting",
        "committed: 100/100 rows, 3 quarantined, ETA 0:00:00",
    ]


def test_on_a_terminal_a_bar_a_pool_and_one_for_what_is_committed_reach_the_total(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 160))
    screen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(ours, 4096):
                screen.extend(data)

    tally = Tally()

    def read_board(board: Any) -> dict[str, PoolTotals]:
        seen = totals(tally.num_rows, 10 * tally.num_rows)["policy"]
        return {"policy": seen, "aligner": seen}

    monkeypatch.setattr(progress, "read_board", read_board)
    monkeypatch.setattr(progress, "POLL_S", 0.05)
    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with shown(None, tally, {"policy": "", "aligner": ""}, 36, log_every_s=0, stall_s=60):
            tally.num_rows, tally.num_quarantined = 12, 1
            time.sleep(0.5)
            tally.num_rows, tally.num_quarantined = 36, 3  # the end, between two polls
    reader.join()
    os.close(ours)
    for name, told in (("policy", "5 in flight, 2 failed"), ("aligner", "5 in flight, 2 failed"), ("committed", "3 q")):
        states = re.findall(rf"{name} *: +([0-9]+)%\|.*?\| ([0-9]+)/36 \[.*?, ([^\]]*)\]", screen.decode())
        counts = [(percent, rows) for percent, rows, _ in states]
        assert ("33", "12") in counts
        assert counts[-1] == ("100", "36"), name
        assert told in states[-1][2]


def test_a_pool_whose_engines_are_not_up_yet_is_starting(capsys: pytest.CaptureFixture[str]) -> None:
    show = _lines(["policy"], 100, every_s=0)
    show({"policy": PoolTotals(0, 0, 0, 0, 0, (), ("starting", "starting"), 3.0)}, Tally())
    show({"policy": PoolTotals(0, 0, 0, 0, 0, (), ("starting", "running"), 3.0)}, Tally())
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("policy")]
    assert told == [
        "policy: starting",
        "policy: 0/100 rows, 0.0 rows/s, 0 tokens/s, 0 in flight, 0 failed, ETA unknown",
    ]


def report(**counts: Any) -> dict[str, Any]:
    """A row of the committer's."""
    none = {"rows": 4, "quarantined": 0, "candidates": 4, "changed": 3, "iterations": [], "tokens": 0, "accepted": 0}
    return {**none, **counts}


def test_at_the_end_it_is_told_how_far_a_forward_pass_came(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    tally.add(report(iterations=[2, 2, 8], tokens=30, accepted=20))
    tally.add(report(iterations=[1, 9, 16, 17, 65], tokens=150, accepted=95))
    print_throughput({}, tally, seconds=2.0, startup_s=0.5, is_aligning=True)
    assert capsys.readouterr().out.splitlines() == [
        "made: 2 units, 8 rows in 2.0 s (0.5 s of them start-up); 75.0% of answers changed",
        "aligner: 1.50 tokens per forward pass and answer, 63.9% of them accepted guesses",
        "aligner: answers by forward passes: 1 in 1, 2 in 2, 1 in 8, 2 in 9-16, 1 in 17-32, 1 in 65-128",
    ]


def test_where_one_token_is_made_at_a_time_nothing_is_told_of_passes(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    tally.add(report())
    print_throughput({}, tally, seconds=2.0, is_aligning=True)
    assert capsys.readouterr().out == "made: 1 unit, 4 rows in 2.0 s; 75.0% of answers changed\n"


def test_where_nothing_is_aligned_and_no_token_counted_neither_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    tally.add(report(iterations=[2], tokens=6, accepted=4))  # as the corpus that is scored has it
    rules = {"reward": totals(4, 0)["policy"]}
    print_throughput(rules, tally, seconds=6.0, startup_s=4.0, is_aligning=False)
    assert capsys.readouterr().out == "reward: 2.00 rows/s\nmade: 1 unit, 4 rows in 6.0 s (4.0 s of them start-up)\n"
    _lines(["reward"], 4, 30.0)(rules, tally, ended=True)
    line, _ = capsys.readouterr().err.splitlines()
    assert "tokens" not in line and "rows/s, 5 in flight" in line


def test_a_stall_ends_the_process_with_a_diagnosis() -> None:
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.pipelines.test_progress import totals, Tally\n"
        "from pipelines.progress import _diagnosis, _give_up\n"
        "asks = {'policy': '2 x 1 CPUs', 'aligner': '1 x 8 GPUs and 1 CPUs'}\n"
        "_give_up(120.0, _diagnosis(totals(4, 5), asks, Tally(num_units=7)))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == STALLED
    assert "nothing has moved for 2.0 minutes" in ended.stderr
    assert "policy: engines running; last progress 3 s ago; 5 candidates running, 1 waiting; units in flight: u1" in (
        ended.stderr
    )
    assert "aligner: no replica has started (asked for 1 x 8 GPUs and 1 CPUs)" in ended.stderr
    assert "7 units were committed" in ended.stderr
