"""Checkpoints on a disk and on an object store: whole, the last ones kept, never written over."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.contract import ConfigError, TransientError
from pipelines.corpus.storage import Storage
from pipelines.training import checkpoints
from pipelines.training.checkpoints import Checkpoint


def checkpoint(step: int, value: float = 0.0) -> Checkpoint:
    state = {"weights": {"a": torch.full((3,), value)}, "optimizer": {"a": {"step": torch.tensor(float(step))}}}
    return Checkpoint(step, [{"step": at, "loss": 1 / (at + 1)} for at in range(step)], state)


def test_the_last_one_is_read_and_the_last_two_are_kept(output: Storage) -> None:
    assert checkpoints.last_step(output) == 0
    for step in (9, 10, 100):
        checkpoints.save(output, checkpoint(step, step))
    found = checkpoints.load(output, checkpoints.last_step(output))
    assert found.step == 100
    assert found.history == checkpoint(100).history
    assert torch.equal(found.state["weights"]["a"], torch.full((3,), 100.0))
    assert torch.equal(found.state["optimizer"]["a"]["step"], torch.tensor(100.0))
    assert list(output.sizes("checkpoints")) == ["step-00000010.pt", "step-00000100.pt"]
    assert [json.loads(line) for line in output.read("metrics.jsonl").splitlines()] == found.history
    assert checkpoints.metrics(output) == found.history


def test_one_that_is_there_is_not_written_over(local_output: Storage) -> None:
    checkpoints.save(local_output, checkpoint(5, 1.0))
    checkpoints.save(local_output, checkpoint(5, 2.0))
    found = checkpoints.load(local_output, 5)
    assert torch.equal(found.state["weights"]["a"], torch.ones(3))


def test_what_a_killed_writer_leaves_is_no_checkpoint(local_output: Storage) -> None:
    checkpoints.save(local_output, checkpoint(5))

    def killed(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local_output.create_file("checkpoints/step-00000006.pt", killed)
    assert checkpoints.last_step(local_output) == 5


def test_one_that_is_not_there_is_told(local_output: Storage) -> None:
    """As on another node, where the output root is another folder."""
    checkpoints.save(local_output, checkpoint(5))
    with pytest.raises(
        ConfigError, match=r"the checkpoint of step 6 here: every process must see the same output\.root"
    ):
        checkpoints.load(local_output, 6)


def test_a_checkpoint_runs_no_code(local_output: Storage, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "made"),))

    checkpoints.save(local_output, Checkpoint(5, [], {"weights": Evil()}))
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.load(local_output, 5)
    assert not (tmp_path / "made").exists()


def test_a_full_disk_is_an_outage_of_the_root(local_output: Storage) -> None:
    """What writes says so, as files do: torch's own writer tells no cause."""

    def full(path: Path) -> Path:
        path.symlink_to("/dev/full")
        return path

    create_file = Storage.create_file

    def created(self: Storage, path: str, write: Callable[[Path], None]) -> bool:
        return create_file(self, path, lambda scratch: write(full(scratch)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "create_file", created)
        with pytest.raises((TransientError, OSError), match="No space left on device"):
            checkpoints.save(local_output, checkpoint(5))
