"""The model that is trained: loaded, with adapters or without, and put together again as what an engine loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from actors.contract import ConfigError
from actors.decoding.forward import ATTENTION
from actors.engines.adapters import merged
from actors.engines.base import EngineConfig
from actors.engines.prompts import load_failure
from actors.training.aligner_settings import TrainingConfig

Weights = Mapping[str, Tensor]
"""What was trained, by name, whole and on the CPU: weights of adapters, or of the model."""

PREFIX = "base_model.model."  # of the names that peft gives


def load(config: TrainingConfig, base: EngineConfig, *, frozen: torch.dtype, attention: str | None = None) -> Any:
    """The model to be trained: a peft model with fresh adapters, the same ones each time, or the plain one.

    Args:
        base: its model, on this node's disk or at the hub.
        frozen: dtype of weights that are not trained; the others are in float32.
        attention: implementation; None: one that has gradients, and caps scores where the model does.

    Raises ConfigError in one line.
    """
    disable_progress_bar()
    where = {"revision": base.revision, "trust_remote_code": False}
    try:
        if attention is None:
            text = AutoConfig.from_pretrained(base.model, **where).get_text_config(decoder=True)
            attention = "eager" if getattr(text, "attn_logit_softcapping", None) else "sdpa"
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base.model,
            dtype=frozen if config.lora_rank else torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            **where,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(load_failure("causal language model", base.model, error)) from error
    return adapted(model, config, base) if config.lora_rank else model


def adapted(model: PreTrainedModel, config: TrainingConfig, base: EngineConfig) -> Any:
    """The model with LoRA on every linear layer but the head (Hu et al., arXiv 2106.09685)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM",
        base_model_name_or_path=base.model, revision=base.revision,
    )  # fmt: skip
    return get_peft_model(model, lora)


def causal(student: Any) -> PreTrainedModel:
    """The causal LM itself, the adapters in its layers."""
    found: PreTrainedModel = student if isinstance(student, PreTrainedModel) else student.get_base_model()
    return found


def finished(config: TrainingConfig, base: EngineConfig, weights: Weights) -> PreTrainedModel:
    """The aligner as an engine of dtype `dtype` would have it, ready for the decoder."""
    student = load(config, base, frozen=torch.float32, attention=ATTENTION)
    fill(causal(student), weights)
    whole: PreTrainedModel = merged(student, config.dtype) if config.lora_rank else student
    return whole.to(getattr(torch, config.dtype)).eval()


@torch.no_grad()
def fill(model: PreTrainedModel, weights: Weights) -> None:
    """Put trained weights into the model. Raises KeyError where they are not those of this model."""
    trained = dict(model.named_parameters())
    for name, value in weights.items():
        trained[name].copy_(value)


def write(
    config: TrainingConfig, base: EngineConfig, weights: Weights, folder: Path, *, adapts: tuple[str, str | None]
) -> None:
    """Write what was trained as a Hugging Face folder: an adapter (peft), or a whole model in `dtype`; no tokenizer.

    Args:
        adapts: how an adapter names its base, and the commit of that where it is a hub id.
    """
    if not config.lora_rank:
        finished(config, base, weights).save_pretrained(folder)
        return
    student = load(config, base, frozen=torch.float32)
    told = student.peft_config["default"]
    told.base_model_name_or_path, told.revision = adapts
    told.target_modules = sorted(told.target_modules)  # a set, whose order would be another in each process
    named = {PREFIX + name: value.contiguous() for name, value in weights.items()}
    student.save_pretrained(folder, state_dict=named, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's own card
