"""What a training leaves: checkpoints and a model, each file created if absent, so that whatever is killed leaves
whole ones only."""

import io
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from actors.contract import ConfigError
from pipelines.corpus.storage import Storage

FOLDER = "checkpoints"
METRICS = "metrics.jsonl"
KEPT = 2
"""Processes may be reading one while what is left of the job before them writes the next."""

Record = Mapping[str, float]
"""What is told of a step or an evaluation; `step` counts the steps done."""


@dataclass(frozen=True)
class Checkpoint:
    """A training after `step` steps: its trainer's state, and all that was told of it until then."""

    step: int
    history: Sequence[Record]
    state: dict[str, Any]


def save(output: Storage, checkpoint: Checkpoint) -> None:
    """Create the checkpoint, and then delete all but the last ones before it.

    One that is there already is left: a training comes to the same state however often it is interrupted.
    """

    def write(path: Path) -> None:
        with path.open("wb") as file:  # of a full disk torch's own writer would tell no cause
            torch.save({"step": checkpoint.step, "history": checkpoint.history, "state": checkpoint.state}, file)

    output.create_file(_path(checkpoint.step), write)
    tell(output, checkpoint.history)
    output.delete([f"{FOLDER}/{name}" for name in _names(output)[:-KEPT]])


def tell(output: Storage, history: Sequence[Record]) -> None:
    """Write for people and plots what was told until a checkpoint."""
    output.put(METRICS, "".join(f"{json.dumps(record)}\n" for record in history).encode())


def load(output: Storage, step: int) -> Checkpoint:
    """The checkpoint of so many steps. Raises ConfigError where it is not there."""
    try:
        data = output.read(_path(step))
    except FileNotFoundError:
        raise ConfigError(
            f"{output.url} does not hold the checkpoint of step {step} here: every process must see the same "
            "output.root"
        ) from None
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return Checkpoint(found["step"], found["history"], found["state"])


def last_step(output: Storage) -> int:
    """Steps that the last checkpoint holds; 0 where there is none."""
    names = _names(output)
    return int(names[-1].removeprefix("step-").removesuffix(".pt")) if names else 0


def metrics(output: Storage) -> list[Record]:
    """All that was told until the last checkpoint; [] before the first."""
    try:
        return [json.loads(line) for line in output.read(METRICS).splitlines()]
    except FileNotFoundError:
        return []


def publish(output: Storage, folder: Path, last: Collection[str]) -> None:
    """Create the folder's files in the output root, those named `last` behind all others.

    Raises ConfigError where the root holds another file of the same name: nothing of anybody's is replaced.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name in last, path.name)):
        name = str(path.relative_to(folder))
        if not output.create_file(name, partial(shutil.copyfile, path)) and output.read(name) != path.read_bytes():
            raise ConfigError(f"{output.url}/{name} is there already, and it is none of this training's: move it")


def _path(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}.pt"


def _names(output: Storage) -> list[str]:
    return [name for name in output.sizes(FOLDER) if name.startswith("step-") and name.endswith(".pt")]
