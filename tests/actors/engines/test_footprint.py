"""What a model takes, reckoned from its headers, against models and caches that are really there."""

import asyncio
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import hf_hub_download
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
from actors.engines.footprint import Footprint, _headers_at_hub, footprint
from actors.engines.identity import safetensors_header
from actors.engines.torch_engine import TorchEngine, load_model

COMMIT = "0" * 40
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


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub for the files in `folder`. Notes every answer's path and number of bytes."""

    protocol_version = "HTTP/1.1"
    folder: Path
    sent: list[tuple[str, int]]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        prefix, _, name = self.path.partition(f"/resolve/{COMMIT}/")
        path = self.folder / name
        found = prefix == "/owner/name" and path.is_file()
        data = path.read_bytes() if found else b""
        asked = re.match(r"bytes=(\d+)-(\d+)$", self.headers.get("Range", ""))
        part = data[int(asked[1]) : int(asked[2]) + 1] if asked else data
        self.send_response((206 if asked else 200) if found else 404)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound" if prefix == "/owner/name" else "RepoNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(part)
            self.sent.append((name, len(part)))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on loopback, without files as yet, and an empty cache."""

    class ThisHub(Hub):
        folder, sent = tmp_path / "hub", []

    _headers_at_hub.cache_clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), ThisHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield ThisHub
        server.shutdown()
    _headers_at_hub.cache_clear()


def split_in_two(folder: Path) -> None:
    """The model's one file of headers as two, with their index."""
    whole = folder / "model.safetensors"
    tensors = json.loads(safetensors_header(whole))
    names = sorted(tensors.keys() - {"__metadata__"})
    weight_map = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        text = json.dumps({name: tensors[name] for name in names if weight_map[name] == file}).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole.unlink()


@pytest.mark.parametrize("num_files", [1, 2])
def test_a_hub_tells_what_a_model_takes_and_sends_no_weights(hub: type[Hub], num_files: int) -> None:
    folder = write_headers(hub.folder, LlamaConfig(num_hidden_layers=8, vocab_size=1024))
    expected = of(folder, tensor_parallel_size=2)
    if num_files == 2:
        split_in_two(folder)
    for path in folder.glob("*.safetensors"):
        os.truncate(path, 2**24)  # zeros for weights
    asked = EngineConfig(model="owner/name", revision=COMMIT, tensor_parallel_size=2)
    assert footprint(asked) == footprint(asked) == expected
    names = [name for name, _ in hub.sent]
    assert len([name for name in names if name.endswith(".safetensors")]) == num_files
    assert names.count("config.json") == 1
    assert sum(size for _, size in hub.sent) < 2**20


def test_a_hub_that_does_not_tell_leaves_it_unknown(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.folder.mkdir()
    assert footprint(EngineConfig(model="owner/name", revision=COMMIT)) is None
    LlamaConfig().save_pretrained(hub.folder)
    _headers_at_hub.cache_clear()
    assert footprint(EngineConfig(model="owner/name", revision=COMMIT)) is None  # its weights have another format
    assert footprint(EngineConfig(model="owner/other", revision=COMMIT)) is None
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{filename}")
    _headers_at_hub.cache_clear()
    assert footprint(EngineConfig(model="owner/name", revision=COMMIT)) is None


def test_a_hub_id_that_is_cached_is_not_asked_for(hub: type[Hub], llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "cache" / "models--owner--name" / "snapshots" / COMMIT)
    assert footprint(EngineConfig(model="owner/name", revision=COMMIT)) == of(llama_folder)
    assert not hub.sent


def test_a_cache_that_holds_no_weights_is_filled_up_by_the_hub(hub: type[Hub], llama_folder: Path) -> None:
    shutil.copytree(llama_folder, hub.folder)
    hf_hub_download("owner/name", "tokenizer.json", revision=COMMIT)
    assert footprint(EngineConfig(model="owner/name", revision=COMMIT)) == of(llama_folder)


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
