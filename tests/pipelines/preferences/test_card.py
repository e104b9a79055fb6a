"""The dataset card: schema, counts, models and rewards, and how the trainer reads what was exported for it."""

import json
from pathlib import Path

import pytest

from pipelines.build_preferences import main
from pipelines.corpus.storage import Storage
from tests.pipelines.preferences.fabricate import candidate, publish_corpus, row, table

pytestmark = pytest.mark.usefixtures("in_this_process")


def test_card_tells_what_the_dataset_is_made_of(tmp_path: Path) -> None:
    policies = ["small", "small", "large"]
    corpus = table(
        [
            row(f"Name a river of land {number}.", [candidate("No.", model=policy)], ["The Elbe."], q=([0.5], [number]))
            for number, policy in enumerate(policies, 1)
        ]
    )
    root = publish_corpus(tmp_path / "corpus", corpus)
    note = "The reward q is a sum of rules (1 length): not a measure of quality."
    Storage(str(root)).create("runs/000001.json", json.dumps({"notes": [note]}).encode())
    job = [f"input.path={root}", f"output.root={tmp_path / 'root'}"]
    assert main([*job, "build.reward=q", "export=openrlhf", "prompts.dedup=none"]) == 0
    card = (tmp_path / "root" / "README.md").read_text()
    for line in (
        "| run=000001 | 3 | 0 | 3 |",
        "| reward before | 0.5 |",
        "| reward after | 2 |",
        "| `chosen_model` | 3 `aligner` |",
        "| `chosen_policy` | 1 `large`, 2 `small` |",
        "| `rejected_model` | 1 `large`, 2 `small` |",
        "| `build.reward` | `q` |",
        "| `chosen` | `list<item: struct<role: string not null, content: string not null>>` |",
        f"What it was built from is at `file://{root}`.",
        note,
        "## Read it: openrlhf",
        "python -m openrlhf.cli.train_dpo --data.dataset <this folder> --data.apply_chat_template …",
    ):
        assert line in card.splitlines()
