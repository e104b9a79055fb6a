"""Every row that goes in comes out once, well or quarantined with a reason, whatever is wrong with it or its shard."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.end_to_end.conftest import tiny_pool
from tests.end_to_end.jobs import (
    CommandLine,
    CompletedJob,
    corpus,
    manifests,
    num_units,
    partition,
    quarantine,
    write_shard,
)

LONG = "Please tell me all about it. " * 20
NUM_BAD = {
    "null_prompt": 2,
    "empty_prompt": 3,
    "invalid_roles": 2,
    "invalid_utf8": 1,
    "duplicate_id": 1,
    "null_id": 1,
    "prompt_too_long": 2,
    "unreadable_row_group": 4,
}
NUM_GOOD = {"strings.parquet": 3, "chats.parquet": 2, "truncated.parquet": 4}
BAD_SHARDS = {
    "broken.parquet": "broken_footer",
    "columnless.parquet": "missing_column",
    "numbers.parquet": "wrong_type",
    "other-schema.parquet": "schema_mismatch",
}


def write_strings(folder: Path) -> None:
    rows: list[tuple[str | None, bytes | None]] = [
        ("s0", b"How?"),
        ("s1", None),
        ("s2", b""),
        ("s3", b" \n"),
        ("s4", b"caf\xe9"),
        ("s5", LONG.encode()),
        ("s0", b"Who?"),
        (None, b"Why?"),
        ("s8", b"When?"),
        ("s9", LONG.encode()),
        ("s0", b"Where?"),  # in another row group, hence another unit: counted, not removed
    ]
    ids, prompts = zip(*rows, strict=True)
    column = pa.array(prompts, pa.binary()).view(pa.string())  # strings whose bytes nobody has checked
    write_shard(folder / "strings.parquet", {"id": ids, "prompt": column, "topic": ["a"] * len(ids)})


def write_chats(folder: Path) -> None:
    def chat(*messages: tuple[str, str | None]) -> list[dict[str, str | None]]:
        return [{"role": role, "content": content} for role, content in messages]

    prompts = [
        chat(("user", "How?")),
        chat(("user", "How?"), ("user", "And why?")),
        chat(("assistant", "Hello."), ("user", "Why?")),
        chat(),
        chat(("user", None)),
        chat(("system", "Be brief."), ("user", "Where?")),
    ]
    columns = {"id": [f"c{number}" for number in range(6)], "prompt": prompts, "topic": ["b"] * 6}
    write_shard(folder / "chats.parquet", columns)


def write_truncated(folder: Path) -> None:
    """The second of two row groups is gone but for the footer, as after a copy that lost its blocks."""
    columns = {
        "id": [f"t{number}" for number in range(8)],
        "prompt": [f"What is {number}?" for number in range(8)],
        "topic": ["c"] * 8,
    }
    path = write_shard(folder / "truncated.parquet", columns, row_group_size=4)
    start = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    metadata = pq.read_metadata(path).row_group(1)
    size = sum(metadata.column(number).total_compressed_size for number in range(metadata.num_columns))
    data = bytearray(path.read_bytes())
    data[start : start + size] = bytes(size)
    path.write_bytes(data)


def write_bad_shards(folder: Path) -> None:
    path = write_shard(folder / "broken.parquet", {"id": ["b"], "prompt": ["Is this the end?"]})
    path.write_bytes(path.read_bytes()[:-20])
    write_shard(folder / "columnless.parquet", {"id": ["m"], "question": ["Where is it?"], "topic": ["a"]})
    write_shard(folder / "numbers.parquet", {"id": ["n"], "prompt": [7], "topic": ["a"]})
    write_shard(folder / "other-schema.parquet", {"id": ["o"], "prompt": ["What is it?"], "topic": [1.5]})


@dataclass(frozen=True)
class Account:
    """The runs over one folder of everything that can be wrong, in their order."""

    root: Path
    refused: CompletedJob
    withheld: CompletedJob
    num_withheld: int
    manifests_withheld: list[dict[str, Any]]
    accepted: CompletedJob
    retried: CompletedJob


@pytest.fixture(scope="module")
def account(command_line: CommandLine, tiny_llama: Path, new_folder: Callable[[], Path]) -> Account:
    folder = new_folder()
    root, prompts = folder / "output", folder / "prompts"
    write_strings(prompts)
    write_chats(prompts)
    write_truncated(prompts)
    nothing = {name: pa.array([], pa.string()) for name in ("id", "prompt", "topic")}
    write_shard(prompts / "empty.parquet", nothing)
    write_bad_shards(prompts)
    arguments = [
        f"input.path={prompts}", "input.id_column=id", "input.keep_columns=[topic]", f"output.root={root}",
        *tiny_pool("policy", tiny_llama, 8),
        "policy.max_model_len=100", "aligner=identity", "run.task_mib=1",
    ]  # fmt: skip
    refused = command_line.run(*arguments)
    assert not (root / "runs").exists()
    withheld = command_line.run(*arguments, "input.on_bad_shard=skip")
    num_withheld, nothing = num_units(root), manifests(root)
    for name in BAD_SHARDS:
        (prompts / name).unlink()
    accepted = command_line.run(*arguments, "run.accept_quarantined=true")
    write_bad_shards(prompts)
    retry = ["run.retry_quarantined=prompt_too_long", "policy.max_model_len=400", "run.accept_changes=true"]
    retried = command_line.run(*arguments, *retry, "input.on_bad_shard=skip")
    return Account(root, refused, withheld, num_withheld, nothing, accepted, retried)


def test_bad_shards_are_refused_before_any_work(account: Account) -> None:
    account.refused.expect(3)
    *bad, nothing = account.refused.errors
    for line, (name, reason) in zip(bad, BAD_SHARDS.items(), strict=True):
        assert line.startswith(f"error: shard {name}: {reason}: ")
    assert "input.on_bad_shard=skip" in nothing


def test_too_many_quarantined_rows_are_not_published(account: Account) -> None:
    account.withheld.expect(3)
    assert account.num_withheld > 0
    assert account.manifests_withheld == []
    assert "16 of 25 rows are quarantined" in account.withheld.stderr
    assert "run.accept_quarantined=true" in account.withheld.stderr


def test_they_are_published_when_they_are_accepted(account: Account) -> None:
    account.accepted.expect(0)
    first = manifests(account.root)[0]
    assert (first["num_rows"], first["num_ok"], first["num_quarantined"]) == (25, 9, 16)
    assert first["causes"] == NUM_BAD
    assert first["num_repeated_ids"] == 1


def test_every_row_comes_out_once(account: Account) -> None:
    first = manifests(account.root)[0]
    rows = [*partition(account.root, first, "corpus"), *partition(account.root, first, "quarantine")]
    places = Counter((row["source"]["shard"], row["source"]["row"]) for row in rows)
    sizes = {"strings.parquet": 11, "chats.parquet": 6, "truncated.parquet": 8}
    assert places == Counter((shard, row) for shard, size in sizes.items() for row in range(size))
    assert Counter(row["source"]["shard"] for row in partition(account.root, first, "corpus")) == NUM_GOOD


def test_a_quarantined_row_says_what_is_wrong_and_keeps_its_input(account: Account) -> None:
    rows = partition(account.root, manifests(account.root)[0], "quarantine")
    found = {(row["source"]["shard"].removesuffix(".parquet"), row["source"]["row"]): row for row in rows}
    assert Counter(row["cause"] for row in rows) == NUM_BAD
    for row in rows:
        assert row["message"]
        assert row["stage"] == ("policy" if row["cause"] == "prompt_too_long" else "read")
        if row["cause"] == "unreadable_row_group":
            assert row["input"] is None
        else:
            assert set(json.loads(row["input"])) == {"id", "prompt", "topic"}
    assert json.loads(found["strings", 1]["input"]) == {"id": "s1", "prompt": None, "topic": "a"}
    assert json.loads(found["strings", 4]["input"])["prompt"] == {"base64": "Y2Fm6Q=="}
    assert json.loads(found["chats", 1]["input"])["prompt"][1] == {"role": "user", "content": "And why?"}
    assert found["chats", 2]["message"] == "roles are assistant, user; system (optional), then user, assistant, … user"


def test_skipped_shards_are_recorded_and_tell_in_the_exit_code(account: Account) -> None:
    account.retried.expect(3)
    recorded = manifests(account.root)[1]["bad_shards"]
    assert {shard["path"]: shard["reason"].partition(":")[0] for shard in recorded} == BAD_SHARDS
    assert "warning: shard broken.parquet was skipped: broken_footer" in account.retried.stderr


def test_rows_that_were_too_long_arrive_in_a_later_partition(account: Account) -> None:
    second = manifests(account.root)[1]
    assert (second["num_rows"], second["num_ok"]) == (2, 2)
    rows = partition(account.root, second, "corpus")
    assert [row["prompt_id"] for row in rows] == ["s5", "s9"]
    assert all(row["prompt"][0]["content"] == LONG for row in rows)
    assert len(corpus(account.root)) == 9 + 2
    assert len(quarantine(account.root)) == 16
