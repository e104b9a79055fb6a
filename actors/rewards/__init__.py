"""Engines that score: a chat with its answer in, a number out; this is the one place that knows their names."""

from typing import TYPE_CHECKING

from actors.engines import prepare_torch, require_vllm
from actors.engines.base import Engine, EngineConfig, ScoringConfig
from actors.engines.by_url import on_this_node
from actors.engines.hosted import MAX_ATTEMPTS, HostedEngine, Remember, forget

if TYPE_CHECKING:
    from actors.reward import RewardConfig


def build_reward(
    config: "RewardConfig", num_threads: int, max_attempts: int = MAX_ATTEMPTS, remember: Remember = forget
) -> Engine:
    """The engine that scores as `config` says: in a process of its own, unless there is nothing in it to die.

    Args:
        num_threads: CPU threads of the engine.
        max_attempts, remember: as of `build_engine`.

    Raises ConfigError for a user's mistake, such as a model that is not there.
    """
    if config.engine == "rules":
        from actors.rewards.rules import RuleEngine

        return RuleEngine(config)
    if config.engine in ("torch", "vllm"):
        return HostedEngine(_build_here, on_this_node(config), num_threads, max_attempts, remember)
    from actors.engines.openai_engine import OpenAIEngine

    return OpenAIEngine(config)


def _build_here(config: EngineConfig, num_threads: int) -> Engine:
    """The engine itself, in this process."""
    assert isinstance(config, ScoringConfig)
    if config.engine == "vllm":
        require_vllm()
        from actors.rewards.pooling import PoolingEngine

        return PoolingEngine(config, num_threads)
    num_threads, followers = prepare_torch(config, num_threads, "actors.rewards.classifier")
    from actors.rewards.classifier import Classifier  # torch and transformers take seconds to import

    return Classifier(config, num_threads, followers)
