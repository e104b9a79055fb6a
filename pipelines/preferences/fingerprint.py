"""What makes a dataset's rows: the fingerprint that two runs must share, and the record that a run leaves."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.contract import ConfigError
from actors.engines.base import EngineConfig
from actors.engines.identity import identity
from pipelines.config import changes_rows, resolved
from pipelines.corpus.plan import Plan
from pipelines.corpus.runs import digest
from pipelines.preferences import schema
from pipelines.preferences.build import output_columns
from pipelines.preferences.settings import BuildPreferencesConfig
from pipelines.preferences.source import PublishedCorpus
from pipelines.settings import code_version


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


def run_record(
    config: BuildPreferencesConfig, source: PublishedCorpus, plan: Plan, made_of: Mapping[str, Any]
) -> dict[str, Any]:
    """What runs/<n>.json keeps: enough to build the same rows again, and to tell whether a later run would."""
    return {
        "started_at": time.time(),
        "code_version": code_version(),
        "fingerprint": made_of,
        "digest": digest(made_of),
        "kept_types": plan.kept_types,
        "columns": output_columns(config, plan.kept_types),
        "input_root": source.root_url,
        "num_units": plan.num_units,
        "num_rows": plan.num_rows,
        "config": resolved(config),
    }
