"""A sample of the campaign of random kills and faults; `tests/faults/campaign.py` is the whole of it."""

import random
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.faults import campaign as campaign_module
from tests.faults.campaign import Outcome, Round, campaign
from tests.s3_server import S3Server


@pytest.mark.long
@pytest.mark.parametrize(("num_kills", "num_shards"), [(2, 1), (60, 4)])
def test_kills_and_faults_at_random_change_no_row(
    s3_server: S3Server, tmp_path: Path, num_kills: int, num_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    outcome = campaign(
        s3_server, tmp_path, num_kills=num_kills, kills_a_round=12, num_shards=num_shards, seed=7, say=print
    )
    assert not outcome.failures, outcome.failures[0]
    assert outcome.kills.total() >= num_kills


def test_a_kill_counts_only_where_something_died_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleeping() -> Any:
        return SimpleNamespace(process=subprocess.Popen(["sleep", "60"]))

    outcome, ended = Outcome(), sleeping()
    ended.process.kill()
    ended.process.wait()
    this = Round([], None, None, S3Server(tmp_path), None, random.Random(0), outcome, 5)  # type: ignore[arg-type]
    assert not this._kill(ended, "driver")
    assert not this._kill(ended, "policy actor")  # there is none
    worker = psutil.Popen(["sleep", "60"])
    monkeypatch.setattr(campaign_module, "_workers", lambda title: [worker])
    assert this._kill(ended, "policy actor")
    assert not this._kill(ended, "policy actor")  # it is found, but died before
    worker.wait()
    assert this._kill(sleeping(), "driver")
    assert not S3Server(tmp_path).kill()
    assert (outcome.kills, this.kills) == ({"policy actor": 1, "driver": 1}, 3)
