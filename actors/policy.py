"""The policy pool: prompts become responses, `num_candidates` of them each."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.contract import RESPONSES, ConfigError, RowError, candidate_seed, option
from actors.engines.base import EngineConfig, Messages, Request
from actors.pool import Columns, ModelStage, PoolConfig


@dataclass(frozen=True)
class PolicyConfig(PoolConfig):
    """The model whose answers are to be aligned."""

    num_candidates: int = option(1, "answers per prompt; `stored` takes all there are", changes_rows=True)
    system_prompt: str | None = option(None, "system message for prompts that have none", changes_rows=True)
    reasoning_end: str | None = option(
        "</think>",
        "what ends a reasoning model's thinking, which is kept apart; null: there is none",
        changes_rows=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_candidates < 1:
            raise ConfigError(f"num_candidates must be at least 1, got {self.num_candidates}")


class PolicyStage(ModelStage):
    """One policy replica. Adds `responses`, or appends to it where another policy has been before.

    Args:
        run_seed: of the run; every candidate's own seed derives from it.
        first_candidate: number of this policy's first candidate, where several policies answer the same prompts.
    """

    def __init__(self, config: PolicyConfig, run_seed: int, first_candidate: int = 0, **arguments: Any) -> None:
        super().__init__(config=config, **arguments)
        self._config, self._run_seed, self._first = config, run_seed, first_candidate
        self._label = model_label(config)

    async def columns(self, unit: pa.Table) -> Columns:
        """Raises whatever is the engine's fault; a fault of one request ends in that candidate's `error`."""
        names = ["prompt_id", "prompt", "problem", *({"stored", "responses"} & set(unit.column_names))]
        rows = unit.select(names).to_pylist()
        answered = await self.each(self._answers, rows)
        responses = [(row.get("responses") or []) + answers for row, answers in zip(rows, answered, strict=True)]
        num_failed = sum(not any(answer["status"] == "ok" for answer in answers) for answers in answered)
        return Columns({"responses": pa.array(responses, RESPONSES)}, num_failed)

    async def _answers(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        if row["problem"] is not None:
            return []
        stored: list[str | None] = [None] * self._config.num_candidates
        if self._config.engine == "stored":
            stored = row["stored"] or [None]
        messages = policy_prompt(self._config, row["prompt"])
        if len(stored) == 1:
            return [await self._answer(row["prompt_id"], messages, 0, stored[0])]
        return list(
            await asyncio.gather(
                *(self._answer(row["prompt_id"], messages, number, text) for number, text in enumerate(stored))
            )
        )

    async def _answer(self, prompt_id: str, messages: Messages, number: int, stored: str | None) -> dict[str, Any]:
        seed = candidate_seed(self._run_seed, prompt_id, self._first + number, "policy")
        candidate = {"model": self._label, "seed": seed}
        try:
            completion = await self._engine.generate(Request(messages, seed, stored))
            reasoning, text = split_reasoning(completion.text, self._config.reasoning_end)
            if not text:
                raise RowError("empty_answer", "the model's answer has no text")
        except RowError as error:
            return failed(error, **candidate)
        return {
            **candidate,
            "text": text,
            "reasoning": reasoning,
            "status": "ok",
            "error": None,
            "finish_reason": completion.finish_reason,
            "num_prompt_tokens": completion.num_prompt_tokens,
            "num_tokens": completion.num_tokens,
        }


def failed(error: RowError, **candidate: Any) -> dict[str, Any]:
    """A candidate that could not be made."""
    return {
        **candidate,
        "text": "",
        "reasoning": None,
        "status": "failed",
        "error": str(error),
        "finish_reason": None,
        "num_prompt_tokens": None,
        "num_tokens": None,
    }


def lost(candidates: list[dict[str, Any]], stage: str) -> dict[str, Any] | None:
    """The problem of a row none of whose candidates survived `stage`: that of the first one; None where one did."""
    if any(candidate["status"] == "ok" for candidate in candidates):
        return None
    cause, _, message = candidates[0]["error"].partition(": ") if candidates else ("no_candidate", "", "")
    return {"stage": stage, "cause": cause, "error_class": "RowError", "message": message, "attempts": 1}


def split_reasoning(text: str, end: str | None) -> tuple[str | None, str]:
    """(thinking, answer), both stripped. A text that opens its thinking and never ends it has no answer."""
    if end is None:
        return None, text.strip()
    start = end.replace("/", "")
    if end in text:
        thinking, _, answer = text.partition(end)
        return thinking.strip().removeprefix(start).strip(), answer.strip()
    if text.lstrip().startswith(start) and start != end:
        return text.strip().removeprefix(start).strip(), ""
    return None, text.strip()


def model_label(config: EngineConfig) -> str:
    """How responses name their model: a folder's name, a hub id or the provenance label, as configured."""
    return Path(config.model).name if Path(config.model).is_absolute() else config.model


def policy_prompt(config: PolicyConfig, prompt: list[dict[str, str]]) -> Messages:
    """The chat that the policy's template is applied to."""
    messages = as_messages(prompt)
    if config.system_prompt and messages[0][0] != "system":
        return (("system", config.system_prompt), *messages)
    return messages


def as_messages(prompt: list[dict[str, str]] | None) -> Messages:
    """A prompt of the unit table as (role, content) pairs."""
    return tuple((message["role"], message["content"]) for message in prompt or ())
