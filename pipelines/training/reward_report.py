"""What the train_reward job tells: what it would do, what came of it, and the model's card."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from actors.candidates import model_label
from actors.engines.base import ScoringConfig
from actors.engines.by_url import on_this_node
from actors.engines.footprint import footprint
from actors.engines.identity import hub_id
from actors.training.accuracy import Accuracy, accuracy_of
from actors.training.reward_settings import Pair, RewardTrainingConfig, num_steps_of
from pipelines.training.material import Material

if TYPE_CHECKING:
    from actors.training.bradley_terry import Step

RECORD = "training.json"
GIB = 1 << 30


def result(
    num_pairs: int, steps: Sequence["Step"], held_out: Sequence[Pair], margins: Sequence[float]
) -> dict[str, Any]:
    """What came of training on `num_pairs`, for RECORD and the card. Losses are means over the first and the last tenth
    of the steps.

    Args:
        margins: of the held-out pairs, the score of the chosen answer less that of the rejected one.
    """
    prompts = [pair.prompt for pair in held_out]
    longer = [float(len(pair.chosen) - len(pair.rejected)) for pair in held_out]
    losses = [each.loss for each in steps]
    tenth = max(1, len(steps) // 10)
    return {
        "num_pairs": num_pairs,
        "num_steps": len(steps),
        "num_tokens": sum(each.num_tokens for each in steps),
        "seconds": sum(each.seconds for each in steps),
        "first_loss": float(np.mean(losses[:tenth])),
        "last_loss": float(np.mean(losses[-tenth:])),
        "held_out_loss": float(np.logaddexp(0, -np.asarray(margins)).mean()),
        "held_out": asdict(accuracy_of(prompts, margins)),
        "longer": asdict(accuracy_of(prompts, longer)),
    }


def _told(result: Mapping[str, Any]) -> list[str]:
    """Lines that tell a person what came of it."""
    held_out = Accuracy(**result["held_out"])
    pace = result["num_tokens"] / result["seconds"]
    return [
        f"trained: {result['num_steps']} steps, {result['num_pairs']} pairs, {result['num_tokens']} tokens in "
        f"{result['seconds']:.1f} s ({pace:.0f} tokens/s); loss {result['first_loss']:.4f} -> "
        f"{result['last_loss']:.4f}",
        f"held out: {held_out.num_pairs} pairs of {held_out.num_prompts} prompts: accuracy {held_out}, loss "
        f"{result['held_out_loss']:.4f}; preferring the longer answer: {Accuracy(**result['longer'])}",
    ]


def print_pairs(material: Material) -> None:
    """What is trained on, what is held out, and what is neither."""
    num_train, num_held_out = len(material.train), len(material.held_out)
    told = f"pairs: {num_train} to train on, {num_held_out} held out; left out: {_listed(material.left_out)}"
    print(told, flush=True)


def print_dry_run(config: RewardTrainingConfig, base: ScoringConfig, material: Material) -> None:
    """What a run would do."""
    print_pairs(material)
    for name, pairs in (("to train on", material.train), ("held out", material.held_out)):
        lengths = [len(text) for pair in pairs for text in (pair.chosen, pair.rejected)]
        half, most = np.percentile(lengths, [50, 95])
        print(
            f"tokens: texts {name} have {np.mean(lengths):.0f} on average, 50% up to {half:.0f}, 95% up to {most:.0f}, "
            f"the longest {max(lengths)}; {sum(lengths)} in all"
        )
    print(
        f"cut: none, as the reward pool cuts none; {material.left_out['too_long']} pairs have a text longer than "
        f"training.max_tokens={config.max_tokens} and are not trained on"
    )
    print(
        f"steps: {num_steps_of(len(material.train), config)} of {config.batch_size} pairs, {config.num_epochs} epochs"
    )
    if found := footprint(base):
        print(
            f"memory: {found.weight_bytes / GIB:.2f} GiB float32 weights, and 3 times those that are trained for "
            f"gradients and AdamW; activations grow with training.batch_tokens={config.batch_tokens}"
        )
    from actors.engines.prompts import load_tokenizer, render_prompt

    tokenizer = load_tokenizer(on_this_node(base).model, base.revision)
    for side in ("chosen", "rejected"):
        print(f"--- first pair, {side}\n{render_prompt(tokenizer, list(getattr(material.train[0], side)))}")


def print_summary(root: Path, record: Mapping[str, Any]) -> None:
    """What came of the training, and how the model is used."""
    for line in _told(record["result"]):
        print(line)
    print(f"model: {root} (reward.engine=torch reward.model={root})")


def card(name: str, base: ScoringConfig, record: Mapping[str, Any]) -> str:
    """The model card: what it is, how it was made, and how often it is right. The base model is pinned."""
    found = hub_id(base)
    header = {
        **({} if found is None else {"base_model": found}),
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "bradley-terry", "burnish"],
    }
    lines = ["---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {name}", ""]
    lines += [
        f"A reward model: {model_label(base)} with a head of one label, trained by burnish on preference pairs with "
        "Bradley and Terry's loss. Scores of answers to one prompt can be compared; nothing else of them means "
        "anything.",
        "",
        *(f"- {line}" for line in _told(record["result"])),
        "",
        "The interval is Wilson's, over prompts. No prompt that is held out was trained on.",
        "",
        "## Made with",
        "",
        "```bash",
        record["command"],
        "```",
        "",
        f"Code {record['code_version']}, seed {record['config']['training']['seed']}. The loss of each step is in "
        f"`losses.jsonl`, all settings are in `{RECORD}`.",
        "",
        "| file | bytes | version |",
        "|---|---|---|",
        *(f"| `{each['path']}` | {each['num_bytes']} | `{each['version']}` |" for each in record["files"]),
        "",
        f"Pairs that are neither trained on nor held out: {_listed(record['left_out'])}.",
        "",
        "## Use it",
        "",
        "```bash",
        "python pipelines/score_corpus.py reward.engine=torch reward.model=THIS_FOLDER \\",
        "    input.path=CORPUS output.root=SCORED",
        "```",
        "",
        "A chat with its answer goes through the chat template, and `AutoModelForSequenceClassification` gives its "
        "logit: in float32 (`reward.dtype=float32`) the one that the figures above are of.",
        "",
    ]
    return "\n".join(lines)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in sorted(counts.items()) if count) or "none"
