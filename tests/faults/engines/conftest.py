"""A Ray head whose torch engines are deadly ones, and the command line that joins it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import RayHead, new_folder, start_head
from tests.end_to_end.jobs import CommandLine

__all__ = ["new_folder"]
DEADLY = Path(__file__).parent / "deadly"


@pytest.fixture(scope="session")
def deadly_head() -> Iterator[RayHead]:
    with start_head(["--num-cpus=16"], {"PYTHONPATH": str(DEADLY)}) as head:
        yield head


@pytest.fixture(scope="session")
def command_line(deadly_head: RayHead, new_folder: Callable[[], Path]) -> Iterator[CommandLine]:
    with CommandLine(deadly_head.environment, deadly_head.raylet, new_folder) as jobs:
        yield jobs


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a model's; the deadly engine keeps its diary there."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder
