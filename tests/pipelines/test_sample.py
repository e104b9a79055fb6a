"""The committed sample: its prompts are well formed and its shards are what make_shards.py makes of them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.sample import make_shards, make_training_prompts

SHARDS = sorted((make_shards.SAMPLE / "prompts").glob("*.parquet"))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    prompts: list[dict[str, Any]] = make_shards.read_prompts(make_shards.SAMPLE / "prompts.jsonl").to_pylist()
    return prompts


def test_committed_shards_equal_what_make_shards_makes() -> None:
    expected = make_shards.split_shards(make_shards.read_prompts(make_shards.SAMPLE / "prompts.jsonl"))
    assert [path.name for path in SHARDS] == [f"part-{index:05d}.parquet" for index in range(len(expected))]
    for path, table in zip(SHARDS, expected, strict=True):
        read_back = pq.read_table(path)
        assert read_back.schema == table.schema, path.name
        assert read_back.equals(table.combine_chunks()), path.name


def test_shards_have_several_row_groups_of_16_rows_in_zstd() -> None:
    assert len(SHARDS) >= 4
    for path in SHARDS:
        metadata = pq.read_metadata(path)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        assert len(groups) >= 2
        assert [group.num_rows for group in groups[:-1]] == [16] * (len(groups) - 1)
        assert {group.column(0).compression for group in groups} == {"ZSTD"}


def test_rewritten_shards_have_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.jsonl").write_bytes((make_shards.SAMPLE / "prompts.jsonl").read_bytes())
    monkeypatch.setattr(make_shards, "SAMPLE", tmp_path)
    contents = []
    for _ in range(2):
        make_shards.main()
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "prompts").iterdir()})
    assert contents[0] == contents[1]


def test_there_are_enough_prompts_categories_and_chats(rows: list[dict[str, Any]]) -> None:
    assert len(rows) >= 96
    assert len({row["category"] for row in rows}) >= 8
    turns = Counter(sum(message["role"] == "user" for message in row["prompt"]) for row in rows)
    assert sum(count for num_turns, count in turns.items() if num_turns > 1) >= 16
    assert turns[3] > 0
    assert any(row["prompt"][0]["role"] == "system" for row in rows)


def test_ids_and_prompts_are_unique(rows: list[dict[str, Any]]) -> None:
    assert max(Counter(row["id"] for row in rows).values()) == 1
    assert max(Counter(str(row["prompt"]) for row in rows).values()) == 1
    assert all(row["id"].startswith(row["category"] + "-") for row in rows)


def test_roles_alternate_after_an_optional_system_message_and_end_with_the_user(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        roles = [message["role"] for message in row["prompt"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"], row["id"]
        assert all(message["content"].strip() for message in row["prompt"]), row["id"]


def test_prompts_are_short_enough_for_a_small_model_on_a_cpu(rows: list[dict[str, Any]]) -> None:
    lengths = [sum(len(message["content"].split()) for message in row["prompt"]) for row in rows]
    assert max(lengths) < 100
    assert sum(length >= 60 for length in lengths) <= len(rows) // 20


def test_prompts_to_train_on_are_many_and_none_is_a_sample(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    script = Path(make_training_prompts.__file__)
    subprocess.run([sys.executable, str(script), str(tmp_path / "new" / "prompts.parquet")], check=True)
    made = pq.read_table(tmp_path / "new" / "prompts.parquet")
    assert made.num_rows > 1000
    for column in ("id", "prompt"):
        assert len(set(made[column].to_pylist())) == made.num_rows
    known = {_normal(message["content"]) for row in rows for message in row["prompt"]}
    assert not known & set(map(_normal, made["prompt"].to_pylist()))


def _normal(text: str) -> str:
    return " ".join(text.lower().split())
