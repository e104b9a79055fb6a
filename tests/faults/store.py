"""Prompts put on an object store, and the corpus found there, whatever befell the job in between."""

import tempfile
from collections import Counter
from pathlib import Path

from pipelines.corpus.storage import Storage
from tests.end_to_end.jobs import Row, by_place, corpus, place, quarantine, write_shard

NUM_SHARDS, ROWS_EACH = 3, 40
EMPTY = {17, 90}
"""Rows without a prompt, which the quarantine gets."""


def write_prompts(folder: Path, num_shards: int = NUM_SHARDS) -> Path:
    """Shards of prompts with their answers, 20 rows a row group."""
    for shard in range(num_shards):
        numbers = range(shard * ROWS_EACH, (shard + 1) * ROWS_EACH)
        columns = {
            "id": [f"prompt-{number}" for number in numbers],
            "prompt": ["" if number in EMPTY else f"What is {number}?" for number in numbers],
            "response": [f"It is {number} {'and more ' * (number % 7)}." for number in numbers],
        }
        write_shard(folder / f"shard-{shard}.parquet", columns, row_group_size=20)
    return folder


def upload(folder: Path, url: str, endpoint: str) -> None:
    """Copy the files of a folder to the store, past any proxy."""
    target = Storage(url, {"endpoint_url": endpoint})
    for path in folder.iterdir():
        assert target.create(path.name, path.read_bytes())


def published(url: str, endpoint: str | None = None) -> tuple[list[Row], list[Row]]:
    """(corpus rows, quarantined rows) in the input's order. Raises AssertionError where anything is there twice, or is
    not what the manifests say, or a partition is not finished.

    Without `unit`, which names the version of the shard: stores tell versions apart in ways of their own.
    """
    if endpoint is None:
        return _published(Path(url))
    root = Storage(url, {"endpoint_url": endpoint})
    with tempfile.TemporaryDirectory() as name:
        for kind in ("corpus", "quarantine"):
            for folder in root.folders(kind):
                for file in root.sizes(f"{kind}/{folder}"):
                    path = Path(name) / kind / folder / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(root.read(f"{kind}/{folder}/{file}"))
        return _published(Path(name))


def _published(root: Path) -> tuple[list[Row], list[Row]]:
    plans = sorted(path.parent.name for path in root.glob("corpus/run=*/plan.json"))
    assert plans == sorted(path.parent.name for path in root.glob("corpus/run=*/_SUCCESS")), "an unfinished partition"
    rows, bad = by_place(corpus(root)), by_place(quarantine(root))
    twice = [where for where, count in Counter(map(place, [*rows, *bad])).items() if count > 1]
    assert not twice, f"rows published twice: {twice}"
    return rows, [{name: row[name] for name in row if name != "unit"} for row in bad]
