"""Every key of a training that the model's side reads: what is trained, on which losses, how, and how it is judged."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from actors.contract import ConfigError, is_set, option, refuse_unless


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained, and how."""

    model: str = option(MISSING, "folder, hub id or URL of the model that becomes a DiffPO aligner")
    revision: str | None = option(None, "branch, tag or commit of a hub id; resolved to a commit when the run starts")
    lora_rank: int = option(
        16, "rank of LoRA adapters on every linear layer but the head; 0: all weights are trained", changes_rows=True
    )
    lora_alpha: int = option(32, "adapters are scaled by lora_alpha / lora_rank", changes_rows=True)
    omega: float = option(
        0.1,
        "weight of the consistency loss; 0: cross-entropy on the best answer alone. The paper's 1000 goes with a scale "
        "of the loss that it does not tell: with its sums as they are written, the best answers would not be learned",
        changes_rows=True,
    )
    curriculum: bool = option(
        False,
        "draw y(t) from the answers next to the best first, from all of them after half of the steps",
        changes_rows=True,
    )
    num_epochs: float = option(1.0, "how often each trajectory is seen, with one y(t) each time", changes_rows=True)
    batch_size: int = option(32, "trajectories of a step, over all processes", changes_rows=True)
    micro_batch_size: int = option(
        4, "trajectories of one forward pass of a process, of two sequences each: what memory depends on"
    )
    learning_rate: float = option(1e-4, "after warming up; it falls to 0 along a cosine (AdamW)", changes_rows=True)
    warmup_fraction: float = option(0.05, "share of the steps in which the learning rate rises", changes_rows=True)
    weight_decay: float = option(0.0, "AdamW's", changes_rows=True)
    max_grad_norm: float = option(1.0, "longer gradients are scaled down to it", changes_rows=True)
    max_prompt_tokens: int = option(512, "trajectories of longer prompts are left out", changes_rows=True)
    max_tokens: int = option(
        256, "answers are cut behind so many tokens; a DiffPO aligner's block_size", changes_rows=True
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "of matrix products, and of the frozen weights under LoRA; what is trained is kept in float32",
        changes_rows=True,
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        False, "make each layer's activations again in the backward pass, instead of keeping them"
    )
    seed: int = option(0, "of adapters, of the order of trajectories and of the y(t) drawn", changes_rows=True)

    def __post_init__(self) -> None:
        refuse_unless(
            self, "more than 0",
            "num_epochs", "batch_size", "micro_batch_size", "learning_rate", "lora_alpha", "max_grad_norm",
            "max_prompt_tokens",
        )  # fmt: skip
        refuse_unless(self, "0 or more", "omega", "lora_rank", "weight_decay", "seed")
        if self.max_tokens < 2:
            raise ConfigError(f"max_tokens must be 2 or more, got {self.max_tokens}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ConfigError(f"warmup_fraction must be in [0, 1], got {self.warmup_fraction}")
        if not self.lora_rank and is_set(self, "lora_alpha"):
            raise ConfigError("lora_alpha has no effect with lora_rank=0")
        if not self.omega and self.curriculum:
            raise ConfigError("curriculum has no effect with omega=0: no y(t) is drawn")


@dataclass(frozen=True)
class EvaluationConfig:
    """How the aligner is judged while it is trained: on prompts of the dataset's split `validation`."""

    every: int = option(
        100, "steps between evaluations; there is one before the first step and one after the last, too; 0: none at all"
    )
    num_prompts: int = option(32, "held-out prompts that are answered each time, to the fixed point; at most all")
    max_num_seqs: int = option(16, "answers decoded at the same time")

    def __post_init__(self) -> None:
        refuse_unless(self, "0 or more", "every")
        refuse_unless(self, "1 or more", "num_prompts", "max_num_seqs")
