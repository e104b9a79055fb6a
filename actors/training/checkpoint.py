"""What a training run leaves on disk: checkpoints, its curve and the finished model, each whole or not there at all."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replace the checkpoint: whoever is killed here leaves the one before.

    Args:
        state: tensors, numbers, texts, and lists and dicts of them: what `load_checkpoint` takes without running code.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync(path.parent)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The last state that was saved, its tensors on the CPU; None where none was."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def open_curve(path: Path, known: Sequence[Mapping[str, Any]]) -> TextIO:
    """A file of JSON lines, one a step, that holds `known`, the steps of the checkpoint, and is open for more.

    Lines of steps that a killed run took after its last checkpoint are gone: those steps are taken again. Lines are
    for people and plots; a run goes on from its checkpoint alone.
    """
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(f"{json.dumps(each)}\n" for each in known), encoding="utf-8")
    os.replace(part, path)
    return path.open("a", encoding="utf-8", buffering=1)


def publish_model(folder: Path, scratch: Path, write: Callable[[Path], None]) -> None:
    """Put a finished Hugging Face model into `folder`, `config.json` last: without that the folder is no model yet.

    Args:
        scratch: a folder on the same file system, for `write` to fill; what is in it is deleted.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    write(scratch)
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        else:
            _sync(path)
        os.replace(path, folder / path.name)
    _sync(folder)
    scratch.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
