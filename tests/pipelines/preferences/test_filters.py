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
    shingled,
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


def found_near(parts: list[list[str]], overlap: float) -> list[list[bool]]:
    return [each.tolist() for each in near_duplicates([pa.table(shingled(pa.array(part))) for part in parts], overlap)]


def test_near_duplicates_are_found_and_others_are_not() -> None:
    texts = [
        SENTENCE, f"{SENTENCE}, please", "What is the capital of France?", "what is the capital of FRANCE",
        "What is the capital of Spain?",
    ]  # fmt: skip
    assert found_near([texts[:3], texts[3:]], 0.8) == [[False, True, False], [True, False]]


def test_a_prompt_is_contaminated_by_a_run_of_words_whatever_the_format(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "q": [[{"text": SENTENCE}]]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({"q": ["How many of those nine apples are left?"]}) + "\n\n")
    (tmp_path / "c.txt").write_text("Name three long rivers\n")
    (tmp_path / "d.json").write_text(json.dumps({"choices": ["0", "1", "2", "Yes", "None of these"]}))
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.jsonl", "c.txt", "d.json")]
    config = PromptsConfig(decontaminate=paths, ngram=10)
    found = benchmarks_of(config, {})
    assert found is not None
    asked: dict[str | tuple[tuple[str, str], ...], bool] = {
        f"Well: {SENTENCE.upper()}!": True,
        "Explain in a few plain words how a heat pump": True,
        "Explain in a few plain words how a heat engine": False,
        "How many of those nine apples are left, and how many pears?": True,
        "How many of those nine apples are eaten?": False,
        "Name three long rivers!": True,
        "Please name three long rivers.": False,
        "Is 2 a prime? Yes or no? None of these?": False,
        "Yes": False,
        (("user", "Hello!"), ("assistant", "Hello."), ("user", "name three long rivers")): True,
        (("user", "Name three"), ("assistant", "long rivers"), ("user", "Do")): False,
    }
    assert found.touched(chats(*map(list_of, asked))).tolist() == list(asked.values())
    assert found.touched(chats("no", *map(list_of, asked)).slice(1)).tolist() == list(asked.values())
    assert benchmarks_of(config, {}) is found, "read once"
    other = benchmarks_of(PromptsConfig(decontaminate=paths[:2], ngram=10), {})
    assert other is not None and other.digest != found.digest
    assert benchmarks_of(PromptsConfig(), {}) is None


def list_of(prompt: str | tuple[tuple[str, str], ...]) -> str | list[tuple[str, str]]:
    return prompt if isinstance(prompt, str) else list(prompt)


def test_a_benchmark_of_chats_is_its_messages_and_not_who_speaks(tmp_path: Path) -> None:
    chat = {
        "messages": [{"role": "user", "content": "What is four times six?"}, {"role": "assistant", "content": "24"}]
    }
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    for ngram, touched in ((13, [True, False, False]), (1, [True, True, False])):
        found = benchmarks_of(PromptsConfig(decontaminate=[str(tmp_path / "chats.jsonl")], ngram=ngram), {})
        assert found is not None
        asked = chats("What is four times six?", "What now?", "Be a helpful user and assistant.")
        assert found.touched(asked).tolist() == touched


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
    assert len(shingled(pa.array([], pa.string()))["signature"]) == 0
    assert np.asarray(shingled(pa.array(["", "a"]))["signature"].flatten()).shape == (256,)


def texts_that_share(rng: np.random.Generator, low: float, high: float, count: int) -> tuple[str, str]:
    """Two texts of `count` words whose sets of word triples have a Jaccard similarity of `low` to `high`: words three
    apart or more are changed, each of which is in three triples."""
    one, triples = rng.integers(0, 10**6, count), count - 2
    fitting = [num for num in range(1, count // 3) if low <= (triples - 3 * num) / (triples + 3 * num) <= high]
    other = one.copy()
    other[2 + 3 * rng.choice(count // 3 - 1, rng.choice(fitting), replace=False)] += 10**6
    return " ".join(map(str, one)), " ".join(map(str, other))


@pytest.mark.parametrize(
    ("low", "high", "count", "found"),
    [
        (0.80, 0.87, 150, range(286, 301)),  # 95 %
        (0.72, 0.799, 150, range(1)),
        (0.82, 0.87, 1500, range(29, 31)),  # of so many words only a part is kept
        (0.60, 0.75, 1500, range(1)),
    ],
)
def test_nearly_all_prompts_above_the_overlap_are_found_and_none_below(
    low: float, high: float, count: int, found: range
) -> None:
    rng = np.random.default_rng(3)
    texts = [texts_that_share(rng, low, high, count) for _ in range(300 if count < 1000 else 30)]
    ((*again,),) = found_near([[text for pair in texts for text in pair]], 0.8)
    assert not any(again[::2])
    assert sum(again[1::2]) in found


def test_prompts_in_scripts_with_vowel_signs_or_without_spaces_are_told_apart() -> None:
    texts = ["user: राम की किताब", "user: राम का किताब", "user: 天空为什么是蓝色的？", "user: 大海为什么是蓝色的？"]
    assert found_near([texts], 0.8) == [[False] * 4]
    assert found_near([[texts[2], "user: 天空为什么是蓝色的呢？"]], 0.7) == [[False, True]]
