"""Pairs are what a dataset's manifests name, or what Parquet files of one's own hold; a bad row is told, not read."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.contract import ConfigError, RowError
from pipelines.build_preferences import main as build_preferences
from pipelines.training.pairs import Preference, PreferenceFiles, is_held_out, preference_of, prompt_key
from tests.pipelines.preferences import examples
from tests.pipelines.preferences.conftest import in_this_process  # noqa: F401  # a fixture
from tests.pipelines.preferences.fabricate import damage, publish_corpus, row, table

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river."}]
MESSAGES = (("system", "Be brief."), ("user", "Name a river."))


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def read(path: Path, split: str = "train") -> list[Preference | RowError]:
    source = PreferenceFiles(str(path))
    return [row for listed in source.by_split().get(split, []) for row in source.rows(listed)]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        (CHAT, "The Elbe.", "Water.", Preference(MESSAGES, "The Elbe.", "Water.")),
        (CHAT, assistant(" The Elbe.\n"), assistant("Water."), Preference(MESSAGES, "The Elbe.", "Water.")),
        ("Name a river.", " The Elbe.", "Water.", Preference((("user", "Name a river."),), "The Elbe.", "Water.")),
    ],
)
def test_what_a_row_may_be(prompt: Any, chosen: Any, rejected: Any, expected: Preference) -> None:
    assert preference_of({"prompt": prompt, "chosen": chosen, "rejected": rejected}) == expected


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "cause"),
    [
        (None, "a", "b", "empty_prompt"),
        ([], "a", "b", "empty_prompt"),
        (" ", "a", "b", "empty_prompt"),
        ([{"role": "user", "content": None}], "a", "b", "empty_prompt"),
        ([*CHAT, *assistant("The Elbe.")], "a", "b", "invalid_roles"),
        (CHAT, [*CHAT, *assistant("a")], [*CHAT, *assistant("b")], "invalid_roles"),
        (CHAT, [{"role": "user", "content": "a"}], assistant("b"), "invalid_roles"),
        (CHAT, "a", None, "empty_answer"),
        (CHAT, assistant(" "), assistant("b"), "empty_answer"),
        (CHAT, "a", "a ", "same_text"),
    ],
)
def test_why_a_row_is_none(prompt: Any, chosen: Any, rejected: Any, cause: str) -> None:
    with pytest.raises(RowError) as caught:
        preference_of({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert caught.value.cause == cause


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("export", ["null", "trl"])
def test_a_dataset_is_what_its_manifests_name(tmp_path: Path, export: str) -> None:
    rows = [row(f"Tell me of {number}.", [f"It is {number}."], [f"It is {number}, I say."]) for number in range(40)]
    corpus, root = publish_corpus(tmp_path / "corpus", table(rows)), tmp_path / "pairs"
    given = [f"input.path={corpus}", f"output.root={root}", "prompts.test_fraction=0.3", f"export={export}"]
    assert build_preferences(given) == 0
    part = root / "preferences/run=000001/train-00000.parquet"
    (part.parent / "train-00001.parquet").write_bytes(part.read_bytes())  # in no manifest
    (root / "preferences/run=000002").mkdir()
    (root / "preferences/run=000002/plan.json").write_text(json.dumps({"number": 2, "parts": []}))
    (root / "preferences/run=000002/train-00000.parquet").write_bytes(part.read_bytes())  # not published

    assert PreferenceFiles(str(root)).by_split().keys() == {"train", "test"}
    train, test = read(root), read(root, "test")
    assert len(train) > len(test) > 5 and len(train) + len(test) == 40
    numbers = [int(each.chosen.split()[2].strip(",")) for each in (*train, *test) if isinstance(each, Preference)]
    assert sorted(numbers) == list(range(40))
    for each in (*train, *test):
        assert isinstance(each, Preference)
        asked = each.prompt[-1][1]
        assert each.chosen == asked.replace("Tell me of", "It is").replace(".", ", I say.")
        assert each.rejected == asked.replace("Tell me of", "It is")

    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(ConfigError, match=r"^input\.path: preferences/run=000001/train-00000\.parquet is not what its"):
        read(root)


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, write_page_checksum=True)
    return path


def test_files_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", prompt=["p"], chosen=["a"], rejected=["b"], margin=[1.0])
    write(tmp_path / "more" / "b.parquet", prompt=[CHAT], chosen=[assistant("a")], rejected=[assistant("b")])
    expected = [Preference((("user", "p"),), "a", "b"), Preference(MESSAGES, "a", "b")]
    assert read(tmp_path) == expected
    assert read(tmp_path / "a.parquet") == expected[:1]
    assert read(tmp_path / "*" / "b.parquet") == expected[1:]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"prompt": ["p"], "completion": ["a"]}, "a.parquet: missing_column: there is no column 'chosen'"),
        ({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"], "prefix": ["c"]}, "a reward scores whole ones"),
        ({"prompt": ["p"], "chosen": [1], "rejected": ["b"]}, "a.parquet: 'chosen' is int64; a string or"),
    ],
)
def test_other_files_are_refused_in_a_line(tmp_path: Path, columns: dict[str, Any], told: str) -> None:
    write(tmp_path / "a.parquet", **columns)
    with pytest.raises(ConfigError, match=told) as caught:
        read(tmp_path)
    assert str(caught.value).startswith("input.path: ") and "\n" not in str(caught.value)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    damage(write(tmp_path / "a.parquet", prompt=["p" * 500], chosen=["a" * 500], rejected=["b"]))
    with pytest.raises(ConfigError, match=r"^input\.path: a\.parquet is damaged \("):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no Parquet at all, whatever it is called")
    with pytest.raises(ConfigError, match=r"^input\.path: b\.parquet is damaged \("):
        read(tmp_path / "b.parquet")


def test_what_is_not_there_is_told_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^input\.test_path '.*gone' does not exist$"):
        PreferenceFiles(str(tmp_path / "gone"), key="input.test_path").by_split()
    (tmp_path / "preferences").mkdir()
    with pytest.raises(ConfigError, match="holds no published partition of a preference dataset"):
        PreferenceFiles(str(tmp_path)).by_split()


def test_a_prompt_is_held_out_by_its_text_alone() -> None:
    keys = [prompt_key((("user", f"Tell me of {number}."),)) for number in range(2000)]
    assert len(set(keys)) == 2000
    assert prompt_key((("user", "tell  me of\n7."),)) == keys[7] != prompt_key((("system", "Tell me of 7."),))
    held_out = {key for key in keys if is_held_out(key, 0.1)}
    assert 150 < len(held_out) < 250
    assert held_out < {key for key in keys if is_held_out(key, 0.2)}


@examples.needs_hh_harmless
def test_real_pairs() -> None:
    found = read(examples.EVAL_DATA / "hh_harmless_pairs.parquet")
    causes = [each.cause for each in found if isinstance(each, RowError)]
    assert (len(found), causes) == (1400, ["empty_answer"] * 4)
