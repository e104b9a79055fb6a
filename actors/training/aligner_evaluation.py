"""How good an aligner is on held-out prompts while it is trained: what it makes of answers, in how many iterations."""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from actors.contract import RowError
from actors.decoding.forward import Forward
from actors.decoding.loop import DecodeLoop, Row
from actors.engines.base import Engine, Request
from actors.training.trajectories import Trajectory, Vocabulary


@dataclass(frozen=True)
class Question:
    """A held-out prompt, and one of its answers, which stands for a policy's."""

    trajectory: Trajectory
    t: int

    @property
    def answer(self) -> str:
        return self.trajectory.texts[self.t]


def questions(trajectories: Sequence[Trajectory], count: int, seed: int) -> list[Question]:
    """The first `count` trajectories, each with one of y(0) … y(T-1), drawn by the seed: the same ones each time."""
    return [
        Question(each, int(np.random.default_rng([seed, number]).integers(len(each.states) - 1)))
        for number, each in enumerate(trajectories[:count])
    ]


def aligned(
    model: PreTrainedModel,
    words: Vocabulary,
    asked: Sequence[Question],
    *,
    max_tokens: int,
    max_num_seqs: int,
) -> Iterator[tuple[Question, Row]]:
    """Each question with its row at the fixed point, decoded by plain Jacobi iteration, as rows end.

    `max_iterations` is as many as a row can take, so `Row.iterations` counts every forward pass up to the one that
    changes nothing before the end of the answer, that one included: 2 for a model that sees y(T) whatever it begins
    with.

    Args:
        model: loaded for the decoder (`attn_implementation=ATTENTION`).
    """

    def decode(ids: list[int]) -> str:
        return str(words.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    longest = max(len(each.trajectory.prompt) for each in asked) + max_tokens
    loop = DecodeLoop(
        Forward(model), decode, eos=words.end, block_size=max_tokens, max_iterations=max_tokens,
        max_num_seqs=max_num_seqs, kv_cache_tokens=2 * max_num_seqs * longest,
    )  # fmt: skip
    rows: dict[Row, Question] = {}
    for each in asked:
        draft = [token for token in each.trajectory.states[each.t].tolist() if token not in words.end]
        row = Row(tuple(each.trajectory.prompt.tolist()), max_tokens, seed=0, draft=draft)
        rows[row] = each
        loop.submit(row)
    while loop.busy:
        for row in loop.step():
            yield rows[row], row


def evaluate(
    answered: Sequence[tuple[Question, Row]], reward: Engine | None, said: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Means over the questions: `iterations` to converge; `tokens` of the aligned answers; `changed`, the share that is
    not its response any more; `cut`, the share that ends at `max_tokens`, where responses may not; and with a reward
    `response` and `aligned`, their `gain` and the half-width of its 95 % interval, `gain_95`, over the `scored`
    questions of which both could be: without one there is no gain, and without two no interval.

    Args:
        said: called whenever a text has been scored.
    """
    told = {
        "iterations": _mean([row.iterations for _, row in answered]),
        "tokens": _mean([len(row.tokens) for _, row in answered]),
        "changed": _mean([row.text.strip() != asked.answer for asked, row in answered]),
        "cut": _mean([row.finish_reason == "length" for _, row in answered]),
    }
    if reward is None:
        return told
    pairs = asyncio.run(_scores(answered, reward, said))
    both = [(before, after) for before, after in pairs if before is not None and after is not None]
    gains = np.array([after - before for before, after in both])
    told["scored"] = float(len(both))
    if both:
        told["response"] = _mean([before for before, _ in both])
        told["aligned"] = _mean([after for _, after in both])
        told["gain"] = _mean(gains)
    if len(both) > 1:
        told["gain_95"] = 1.96 * float(gains.std(ddof=1)) / math.sqrt(len(both))
    return told


async def _scores(
    answered: Sequence[tuple[Question, Row]], reward: Engine, said: Callable[[], None]
) -> list[tuple[float | None, float | None]]:
    async def score(asked: Question, text: str) -> float | None:
        try:
            found = await reward.generate(Request((*asked.trajectory.messages, ("assistant", text)), seed=0))
        except RowError:
            return None
        said()
        return found.score if found.score is not None and math.isfinite(found.score) else None

    async def both(asked: Question, row: Row) -> tuple[float | None, float | None]:
        before, after = await asyncio.gather(score(asked, asked.answer), score(asked, row.text.strip()))
        return before, after

    return list(await asyncio.gather(*(both(asked, row) for asked, row in answered)))


def _mean(values: Sequence[Any] | np.ndarray) -> float:
    return float(np.mean(values))
