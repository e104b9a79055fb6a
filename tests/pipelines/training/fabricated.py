"""Datasets of trajectories made up for tests, as if they had been published."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.preferences.schema import STRATEGIES

WORDS = ("one", "two", "three", "five", "eight", "a", "the", "of", "to", "and", "is", "not", "more", "less", "good")


def row(number: int, num_states: int = 3) -> dict[str, Any]:
    """A trajectory of which every text differs from all others."""
    states = []
    for step in range(num_states):
        words = (WORDS[(number * 7 + step * 4 + at * (1 + number % 3)) % len(WORDS)] for at in range(4))
        states.append(f"{number} is {' '.join(words)}.")
    return {
        "prompt_id": f"prompt-{number}",
        "prompt": [{"role": "user", "content": f"Tell me of number {number}."}],
        "states": states,
        "rewards": [float(step) for step in range(num_states)],
        "models": ["policy"] * num_states,
        "policies": ["policy"] * num_states,
        "partition": 1,
    }


def publish_trajectories(root: Path, number: int = 1, **splits: list[dict[str, Any]]) -> Path:
    """Write a finished partition with these rows, by split, below a dataset's root. Returns the root."""
    folder = root / f"preferences/run={number:06d}"
    folder.mkdir(parents=True)
    schema = pa.schema([field for field in STRATEGIES["trajectory"] if field.name != "split"])
    records = []
    for split, rows in splits.items():
        path = folder / f"{split}-00000.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        data = path.read_bytes()
        told = {"num_rows": len(rows), "num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        records.append({"path": str(path.relative_to(root)), **told})
    (folder / "plan.json").write_text(json.dumps({"number": number, "parts": [], "runs": [1], "shards": []}))
    manifest = {"number": number, "preferences": records, "dropped": [], "rows": [], "finished_shards": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "_SUCCESS").touch()
    return root
