"""The contract of an engine: requests in, completions out, asynchronously, many at once."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from omegaconf import MISSING

from actors.contract import ConfigError, is_set, option, refuse_secrets, refuse_unless

Messages = tuple[tuple[str, str], ...]
"""A chat as (role, content) pairs."""

OPENAI = "https://api.openai.com/v1"
"""Where `base_url: null` leads."""

Generating = Literal["torch", "vllm", "openai", "stored"]
"""Engines that make text; `rules` only scores it."""

_KEYS_OF_THEIR_OWN = {
    "model", "revision", "dtype", "max_model_len", "max_num_seqs", "tensor_parallel_size", "trust_remote_code", "seed",
}  # fmt: skip
_ENGINES_OF = {
    "engine_kwargs": ("vllm",),
    "tensor_parallel_size": ("torch", "vllm"),
    "base_url": ("openai",),
    "revision": ("torch", "vllm", "stored"),
    "max_model_len": ("torch", "vllm", "stored"),
}
"""Keys that some engines do not know: set for one of those, they would be silently without effect."""


@dataclass(frozen=True)
class EngineConfig:
    """How tokens are made. Shared by every pool that holds a model."""

    engine: Literal["torch", "vllm", "openai", "stored", "rules"] = option(
        "torch", "how tokens are made", changes_rows=True
    )
    model: str = option(
        MISSING,
        "folder, hub id or URL of the model; its name at the endpoint for `openai`; a provenance label for `stored`",
    )
    model_storage_options: dict[str, Any] = option(
        {}, "fsspec options of a model that is named by URL; empty: site.storage_options; no secrets"
    )
    revision: str | None = option(None, "branch, tag or commit of a hub id; resolved to a commit when the run starts")
    max_tokens: int = option(512, "most tokens to make per candidate", changes_rows=True)
    temperature: float = option(
        0.0, "0 decodes greedily, above 0 samples with one seed per candidate", changes_rows=True
    )
    top_p: float = option(1.0, "sample from the smallest set of tokens that holds this probability", changes_rows=True)
    top_k: int | None = option(None, "sample from this many most likely tokens; null: all", changes_rows=True)
    reasoning_end: str | None = option(
        "</think>",
        "what ends a reasoning model's thinking, which is kept apart; null: there is none",
        changes_rows=True,
    )
    stop: list[str] = option([], "strings that end an answer and are not part of it", changes_rows=True)
    max_model_len: int | None = option(
        None, "longest prompt plus answer in tokens; null: the model's own limit", changes_rows=True
    )
    dtype: Literal["bfloat16", "float32", "float16"] = option("bfloat16", "of weights and KV cache", changes_rows=True)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "`auto` is cuda where there is one")
    max_num_seqs: int = option(32, "candidates decoded at the same time by one replica")
    kv_cache_tokens: int = option(
        131072, "most tokens (rows x longest row) the KV cache may hold; `vllm` on a GPU fills gpu_memory_utilization"
    )
    num_threads: int | None = option(
        None, "CPU threads of one replica; null: the node's cores shared between the pools"
    )
    # Like `device`, not in the fingerprint: shards of a matrix add up in another order, which only moves rounding.
    tensor_parallel_size: int = option(1, "GPUs (processes on a CPU) that each layer is split over; `torch` and `vllm`")
    engine_kwargs: dict[str, Any] = option(
        {}, "further arguments of vLLM's AsyncEngineArgs, which checks them", changes_rows=True
    )
    base_url: str | None = option(None, "of the `openai` endpoint, ending in /v1; null: OpenAI's own")
    api_key_env: str = option("OPENAI_API_KEY", "environment variable that holds the endpoint's key, if it wants one")
    request_timeout_s: float = option(300.0, "seconds after which a request to the endpoint is given up and retried")
    retry_s: float = option(600.0, "seconds that an endpoint may be out before the job stops; it can be resumed")

    def __post_init__(self) -> None:
        refuse_unless(self, "at least 1", "max_tokens")
        refuse_unless(self, "0 or more", "temperature")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, or null for all, got {self.top_k}")
        refuse_unless(self, "at least 1", "max_num_seqs")
        if any(not text for text in self.stop):
            raise ConfigError("stop must not hold an empty string")
        refuse_unless(self, "at least 1", "tensor_parallel_size")
        refuse_unless(self, "more than 0", "request_timeout_s")
        refuse_unless(self, "0 or more", "retry_s")
        if taken := sorted(_KEYS_OF_THEIR_OWN.intersection(self.engine_kwargs)):
            hint = "is not to be had" if taken[0] in ("trust_remote_code", "seed") else "has a key of its own"
            raise ConfigError(f"engine_kwargs.{taken[0]}: {taken[0]} {hint}; take it out of engine_kwargs")
        for name, engines in _ENGINES_OF.items():
            if self.engine not in engines and is_set(self, name):
                raise ConfigError(f"{name} has no effect with engine={self.engine}: it is for {' and '.join(engines)}")
        refuse_secrets("model", self.model)
        refuse_secrets("model_storage_options", self.model_storage_options)
        refuse_secrets(
            "engine_kwargs", {key: self.engine_kwargs[key] for key in self.engine_kwargs if key == "hf_token"}
        )
        if self.base_url is not None:
            url = urlsplit(self.base_url)
            if url.username or url.password or url.query:
                raise ConfigError("base_url must hold no user, password or query: the key is read from api_key_env")
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ConfigError(f"base_url must be like https://host/v1, got {self.base_url!r}")


@dataclass(frozen=True)
class DraftingConfig(EngineConfig):
    """What an engine does with the draft that a request brings along."""

    decoder: Literal["auto", "parallel", "greedy"] = option(
        "auto",
        "parallel: check many positions of a draft per forward pass; greedy: one token each; auto: as many positions "
        "as pay, measured at the start (on `vllm` none where max_num_seqs is above 128, or 16 on CPUs)",
    )
    block_size: int = option(
        256,
        "most positions of a row per forward pass; with max_iterations a draft is filled up to it",
        changes_rows=True,
    )
    max_iterations: int | None = option(
        None,
        "`diffpo`: updates of the whole response, one after the other; null: until nothing changes, which is what the "
        "aligner would answer greedily without the response",
        changes_rows=True,
    )
    num_reserved: int = option(0, "`diffpo`: leading tokens of the response that stay as they are", changes_rows=True)
    random_reserved: bool = option(
        False, "`diffpo`: keep 0 to num_reserved of them, drawn by the candidate's seed", changes_rows=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless(self, "at least 1", "block_size")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ConfigError(
                f"max_iterations must be at least 1, or null for a fixed point, got {self.max_iterations}"
            )
        refuse_unless(self, "0 or more", "num_reserved")
        if self.max_iterations is not None:
            if self.engine != "torch":
                raise ConfigError(
                    f"max_iterations={self.max_iterations} needs engine=torch: {self.engine} can only decode until "
                    "nothing changes; set max_iterations to null"
                )
            if self.decoder == "greedy":
                raise ConfigError(
                    "max_iterations needs a parallel decoder: set decoder to auto, or max_iterations to null"
                )
        if self.decoder == "parallel" and self.engine not in ("torch", "vllm"):
            raise ConfigError(f"decoder=parallel has no effect with engine={self.engine}: it is for torch and vllm")
        if self.temperature > 0 and self.max_iterations is not None:
            raise ConfigError(f"max_iterations decodes greedily: temperature must be 0, got {self.temperature:g}")
        if self.temperature > 0 and self.decoder == "parallel":
            raise ConfigError("decoder=parallel decodes greedily: set temperature to 0, or decoder to auto")


@dataclass(frozen=True)
class ScoringConfig(EngineConfig):
    """How an engine scores a chat with its answer."""

    batch_tokens: int = option(16384, "`torch`: most tokens (rows x longest row) of one forward pass")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless(self, "at least 1", "batch_tokens")


@dataclass(frozen=True)
class Request:
    """One candidate to be made.

    Attributes:
        prompt: a chat, to which the model's own chat template is applied once, or raw text for models without one.
            Where a score is asked for, the chat ends with the answer that is to be scored.
        seed: of this candidate's sampling.
        draft: an answer that is there already: what `stored` returns, and where a parallel decoder begins.
        origin: the unit and the row of it that the candidate is for; None where it is for nobody.
        num_kills: engines that died while the row was alone in them, in lives before of the actor or of the job.
    """

    prompt: Messages | str
    seed: int
    draft: str | None = None
    origin: tuple[str, int] | None = field(default=None, compare=False)
    num_kills: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Completion:
    """What an engine made of a request: a text, or of a chat with its answer a `score`.

    Token counts are null where no tokens were made here (`stored`) or read (`rules`).

    `reasoning` is the thinking that the model's server has told apart; null where it may still be in the text.
    `iterations` (forward passes that changed or checked this answer) and `accepted` (tokens of its guesses that stayed)
    are null where one token was made at a time.
    """

    text: str
    finish_reason: Literal["stop", "length"] | None
    num_prompt_tokens: int | None
    num_tokens: int | None
    reasoning: str | None = None
    iterations: int | None = None
    accepted: int | None = None
    score: float | None = None


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


def settle(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[Any]", result: Any) -> None:
    """Hand a result, or an exception, from an engine's thread to who waits for it in `loop`, if anyone still does."""

    def wake() -> None:
        if future.done():
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    with contextlib.suppress(RuntimeError):  # the caller's event loop is closed: nobody waits
        loop.call_soon_threadsafe(wake)
