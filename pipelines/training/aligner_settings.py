"""Every key of the train_aligner job."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from actors.contract import ConfigError, is_set, option, refuse_unless, section
from actors.engines.base import EngineConfig
from actors.engines.identity import identity
from actors.reward import RewardConfig
from actors.training.aligner_settings import EvaluationConfig, TrainingConfig
from pipelines.config import changes_rows
from pipelines.settings import SiteConfig

VERSION = 1
"""Counted up when a training of the same config and data comes to other weights."""


@dataclass(frozen=True)
class TrajectoriesConfig:
    """The dataset that is trained on."""

    path: str = option(
        "???", "output.root of build_preferences with build=trajectory, export=null; only published partitions are read"
    )


@dataclass(frozen=True)
class ModelConfig:
    """Where the aligner goes."""

    root: str = option("???", "folder or URL that becomes the model's; the same command on it resumes")
    title: str = option("DiffPO aligner", "title of the model card")


@dataclass(frozen=True)
class TrainRunConfig:
    """How the job goes about it."""

    num_workers: int = option(1, "processes that train together, each on batch_size / num_workers trajectories a step")
    use_gpu: bool = option(False, "a GPU for each process; without, a CPU")
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "several processes have the model whole each (ddp), or a shard of it (fsdp: FSDP2)"
    )
    num_threads: int | None = option(None, "CPU threads of a process; null: the node's cores, shared between its own")
    checkpoint_every: int = option(50, "steps between checkpoints: what a crash loses at most; the last two are kept")
    max_failures: int = option(2, "deaths of processes after which the job goes on by itself, from its checkpoint")
    lease_ttl_s: float = option(30.0, "seconds of silence after which another job on the same root counts as dead")
    wait_for_resources_s: float = option(600.0, "seconds to wait for nodes that an autoscaling cluster may add")
    stall_minutes: float = option(30.0, "end with exit code 4 after so long without a step or an answer evaluated")

    def __post_init__(self) -> None:
        refuse_unless(self, "more than 0", "num_workers", "checkpoint_every", "lease_ttl_s", "stall_minutes")
        refuse_unless(self, "0 or more", "max_failures")
        if self.num_workers == 1 and is_set(self, "parallel"):
            raise ConfigError(f"parallel={self.parallel} has no effect with num_workers=1")


@dataclass(frozen=True)
class TrainAlignerConfig:
    """The train_aligner job."""

    input: TrajectoriesConfig = section(TrajectoriesConfig, "where the trajectories are")
    output: ModelConfig = section(ModelConfig, "where the aligner goes")
    training: TrainingConfig = section(TrainingConfig, "what is trained, and how")
    evaluation: EvaluationConfig = section(EvaluationConfig, "how it is judged meanwhile, on held-out prompts")
    reward: RewardConfig | None = option(
        None, "what scores held-out answers before and after aligning; its pool's size is of no matter; null: nothing"
    )
    run: TrainRunConfig = section(TrainRunConfig, "how the job goes about it")
    site: SiteConfig = section(SiteConfig, "where the job runs")

    def __post_init__(self) -> None:
        if self.training.batch_size % self.run.num_workers:
            raise ConfigError(
                f"run.num_workers is {self.run.num_workers}, which does not divide training.batch_size of "
                f"{self.training.batch_size}"
            )
        if self.reward is not None and not self.evaluation.every:
            raise ConfigError("reward has no effect with evaluation.every=0")
        if self.reward is not None and self.reward.engine == "openai":
            raise ConfigError(
                "reward.engine=openai compares two answers; here each is scored: take rules, torch or vllm"
            )


def fingerprint(config: TrainAlignerConfig, base: EngineConfig, parts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that can change the weights, or what evaluations tell of them, by dotted key."""
    return {
        **{f"training.{key}": value for key, value in changes_rows(config.training).items()},
        "training.model": f"{config.training.model} ({identity(base)})",
        "training.version": VERSION,
        "evaluation.num_prompts": config.evaluation.num_prompts,
        "reward": None if config.reward is None else config.reward.label,
        "input.parts": [part["sha256"][:16] for part in parts],
    }
