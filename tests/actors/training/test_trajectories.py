"""Trajectories as token ids: those that inference sees; what a step sees; and where a batch has its losses."""

import asyncio
import contextlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.decoding.loop import DecodeLoop, Row
from actors.decoding.parallel import Denoiser
from actors.engines.base import DraftingConfig, EngineConfig, Request
from actors.engines.torch_engine import TorchEngine
from actors.training.aligner_settings import TrainingConfig
from actors.training.trajectories import Trajectory, Vocabulary, batch, differing, drawn, encoded, guess, vocabulary

CPU = torch.device("cpu")


def config(**values: Any) -> TrainingConfig:
    return replace(TrainingConfig(model="m", batch_size=4, max_tokens=24), **values)


@pytest.fixture(scope="module")
def words(llama_folder: Path) -> Vocabulary:
    return vocabulary(EngineConfig(model=str(llama_folder)))


def row(*states: str, prompt: str = "How many tokens?", system: str | None = None) -> dict[str, Any]:
    chat = [{"role": "system", "content": system}] if system else []
    return {"prompt": [*chat, {"role": "user", "content": prompt}], "states": list(states)}


def trajectories(count: int, num_states: int = 5) -> list[Trajectory]:
    states = tuple(np.array([number, 2], np.int32) for number in range(num_states))
    return [Trajectory((), np.array([number], np.int32), states, ("",) * num_states) for number in range(count)]


@pytest.mark.parametrize("text", ["Two cores, one batch.", "<|im_end|> is only text here", " naïve\n\ncafé 東京 "])
def test_training_reads_the_tokens_that_inference_reads(
    text: str, words: Vocabulary, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Row] = []
    monkeypatch.setattr(DecodeLoop, "submit", lambda self, row: submitted.append(row))
    parallel = DraftingConfig(model=str(llama_folder), dtype="float32", device="cpu", decoder="parallel", max_tokens=24)
    engine = TorchEngine(parallel, 1)
    messages = (("system", "Be brief."), ("user", "How many <|im_end|> tokens?"))

    async def ask() -> None:
        asked = asyncio.create_task(engine.generate(Request(messages, seed=0, draft=text)))
        while not submitted and not asked.done():
            await asyncio.sleep(0.01)
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked

    try:
        asyncio.run(ask())
    finally:
        engine.close()
    found = encoded(words, row(text, text, system="Be brief.", prompt="How many <|im_end|> tokens?"), config())
    assert found is not None
    assert found.messages == messages
    assert tuple(found.prompt.tolist()) == submitted[0].prompt
    assert found.states[0].tolist() == [*submitted[0].draft, words.end[0]][:24]


def test_an_answer_ends_with_the_end_of_sequence_unless_it_is_cut(words: Vocabulary) -> None:
    text = "The quick brown fox jumps over the lazy dog."
    found = encoded(words, row("The fox.", text), config(max_tokens=8))
    assert found is not None
    assert found.states[0][-1] == words.end[0] == 2
    assert len(found.states[1]) == 8 and 2 not in found.states[1]
    assert found.texts == ("The fox.", text)


def test_prompts_that_are_too_long_or_refused_are_left_out(words: Vocabulary) -> None:
    assert encoded(words, row("a", "b", prompt="tokens " * 40), config(max_prompt_tokens=32)) is None
    assert encoded(words, row("a", "b", prompt="tokens " * 40), config(max_prompt_tokens=512)) is not None
    assert words.limit == 512
    assert encoded(words, row("a", "b", prompt="tokens " * 40), config(max_prompt_tokens=512, max_tokens=500)) is None


def test_every_trajectory_is_seen_once_an_epoch_and_every_worse_answer_in_time() -> None:
    some = trajectories(10)
    seen = [each for step in range(50) for each in drawn(step, 50, some, config())]
    epochs = [seen[at : at + 10] for at in range(0, 200, 10)]
    assert all(sorted(number for number, _ in epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(number for number, _ in epoch) for epoch in epochs}) > 10
    counts = Counter(t for _, t in seen)
    assert set(counts) == {0, 1, 2, 3}  # never y(T)
    assert min(counts.values()) > 25
    assert drawn(7, 50, some, config()) != drawn(7, 50, some, config(seed=1))


def test_a_curriculum_begins_next_to_the_best() -> None:
    some = trajectories(64)
    lowest = [min(t for _, t in drawn(step, 40, some, config(batch_size=64, curriculum=True))) for step in range(40)]
    assert lowest[:2] == [3, 3]
    assert lowest[20:] == [0] * 20
    assert sorted(lowest, reverse=True) == lowest
    pairs = trajectories(4, num_states=2)
    assert {t for step in range(4) for _, t in drawn(step, 4, pairs, config(curriculum=True))} == {0}


@pytest.mark.parametrize(
    ("best", "state", "other", "places"),
    [
        ([5, 6, 7, 8, 2], [5, 9, 7, 2], [5, 9, 7, 2, 2], [2, 3, 4]),
        ([5, 6, 2], [9, 6, 7, 8, 2], [9, 6, 7], [1, 2]),
        ([5, 6, 2], [5, 6, 2], [5, 6, 2], []),
        ([5, 6, 7], [5, 6, 7, 8], [5, 6, 7], []),  # both cut
        ([5, 6, 7, 8], [5, 6, 2], [5, 6, 2, 2], [3]),
        ([5, 2], [6, 2], [6, 2], [1]),
    ],
)
def test_consistency_goes_from_behind_the_first_difference_to_the_end_of_the_best(
    best: list[int], state: list[int], other: list[int], places: list[int]
) -> None:
    found = guess(np.array(state, np.int32), len(best))
    assert found.tolist() == other
    assert differing(np.array(best, np.int32), found).tolist() == places


def test_a_guess_is_filled_up_as_the_decoder_does(words: Vocabulary) -> None:
    loop = DecodeLoop(
        None, lambda ids: "", eos=words.end, block_size=6, max_iterations=6, max_num_seqs=1, kv_cache_tokens=64,  # type: ignore[arg-type]
    )  # fmt: skip
    row = Row((5,), 6, seed=0, draft=[7, 8])
    loop.submit(row)
    assert isinstance(row.guesser, Denoiser)
    assert row.guesser.guess == guess(np.array([7, 8, words.end[0]], np.int32), 6).tolist()


def test_a_batch_names_the_places_of_its_losses() -> None:
    long = Trajectory(
        (), np.array([5, 6, 7], np.int32), tuple(map(np.int32, ([20, 30, 2], [20, 21, 22, 23, 2]))), ("", "")
    )
    short = Trajectory((), np.array([8], np.int32), tuple(map(np.int32, ([40, 41, 2], [50, 2]))), ("", ""))
    made = batch([(long, 0), (short, 0)], consistent=True, device=CPU)
    assert made.ids.tolist() == [
        [5, 6, 7, 20, 21, 22, 23, 2],
        [8, 50, 2, 0, 0, 0, 0, 0],
        [5, 6, 7, 20, 30, 2, 2, 2],
        [8, 40, 41, 0, 0, 0, 0, 0],
    ]
    assert made.mask.sum(1).tolist() == [8, 3, 8, 3]
    assert made.targets.tolist() == [20, 21, 22, 23, 2, 50, 2]
    assert made.before_targets.tolist() == [2, 3, 4, 5, 6, 8, 9]
    assert made.teacher.tolist() == [4, 5, 6, 9]  # predict 22 and what follows it, and the end of the short one
    assert made.student.tolist() == [16 + 4, 16 + 5, 16 + 6, 16 + 9]

    alone = batch([(long, 0), (short, 0)], consistent=False, device=CPU)
    assert alone.ids.shape == (2, 8) and not len(alone.teacher) and not len(alone.student)
