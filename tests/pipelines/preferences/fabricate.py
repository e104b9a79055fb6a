"""Corpora made up for tests: rows with candidates and rewards, and roots that look as if they had been published."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus import schema

Row = dict[str, Any]


def candidate(text: str, **more: Any) -> dict[str, Any]:
    """A candidate that is well; an aligned text takes `changed` and the like as null."""
    return {
        "text": text, "reasoning": None, "model": "policy", "status": "ok", "error": None, "finish_reason": "stop",
        "num_prompt_tokens": 3, "num_tokens": len(text.split()), "seed": 0, **more,
    }  # fmt: skip


def row(
    prompt: str | list[tuple[str, str]],
    responses: list[Any],
    aligned: list[Any],
    prompt_id: str | None = None,
    **rewards: tuple[list[float | None], list[float | None]],
) -> Row:
    """A corpus row. Candidates are texts, or made by `candidate`; `rewards` are (of responses, of aligned) by name."""
    chat = [("user", prompt)] if isinstance(prompt, str) else prompt
    made = [candidate(each) if isinstance(each, str) else each for each in responses]
    better = [candidate(each, model="aligner") if isinstance(each, str) else each for each in aligned]
    return {
        "prompt_id": prompt_id or hashlib.sha256(repr(chat).encode()).hexdigest()[:8],
        "prompt": [{"role": role, "content": content} for role, content in chat],
        "responses": made,
        "aligned": better,
        "source": {"shard": "prompts.parquet", "row_group": 0, "row": 0},
        "rewards": [{"name": name, "response": of[0], "aligned": of[1]} for name, of in rewards.items()] or None,
    }


def table(rows: list[Row], **kept: list[Any]) -> pa.Table:
    """Corpus rows as a table; `kept` are further columns."""
    made = pa.Table.from_pylist(rows, schema=schema.CORPUS)
    for name, values in kept.items():
        made = made.append_column(name, pa.array(values))
    return made


def publish_corpus(root: Path, *parts: pa.Table, number: int = 1, row_group_size: int = 1024) -> Path:
    """Write a finished partition with these parts below a corpus's root. Returns the root."""
    folder = root / f"corpus/run={number:06d}"
    folder.mkdir(parents=True)
    records = []
    for at, part in enumerate(parts):
        path = folder / f"part-{at:05d}.parquet"
        pq.write_table(part, path, row_group_size=row_group_size, write_page_checksum=True)
        data = path.read_bytes()
        checksum = hashlib.sha256(data).hexdigest()
        records.append(
            {
                "path": str(path.relative_to(root)), "num_rows": part.num_rows, "num_bytes": len(data),
                "sha256": checksum,
            }
        )  # fmt: skip
    plan = {"number": number, "parts": [], "runs": [1], "shards": []}
    manifest = {"number": number, "corpus": records, "quarantine": [], "rows": [], "finished_shards": []}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "_SUCCESS").touch()
    return root


def damage(path: Path) -> None:
    """Spoil the first pages of a part; its footer and its size stay."""
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(200) + data[204:])
