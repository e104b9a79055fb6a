"""The model card of a trained aligner: what it was made of, by which command, and what it came to."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from actors.engines.base import EngineConfig
from actors.engines.identity import hub_id
from pipelines.corpus.card import made_with
from pipelines.training.aligner_report import gain
from pipelines.training.aligner_settings import TrainAlignerConfig
from pipelines.training.checkpoints import Record


def model_card(
    config: TrainAlignerConfig,
    base: EngineConfig,
    record: Mapping[str, Any],
    counts: Mapping[str, int],
    history: Sequence[Record],
) -> str:
    """README.md of the model's folder.

    Args:
        base: the model that was trained, pinned.
        record: the run's: command, code_version, fingerprint.
        counts: trajectories used and left_out, and steps.
        history: records of all steps and evaluations.
    """
    training = config.training
    steps = [each for each in history if "loss" in each]
    header: dict[str, Any] = {
        "library_name": "peft" if training.lora_rank else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alignment", "diffpo", "jacobi-decoding", "burnish"],
    }
    if (found := hub_id(base)) is not None:
        header["base_model"] = found
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# {config.output.title}", ""]
    kind = f"a LoRA adapter of rank {training.lora_rank} for" if training.lora_rank else "all weights of"
    lines += [
        f"A DiffPO aligner (arXiv 2503.04240): {kind} `{training.model}`, trained to turn any answer to a prompt into "
        "a better one, many tokens at a time. burnish loads this folder as it is:",
        "",
        "```bash",
        "python pipelines/align_corpus.py aligner.recipe=diffpo aligner.model=THIS_FOLDER \\",
        f"    aligner.max_tokens={training.max_tokens} aligner.block_size={training.max_tokens} ...",
        "```",
        "",
        "## How it was made",
        "",
        "```bash",
        without_limit(record["command"]),
        "```",
        "",
        f"Code version {record['code_version']}; {counts['trajectories']} trajectories, {counts['left_out']} more left "
        f"out for their prompts, {counts['cut']} best answers cut at max_tokens; "
        f"{counts['steps']} steps, seed {training.seed}, "
        f"{sum(each['tokens'] for each in steps):.0f} tokens of best answers in "
        f"{sum(each['seconds'] for each in steps) / 3600:.2f} hours of training; "
        f"{config.run.num_workers} x {'GPU' if config.run.use_gpu else 'CPU'}.",
    ]
    lines += _losses(steps, training.omega)
    lines += _evaluations(history, config)
    lines += made_with(dict(record))
    return "\n".join([*lines, ""])


def without_limit(command: str) -> str:
    """The command that makes the whole model, where the first one was to stop early."""
    words = shlex.split(command)
    if "--limit" in words:
        at = words.index("--limit")
        del words[at : at + 2]
    return shlex.join(words)


def _losses(steps: Sequence[Record], omega: float) -> list[str]:
    tenth = max(1, len(steps) // 10)
    rows = [
        f"| {name} | {_mean(some, 'ar'):.4g} | {format(_mean(some, 'con'), '.4g') if omega else 'not computed'} |"
        for name, some in (("first tenth of the steps", steps[:tenth]), ("last tenth", steps[-tenth:]))
    ]
    return ["", "## Losses", "", "| mean over trajectories | L_AR | L_Con |", "|---|---|---|", *rows]


def _evaluations(history: Sequence[Record], config: TrainAlignerConfig) -> list[str]:
    found = [each for each in history if "iterations" in each]
    if not found:
        return []
    lines = ["", "## On held-out prompts", ""]
    lines += [
        "The first of the dataset's split `validation`, each with one of its worse answers, which is aligned to the "
        "fixed point by plain Jacobi iteration.",
        "",
        "| steps | iterations to converge | tokens | changed | cut | reward before | after | gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        scores = [f"{each[name]:.4g}" if name in each else "-" for name in ("response", "aligned")]
        lines.append(
            f"| {each['step']:.0f} | {each['iterations']:.2f} | {each['tokens']:.1f} | {each['changed']:.1%} | "
            f"{each['cut']:.1%} | "
            f"{' | '.join(scores)} | {gain(each)} |"
        )
    if config.reward is not None:
        lines += ["", f"The reward is `{config.reward.label}`."]
    return lines


def _mean(steps: Sequence[Record], name: str) -> float:
    return sum(each[name] for each in steps) / len(steps)
