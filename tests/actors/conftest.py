"""Tiny models, built once per session, and the loop run on them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.engines.base import EngineConfig
from actors.engines.prompts import load_tokenizer
from actors.engines.torch_model import load_model
from tests import tiny_models

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_models.build_tiny_llama,
    "tied": tiny_models.build_tiny_tied_llama,
    "gemma2": tiny_models.build_tiny_gemma2,
    "qwen2": tiny_models.build_tiny_qwen2,
    "mistral": tiny_models.build_tiny_mistral,
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model: llama, tied (a llama too), gemma2, qwen2 or mistral."""
    built: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in built:
            built[kind] = BUILDERS[kind](tmp_path_factory.mktemp(kind))
        return built[kind]

    return folder


@pytest.fixture(scope="session")
def llama_folder(model_folder: Callable[[str], Path]) -> Path:
    return tiny_models.assert_answers_differ(model_folder("llama"))


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> PreTrainedModel:
    torch.set_num_threads(1)  # tiny matrices: a second thread only costs
    return load_model(EngineConfig(model=str(llama_folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def tokenizer(llama_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(llama_folder))
