"""Checkpoints on a disk and on an object store: whole, the last ones kept, never written over."""

import json

import pytest
import torch

from pipelines.corpus.storage import Storage
from pipelines.training import checkpoints
from pipelines.training.checkpoints import Checkpoint


def checkpoint(step: int, value: float = 0.0) -> Checkpoint:
    state = {"weights": {"a": torch.full((3,), value)}, "optimizer": {"a": {"step": torch.tensor(float(step))}}}
    return Checkpoint(step, [{"step": at, "loss": 1 / (at + 1)} for at in range(step)], state)


def test_the_last_one_is_read_and_the_last_two_are_kept(output: Storage) -> None:
    assert checkpoints.latest(output) is None and checkpoints.last_step(output) == 0
    for step in (9, 10, 100):
        checkpoints.save(output, checkpoint(step, step))
    found = checkpoints.latest(output)
    assert found is not None and found.step == checkpoints.last_step(output) == 100
    assert found.history == checkpoint(100).history
    assert torch.equal(found.state["weights"]["a"], torch.full((3,), 100.0))
    assert torch.equal(found.state["optimizer"]["a"]["step"], torch.tensor(100.0))
    assert list(output.sizes("checkpoints")) == ["step-00000010.pt", "step-00000100.pt"]
    assert [json.loads(line) for line in output.read("metrics.jsonl").splitlines()] == found.history
    assert checkpoints.metrics(output) == found.history


def test_one_that_is_there_is_not_written_over(local_output: Storage) -> None:
    checkpoints.save(local_output, checkpoint(5, 1.0))
    checkpoints.save(local_output, checkpoint(5, 2.0))
    found = checkpoints.latest(local_output)
    assert found is not None and torch.equal(found.state["weights"]["a"], torch.ones(3))


def test_what_a_killed_writer_leaves_is_no_checkpoint(local_output: Storage) -> None:
    checkpoints.save(local_output, checkpoint(5))
    local_output.create_file("checkpoints/step-00000006.pt.part", lambda path: path.write_bytes(b"half"))
    found = checkpoints.latest(local_output)
    assert found is not None and found.step == 5


def test_one_that_is_deleted_while_it_is_looked_for_gives_way_to_the_next(
    local_output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(local_output, checkpoint(5))
    names = [["step-00000004.pt"], ["step-00000005.pt"]]
    monkeypatch.setattr(checkpoints, "_names", lambda output: names.pop(0))
    found = checkpoints.latest(local_output)
    assert found is not None and found.step == 5
