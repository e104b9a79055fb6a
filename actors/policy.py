"""The policy pool: prompts become responses, `num_candidates` of them each."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actors.candidates import as_messages, failed, made, model_label
from actors.contract import RESPONSES, RowError, candidate_seed, option, refuse_unless
from actors.engines.base import Generating, Messages
from actors.pool import Columns, ModelStage, PoolConfig, Row


@dataclass(frozen=True)
class PolicyConfig(PoolConfig):
    """The model whose answers are to be aligned."""

    engine: Generating = option("torch", "how tokens are made", changes_rows=True)
    num_candidates: int = option(1, "answers per prompt; `stored` takes all there are", changes_rows=True)
    system_prompt: str | None = option(None, "system message for prompts that have none", changes_rows=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless(self, "at least 1", "num_candidates")


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

    async def columns(self, name: str, unit: pa.Table) -> Columns:
        """Raises whatever is the engine's fault; a fault of one request ends in that candidate's `error`."""
        names = ["prompt_id", "prompt", "problem", *({"stored", "responses"} & set(unit.column_names))]
        rows = unit.select(names).to_pylist()
        answered = await self.each(name, self._answers, rows)
        responses = [(row.get("responses") or []) + answers for row, answers in zip(rows, answered, strict=True)]
        num_failed = sum(not any(answer["status"] == "ok" for answer in answers) for answers in answered)
        return Columns({"responses": pa.array(responses, RESPONSES)}, num_failed)

    async def _answers(self, row: Row) -> list[dict[str, Any]]:
        if row["problem"] is not None:
            return []
        stored: list[str | None] = [None] * self._config.num_candidates
        if self._config.engine == "stored":
            stored = row["stored"] or [None]
        messages = policy_prompt(self._config, row["prompt"])
        if len(stored) == 1:
            return [await self._answer(row, messages, 0, stored[0])]
        return list(
            await asyncio.gather(*(self._answer(row, messages, number, text) for number, text in enumerate(stored)))
        )

    async def _answer(self, row: Row, messages: Messages, number: int, stored: str | None) -> dict[str, Any]:
        seed = candidate_seed(self._run_seed, row["prompt_id"], self._first + number, "policy")
        candidate = {"model": self._label, "seed": seed}
        try:
            completion = await self.generate(row, messages, seed=seed, draft=stored)
            return made(completion, self._config.reasoning_end, **candidate)
        except RowError as error:
            return failed(error, **candidate)


def policy_prompt(config: PolicyConfig, prompt: list[dict[str, str]]) -> Messages:
    """The chat that the policy's template is applied to."""
    messages = as_messages(prompt)
    if config.system_prompt and messages[0][0] != "system":
        return (("system", config.system_prompt), *messages)
    return messages
