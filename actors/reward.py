"""The reward pool: every response and every aligned text gets a score."""

import asyncio
import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import pyarrow as pa
from omegaconf import MISSING

from actors.candidates import as_messages, model_label
from actors.contract import REWARD_NOTES, REWARDS, SCORED, ConfigError, RowError, is_set, option
from actors.engines.base import Messages, ScoringConfig
from actors.pool import Columns, ModelStage, PoolConfig, Row
from actors.rewards import build_reward
from actors.rewards.judge import judged

_READ_BY = {
    "rules": "rules",
    "batch_tokens": "torch",
    "kv_cache_tokens": "vllm",
    **dict.fromkeys(("criterion", "max_tokens", "temperature", "top_p", "top_k", "reasoning_end", "stop"), "openai"),
}
"""Keys that one engine reads: set for another, they would be silently without effect."""


@dataclass(frozen=True)
class RewardConfig(ScoringConfig, PoolConfig):
    """What scores the candidates. A reward is a pool of its own, with resources of its own."""

    engine: Literal["rules", "torch", "vllm", "openai"] = option(
        "rules",
        "rules: functions of the text, no model; torch: a sequence classification model; vllm: the same by vLLM; "
        "openai: a judge that compares two answers",
        changes_rows=True,
    )
    model: str = option(
        MISSING,
        "folder, hub id or URL of the reward model; its name at the endpoint for `openai`; a label for `rules`",
    )
    name: str | None = option(None, "name of the reward in the corpus; null: the model's", changes_rows=True)
    rules: dict[str, float] = option(
        {},
        "weight of each rule in the sum: length, repetition, refusal, language, format, relevance, or "
        "module:function, given (prompt, response): a list of {role, content} and a text",
        changes_rows=True,
    )
    criterion: str | None = option(
        None, "`openai`: what makes the better answer, in a sentence; null: built in", changes_rows=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "rules" and not any(self.rules.values()) and self.model != MISSING:  # not made of defaults
            raise ConfigError(
                "rules must give one rule a weight with engine=rules; reward=rules is a combination of all"
            )
        for field in fields(self):
            reader = _READ_BY.get(field.name, self.engine)
            if self.engine != reader and is_set(self, field.name):
                raise ConfigError(f"{field.name} has no effect with engine={self.engine}: it is for {reader}")

    @property
    def label(self) -> str:
        """The reward's name in the corpus."""
        return self.name or model_label(self)


Note = tuple[str, str | None]
"""A note on a text and its message, as in REWARD_NOTES."""


class RewardStage(ModelStage):
    """One replica of a reward. Adds `rewards`, or appends to it where another reward has been before.

    A candidate that cannot be scored has a null there, and its cause is noted; no row is lost by it.
    """

    def __init__(self, config: RewardConfig, **arguments: Any) -> None:
        super().__init__(config=config, build=build_reward, **arguments)
        self._config, self._label = config, config.label

    async def columns(self, name: str, unit: pa.Table) -> Columns:
        """Raises whatever is the engine's fault; a fault of one text is one of the `reward_notes`."""
        names = ["prompt", "responses", "aligned", "problem", *({"rewards", "reward_notes"} & set(unit.column_names))]
        rows = unit.select(names).to_pylist()
        scored = await self.each(name, self._scored, rows)
        rewards, notes = [], []
        for row, (reward, told) in zip(rows, scored, strict=True):
            before = [each for each in row.get("rewards") or [] if each["name"] != self._label]
            rewards.append([*before, reward] if reward else row.get("rewards"))
            made = [{"reward": self._label, "note": note, "message": message} for note, message in told]
            notes.append([*(row.get("reward_notes") or []), *made])
        columns = {"rewards": pa.array(rewards, REWARDS), "reward_notes": pa.array(notes, REWARD_NOTES)}
        num_failed = sum(
            reward is not None and _is_short(row, reward) for row, (reward, _) in zip(rows, scored, strict=True)
        )
        return Columns(columns, num_failed)

    async def _scored(self, row: Row) -> tuple[dict[str, Any] | None, list[Note]]:
        """The row's reward and what is to be noted of it; None for a row that has a problem."""
        if row["problem"] is not None:
            return None, []
        messages = as_messages(row["prompt"])
        there = {name: _texts(row[column]) for name, column in (("response", "responses"), ("aligned", "aligned"))}
        texts = list(dict.fromkeys(text for found in there.values() for text in found if text is not None))
        found = await asyncio.gather(*(self._score(row, messages, text, texts[0]) for text in texts))
        scores = dict(zip(texts, (score for score, _ in found), strict=True))
        parallel = {name: [None if text is None else scores[text] for text in told] for name, told in there.items()}
        return {"name": self._label, **parallel}, [note for _, notes in found for note in notes]

    async def _score(self, row: Row, messages: Messages, text: str, first: str) -> tuple[float | None, list[Note]]:
        """A text's score and notes. Candidates of a row that say the same share it; `first` is the row's first text."""
        try:
            if self._config.engine == "openai":
                ask = partial(self.generate, row, seed=0)
                score, notes = await judged(ask, self._config, messages, first, text)
                return score, [(note, None) for note in ((SCORED, *notes) if notes else ())]  # none: it was not asked
            completion = await self.generate(row, (*messages, ("assistant", text)), seed=0)
            assert completion.score is not None
            if not math.isfinite(completion.score):
                raise RowError("reward_failed", f"the score is {completion.score}")
        except RowError as error:
            return None, [(error.cause, error.message)]
        return completion.score, [(SCORED, None)]


def _texts(candidates: list[dict[str, Any]]) -> list[str | None]:
    return [candidate["text"] if candidate["status"] == "ok" else None for candidate in candidates]


def _is_short(row: dict[str, Any], reward: dict[str, Any]) -> bool:
    """Whether a text that is there has no score."""
    there = [*_texts(row["responses"]), *_texts(row["aligned"])]
    scores = [*reward["response"], *reward["aligned"]]
    return any(text is not None and score is None for text, score in zip(there, scores, strict=True))
