"""Every key of the jobs that make and score a corpus, put together from the sections that the layers own."""

import hashlib
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from actors.aligner import AlignerConfig
from actors.candidates import model_label
from actors.contract import ConfigError, option, refuse_secrets, refuse_unless, section
from actors.engines.by_url import is_url
from actors.engines.hosted import MAX_ATTEMPTS
from actors.engines.identity import identity, pinned
from actors.policy import PolicyConfig
from actors.pool import PoolConfig
from actors.recipes import recipe_version
from actors.reward import RewardConfig
from actors.rewards import judge
from actors.rewards.rules import rule_of, rules_identity
from pipelines.config import changes_rows
from pipelines.corpus import schema
from pipelines.corpus.publish import OutputConfig
from pipelines.corpus.published import CorpusConfig
from pipelines.corpus.shards import InputConfig
from pipelines.corpus.storage import RETRY_S

VERSION = "0.1.0"

Pool = TypeVar("Pool", bound=PoolConfig)


@dataclass(frozen=True)
class RunConfig:
    """How a job goes about it, and when it stops."""

    seed: int = option(0, "every candidate's seed derives from this, its prompt_id and its number", changes_rows=True)
    unit_rows: int = option(256, "most rows of a unit: what is committed at once, and lost at most by a crash")
    task_mib: float = option(0.0, "units per Ray task, in MiB of rows; 0: one unit. Raise it where engines are cheap")
    max_quarantined_fraction: float = option(0.1, "publish nothing where more of a partition's rows are quarantined")
    accept_quarantined: bool = option(False, "publish all the same")
    max_unscored_fraction: float = option(
        0.5, "publish nothing where a reward could not score a larger share of a partition's texts; 1: always publish"
    )
    retry_quarantined: str | None = option(None, "align published quarantined rows with this cause again")
    accept_changes: bool = option(False, "apply a changed config to new rows; go on with an input that was moved")
    max_attempts: int = option(MAX_ATTEMPTS, "engines that a row may kill while it runs alone; then it is quarantined")
    lease_ttl_s: float = option(30.0, "seconds of silence after which another job on the same root counts as dead")
    wait_for_resources_s: float = option(600.0, "seconds to wait for nodes that an autoscaling cluster may add")
    stall_minutes: float = option(30.0, "end with exit code 4 after so long without a token, a commit or a start-up")

    def __post_init__(self) -> None:
        refuse_unless(self, "more than 0", "unit_rows", "max_attempts", "lease_ttl_s", "stall_minutes")
        for name in ("max_quarantined_fraction", "max_unscored_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class PlanConfig:
    """What `--dry-run` reckons with."""

    gpu_hour_price: float | None = option(
        None, "of one GPU for one hour, in any currency; `--dry-run` then says what the rows may cost"
    )

    def __post_init__(self) -> None:
        refuse_unless(self, "0 or more", "gpu_hour_price")


@dataclass(frozen=True)
class SiteConfig:
    """Where the job runs."""

    ray_address: str | None = option(
        None, "Ray cluster to run on, or `local`: one started here; null: RAY_ADDRESS where set, else local"
    )
    storage_options: dict[str, Any] = option(
        {}, "fsspec options for input and output, such as endpoint_url; no secrets"
    )
    storage_retry_s: float = option(
        RETRY_S, "seconds that the store of input or output may be out before the job stops; it can be resumed"
    )
    log_every_s: float = option(30.0, "seconds between progress lines where there is no terminal")

    def __post_init__(self) -> None:
        refuse_unless(self, "0 or more", "storage_retry_s")
        refuse_secrets("storage_options", self.storage_options)


@dataclass(frozen=True)
class AlignCorpusConfig:
    """The align_corpus job."""

    input: InputConfig = section(InputConfig, "where the prompts are")
    output: OutputConfig = section(OutputConfig, "where the corpus goes")
    policy: PolicyConfig = section(PolicyConfig, "the model that answers")
    policies: list[PolicyConfig] = option([], "further policies; their candidates follow those of `policy`")
    aligner: AlignerConfig = section(AlignerConfig, "the model that aligns")
    reward: RewardConfig | None = option(None, "what scores responses and aligned texts; null: nothing does")
    rewards: list[RewardConfig] = option([], "further rewards, each a pool of its own")
    run: RunConfig = section(RunConfig, "how a job goes about it")
    plan: PlanConfig = section(PlanConfig, "what --dry-run reckons with")
    site: SiteConfig = section(SiteConfig, "where the job runs")

    def __post_init__(self) -> None:
        for name, pool in pools(self).items():
            if name != "aligner" and pool.engine == "stored" and self.input.response_column is None:
                raise ConfigError(f"{name}.engine is stored: input.response_column must name the column of the answers")
        _check_rewards(self)


@dataclass(frozen=True)
class ScoreCorpusConfig:
    """The score_corpus job."""

    input: CorpusConfig = section(CorpusConfig, "the corpus that is scored")
    output: OutputConfig = section(OutputConfig, "where the scored corpus goes")
    reward: RewardConfig | None = option(None, "what scores responses and aligned texts")
    rewards: list[RewardConfig] = option([], "further rewards, each a pool of its own")
    run: RunConfig = section(RunConfig, "how a job goes about it")
    plan: PlanConfig = section(PlanConfig, "what --dry-run reckons with")
    site: SiteConfig = section(SiteConfig, "where the job runs")

    def __post_init__(self) -> None:
        if not rewards(self):
            raise ConfigError("reward: nothing scores; name a reward, as in reward=rules")
        _check_rewards(self)


JobConfig = AlignCorpusConfig | ScoreCorpusConfig
Config = TypeVar("Config", AlignCorpusConfig, ScoreCorpusConfig)


def _check_rewards(config: JobConfig) -> None:
    labels = [reward.label for reward in rewards(config).values()]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(
                f"rewards: {labels.count(label)} of them are called {label!r}; give each a name of its own"
            )


def pin_models(config: Config) -> Config:
    """The config with every model pinned to a folder, a commit or the versions of its files. Raises ConfigError where
    there is none, and TransientError where its store is out."""

    def pin(pool: Pool, section: str) -> Pool:
        if is_url(pool.model) and not pool.model_storage_options:
            pool = replace(pool, model_storage_options=config.site.storage_options)
        return pinned(pool, section)

    if config.reward is not None:
        check_rules(config.reward, "reward")
        config = replace(config, reward=pin(config.reward, "reward"))
    for number, reward in enumerate(config.rewards):
        check_rules(reward, f"rewards.{number}")
    config = replace(config, rewards=[pin(each, f"rewards.{number}") for number, each in enumerate(config.rewards)])
    if isinstance(config, ScoreCorpusConfig):
        return config
    return replace(
        config,
        policy=pin(config.policy, "policy"),
        policies=[pin(policy, f"policies.{number}") for number, policy in enumerate(config.policies)],
        aligner=pin(config.aligner, "aligner"),
    )


def check_rules(config: RewardConfig, section: str) -> None:
    """Raises ConfigError for a rule that does not exist or cannot be imported."""
    for name in config.rules:
        try:
            rule_of(name)
        except ConfigError as error:
            raise ConfigError(f"{section}.{error}") from error


def pools(config: JobConfig) -> dict[str, PoolConfig]:
    """Every pool of the job by name, in the order in which a unit passes them."""
    if isinstance(config, ScoreCorpusConfig):
        return {**rewards(config)}
    further = {f"policy_{number + 2}": policy for number, policy in enumerate(config.policies)}
    return {"policy": config.policy, **further, "aligner": config.aligner, **rewards(config)}


def rewards(config: JobConfig) -> dict[str, RewardConfig]:
    """The pools that score, by name: they are the last that a unit passes."""
    found = [config.reward] if config.reward is not None else []
    return {
        f"reward_{number}" if number > 1 else "reward": each for number, each in enumerate([*found, *config.rewards], 1)
    }


def fingerprint(config: JobConfig, kept_types: Mapping[str, str]) -> dict[str, Any]:
    """Everything that can change a row, by dotted key: what two runs must share to make rows that go together."""
    models = {f"{name}.model": f"{model_label(pool)} ({_identity(pool)})" for name, pool in pools(config).items()}
    recipe = {"aligner.recipe_version": recipe_version(config.aligner)} if isinstance(config, AlignCorpusConfig) else {}
    return {
        **changes_rows(config),
        **models,
        **recipe,
        "corpus.schema_version": schema.VERSION,
        **{f"input.keep_columns.{name}": dtype for name, dtype in sorted(kept_types.items())},
    }


def _identity(pool: PoolConfig) -> str:
    if not isinstance(pool, RewardConfig) or pool.engine in ("torch", "vllm"):
        return identity(pool)
    if pool.engine == "rules":
        return rules_identity(pool.rules)
    return f"{identity(pool)}, question {judge.VERSION}"


def notes(config: JobConfig) -> list[str]:
    """What whoever uses the rows must know of how they are made, in sentences."""
    found = []
    if isinstance(config, ScoreCorpusConfig):
        found.append(
            f"Responses and aligned texts are those of the corpus at {config.input.path}; its card tells of them."
        )
    elif config.aligner.ignores_response:
        found.append(
            "The aligned text does not depend on the response: with recipe=diffpo, max_iterations=null and "
            "num_reserved=0 it is what the aligner answers by itself, made once per prompt however many candidates "
            "there are."
        )
    for reward in rewards(config).values():
        if reward.engine == "rules":
            told = " + ".join(f"{weight:g} {name}" for name, weight in reward.rules.items() if weight)
            found.append(f"The reward {reward.label} is a sum of rules ({told}): not a measure of quality.")
    return found


def code_version() -> str:
    """The commit of this checkout, with `+changes` where it differs; where it is none, as on a cluster that `ray job
    submit` sent it to, the release and a digest of its code."""
    folder = Path(__file__).resolve().parents[1]
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes", "--abbrev=12"],
            cwd=folder, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        code = hashlib.sha256()
        for path in sorted(path for part in ("actors", "pipelines") for path in (folder / part).rglob("*.py")):
            code.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
        return f"{VERSION}+code.{code.hexdigest()[:12]}"
    return found.stdout.strip()
