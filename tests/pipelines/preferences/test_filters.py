"""Prompts that ask the same, prompts of benchmarks, and the split that a prompt is in."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.contract import PROMPT, ConfigError
from pipelines.preferences.filters import (
    benchmarks_of,
    exact_duplicates,
    near_duplicates,
    prompt_keys,
    prompt_texts,
    signatures,
    split_of,
)
from pipelines.preferences.settings import PromptsConfig

SENTENCE = "Explain in a few plain words how a heat pump warms a house when it is freezing outside"


def chats(*prompts: str | list[tuple[str, str]]) -> pa.Array:
    turns = [[("user", each)] if isinstance(each, str) else each for each in prompts]
    return pa.array([[{"role": role, "content": text} for role, text in each] for each in turns], PROMPT)


def keys(*prompts: str | list[tuple[str, str]]) -> list[int]:
    return prompt_keys(prompt_texts(chats(*prompts))).tolist()


def test_case_and_white_space_make_no_other_prompt_but_words_and_turns_do() -> None:
    same = keys("Say  it", " say\nIT ")
    assert len(set(same)) == 1
    others = keys("say it", "say it!", [("system", "say"), ("user", "it")], [("system", "say it"), ("user", "it")])
    assert len(set(others)) == 4
    assert keys("say it") == same[:1]


def test_a_slice_of_prompts_has_the_texts_of_those_prompts() -> None:
    array = chats("a", [("user", "b"), ("assistant", "c"), ("user", "d")], "e")
    assert prompt_texts(array.slice(1)).to_pylist() == prompt_texts(array).to_pylist()[1:]


def test_splits_go_by_text_and_seed_and_have_their_shares() -> None:
    config = PromptsConfig(test_fraction=0.1, validation_fraction=0.2)
    found = prompt_keys(prompt_texts(chats(*(f"prompt {number}" for number in range(5000)))))
    for seed in (0, 1, 2**62):
        split = split_of(found, config, seed)
        shares = {name: split.to_pylist().count(name) / 5000 for name in ("test", "validation", "train")}
        assert shares == pytest.approx({"test": 0.1, "validation": 0.2, "train": 0.7}, abs=0.02)
    assert split_of(found[::-1], config, 2**62).to_pylist() == split.to_pylist()[::-1]
    assert split_of(found, config, 1).to_pylist() != split.to_pylist()
    assert set(split_of(found, PromptsConfig(), 0).to_pylist()) == {"train"}


def test_of_equal_prompts_the_first_of_the_corpus_is_kept() -> None:
    parts = [pa.table({"key": pa.array(each, pa.uint64())}) for each in ([1, 2, 1], [3, 2, 4, 4], [5])]
    assert [each.tolist() for each in exact_duplicates(parts)] == [
        [False, False, True], [False, True, False, True], [False]
    ]  # fmt: skip


def test_near_duplicates_are_found_and_others_are_not() -> None:
    texts = [
        SENTENCE, f"{SENTENCE}, please", "What is the capital of France?", "what is the capital of FRANCE",
        "What is the capital of Spain?",
    ]  # fmt: skip
    parts = [pa.table({"signature": signatures(pa.array(each))}) for each in (texts[:3], texts[3:])]
    found = [each.tolist() for each in near_duplicates(parts, 0.8)]
    assert found == [[False, True, False], [True, False]]


def test_a_prompt_is_contaminated_by_a_run_of_words_whatever_the_format(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "q": [[{"text": SENTENCE}]]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({"q": ["How many apples are left?"]}) + "\n\n")
    (tmp_path / "c.txt").write_text("Name three rivers\n")
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.jsonl", "c.txt")]
    config = PromptsConfig(decontaminate=paths, ngram=8)
    found = benchmarks_of(config, {})
    assert found is not None
    asked = {
        f"Well: {SENTENCE.upper()}!": True,
        "Explain in a few plain words how a heat": True,
        "Explain in a few plain words how fridges work": False,
        "How many apples are left, and how many pears?": True,
        "How many apples are eaten?": False,
        "Please name three rivers.": True,
        "Rivers three name": False,
    }
    assert found.touched(pa.array(list(asked))).tolist() == list(asked.values())
    assert benchmarks_of(config, {}) is found, "read once"
    other = benchmarks_of(PromptsConfig(decontaminate=paths[:2], ngram=8), {})
    assert other is not None and other.digest != found.digest
    assert benchmarks_of(PromptsConfig(), {}) is None


def test_a_benchmark_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.decontaminate: cannot read .*none\.jsonl"):
        benchmarks_of(PromptsConfig(decontaminate=[str(tmp_path / "none.jsonl")]), {})


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("mk.py", "print('What is four times six?')", "it is none of .parquet, .jsonl, .json and .txt"),
        ("empty.jsonl", "\n", "it holds no text"),
        ("numbers.json", "[1, 2]", "it holds no text"),
        ("blank.txt", " \n\n", "it holds no text"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused(name: str, content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"prompts\.decontaminate: cannot read .*{name}: {told}"):
        benchmarks_of(PromptsConfig(decontaminate=[str(tmp_path / name)]), {})


def test_signatures_of_nothing_are_nothing() -> None:
    assert len(signatures(pa.array([], pa.string()))) == 0
    assert np.asarray(signatures(pa.array(["", "a"])).flatten()).shape == (256,)
