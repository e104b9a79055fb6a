"""The contract of an engine: requests in, completions out, asynchronously, many at once."""

from dataclasses import dataclass
from typing import Literal, Protocol

from omegaconf import MISSING

from actors.contract import ConfigError, option

Messages = tuple[tuple[str, str], ...]
"""A chat as (role, content) pairs."""


@dataclass(frozen=True)
class EngineConfig:
    """How tokens are made. Shared by every pool that holds a model."""

    engine: Literal["torch", "stored"] = option("torch", "how tokens are made", changes_rows=True)
    model: str = option(MISSING, "folder or hub id of the model; a provenance label for `stored`")
    revision: str | None = option(None, "branch, tag or commit of a hub id; resolved to a commit when the run starts")
    max_tokens: int = option(512, "most tokens to make per candidate", changes_rows=True)
    temperature: float = option(
        0.0, "0 decodes greedily, above 0 samples with one seed per candidate", changes_rows=True
    )
    top_p: float = option(1.0, "sample from the smallest set of tokens that holds this probability", changes_rows=True)
    top_k: int | None = option(None, "sample from this many most likely tokens; null: all", changes_rows=True)
    stop: list[str] = option([], "strings that end an answer and are not part of it", changes_rows=True)
    max_model_len: int | None = option(
        None, "longest prompt plus answer in tokens; null: the model's own limit", changes_rows=True
    )
    dtype: Literal["bfloat16", "float32", "float16"] = option("bfloat16", "of weights and KV cache", changes_rows=True)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "`auto` is cuda where there is one")
    max_num_seqs: int = option(32, "candidates decoded at the same time by one replica")
    kv_cache_tokens: int = option(131072, "most tokens (rows x longest row) the torch engine's KV cache may hold")
    num_threads: int | None = option(
        None, "CPU threads of one replica; null: the node's cores shared between the pools"
    )

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature < 0:
            raise ConfigError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, or null for all, got {self.top_k}")
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if any(not text for text in self.stop):
            raise ConfigError("stop must not hold an empty string")


@dataclass(frozen=True)
class Request:
    """One candidate to be made.

    Attributes:
        prompt: a chat, to which the model's own chat template is applied once, or raw text for models without one.
        seed: of this candidate's sampling.
        stored: the answer that the input shard already holds; read by the `stored` engine only.
    """

    prompt: Messages | str
    seed: int
    stored: str | None = None


@dataclass(frozen=True)
class Completion:
    """What an engine made of a request. Token counts are null where no tokens were made here (`stored`)."""

    text: str
    finish_reason: Literal["stop", "length"] | None
    num_prompt_tokens: int | None
    num_tokens: int | None


@dataclass(frozen=True)
class EngineStats:
    """Totals since the engine started; for progress lines and the stall watchdog."""

    num_tokens: int
    num_running: int
    num_waiting: int


class Engine(Protocol):
    """Holds a model. Built inside a pool's actor; one instance serves every unit in flight there."""

    async def generate(self, request: Request) -> Completion:
        """Make one candidate. Raises RowError when only this request is at fault; any other error is the engine's."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Free the model and end every thread or process of the engine."""
        ...
