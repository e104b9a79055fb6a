"""Adapters (LoRA, as peft writes them) as models: put into the weights of their base, once a node and dtype.

Every engine then loads a folder like any other: sharded over ranks, counted from its headers, at no cost per token. An
engine that would keep the adapter apart pays two small matrix multiplications more for every large one.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actors.contract import ConfigError
from actors.engines import by_url
from actors.engines.base import EngineConfig
from actors.engines.identity import base_of, identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Config = TypeVar("Config", bound=EngineConfig)

WEIGHTS = "adapter_model.safetensors"


def on_this_node(config: Config) -> Config:
    """The config with its model as a whole one on this node's disk: copied where it is named by URL, and where it is an
    adapter put into its base's weights. Any other config as it is.

    Raises as `by_url.on_this_node`, and ConfigError where peft is not installed or the adapter does not fit its base.
    """
    config = by_url.on_this_node(config)
    base = base_of(config)
    if base is None:
        return config
    whole = on_this_node(base)
    name = f"{Path(config.model).name}-{identity(config)}-{config.dtype}"
    made = by_url.made_once(name, lambda folder: _merge(whole, config, folder))
    return replace(config, model=str(made), revision=None)


def with_tokenizer(config: Config) -> Config:
    """The config of the model whose tokenizer is this one's: an adapter's own, where it has one, or else its base's."""
    base = base_of(config)
    if base is None or (Path(config.model) / "tokenizer_config.json").is_file():
        return config
    return with_tokenizer(by_url.described(base))


def _merge(base: EngineConfig, adapter: EngineConfig, folder: Path) -> None:
    """Write the base with the adapter in its weights, in the dtype that they are loaded in."""
    import torch
    from transformers import AutoModelForCausalLM

    from actors.engines.prompts import load_failure, load_tokenizer

    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(f"{adapter.model} is an adapter, which needs peft: pip install '.[train]'") from error
    if not (Path(adapter.model) / WEIGHTS).is_file():  # peft would go on to look for a pickle
        raise ConfigError(f"the adapter {adapter.model} holds no {WEIGHTS}; other weight formats are not loaded")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.model, revision=base.revision, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(load_failure("causal language model", base.model, error)) from error
    try:
        adapted = PeftModel.from_pretrained(model, adapter.model)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"the adapter {adapter.model} does not fit its base {base.model}: {reason}") from error
    merged(adapted, adapter.dtype).save_pretrained(folder)
    tokenizer = with_tokenizer(adapter)
    load_tokenizer(tokenizer.model, tokenizer.revision).save_pretrained(folder)


def merged(adapted: Any, dtype: str) -> "PreTrainedModel":
    """A peft model's base with the adapter in its weights: added up in the dtype that they have, then converted."""
    import torch

    whole: PreTrainedModel = adapted.merge_and_unload()
    return whole.to(getattr(torch, dtype))
