"""Reward models score as the plain Hugging Face call does, row by row, whatever they are batched with; those that
cannot be scored honestly are refused. Real processes on the CPU: each start takes seconds, so there are few."""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.contract import ConfigError, RowError
from actors.engines.base import Engine, Messages, Request, ScoringConfig
from actors.engines.hosted import HostedEngine
from actors.reward import RewardConfig
from actors.rewards import build_reward, classifier
from actors.rewards.classifier import Classifier, batch_of, score_batch
from actors.rewards.heads import scored_ids
from tests.processes import assert_gone
from tests.tiny_models import CHAT_TEMPLATE, build_tiny_llama, build_tiny_reward, build_tokenizer

CHATS: list[Messages] = [
    (
        ("user", f"Tell me {'more and ' * (number % 7)}more about {number}."),
        ("assistant", "Well, " * (number % 5) + "no."),
    )
    for number in range(20)
]
CHATS.append((("system", "Be brief."), *CHATS[3], ("user", "And <|im_end|> then?"), ("assistant", "Naïve 東京.")))
ENDS_WITH_TURN = CHAT_TEMPLATE.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endfor %}")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny reward model with these values in its config."""
    built: dict[str, Path] = {}

    def folder(**extra: Any) -> Path:
        key = json.dumps(extra)
        if key not in built:
            built[key] = build_tiny_reward(tmp_path_factory.mktemp("reward"), **extra)
        return built[key]

    return folder


def config_of(folder: Path, **settings: Any) -> ScoringConfig:
    return ScoringConfig(model=str(folder), **({"dtype": "float32", "device": "cpu"} | settings))


def plain(folder: Path, chats: list[Messages]) -> list[float]:
    """Each chat by itself, as a model card would have it: template, then the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    scores = []
    for chat in chats:
        messages = [{"role": role, "content": content} for role, content in chat]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        with torch.inference_mode():
            scores.append(float(model(ids).logits[0, 0]))
    return scores


def scores_of(engine: Engine, chats: list[Messages]) -> list[float]:
    async def asking() -> list[Any]:
        return await asyncio.gather(*(engine.generate(Request(chat, 0)) for chat in chats))

    return [made.score for made in asyncio.run(asking())]


@pytest.mark.parametrize("max_rows", [1, 3, 64])
@pytest.mark.parametrize("pad", [0, None, 2])
def test_scores_are_those_of_the_plain_call_whatever_the_batch(
    folder_of: Callable[..., Path], pad: int | None, max_rows: int
) -> None:
    """With 2, the end of turn is the padding token, too, and the last of the template."""
    folder = folder_of(pad_token_id=pad)
    if pad == 2:
        (folder / "chat_template.jinja").write_text(ENDS_WITH_TURN)
    chats = CHATS[:-1]  # the last holds special-token text, which the plain call would take for a special token
    expected = plain(folder, chats)
    assert max(expected) - min(expected) > 0.1
    assert scores_in_batches(folder, chats, max_rows) == pytest.approx(expected, abs=1e-5)


def scores_in_batches(folder: Path, chats: list[Messages], max_rows: int) -> list[float]:
    engine = Classifier(config_of(folder, max_num_seqs=max_rows, batch_tokens=200), 1)
    try:
        return scores_of(engine, chats)
    finally:
        engine.close()


def filled_in_front(rows: list[list[int]]) -> list[list[int]]:
    """Padding on the left that no mask hides."""
    width = max(map(len, rows))
    return [[5] * (width - len(row)) + row for row in rows]


def scored_at_the_end(rows: list[list[int]]) -> list[list[int]]:
    """The score is that of the last column, padding or not."""
    width = max(map(len, rows))
    return [row + [5] * (width - len(row)) for row in rows]


@pytest.mark.parametrize("mutate", [filled_in_front, scored_at_the_end])
def test_the_comparison_finds(
    mutate: Callable[[list[list[int]]], list[list[int]]],
    folder_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, chats = folder_of(pad_token_id=0), CHATS[:-1]
    monkeypatch.setattr(classifier, "score_batch", lambda model, rows: score_batch(model, mutate(rows)))
    expected = plain(folder, chats)
    assert scores_in_batches(folder, chats, max_rows=1) == pytest.approx(expected, abs=1e-5)
    assert scores_in_batches(folder, chats, max_rows=3) != pytest.approx(expected, abs=1e-5)


def test_a_template_that_writes_a_bos_gets_no_second_one_of_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    single = ["<|endoftext|>", "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single, special_tokens=[("<|endoftext|>", 0)])
    assert tokenizer("Hi")["input_ids"][0] == 0
    ids = scored_ids(tokenizer, Request(CHATS[0], 0), pad=None)
    messages = [{"role": role, "content": content} for role, content in CHATS[0]]
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert (ids.count(0), ids[0]) == (1, 0)
    assert tokenizer.decode(ids).endswith("no.<|im_end|>\n"), "to the end of the answer, and no further"


def test_special_tokens_in_an_answer_are_read_as_text(folder_of: Callable[..., Path]) -> None:
    engine = Classifier(config_of(folder_of(pad_token_id=0)), 1)
    try:
        (score,) = scores_of(engine, CHATS[-1:])
        assert score != pytest.approx(plain(folder_of(pad_token_id=0), CHATS[-1:])[0], abs=1e-3)
    finally:
        engine.close()


def test_a_text_that_is_too_long_fails_alone(folder_of: Callable[..., Path]) -> None:
    engine = Classifier(config_of(folder_of(pad_token_id=0), max_model_len=40), 1)
    try:
        with pytest.raises(RowError, match="prompt_too_long"):
            scores_of(engine, [(("user", "word " * 50), ("assistant", "no"))])
        assert len(scores_of(engine, CHATS[:2])) == 2
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("lengths", "max_rows", "max_tokens", "batch"),
    [
        ([5, 9, 5, 6, 100], 3, 1000, [0, 2, 3]),  # the nearest to the first, which has waited longest
        ([5, 9, 5, 6, 100], 9, 20, [0, 2, 3]),  # 3 x 6 fit, 4 x 9 do not
        ([50, 1], 9, 20, [0]),  # too long for any batch: alone
        ([1, 1, 1], 2, 1000, [0, 1]),
    ],
)
def test_a_batch_holds_rows_of_like_length(
    lengths: list[int], max_rows: int, max_tokens: int, batch: list[int]
) -> None:
    assert batch_of(lengths, max_rows, max_tokens) == batch


def test_a_model_that_cannot_be_scored_honestly_is_refused_in_one_line(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    def edited(folder: Path, **values: Any) -> ScoringConfig:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return config_of(folder)

    headless = edited(build_tiny_llama(tmp_path / "headless"), id2label={"0": "R"}, label2id={"R": 0})
    with pytest.raises(ConfigError, match=r"is no reward model: its files hold no score\.weight"):
        Classifier(headless, 1)
    two = edited(build_tiny_reward(tmp_path / "two"), id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ConfigError, match="has 2 labels: a reward model has one"):
        Classifier(two, 1)
    own = edited(
        build_tiny_reward(tmp_path / "own"),
        auto_map={"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
    )
    with pytest.raises(ConfigError, match=r"code of its own \(modeling_custom\.LlamaForRewardModelWithGating\)"):
        Classifier(own, 1)


@pytest.mark.long
def test_scores_outlive_the_death_of_the_engines_process(folder_of: Callable[..., Path]) -> None:
    folder = folder_of(pad_token_id=0)
    engine = build_reward(
        RewardConfig(engine="torch", model=str(folder), dtype="float32", device="cpu", max_num_seqs=4), 1
    )
    assert isinstance(engine, HostedEngine)
    expected = plain(folder, CHATS[:6])
    assert scores_of(engine, CHATS[:6]) == pytest.approx(expected, abs=1e-5)
    os.kill(engine.pid, signal.SIGKILL)
    assert scores_of(engine, CHATS[:6]) == pytest.approx(expected, abs=1e-5)
    engine.close()


def test_two_shards_score_like_one(folder_of: Callable[..., Path]) -> None:
    import psutil

    folder = folder_of(pad_token_id=0)
    config = RewardConfig(
        engine="torch", model=str(folder), dtype="float32", device="cpu", max_num_seqs=5, tensor_parallel_size=2
    )
    engine = build_reward(config, 2)
    assert isinstance(engine, HostedEngine)
    family = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    assert len(family) >= 3  # itself, the other rank, its watch
    assert scores_of(engine, CHATS[:-1]) == pytest.approx(plain(folder, CHATS[:-1]), abs=1e-4)
    engine.close()
    assert_gone(family)
