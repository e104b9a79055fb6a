"""What a training reads: finished partitions as their manifests list them, whole or not at all."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from actors.contract import ConfigError
from pipelines.build_preferences import main as build_preferences
from pipelines.corpus.storage import Storage
from pipelines.preferences import stream
from pipelines.preferences.dataset import FOLDER
from pipelines.preferences.job import PreferencesJob
from pipelines.training.trajectories import of_split, published_parts, read_rows
from tests.pipelines.preferences import fabricate
from tests.pipelines.training.fabricated import publish_trajectories, row


def dataset(root: Path) -> Storage:
    return Storage(str(root), partitions=FOLDER)


def test_what_build_preferences_publishes_is_read_split_by_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reports(config: object, calls: list) -> object:  # type: ignore[type-arg]
        return (each for call in calls for made in call() for each in made.to_pylist())

    monkeypatch.setattr(stream, "reports", reports)
    monkeypatch.setattr(PreferencesJob, "connect", lambda self: None)
    some = [
        fabricate.row(f"Tell me of {number}.", ["Worst.", "Best."], ["Better.", "Good."], q=([1, 4], [3, 2]))
        for number in range(40)
    ]
    corpus = fabricate.publish_corpus(tmp_path / "corpus", fabricate.table(some))
    given = [f"input.path={corpus}", f"output.root={tmp_path / 'data'}", "build=trajectory", "build.reward=q"]
    assert build_preferences([*given, "prompts.validation_fraction=0.3"]) == 0

    found = dataset(tmp_path / "data")
    parts = published_parts(found)
    rows = {split: list(read_rows(found, of_split(parts, split))) for split in ("train", "validation")}
    assert {tuple(each["states"]) for each in rows["train"]} == {("Worst.", "Good.", "Better.", "Best.")}
    asked = [{each["prompt"][0]["content"] for each in rows[split]} for split in ("train", "validation")]
    assert asked[0] | asked[1] == {f"Tell me of {number}." for number in range(40)}
    assert not asked[0] & asked[1] and len(asked[1]) > 3


def test_partitions_count_from_their_end_on(tmp_path: Path) -> None:
    publish_trajectories(tmp_path, train=[row(0)])
    publish_trajectories(tmp_path, number=2, train=[row(1)])
    assert len(published_parts(dataset(tmp_path))) == 2
    (tmp_path / "preferences/run=000002/_SUCCESS").unlink()
    (stray,) = published_parts(dataset(tmp_path))
    assert stray["path"] == "preferences/run=000001/train-00000.parquet"


def test_a_folder_without_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no published partition of a preference dataset"):
        published_parts(dataset(tmp_path))


def test_a_dataset_of_another_strategy_is_refused(tmp_path: Path) -> None:
    publish_trajectories(tmp_path, train=[row(0)])
    path = tmp_path / "preferences/run=000001/train-00000.parquet"
    pq.write_table(pq.read_table(path, partitioning=None).rename_columns({"states": "completions"}), path)
    parts = [{**part, **Storage(str(tmp_path)).checksum(part["path"])} for part in published_parts(dataset(tmp_path))]
    with pytest.raises(ConfigError, match="holds no trajectories: build the dataset with build=trajectory"):
        list(read_rows(dataset(tmp_path), parts))


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_parts_that_are_not_what_their_manifest_says_are_refused(damage: str, tmp_path: Path) -> None:
    publish_trajectories(tmp_path, train=[row(0)])
    path = tmp_path / "preferences/run=000001/train-00000.parquet"
    if damage == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[30] ^= 1
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"it is gone; restore it|is damaged: .* restore it"):
        list(read_rows(dataset(tmp_path), published_parts(dataset(tmp_path))))


def test_the_order_of_rows_is_that_of_the_manifests(tmp_path: Path) -> None:
    publish_trajectories(tmp_path, train=[row(3), row(1)])
    publish_trajectories(tmp_path, number=2, train=[row(2)])
    found = dataset(tmp_path)
    asked = [each["prompt"][0]["content"] for each in read_rows(found, published_parts(found))]
    assert asked == [f"Tell me of number {number}." for number in (3, 1, 2)]
    assert json.loads((tmp_path / "preferences/run=000002/manifest.json").read_text())["number"] == 2
