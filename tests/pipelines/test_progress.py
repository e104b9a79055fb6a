"""Progress lines, totals of a pool, and the watchdog's diagnosis."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.progress import STALLED, PoolTotals, Tally, _lines

ROOT = Path(__file__).resolve().parents[2]


def totals(num_rows: int, num_tokens: int) -> dict[str, PoolTotals]:
    return {"policy": PoolTotals(num_rows, 2, num_tokens, 5, 1, ("u1",), ("running",), 3.0)}


def test_a_line_a_pool_and_one_for_what_is_committed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 10.0, 15.0, 20.0])
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: next(now))
    show = _lines(["policy", "aligner"], 100, every_s=10)
    tally = Tally(num_units=1, num_rows=20, num_quarantined=3)
    show(totals(40, 1000), tally)
    show(totals(50, 1100), tally)
    show(totals(60, 3000), tally)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "policy: 40/100 rows, 4.0 rows/s, 100 tokens/s, 5 in flight, 2 failed, ETA 0:00:15",
        "aligner: starting",
        "committed: 20/100 rows, 3 quarantined, ETA 0:00:40",
        "policy: 60/100 rows, 2.0 rows/s, 200 tokens/s, 5 in flight, 2 failed, ETA 0:00:13",
        "aligner: starting",
        "committed: 20/100 rows, 3 quarantined, ETA 0:01:20",
    ]


def test_a_stall_ends_the_process_with_a_diagnosis() -> None:
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.pipelines.test_progress import totals, Tally\n"
        "from pipelines.progress import _give_up\n"
        "asks = {'policy': '2 x 1 CPUs', 'aligner': '1 x 8 GPUs and 1 CPUs'}\n"
        "_give_up(totals(4, 5), asks, Tally(num_units=7), 120.0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == STALLED
    assert "nothing has moved for 2.0 minutes" in ended.stderr
    assert "policy: engines running; last progress 3 s ago; 5 candidates running, 1 waiting; units in flight: u1" in (
        ended.stderr
    )
    assert "aligner: no replica has started (asked for 1 x 8 GPUs and 1 CPUs)" in ended.stderr
    assert "7 units were committed" in ended.stderr
