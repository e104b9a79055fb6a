"""Adapters as models: what an engine loads is their base with them in its weights."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.contract import ConfigError
from actors.engines import build_engine
from actors.engines.adapters import on_this_node, with_tokenizer
from actors.engines.base import DraftingConfig, EngineConfig, Request
from actors.engines.footprint import footprint
from actors.engines.identity import identity, pinned

PROMPT = (("user", "Which of the two cores?"),)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def adapter(llama_folder: Path, tmp_path: Path) -> Path:
    """Of the tiny llama, and far from doing nothing."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if "lora_B" in name:
                each.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def config(model: Path | str, **values: Any) -> DraftingConfig:
    usual = {"dtype": "float32", "device": "cpu", "max_tokens": 16}
    return DraftingConfig(model=str(model), **{**usual, **values})


def answer(config: EngineConfig) -> str:
    engine = build_engine(config, 1)
    try:
        return asyncio.run(engine.generate(Request(PROMPT, seed=0))).text
    finally:
        engine.close()


def test_an_engine_answers_with_the_adapter(adapter: Path, llama_folder: Path, cache: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT[0][1]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    plain = base.generate(**asked, max_new_tokens=16, do_sample=False)[0]
    made = PeftModel.from_pretrained(base, adapter).generate(**asked, max_new_tokens=16, do_sample=False)[0]
    start = asked["input_ids"].shape[1]
    assert made.tolist() != plain.tolist()
    assert answer(pinned(config(adapter), "aligner")) == tokenizer.decode(made[start:], skip_special_tokens=True)


@pytest.mark.long
def test_vllm_answers_with_it_as_torch_does(adapter: Path) -> None:
    wanted = answer(pinned(config(adapter), "aligner"))
    assert answer(pinned(config(adapter, engine="vllm", decoder="greedy"), "aligner")) == wanted


def test_it_is_merged_once_for_each_dtype_and_again_when_it_changes(adapter: Path, cache: Path) -> None:
    first = on_this_node(config(adapter))
    stamp = (Path(first.model) / "model.safetensors").stat().st_mtime_ns
    assert on_this_node(config(adapter)) == first
    assert (Path(first.model) / "model.safetensors").stat().st_mtime_ns == stamp
    half = on_this_node(config(adapter, dtype="bfloat16"))
    assert AutoModelForCausalLM.from_pretrained(half.model).dtype == torch.bfloat16
    shutil.copy(adapter / "adapter_config.json", adapter / "was.json")
    told = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**told, "lora_alpha": 16}))
    assert on_this_node(config(adapter)).model != first.model
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 3


def test_its_identity_is_that_of_both(adapter: Path, llama_folder: Path, tmp_path: Path) -> None:
    before = identity(pinned(config(adapter), "aligner"))
    assert before != identity(pinned(config(llama_folder), "aligner"))
    other = shutil.copytree(llama_folder, tmp_path / "other")
    told = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": str(other)}))
    same = identity(pinned(config(adapter), "aligner"))
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert len({before, same, identity(pinned(config(adapter), "aligner"))}) == 3


def test_what_was_not_pinned_has_no_identity(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a relative path another adapter of the same name was once taken for it, and the model of that answered."""
    monkeypatch.chdir(adapter.parent)
    with pytest.raises(ValueError, match="is not pinned"):
        on_this_node(config(adapter.name))
    assert on_this_node(pinned(config(adapter.name), "aligner")) == on_this_node(config(adapter))


def test_it_takes_what_its_base_takes(adapter: Path, llama_folder: Path) -> None:
    assert footprint(config(adapter)) == footprint(config(llama_folder)) is not None


def test_its_own_tokenizer_goes_before_its_base_s(adapter: Path, llama_folder: Path) -> None:
    assert with_tokenizer(config(adapter)).model == str(llama_folder)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(adapter)
    assert with_tokenizer(config(adapter)).model == str(adapter)
    assert with_tokenizer(config(llama_folder)).model == str(llama_folder)


def test_an_adapter_by_url_is_fetched_and_merged(adapter: Path) -> None:
    url = f"file://{adapter}"
    found = on_this_node(pinned(config(url), "aligner"))
    assert (Path(found.model) / "config.json").is_file() and found.revision is None
    here = on_this_node(config(adapter))
    assert here.model != found.model
    weights = [(Path(each.model) / "model.safetensors").read_bytes() for each in (here, found)]
    assert weights[0] == weights[1]


def test_a_base_in_the_usual_cache_is_found_where_this_node_has_its_cache(
    adapter: Path, llama_folder: Path, cache: Path
) -> None:
    shutil.copytree(llama_folder, cache.parent / "tiny")
    told = json.loads((adapter / "adapter_config.json").read_text())
    told["base_model_name_or_path"] = "~/.cache/burnish/tiny"
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    assert with_tokenizer(pinned(config(adapter), "aligner")).model == str(cache.parent / "tiny")


@pytest.mark.parametrize("base", ["/nowhere/at/all", "", None])
def test_an_adapter_that_leads_nowhere_is_refused_in_one_line(adapter: Path, base: str | None) -> None:
    told = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": base}))
    with pytest.raises(ConfigError, match=r"^aligner\.model: .*adapter") as caught:
        pinned(config(adapter), "aligner")
    assert "\n" not in str(caught.value)


def test_weights_that_are_a_pickle_are_refused(adapter: Path) -> None:
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").rename(adapter / "other.safetensors")
    with pytest.raises(ConfigError, match=r"holds no adapter_model\.safetensors; other weight formats are not loaded"):
        on_this_node(pinned(config(adapter), "aligner"))


def test_an_adapter_of_another_model_is_refused_in_one_line(adapter: Path, model_folder: Any) -> None:
    told = json.loads((adapter / "adapter_config.json").read_text())
    other = str(model_folder("gemma2"))
    (adapter / "adapter_config.json").write_text(
        json.dumps({**told, "base_model_name_or_path": other, "target_modules": ["c_attn"]})
    )
    with pytest.raises(ConfigError, match="does not fit its base") as caught:
        on_this_node(replace(config(adapter)))
    assert "\n" not in str(caught.value)
