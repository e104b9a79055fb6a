"""What makes a dataset's rows: the fingerprint that two runs must share."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.contract import ConfigError
from actors.engines.base import EngineConfig
from actors.engines.identity import identity
from pipelines.config import changes_rows
from pipelines.preferences import schema
from pipelines.preferences.settings import BuildPreferencesConfig

COLUMNS_AND_REWARDS = (
    "build.strategy", "build.reward", "build.reward_weights", "export", "input.keep_columns",
    "preferences.schema_version",
)  # fmt: skip


def pin_encoder(config: BuildPreferencesConfig) -> BuildPreferencesConfig:
    """The config with the encoder by its absolute path. Raises ConfigError where there is none."""
    if config.build.semantic_encoder is None:
        return config
    folder = Path(config.build.semantic_encoder).expanduser().resolve()
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ConfigError(f"build.semantic_encoder: {folder} holds no encoder (config.json and *.safetensors)")
    return replace(config, build=replace(config.build, semantic_encoder=str(folder)))


def fingerprint(
    config: BuildPreferencesConfig, kept_types: Mapping[str, str], benchmarks: str | None
) -> dict[str, Any]:
    """Everything that can change a row, by dotted key. `benchmarks` is the digest of the benchmark files."""
    encoder = config.build.semantic_encoder
    return {
        **changes_rows(config),
        "build.semantic_encoder": None if encoder is None else identity(EngineConfig(model=encoder)),
        "prompts.decontaminate": benchmarks,
        "preferences.schema_version": schema.VERSION,
        **{f"input.keep_columns.{name}": dtype for name, dtype in sorted(kept_types.items())},
    }


def fixed(config: BuildPreferencesConfig) -> frozenset[str]:
    """The keys of the fingerprint that decide the columns, what rewards mean, and where prompts that are not known from
    one run to the next could come into two splits, the splits."""
    keys = {*COLUMNS_AND_REWARDS}
    if config.prompts.dedup == "none":
        keys |= {"prompts.test_fraction", "prompts.validation_fraction"}
        if config.prompts.test_fraction or config.prompts.validation_fraction:
            keys |= {"build.seed", "prompts.dedup"}  # which may have kept apart what earlier runs split otherwise
    return frozenset(keys)
