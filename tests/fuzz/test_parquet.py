"""Mutated shards are refused or quarantined: no crash, no hang, no row lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mutated_parquet.py")
BATCH = 1000


@pytest.mark.parametrize("num_mutations", [300, pytest.param(12_000, marks=pytest.mark.long)])
def test_a_mutated_shard_is_refused_or_its_rows_come_out_well_or_quarantined(num_mutations: int) -> None:
    ends: dict[str, int] = {}
    for first in range(0, num_mutations, BATCH):
        count = min(BATCH, num_mutations - first)
        child = subprocess.run([sys.executable, SCRIPT, str(first), str(count)], capture_output=True, text=True)
        last = child.stdout.splitlines()[-2:]
        assert child.returncode == 0, f"exit code {child.returncode}, {last}\n{child.stderr[-3000:]}"
        for how, number in json.loads(last[-1]).items():
            ends[how] = ends.get(how, 0) + number
    assert sum(ends.values()) == num_mutations
    assert all(ends[how] > num_mutations / 50 for how in ("refused", "quarantined", "well")), ends
