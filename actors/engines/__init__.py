"""Engines: how tokens are made."""

from actors.contract import ConfigError
from actors.engines.base import Engine, EngineConfig


def build_engine(config: EngineConfig, num_threads: int) -> Engine:
    """The engine that the config names; imported only then, for torch takes seconds to import."""
    if config.engine == "stored":
        from actors.engines.stored import StoredEngine

        return StoredEngine(config)
    if config.engine == "torch":
        from actors.engines.torch_engine import TorchEngine

        return TorchEngine(config, num_threads)
    raise ConfigError(f"engine {config.engine!r} is not built")
