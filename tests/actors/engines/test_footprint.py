"""What a model takes, reckoned from its headers, against models and caches that are really there."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconMambaConfig,
    Gemma3Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3NextConfig,
)

from actors.engines.base import EngineConfig, Request
from actors.engines.footprint import Footprint, footprint
from actors.engines.torch_engine import TorchEngine, load_model

DTYPES = {"float32": "F32", "bfloat16": "BF16", "uint8": "U8"}
KINDS = ["llama", "gemma2", "qwen2", "mistral"]


def write_headers(folder: Path, config: PreTrainedConfig, name: str = "model.safetensors") -> Path:
    """A model's folder with every header that it would have, and no weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and model.config.get_text_config().tie_word_embeddings:
            continue
        size = tensor.numel() * tensor.element_size()
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text)
    model.config.save_pretrained(folder)
    return folder


def of(folder: Path, **values: Any) -> Footprint:
    found = footprint(EngineConfig(model=str(folder), **values))
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_loaded_model(kind: str, dtype: Any, model_folder: Callable[[str], Path]) -> None:
    config = EngineConfig(model=str(model_folder(kind)), dtype=dtype, device="cpu")
    loaded = sum(each.numel() * each.element_size() for each in load_model(config).parameters())
    assert of(model_folder(kind), dtype=dtype).weight_bytes == loaded


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_takes_what_the_torch_engine_allocates(kind: str, model_folder: Callable[[str], Path]) -> None:
    config = EngineConfig(
        model=str(model_folder(kind)), dtype="float32", device="cpu", max_num_seqs=3, max_tokens=448, stop=["\n", " "]
    )
    engine = TorchEngine(config, num_threads=1)
    try:
        asyncio.run(engine.generate(Request((("user", "How?"),), seed=0)))
        cache = engine._loop.forward.cache
    finally:
        engine.close()
    allocated = sum(each.numel() * each.element_size() for each in (*cache.keys, *cache.values))
    found = of(Path(config.model), dtype="float32", max_num_seqs=3)
    assert found.token_bytes is not None
    assert found.token_bytes * cache.slots * cache.capacity == allocated
    assert found.cache_tokens(config) == 3 * 512 == cache.slots * cache.capacity


def test_the_cache_is_bounded_and_always_holds_one_sequence(llama_folder: Path) -> None:
    found = of(llama_folder)
    tokens = [
        found.cache_tokens(EngineConfig(model="m", max_num_seqs=8, kv_cache_tokens=bound))
        for bound in (100, 1000, 10_000)
    ]
    assert tokens == [512, 1000, 8 * 512]


def test_a_published_model_has_its_published_size(tmp_path: Path) -> None:
    """Llama 3.1 8B: 8,030,261,248 parameters, and 128 KiB of KV cache per token in bfloat16."""
    llama = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )
    folder = write_headers(tmp_path / "llama", llama)
    assert of(folder) == Footprint(2 * 8_030_261_248, 128 * 1024, 131072)
    assert of(folder, max_model_len=4096).max_len == 4096
    norms = (2 * 32 + 1) * 4096
    for ranks, heads in [(2, 4), (8, 1), (16, 1)]:  # beyond 8 ranks, two of them hold the same head
        each = of(folder, engine="vllm", tensor_parallel_size=ranks)
        assert each.weight_bytes == 2 * (norms + (8_030_261_248 - norms) // ranks)
        assert each.token_bytes == heads * 2 * 32 * 128 * 2


@pytest.mark.parametrize(
    "config",
    [
        Phi3Config(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0),
        Gemma3Config(
            text_config={"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16,
                         "num_key_value_heads": 2},
            vision_config={"num_hidden_layers": 2},
        ),
    ],
    ids=["fused", "beside-a-vision-tower"],
)  # fmt: skip
def test_heads_are_found_where_they_have_other_names_or_company(config: PreTrainedConfig, tmp_path: Path) -> None:
    assert of(write_headers(tmp_path / "model", config)).token_bytes == 2 * 3 * 2 * 16 * 2


@pytest.mark.parametrize(
    "config",
    [
        DeepseekV3Config(
            num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8,
            kv_lora_rank=16, q_lora_rank=16, first_k_dense_replace=1,
        ),
        Qwen3NextConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=4, num_experts=4),
        FalconMambaConfig(num_hidden_layers=2, hidden_size=64),
    ],
    ids=["latent-attention", "hybrid", "state-space"],
)  # fmt: skip
def test_another_kind_of_memory_has_no_size_rather_than_a_wrong_one(config: PreTrainedConfig, tmp_path: Path) -> None:
    found = of(write_headers(tmp_path / "model", config))
    assert found.weight_bytes > 0
    assert found.token_bytes is None


def test_weights_that_lie_there_twice_count_once(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"any": "model.safetensors"}}))
    assert of(folder) == of(llama_folder)
    (folder / "model.safetensors").unlink()
    assert footprint(EngineConfig(model=str(folder))) is None


def test_quantized_weights_stay_as_they_are(tmp_path: Path) -> None:
    text = json.dumps({"a.qweight": {"dtype": "U8", "shape": [3, 5], "data_offsets": [0, 15]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    LlamaConfig().save_pretrained(tmp_path)
    assert of(tmp_path, dtype="float32") == Footprint(15, None, 2048)


def test_a_hub_id_is_looked_up_in_the_cache_and_never_fetched(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    config = EngineConfig(model="owner/name", revision="0" * 40)
    assert footprint(config) is None
    shutil.copytree(llama_folder, tmp_path / "models--owner--name" / "snapshots" / ("0" * 40))
    assert footprint(config) == of(llama_folder)


def test_without_a_model_there_is_nothing_to_take() -> None:
    assert footprint(EngineConfig(model="gpt", engine="openai")) is None
    assert footprint(EngineConfig(model="label", engine="stored")) is None


def test_a_length_that_vllm_makes_by_itself_is_not_known(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    small = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
    folder = write_headers(tmp_path / "model", LlamaConfig(**small, rope_parameters=rope))
    assert of(folder, engine="vllm").max_len is None
    assert of(folder, engine="vllm", max_model_len=100).max_len == 100
    assert of(folder).max_len == 256
