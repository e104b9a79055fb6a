"""The job that trains an aligner: what it resumes, Ray Train's processes, and what a person sees of them."""

import importlib.util
import shlex
import time
from dataclasses import replace
from typing import Any, TypeVar

from actors.contract import ConfigError
from actors.engines.base import EngineConfig
from actors.engines.by_url import ADAPTER, is_url
from actors.engines.identity import pinned
from pipelines import report
from pipelines.config import Flags, resolved
from pipelines.corpus.lease import Lease
from pipelines.corpus.runs import changes, create_run, digest, latest_run
from pipelines.corpus.storage import Storage
from pipelines.settings import SiteConfig, check_rules, code_version
from pipelines.training.aligner_report import Progress, print_dry_run, print_summary
from pipelines.training.aligner_settings import TrainAlignerConfig, fingerprint
from pipelines.training.trajectories import Part, of_split, published_parts

Model = TypeVar("Model", bound=EngineConfig)

SCRIPT = "pipelines/train_aligner.py"


def run_training(config: TrainAlignerConfig, argv: list[str], dataset: Storage, output: Storage, flags: Flags) -> int:
    """Train, or go on training, and leave the model in the output root. Returns the exit code, 0.

    Raises ConfigError where the output root holds another training, or anything else.
    """
    site, training = config.site, config.training
    if training.lora_rank and importlib.util.find_spec("peft") is None:
        raise ConfigError("training.lora_rank is above 0, which needs peft: pip install '.[train]'")
    base = _pinned(
        EngineConfig(model=training.model, revision=training.revision, dtype=training.dtype), "training", site
    )
    if config.reward is not None:
        check_rules(config.reward, "reward")
        config = replace(config, reward=_pinned(config.reward, "reward", site))
    if flags.dry_run:
        record = _record(config, base, argv, dataset, output)
        print_dry_run(config, base, dataset, output, record)
        return 0
    with Lease(output, config.run.lease_ttl_s, announce=report.say):
        output.sweep()
        record = _record(config, base, argv, dataset, output)
        if not is_finished(output):
            if latest_run(output) is None:
                create_run(output, record)
            _train(config, base, dataset, output, record, flags)
        print_summary(output, is_finished(output), training.max_tokens)
    return 0


def is_finished(output: Storage) -> bool:
    """Whether the root holds a whole model: what describes it is written last."""
    return any(output.exists(name) for name in ("config.json", ADAPTER))


def _pinned(model: Model, section: str, site: SiteConfig) -> Model:
    """The config with its model pinned, and with the site's options where that is named by URL and has none."""
    if is_url(model.model) and not model.model_storage_options:
        model = replace(model, model_storage_options=site.storage_options)
    return pinned(model, section)


def _record(
    config: TrainAlignerConfig, base: EngineConfig, argv: list[str], dataset: Storage, output: Storage
) -> dict[str, Any]:
    """The run's record: that of the training which is there already, or else a new one.

    A training that was begun goes on with the data it began with: partitions published since are for the next one.
    """
    before = latest_run(output)
    if is_finished(output) if before is None else "parts" not in before:
        raise ConfigError(f"output.root {output.url} holds something else than a training: take another folder")
    parts: list[Part] = before["parts"] if before else published_parts(dataset)
    if not of_split(parts, "train"):
        raise ConfigError(f"{dataset.url} has no split `train`")
    made_of = fingerprint(config, base, parts)
    if before is not None:
        if found := changes(before["fingerprint"], made_of):
            raise ConfigError(
                f"output.root holds a training of another config: {'; '.join(found.values())}. Run it with the old "
                "values, or take another output.root"
            )
        return before
    return {
        "started_at": time.time(),
        "code_version": code_version(),
        "command": shlex.join(["python", SCRIPT, *argv]),
        "fingerprint": made_of,
        "digest": digest(made_of),
        "parts": [dict(part) for part in parts],
        "config": resolved(config),
    }


# --- training -------------------------------------------------------------------------------------------------------


def _train(
    config: TrainAlignerConfig,
    base: EngineConfig,
    dataset: Storage,
    output: Storage,
    record: dict[str, Any],
    flags: Flags,
) -> None:
    """Run the processes until they are done. Raises what they raised for a person, or Ray Train's own error."""
    from pipelines.training import checkpoints, on_ray  # which import torch, and take seconds
    from pipelines.training.aligner_worker import Work, train

    stop = None
    if flags.limit is not None:  # counted from here, however often processes die on the way
        stop = checkpoints.last_step(output) + -(-flags.limit // config.training.batch_size)
    work = Work(config, base, dataset, output, record["parts"], record, stop)
    progress = Progress(config.site.log_every_s)
    for kind, what in on_ray.trained(train, {"work": work}, config.run, config.site, lambda: progress.state):
        progress.show(kind, what)
