"""The aligner pool: every response becomes an aligned one."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actors.candidates import DEPENDENT, as_messages, failed, lost, made, model_label
from actors.contract import ALIGNED_LIST, PROBLEM, RowError, candidate_seed
from actors.engines.base import DraftingConfig, Messages, Request
from actors.pool import Columns, ModelStage, PoolConfig
from actors.recipes import RecipeConfig, aligner_input


@dataclass(frozen=True)
class AlignerConfig(RecipeConfig, DraftingConfig, PoolConfig):
    """The model that aligns, and the recipe by which it does."""

    def __post_init__(self) -> None:
        super(RecipeConfig, self).__post_init__()
        RecipeConfig.__post_init__(self)


class AlignerStage(ModelStage):
    """One aligner replica. Adds `aligned`, parallel to `responses`. A failed response stays failed.

    Args:
        run_seed: of the run; every candidate's own seed derives from it.
    """

    def __init__(self, config: AlignerConfig, run_seed: int, **arguments: Any) -> None:
        super().__init__(config=config, **arguments)
        self._config, self._run_seed = config, run_seed
        self._label = model_label(config)

    async def columns(self, unit: pa.Table) -> Columns:
        """Raises whatever is the engine's fault; a fault of one request ends in that candidate's `error`."""
        rows = unit.select(["prompt_id", "prompt", "responses", "problem"]).to_pylist()
        aligned = await self.each(self._aligned, rows)
        problems = [row["problem"] or lost(row["responses"], found) for row, found in zip(rows, aligned, strict=True)]
        num_failed = sum(problem is not None for problem in problems)
        return Columns({"aligned": pa.array(aligned, ALIGNED_LIST), "problem": pa.array(problems, PROBLEM)}, num_failed)

    async def _aligned(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        messages = as_messages(row["prompt"])
        responses = row["responses"]
        if len(responses) == 1:
            return [await self._align(row["prompt_id"], messages, 0, responses[0])]
        return list(
            await asyncio.gather(
                *(self._align(row["prompt_id"], messages, number, each) for number, each in enumerate(responses))
            )
        )

    async def _align(self, prompt_id: str, messages: Messages, number: int, response: dict[str, Any]) -> dict[str, Any]:
        seed = candidate_seed(self._run_seed, prompt_id, number, "aligner")
        candidate = {"model": self._label, "seed": seed, "iterations": None, "accepted": None, "changed": None}
        answer = response["text"]
        try:
            if response["status"] != "ok":
                raise RowError(DEPENDENT, "there is no response to align")
            stored = self._config.engine == "stored"
            prompt = messages if stored else aligner_input(self._config, messages, answer)
            completion = await self._engine.generate(Request(prompt, seed, draft=answer))
            candidate |= {"iterations": completion.iterations, "accepted": completion.accepted}
            aligned = made(completion, self._config.reasoning_end, **candidate)
        except RowError as error:
            return failed(error, **candidate)
        return {**aligned, "changed": aligned["text"] != answer}
