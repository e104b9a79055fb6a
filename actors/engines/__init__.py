"""Engines make completions; `build_engine` is the one place that knows their names."""

from actors.engines.base import Engine, EngineConfig


def build_engine(config: EngineConfig, num_threads: int | None) -> Engine:
    """Build the engine that `config` names, its model loaded and ready.

    Args:
        num_threads: CPU threads of the engine; None leaves torch's default.

    Raises ConfigError for a user's mistake, such as a model that is not there.
    """
    if config.engine == "stored":
        from actors.engines.stored import StoredEngine

        return StoredEngine(config)
    from actors.engines.torch_engine import TorchEngine  # torch and transformers take seconds to import

    return TorchEngine(config, num_threads)
