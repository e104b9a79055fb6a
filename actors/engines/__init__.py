"""Engines make completions; this is the one place that knows their names."""

import os

from actors.contract import ConfigError
from actors.engines.adapters import on_this_node
from actors.engines.base import Engine, EngineConfig
from actors.engines.hosted import MAX_ATTEMPTS, HostedEngine, Remember, forget
from actors.engines.ranks import Followers
from actors.engines.stored import StoredEngine


def build_engine(
    config: EngineConfig, num_threads: int, max_attempts: int = MAX_ATTEMPTS, remember: Remember = forget
) -> Engine:
    """The engine that `config` names, ready to answer: in a process of its own, unless there is nothing in it to die.

    Args:
        num_threads: CPU threads of the engine.
        max_attempts: engines that a request may kill while it runs alone.
        remember: told how far the search for such a request has come.

    Raises ConfigError for a user's mistake, such as a model that is not there.
    """
    if config.engine == "stored":
        return StoredEngine(config)
    if config.engine == "openai":
        from actors.engines.openai_engine import OpenAIEngine

        return OpenAIEngine(config)
    return HostedEngine(_build_here, on_this_node(config), num_threads, max_attempts, remember)


def _build_here(config: EngineConfig, num_threads: int) -> Engine:
    """The engine itself, in this process."""
    if config.engine == "vllm":
        require_vllm()
        from actors.engines.vllm_engine import VllmEngine

        return VllmEngine(config, num_threads)
    num_threads, followers = prepare_torch(config, num_threads, "actors.engines.torch_model")
    from actors.engines.torch_engine import TorchEngine  # torch and transformers take seconds to import

    return TorchEngine(config, num_threads, followers)


def require_vllm() -> None:
    """Raises ConfigError where vllm cannot be imported."""
    try:
        from vllm import __version__  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"engine is vllm, but vllm cannot be imported here ({error})") from error


def prepare_torch(config: EngineConfig, num_threads: int, life: str) -> tuple[int, Followers | None]:
    """What comes before torch is imported: (CPU threads of each rank, the other ranks where there are any).

    Args:
        num_threads: CPU threads of all ranks together.
        life: the module whose `follow` the other ranks run.
    """
    if config.device == "cpu":  # before torch looks: transformers splits a model over GPUs wherever there is one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.tensor_parallel_size == 1:
        return num_threads, None
    num_threads = max(1, num_threads // config.tensor_parallel_size)
    return num_threads, Followers(config, num_threads, life)
