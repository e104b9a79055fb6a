"""Notes on units that may kill engines: kept while they are needed, and never what a job fails for."""

import logging
import pickle
from typing import Any

import pytest

from actors.contract import ConfigError, TransientError
from pipelines.corpus.attempts import Attempts
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit
from tests.pipelines.corpus.fabricate import commit_unit, fake_shard

SHARD = fake_shard(row_groups=(12,))
FIRST, SECOND = (Unit(SHARD.key, start, start + 4).name for start in (0, 4))


def test_what_any_job_has_noted_the_next_one_finds_with_one_look(output: Storage) -> None:
    notes = pickle.loads(pickle.dumps(Attempts(output)))  # as in an actor
    notes.write(FIRST, "policy", {"n": 1})
    notes.write(FIRST, "aligner", {"n": 2})
    notes.write(FIRST, "policy", {"n": 3})
    notes.write(SECOND, "policy", {"n": 4})
    notes.forget(SECOND, "policy")
    assert sorted(output.sizes("attempts")) == [f"{FIRST}.json"]

    found = Attempts.of_job(output)
    assert (found.found(FIRST, "policy"), found.found(FIRST, "aligner")) == ({"n": 3}, {"n": 2})
    assert found.found(SECOND, "policy") is None
    notes.forget(FIRST, "policy")
    assert (found.read(FIRST, "policy"), found.read(FIRST, "aligner")) == (None, {"n": 2})
    assert found.found(FIRST, "policy") == {"n": 3}, "as it was when the job began"


def test_notes_go_when_their_units_are_done(local_output: Storage) -> None:
    notes = Attempts(local_output)
    for name in (FIRST, SECOND, "somebody's own"):
        notes.write(name, "policy", {})
    commit_unit(local_output, SHARD, Unit.named(FIRST))
    notes.forget_done()
    assert sorted(local_output.sizes("attempts")) == [f"{SECOND}.json", "somebody's own.json"]


@pytest.mark.parametrize("error", [TransientError("the store is out"), ConfigError("the store refuses")], ids=repr)
def test_a_store_that_is_away_loses_notes_and_nothing_else(
    local_output: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def away(*args: Any) -> Any:
        raise error

    notes = Attempts(local_output)
    notes.write(FIRST, "policy", {"n": 1})
    for name in ("read", "put", "delete", "sizes"):
        monkeypatch.setattr(Storage, name, away)
    with caplog.at_level(logging.WARNING):
        notes.write(FIRST, "policy", {"n": 2})
        notes.forget(FIRST, "policy")
        notes.forget_done()
        assert notes.read(FIRST, "policy") is None
        assert Attempts.of_job(local_output).found(FIRST, "policy") is None
    assert all("a note on a unit that may kill engines is lost: the store" in text for text in caplog.messages)
    monkeypatch.undo()
    assert notes.read(FIRST, "policy") == {"n": 1}


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"'])
def test_a_note_that_is_none_is_as_good_as_none(local_output: Storage, data: bytes) -> None:
    local_output.put(f"attempts/{FIRST}.json", data)
    assert Attempts(local_output).read(FIRST, "policy") is None
    assert Attempts.of_job(local_output).at_start == {}
