"""The aligner pool: every response becomes an aligned one."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actors.candidates import DEPENDENT, as_messages, failed, lost, made, model_label
from actors.contract import ALIGNED_LIST, PROBLEM, ConfigError, RowError, candidate_seed, option
from actors.engines.base import DraftingConfig, Generating, Messages
from actors.pool import Columns, ModelStage, PoolConfig, Row
from actors.recipes import RecipeConfig, aligner_input

Candidate = dict[str, Any]
"""A response, or the aligned text of one, as `contract.RESPONSE` and `contract.ALIGNED` have them."""


@dataclass(frozen=True)
class AlignerConfig(RecipeConfig, DraftingConfig, PoolConfig):
    """The model that aligns, and the recipe by which it does."""

    engine: Generating = option("torch", "how tokens are made", changes_rows=True)

    def __post_init__(self) -> None:
        super(RecipeConfig, self).__post_init__()
        RecipeConfig.__post_init__(self)
        for name, unset in (("max_iterations", "null"), ("num_reserved", "0"), ("random_reserved", "false")):
            if self.recipe != "diffpo" and getattr(self, name):
                raise ConfigError(f"{name} is read by recipe=diffpo only; with recipe={self.recipe} it must be {unset}")
        if self.recipe == "diffpo" and self.temperature > 0:
            raise ConfigError(f"recipe=diffpo decodes greedily: temperature must be 0, got {self.temperature:g}")
        if self.num_reserved and self.engine not in ("torch", "vllm"):
            raise ConfigError(f"num_reserved has no effect with engine={self.engine}: it is for torch and vllm")
        if self.num_reserved >= self.max_tokens:
            most = self.max_tokens - 1
            raise ConfigError(f"num_reserved must be at most max_tokens - 1 = {most}, got {self.num_reserved}")
        if self.random_reserved and not self.num_reserved:
            raise ConfigError("random_reserved draws from 0 to num_reserved: set num_reserved to 1 or more")

    @property
    def ignores_response(self) -> bool:
        """Whether every response comes to the same text: the one that the aligner would write greedily without any.

        So it is with `diffpo` where decoding goes on until nothing changes and no token of the response is reserved:
        position i is then the argmax after positions that are final already, whatever stood there first.
        """
        return self.recipe == "diffpo" and self.engine != "stored" and not (self.max_iterations or self.num_reserved)


class AlignerStage(ModelStage):
    """One aligner replica. Adds `aligned`, parallel to `responses`. A failed response stays failed.

    Args:
        run_seed: of the run; every candidate's own seed derives from it.
    """

    def __init__(self, config: AlignerConfig, run_seed: int, **arguments: Any) -> None:
        super().__init__(config=config, **arguments)
        self._config, self._run_seed = config, run_seed
        self._label = model_label(config)

    async def columns(self, name: str, unit: pa.Table) -> Columns:
        """Raises whatever is the engine's fault; a fault of one request ends in that candidate's `error`."""
        rows = unit.select(["prompt_id", "prompt", "responses", "problem"]).to_pylist()
        aligned = await self.each(name, self._aligned, rows)
        problems = [row["problem"] or lost(row["responses"], found) for row, found in zip(rows, aligned, strict=True)]
        num_failed = sum(problem is not None for problem in problems)
        return Columns({"aligned": pa.array(aligned, ALIGNED_LIST), "problem": pa.array(problems, PROBLEM)}, num_failed)

    async def _aligned(self, row: Row) -> list[Candidate]:
        messages = as_messages(row["prompt"])
        candidates = [
            (candidate_seed(self._run_seed, row["prompt_id"], number, "aligner"), response)
            for number, response in enumerate(row["responses"])
        ]
        if self._config.ignores_response:
            return await self._align_once(row, messages, candidates)
        if len(candidates) == 1:
            return [await self._align(row, messages, *candidates[0])]
        return list(await asyncio.gather(*(self._align(row, messages, *candidate) for candidate in candidates)))

    async def _align_once(
        self, row: Row, messages: Messages, candidates: list[tuple[int, Candidate]]
    ) -> list[Candidate]:
        """One text for all responses that there are, made from the first of them; the others only share it."""
        aligned: list[Candidate] = []
        first: Candidate | None = None
        for seed, response in candidates:
            if response["status"] != "ok":
                aligned.append(await self._align(row, messages, seed, response))
            elif first is None:
                first = await self._align(row, messages, seed, response)
                aligned.append(first)
            else:
                changed = first["text"] != response["text"] if first["status"] == "ok" else None
                aligned.append({**first, "seed": seed, "iterations": None, "accepted": None, "changed": changed})
        return aligned

    async def _align(self, row: Row, messages: Messages, seed: int, response: Candidate) -> Candidate:
        candidate = {"model": self._label, "seed": seed, "iterations": None, "accepted": None, "changed": None}
        answer = response["text"]
        try:
            if response["status"] != "ok":
                raise RowError(DEPENDENT, "there is no response to align")
            stored = self._config.engine == "stored"
            prompt = messages if stored else aligner_input(self._config, messages, answer)
            completion = await self.generate(row, prompt, seed=seed, draft=answer)
            aligned = made(completion, self._config.reasoning_end, **candidate)
        except RowError as error:
            return failed(error, **candidate)
        decoded = {"iterations": completion.iterations, "accepted": completion.accepted}
        return {**aligned, **decoded, "changed": aligned["text"] != answer}
