"""What a preference dataset's partitions hold: how built units become parts, and what their manifests and card tell."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from pipelines.corpus.card import card_config, card_configs, made_with, size_category
from pipelines.corpus.publish import Kind
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit
from pipelines.preferences import checks, schema
from pipelines.preferences.arrow import whole
from pipelines.preferences.exporters import EXPORTERS

FOLDER = "preferences"
ROWS_AT_ONCE = 4096
SPLITS = ("train", "validation", "test")


def preferences(*, jsonl: bool, files: Mapping[str, str]) -> Kind:
    """A preference dataset: parts by split; prompts from which nothing was made are told in `dropped`.

    Args:
        jsonl: whether each part is written as JSON lines too.
        files: what stands beside the card: content by name.
    """

    def finished(output: Storage, plan: Mapping[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
        for name, content in files.items():
            output.put(name, content.encode())
        told = {name: plan[name] for name in ("num_made", "made", "unused", "num_candidates", "models")}
        report = {"report": checks.report(plan["checks"]), "checks": plan["checks"]}
        return {**told, **report, "jsonl": [_write_jsonl(output, part) for part in parts] if jsonl else []}

    return Kind(
        left_out="dropped",
        names=lambda facts: facts["made"],
        rows=_rows,
        left_out_rows=_dropped_rows,
        summed=summed,
        refusal=_refusal,
        finished=finished,
        card=card,
    )


def _rows(table: pa.Table, split: str) -> pa.Table:
    """The rows that were made of a unit's prompts of one split."""
    lists = whole(table.filter(pc.equal(table["split"], split))["made"])
    return pa.Table.from_struct_array(lists.flatten())


def _dropped_rows(unit: Unit, rows: pa.Table) -> pa.Table:
    source = whole(rows["source"])
    columns = [rows["prompt_id"], source.field("shard"), source.field("row"), rows["cause"]]
    return pa.table(columns, names=schema.DROPPED.names).cast(schema.DROPPED)


def summed(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of units: rows made by split, candidates used and unused, and the checked facts."""
    made, unused = Counter[str](), Counter[str]()
    for each in facts:
        made.update(each["made"])
        unused.update(each["unused"])
    return {
        "num_made": made.total(),
        "made": dict(made),
        "unused": dict(unused),
        "num_candidates": sum(each["num_candidates"] for each in facts),
        "models": checks.summed(each["models"] for each in facts),
        "checks": checks.summed(each["checks"] for each in facts),
    }


def _refusal(plan: Mapping[str, Any]) -> str | None:
    told = checks.refusal(plan["checks"])
    if told is None:
        return None
    return (
        f"{told}; nothing is published. Where the corpus is at fault, mend it; then delete the folder `units` of the "
        f"output root, or take another root"
    )


def json_line(row: dict[str, Any]) -> bytes:
    """A row as JSON, UTF-8. What JSON has no type for, as kept columns may hold, is written as Python writes it."""
    return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"


def _write_jsonl(output: Storage, part: dict[str, Any]) -> dict[str, Any]:
    """Create the JSON lines of a part beside it, or leave those that are there. Returns their record."""
    path = part["path"].removesuffix(".parquet") + ".jsonl"

    def write(scratch: Path) -> None:
        with output.fs.open(output.path(part["path"])) as file, scratch.open("wb") as lines:
            for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE):
                lines.writelines(json_line(row) for row in batch.to_pylist())

    if not output.exists(path):
        output.create_file(path, write)
    return {"path": path, "num_rows": part["num_rows"], **output.checksum(path)}


# --- card -----------------------------------------------------------------------------------------------------------


def card(title: str, found: list[dict[str, Any]], run: dict[str, Any] | None) -> str:
    """The dataset card: a config `default` with its splits, counts, checked facts and the settings of the last run."""
    parts = [part for manifest in found for part in manifest[FOLDER]]
    dropped = [part for manifest in found for part in manifest["dropped"]]
    num_rows = sum(part["num_rows"] for part in parts)
    header = {
        "pretty_name": title,
        "tags": ["preference", "synthetic", "alignment", "burnish"],
        "size_categories": [size_category(num_rows)],
        "configs": card_configs(_by_split(parts), card_config("dropped", dropped)),
    }
    lines = ["---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {title}", ""]
    lines += ["Preferences between answers to one prompt, built from a corpus by burnish.", ""]
    names = [split for split in SPLITS if any(split in manifest["made"] for manifest in found)]
    lines += [f"| partition | prompts | dropped | {' | '.join(names)} |", f"|{'---|' * (len(names) + 3)}"]
    for each in found:
        made = " | ".join(str(each["made"].get(split, 0)) for split in names)
        lines.append(f"| run={each['number']:06d} | {each['num_rows']} | {each['num_quarantined']} | {made} |")
    sums = checks.summed(manifest["checks"] for manifest in found)
    lines += ["", "## Checked", "", "| fact | value |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {_told(value)} |" for name, value in checks.report(sums).items()]
    if found:
        causes = sum((Counter(each["causes"]) for each in found), Counter())
        unused = sum((Counter(each["unused"]) for each in found), Counter())
        lines += [f"| prompts dropped | {_told(dict(causes))} |", f"| candidates not used | {_told(dict(unused))} |"]
    models = checks.summed(manifest["models"] for manifest in found)
    if models:
        lines += ["", "## Models", "", "| column | texts of each |", "|---|---|"]
        for name, counts in models.items():
            told = ", ".join(f"{count} `{model}`" for model, count in sorted(counts.items()))
            lines.append(f"| `{name}` | {told} |")
    if run:
        lines += ["", "## Columns", "", "| column | type |", "|---|---|"]
        lines += [f"| `{name}` | `{dtype}` |" for name, dtype in run["columns"].items()]
        lines += made_with(run)
        lines += ["", "## The corpus", "", f"What it was built from is at `{run['input_root']}`."]
        for note in run.get("notes", []):  # records of earlier versions have none
            lines += ["", note]
        export = run["config"]["export"]
        if export:
            told = EXPORTERS[export].read(run["config"]["build"]["strategy"])
            lines += ["", f"## Read it: {export}", "", told]
    lines += ["", "Only files that a `manifest.json` lists belong to it; a partition counts from `_SUCCESS` on.", ""]
    return "\n".join(lines)


def _by_split(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The config `default` of the YAML header: the dataset by split."""
    files = [
        {"split": split, "path": paths}
        for split in SPLITS
        if (paths := [part["path"] for part in parts if part["path"].rsplit("/", 1)[1].startswith(f"{split}-")])
    ]
    return card_config("default", parts) | {"data_files": files}


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(value.items())) or "none"
    if isinstance(value, list):
        return " to ".join(_told(each) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
