"""Which model it is: what is noticed when a folder's contents change, and what is refused."""

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from actors.contract import ConfigError
from actors.engines.base import EngineConfig
from actors.engines.identity import identity, pinned


@pytest.fixture
def model(llama_folder: Path, tmp_path: Path) -> EngineConfig:
    return EngineConfig(model=str(shutil.copytree(llama_folder, tmp_path / "model")))


def test_a_folder_keeps_its_identity_while_nothing_in_it_changes(model: EngineConfig) -> None:
    assert identity(pinned(model, "policy")) == identity(pinned(model, "policy"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_another_file_in_the_same_folder_is_another_model(model: EngineConfig, name: str) -> None:
    before = identity(pinned(model, "policy"))
    path = Path(model.model) / name
    if name == "model.safetensors":  # retrained: the same names and shapes, other numbers
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        path.write_text(path.read_text() + "\n")
    assert identity(pinned(model, "policy")) != before


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "holds no config.json"), ("model.safetensors", "holds no \\*.safetensors")],
)
def test_a_folder_without_a_model_is_refused(model: EngineConfig, missing: str, message: str) -> None:
    (Path(model.model) / missing).unlink()
    with pytest.raises(ConfigError, match=f"policy.model: .* {message}"):
        pinned(model, "policy")


def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"there is no folder \./model, and it is not a hub id"):
        pinned(EngineConfig(model="./model"), "policy")


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise HTTPError("[Errno -2] Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    with pytest.raises(ConfigError, match=r"no/such is neither a folder nor to be had from a hub .*Errno -2"):
        pinned(EngineConfig(model="no/such"), "policy")
