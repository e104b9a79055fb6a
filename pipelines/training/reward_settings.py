"""Every key of the train_reward job."""

from dataclasses import dataclass

from actors.contract import ConfigError, is_set, option, refuse_secrets, refuse_unless, section
from actors.engines.by_url import is_url
from actors.training.reward_settings import RewardTrainingConfig
from pipelines.settings import SiteConfig


@dataclass(frozen=True)
class PairsConfig:
    """The preference pairs."""

    path: str = option(
        "???",
        "output root of build_preferences (only published partitions are read), or a Parquet file, folder or glob with "
        "columns prompt, chosen and rejected: texts, or chats as TRL has them",
    )
    test_path: str | None = option(
        None, "pairs that are held out, likewise; null: split `test` of a dataset that has one, else test_fraction"
    )
    test_fraction: float = option(
        0.1, "share of the prompts held out, by their text, where nothing else says which", changes_rows=True
    )

    def __post_init__(self) -> None:
        refuse_secrets("path", self.path)
        refuse_secrets("test_path", self.test_path)
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"test_fraction must be between 0 and 1, got {self.test_fraction}")
        if self.test_path is not None and is_set(self, "test_fraction"):
            raise ConfigError("test_fraction has no effect with test_path")


@dataclass(frozen=True)
class RewardModelConfig:
    """Where the reward model goes."""

    root: str = option("???", "folder that becomes the model's; its name is that of the reward")

    def __post_init__(self) -> None:
        if is_url(self.root):
            raise ConfigError(f"root must be a folder that every worker can write, not a URL, got {self.root!r}")


@dataclass(frozen=True)
class RewardRunConfig:
    """How the job goes about it."""

    num_workers: int = option(0, "0: this process trains; otherwise processes of Ray Train that train together")
    use_gpu: bool = option(False, "a GPU for each process, which must hold the whole model; without, a CPU")
    num_threads: int | None = option(None, "CPU threads of a process; null: torch's own choice")
    checkpoint_s: float = option(300.0, "seconds between checkpoints: what a crash loses at most")
    max_failures: int = option(2, "deaths of Ray Train's processes after which the job goes on by itself")
    stall_minutes: float = option(30.0, "with Ray Train: end with exit code 4 after so long without a step")
    wait_for_resources_s: float = option(600.0, "seconds to wait for nodes that an autoscaling cluster may add")

    def __post_init__(self) -> None:
        refuse_unless(self, "0 or more", "num_workers", "checkpoint_s", "max_failures")
        refuse_unless(self, "more than 0", "stall_minutes")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads must be at least 1, or null, got {self.num_threads}")


@dataclass(frozen=True)
class TrainRewardConfig:
    """The train_reward job."""

    input: PairsConfig = section(PairsConfig, "where the preference pairs are")
    output: RewardModelConfig = section(RewardModelConfig, "where the reward model goes")
    training: RewardTrainingConfig = section(RewardTrainingConfig, "what is trained, and how")
    run: RewardRunConfig = section(RewardRunConfig, "how the job goes about it")
    site: SiteConfig = section(SiteConfig, "where the job runs")
