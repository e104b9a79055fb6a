"""What the training of a reward model is made of: its settings and its pairs. Imports no torch."""

from array import array
from dataclasses import dataclass
from typing import Literal, NamedTuple

from omegaconf import MISSING

from actors.contract import ConfigError, option, refuse_unless


@dataclass(frozen=True)
class RewardTrainingConfig:
    """What is trained, and how."""

    model: str = option(
        MISSING,
        "folder, hub id or URL of the model with a chat template that becomes a reward model, or is one already",
    )
    revision: str | None = option(None, "branch, tag or commit of a hub id; resolved to a commit when the run starts")
    num_layers: int | None = option(
        None,
        "last layers that are trained besides the head; what is below them stays as it is and costs no backward "
        "pass; null: the whole model",
        changes_rows=True,
    )
    num_epochs: int = option(1, "how often each pair is seen", changes_rows=True)
    batch_size: int = option(16, "pairs of a step, over all processes", changes_rows=True)
    batch_tokens: int = option(
        2048, "most tokens (rows x longest row) of one forward pass of a process: what memory depends on"
    )
    learning_rate: float = option(
        2e-5, "of the model's own weights, after warming up; it falls to 0 in a line (AdamW)", changes_rows=True
    )
    head_learning_rate: float = option(1e-3, "of the head, which begins at zero; likewise", changes_rows=True)
    warmup_fraction: float = option(0.1, "share of the steps in which the learning rates rise", changes_rows=True)
    weight_decay: float = option(0.0, "AdamW's", changes_rows=True)
    max_tokens: int = option(
        2048,
        "pairs with a longer text are not trained on: nothing is cut, as the reward pool cuts nothing",
        changes_rows=True,
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "of matrix products; weights and optimiser are float32", changes_rows=True
    )
    seed: int = option(0, "of the order of the pairs, and of those that --limit draws", changes_rows=True)

    def __post_init__(self) -> None:
        refuse_unless(
            self, "more than 0",
            "num_epochs", "batch_size", "batch_tokens", "learning_rate", "head_learning_rate", "max_tokens",
        )  # fmt: skip
        refuse_unless(self, "0 or more", "weight_decay", "seed")
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(f"warmup_fraction must be in [0, 1), got {self.warmup_fraction}")
        if self.num_layers is not None and self.num_layers < 0:
            raise ConfigError(f"num_layers must be 0 or more, or null for all, got {self.num_layers}")


class Pair(NamedTuple):
    """Two answers to a prompt, as the model reads them.

    Attributes:
        prompt: what names the prompt: equal prompts have equal names.
        chosen, rejected: token ids of the chat with each of the answers, int32.
    """

    prompt: str
    chosen: "array[int]"
    rejected: "array[int]"

    @property
    def longest(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def num_steps_of(num_pairs: int, config: RewardTrainingConfig) -> int:
    """Optimiser steps of a run; the last of an epoch may have fewer pairs than the others."""
    return config.num_epochs * -(-num_pairs // config.batch_size)
