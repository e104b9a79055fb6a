"""The dataset card: README.md of the output root, with the YAML header that the Hub and `datasets` read."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import yaml

from pipelines.corpus.runs import latest_run
from pipelines.corpus.scored import failures
from pipelines.corpus.state import manifests
from pipelines.corpus.storage import Storage

CardText = Callable[[str, list[dict[str, Any]], dict[str, Any] | None], str]
"""The card of a title, the manifests and the last run record."""


def write_card(output: Storage, title: str, text: CardText | None = None) -> None:
    """Write the card from the manifests until it is there as they have it: a late writer may put an outdated one."""
    while True:
        card = (text or corpus_card)(title, manifests(output), latest_run(output)).encode()
        if output.exists("README.md") and output.read("README.md") == card:
            return
        output.put("README.md", card)


def corpus_card(title: str, found: list[dict[str, Any]], run: dict[str, Any] | None) -> str:
    """The card of a corpus."""
    num_ok = sum(manifest["num_ok"] for manifest in found)
    corpus, quarantine = ([part for each in found for part in each[kind]] for kind in ("corpus", "quarantine"))
    header = {
        "pretty_name": title,
        "tags": ["synthetic", "alignment", "burnish"],
        "size_categories": [size_category(num_ok)],
        "configs": card_configs(card_config("default", corpus), card_config("quarantine", quarantine)),
    }
    lines = ["---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {title}", ""]
    lines += [
        "Prompts, the answers of a policy model, and the same answers aligned, one row per prompt. Made by burnish.",
        "",
    ]
    lines += [
        "| partition | rows | quarantined | repeated ids | shards finished | fingerprint |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| run={each['number']:06d} | {each['num_ok']} | {each['num_quarantined']} | {each['num_repeated_ids']} | "
        f"{len(each['finished_shards'])} | {', '.join(each['fingerprints'])} |"
        for each in found
    ]
    lines += _rewards(found)
    if run:
        lines += made_with(run)
        for note in run.get("notes", []):  # records of earlier versions have none
            lines += ["", note]
    lines += [
        "",
        "## Read it",
        "",
        "```python",
        "import datasets",
        'rows = datasets.load_dataset("<this folder>", split="train")',
    ]
    lines += [
        "```",
        "",
        "Only files that a `manifest.json` lists belong to the corpus; a partition counts from `_SUCCESS` on.",
        "",
    ]
    return "\n".join(lines)


def _rewards(found: list[dict[str, Any]]) -> list[str]:
    """The means of each reward and the texts that it could not score, by partition; [] where nothing was scored.
    Manifests of earlier versions have none."""
    rows = []
    for each in found:
        means, unscored = each.get("rewards", {}), failures(each)
        for name in sorted({*means, *unscored}):
            both = "0 | |"
            if name in means:
                of = means[name]
                both = f"{of['num_candidates']} | {of['response']:.4g} | {of['aligned']:.4g}"
            causes = ", ".join(f"{count} {cause}" for cause, count in unscored.get(name, {}).items())
            rows.append(f"| run={each['number']:06d} | {name} | {both} | {causes or 0} |")
    if not rows:
        return []
    head = ["partition", "reward", "candidates", "mean of responses", "mean of aligned texts", "texts without a score"]
    return ["", "## Rewards", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]


def made_with(run: dict[str, Any]) -> list[str]:
    """Lines of a card that tell the settings of a run."""
    lines = ["", "## Made with", "", "| setting | value |", "|---|---|"]
    return lines + [f"| `{key}` | {_cell(value)} |" for key, value in sorted(run["fingerprint"].items())]


def card_config(name: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A config of the YAML header.

    `datasets` keeps what it has loaded under a hash of this header, not of the files: without the checksums in it, two
    roots of the same name whose parts have the same names would be one to it.
    """
    checksums = "".join(part["sha256"] for part in parts).encode()
    description = f"{sum(part['num_rows'] for part in parts)} rows, sha256 {hashlib.sha256(checksums).hexdigest()}"
    return {"config_name": name, "description": description, "data_files": [part["path"] for part in parts]}


def card_configs(default: dict[str, Any], besides: dict[str, Any]) -> list[dict[str, Any]]:
    """The configs of the YAML header: what is loaded where none is named, and what is there besides, if it has files.

    Without files the default is there, too, as one that `datasets` refuses: it would take what is besides instead, or
    whatever files it finds. It then stands last, as the first one's files tell of what kind they all are.
    """
    filled = [besides] if besides["data_files"] else []
    return [default, *filled] if default["data_files"] else [*filled, default]


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)  # as one would type it
    text = text.replace("|", "\\|").replace("\n", "⏎")
    return f"`{text[:200]}{'…' if len(text) > 200 else ''}`"


def size_category(num_rows: int) -> str:
    """The Hub's names for sizes."""
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    bounds += [(10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B")]
    return next((name for bound, name in bounds if num_rows < bound), "n>1B")
