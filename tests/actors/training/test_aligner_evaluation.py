"""Evaluation: the texts and iterations that the engine comes to, and what rewards of both sides tell."""

import asyncio
import math
from pathlib import Path

import pytest
import torch

from actors.contract import RowError
from actors.decoding.forward import ATTENTION
from actors.decoding.loop import Row
from actors.engines.base import Completion, DraftingConfig, EngineConfig, EngineStats, Request
from actors.engines.torch_engine import TorchEngine
from actors.training import aligner_model as models
from actors.training.aligner_evaluation import Question, aligned, evaluate, questions
from actors.training.aligner_settings import TrainingConfig
from actors.training.trajectories import Trajectory, encoded, vocabulary
from tests.pipelines.training.fabricated import row

MAX_TOKENS = 20


@pytest.fixture(scope="module")
def base(llama_folder: Path) -> EngineConfig:
    torch.set_num_threads(1)
    return EngineConfig(model=str(llama_folder), dtype="float32")


@pytest.fixture(scope="module")
def trajectories(base: EngineConfig) -> list[Trajectory]:
    config, words = TrainingConfig(model="m", max_tokens=MAX_TOKENS), vocabulary(base)
    return [each for number in range(6) if (each := encoded(words, row(number, 4), config))]


def test_texts_and_iterations_are_those_of_the_engine(base: EngineConfig, trajectories: list[Trajectory]) -> None:
    model = models.load(TrainingConfig(model="m", lora_rank=0), base, frozen=torch.float32, attention=ATTENTION).eval()
    asked = questions(trajectories, 6, seed=0)
    found = dict(aligned(model, vocabulary(base), asked, max_tokens=MAX_TOKENS, max_num_seqs=4))
    engine = TorchEngine(
        DraftingConfig(
            model=base.model, dtype="float32", device="cpu", max_tokens=MAX_TOKENS, block_size=MAX_TOKENS,
            max_iterations=MAX_TOKENS, max_num_seqs=3,
        ),
        1,
    )  # fmt: skip

    async def answers() -> list[Completion]:
        wanted = (Request(each.trajectory.messages, seed=0, draft=each.answer) for each in asked)
        return list(await asyncio.gather(*map(engine.generate, wanted)))

    try:
        wanted = asyncio.run(answers())
    finally:
        engine.close()
    assert [(found[each].text, found[each].iterations) for each in asked] == [
        (each.text, each.iterations) for each in wanted
    ]
    assert len({each.text for each in wanted}) > 3
    assert all(1 < found[each].iterations <= MAX_TOKENS for each in asked)


def test_the_answers_that_stand_for_a_policy_s_are_the_same_each_time(trajectories: list[Trajectory]) -> None:
    first = questions(trajectories, 4, seed=0)
    assert first == questions(trajectories, 4, seed=0) and len(first) == 4
    drawn = {each.t for seed in range(9) for each in questions(trajectories, 6, seed)}
    assert drawn == {0, 1, 2}  # never the best one
    assert first[0].answer == trajectories[0].texts[first[0].t]


class Words:
    """Scores a text by its words; `bad` cannot be scored, and the score of `odd` is no number."""

    async def generate(self, request: Request) -> Completion:
        assert request.prompt[0][0] == "user" and request.prompt[-1][0] == "assistant"
        text = request.prompt[-1][1]
        if text == "bad":
            raise RowError("reward_failed", "")
        return Completion("", None, None, None, score=math.nan if text == "odd" else float(len(text.split())))

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0)

    def close(self) -> None:
        pass


def test_the_gain_is_that_over_the_policy_s_answers_of_which_both_have_a_score(trajectories: list[Trajectory]) -> None:
    def pair(number: int, answer: str, text: str, iterations: int) -> tuple[Question, Row]:
        trajectory = Trajectory(
            (("user", f"{number}"),), trajectories[0].prompt, trajectories[0].states, (answer, "best")
        )
        row = Row((1,), 8, seed=0, tokens=[1] * iterations, text=text, iterations=iterations)
        return Question(trajectory, 0), row

    answered = [pair(0, "one", "one two three ", 2), pair(1, "one two", "one two", 4), pair(2, "one", "bad", 6)]
    answered.append(pair(3, "one", "odd", 4))
    said: list[None] = []
    found = evaluate(answered, Words(), lambda: said.append(None))
    assert found["iterations"] == 4 and found["tokens"] == 4
    assert found["changed"] == pytest.approx(3 / 4)
    assert (found["scored"], found["response"], found["aligned"], found["gain"]) == (2, 1.5, 2.5, 1.0)
    assert found["gain_95"] == pytest.approx(1.96 * math.sqrt(2) / math.sqrt(2))  # of gains 2 and 0
    assert len(said) == 7
    one = evaluate(answered[:1], Words())
    assert one["gain"] == 2 and "gain_95" not in one  # nothing is known of how it varies
    assert evaluate(answered[2:3], Words())["scored"] == 0
    assert set(evaluate(answered, None)) == {"iterations", "tokens", "changed", "cut"}
