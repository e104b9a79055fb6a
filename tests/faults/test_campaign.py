"""A sample of the campaign of random kills and faults; `tests/faults/campaign.py` is the whole of it."""

from pathlib import Path

import pytest

from tests.faults.campaign import campaign
from tests.s3_server import S3Server


@pytest.mark.parametrize(("num_kills", "num_shards"), [(4, 2), pytest.param(60, 4, marks=pytest.mark.long)])
def test_kills_and_faults_at_random_change_no_row(
    s3_server: S3Server, tmp_path: Path, num_kills: int, num_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    outcome = campaign(
        s3_server, tmp_path, num_kills=num_kills, kills_a_round=12, num_shards=num_shards, seed=7, say=print
    )
    assert not outcome.failures, outcome.failures[0]
    assert outcome.kills.total() >= num_kills
