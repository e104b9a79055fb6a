"""A model by URL: pinned by what is there, copied to a node once, never with code or pickles."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from actors.contract import ConfigError, TransientError
from actors.engines import by_url
from actors.engines.base import EngineConfig
from actors.engines.by_url import described, on_this_node
from actors.engines.footprint import footprint
from actors.engines.identity import identity, pinned
from actors.engines.prompts import load_tokenizer
from tests.s3_server import BUCKET


@pytest.fixture
def stored(llama_folder: Path, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """A config whose model is on the store, with files beside it that must not be fetched."""
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    url = f"s3://{BUCKET}/{tmp_path.name}/models/tiny"
    options = {"endpoint_url": s3_endpoint}
    fs, root = fsspec.core.url_to_fs(url, **options)
    for path in llama_folder.iterdir():
        fs.pipe_file(f"{root}/{path.name}", path.read_bytes())
    for name in ("pytorch_model.bin", "modeling_tiny.py", "optimizer.PT", "x.joblib", "x.so", "sub/model.safetensors"):
        fs.pipe_file(f"{root}/{name}", b"not to be fetched")
    return EngineConfig(model=url, model_storage_options=options, dtype="float32")


def put(config: EngineConfig, name: str, data: bytes) -> None:
    fs, root = fsspec.core.url_to_fs(config.model, **config.model_storage_options)
    fs.pipe_file(f"{root}/{name}", data)


def test_it_is_copied_whole_and_without_what_is_never_loaded(stored: EngineConfig, llama_folder: Path) -> None:
    local = on_this_node(pinned(stored, "policy"))
    copied = {path.name: path.read_bytes() for path in Path(local.model).iterdir()}
    assert copied == {path.name: path.read_bytes() for path in llama_folder.iterdir()}
    assert (local.revision, local.dtype) == (None, "float32")


def test_it_is_fetched_once_however_many_replicas_ask(stored: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pinned(stored, "policy")
    fetched: list[str] = []
    copy = by_url._copy

    def counting(fs: Any, source: str, target: Path, size: int) -> None:
        fetched.append(target.name)
        copy(fs, source, target, size)

    monkeypatch.setattr(by_url, "_copy", counting)
    with ThreadPoolExecutor(4) as pool:
        folders = {local.model for local in pool.map(on_this_node, [config] * 4)}
    assert len(folders) == 1
    assert len(fetched) == len(set(fetched)) > 0


def test_a_changed_model_is_another_one_and_is_refused_in_the_middle_of_a_run(stored: EngineConfig) -> None:
    before = pinned(stored, "policy")
    config = json.loads(fsspec.open(f"{stored.model}/config.json", **stored.model_storage_options).open().read())
    put(stored, "config.json", json.dumps({**config, "bos_token_id": 1}).encode())
    assert identity(pinned(stored, "policy")) != identity(before)
    with pytest.raises(ConfigError, match="has changed since this run began"):
        on_this_node(before)


def test_a_plan_needs_no_weights(stored: EngineConfig, llama_folder: Path) -> None:
    config = pinned(stored, "policy")
    local = described(config)
    assert sum(path.stat().st_size for path in Path(local.model).glob("*.safetensors")) < 20_000
    assert load_tokenizer(local.model)
    assert footprint(config) == footprint(EngineConfig(model=str(llama_folder), dtype="float32"))


def test_what_is_no_model_is_refused(stored: EngineConfig) -> None:
    for url, told in ((f"{stored.model}-none", "holds no config.json"), ("nosuchstore://b/m", "cannot be opened")):
        with pytest.raises(ConfigError, match=told):
            pinned(EngineConfig(model=url, model_storage_options=stored.model_storage_options), "policy")


def test_a_store_that_is_out_is_an_outage(stored: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_url, "RETRY_S", 0)
    away = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}
    with pytest.raises(TransientError, match="cannot be fetched"):
        pinned(EngineConfig(model=stored.model, model_storage_options=away), "policy")


def test_an_outage_in_the_middle_is_waited_out(stored: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pinned(stored, "policy")
    copy, failures = by_url._copy, [OSError("reset"), TimeoutError()]

    def flaky(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        copy(*arguments)

    monkeypatch.setattr(by_url, "_copy", flaky)
    monkeypatch.setattr(by_url.time, "sleep", lambda seconds: None)
    assert (Path(on_this_node(config).model) / "config.json").is_file()
    assert not failures


def test_a_file_that_goes_while_it_is_copied_is_told(stored: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pinned(stored, "policy")

    def gone(*arguments: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(by_url, "_copy", gone)
    with pytest.raises(ConfigError, match="has changed since this run began"):
        on_this_node(config)


def test_half_a_file_never_becomes_a_model(stored: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pinned(stored, "policy")
    monkeypatch.setattr(by_url, "RETRY_S", 0)

    def half(source: Any, target: Any, length: int) -> None:
        target.write(source.read(10))

    monkeypatch.setattr("shutil.copyfileobj", half)
    with pytest.raises(TransientError, match="came with 10 bytes"):
        on_this_node(config)
    monkeypatch.setattr("shutil.copyfileobj", lambda source, target, length: target.write(source.read()))
    assert (Path(on_this_node(config).model) / "config.json").is_file()
