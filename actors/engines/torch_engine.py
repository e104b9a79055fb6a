"""The `torch` engine: a Hugging Face model in this process, decoded by `DecodeLoop` in one thread.

With `tensor_parallel_size` > 1 this process is rank 0, and holds one shard of the model; it alone chooses tokens.
"""

import asyncio
import threading
import traceback

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from actors.contract import ConfigError
from actors.decoding.cost import CONTEXT, StepCost
from actors.decoding.forward import Forward
from actors.decoding.loop import DecodeLoop, Row
from actors.decoding.mirror import MirroredForward
from actors.decoding.sampling import reserved
from actors.engines.base import Completion, DraftingConfig, EngineConfig, EngineStats, Request, settle
from actors.engines.footprint import longest
from actors.engines.prompts import (
    before_unknown,
    check_room,
    check_words,
    encode_draft,
    encode_prompt,
    end_of_turn,
    load_tokenizer,
)
from actors.engines.ranks import Followers
from actors.engines.torch_model import check_shards, leave, load_model, load_shard


class TorchEngine:
    """Holds the model and the thread that decodes. `generate` may be awaited from any event loop, or several.

    Args:
        num_threads: CPU threads of torch in the decoding thread; None leaves torch's default.
        followers: the other ranks, when `tensor_parallel_size` > 1. An error of decoding then ends this process.

    Raises ConfigError when the model is not there, has no safetensors, or cannot be decoded by `DecodeLoop`.
    """

    def __init__(self, config: EngineConfig, num_threads: int | None, followers: Followers | None = None) -> None:
        self.config = config
        self._tokenizer = load_tokenizer(config.model, config.revision)
        self._followers = followers
        if followers is None:
            model = load_model(config)
            forward = Forward(model)
        else:
            check_shards(config)
            model = load_shard(config, 0, followers.store)
            forward = MirroredForward(model, followers.tell)
        self._limit = longest(model.config, config.max_model_len)
        self._num_words: int = model.config.get_text_config(decoder=True).vocab_size
        assert model.generation_config is not None
        eos = end_tokens(model.generation_config, self._tokenizer)
        # Without a drafting config a row's draft, where there is one, is nobody's.
        self._drafting = config if isinstance(config, DraftingConfig) else None
        if self._drafting and self._drafting.max_iterations is not None and not eos:
            raise ConfigError(f"{config.model!r} has no end-of-sequence token to fill a draft up with")
        self._loop = DecodeLoop(
            forward,
            self._decode,
            eos=eos,
            stop=config.stop,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            block_size=self._drafting.block_size if self._drafting and self._drafting.decoder != "greedy" else 1,
            max_iterations=self._drafting.max_iterations if self._drafting else None,
            max_num_seqs=config.max_num_seqs,
            kv_cache_tokens=config.kv_cache_tokens,
        )
        self._num_threads = num_threads
        # Callers encode while the thread decodes, and a fast tokenizer must not be switched to and fro meanwhile.
        self._tokenizer_lock = threading.Lock()
        self._state = threading.Condition()  # guards the five below
        self._pending: dict[Row, tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = {}
        self._submitted: list[Row] = []
        self._cancelled: list[Row] = []
        self._error: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="burnish-decode", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> Completion:
        """Make one candidate.

        Raises:
            RowError: `prompt_too_long`, `empty_prompt`, `rejected_by_engine`, or the causes of `encode_prompt`.
            ConfigError: a chat for a model without a chat template.
            BaseException: what ended the decoding thread, now or earlier; RuntimeError after `close`.
        """
        with self._tokenizer_lock:
            prompt = encode_prompt(self._tokenizer, request.prompt)
            draft = self._draft(request)
        max_tokens = self.config.max_tokens
        check_room(prompt, max_tokens, self._limit)
        num_reserved = self._num_reserved(request)
        if draft is not None:
            check_words(draft[:num_reserved], self._num_words)
            draft = before_unknown(draft, self._num_words)
        check_words(prompt, self._num_words)
        row = Row(tuple(prompt), max_tokens, request.seed, draft, num_reserved)
        caller = asyncio.get_running_loop()
        future: asyncio.Future[None] = caller.create_future()
        with self._state:
            if self._error is not None:
                raise self._error
            self._pending[row] = (caller, future)
            self._submitted.append(row)
            self._state.notify()
        try:
            await future
        except asyncio.CancelledError:
            with self._state:
                self._pending.pop(row, None)
                self._cancelled.append(row)
                self._state.notify()
            raise
        return Completion(
            row.text,
            row.finish_reason,
            num_prompt_tokens=len(prompt),
            num_tokens=len(row.tokens) - row.num_reserved,
            iterations=row.iterations if row.guesser else None,
            accepted=row.accepted if row.guesser else None,
        )

    def _draft(self, request: Request) -> list[int] | None:
        """What the request's row begins with; None where it is decoded one token at a time."""
        if self._drafting is None:
            return None
        if request.draft is not None:
            return encode_draft(self._tokenizer, request.draft)
        return [] if self._drafting.decoder == "parallel" or self._drafting.max_iterations is not None else None

    def _num_reserved(self, request: Request) -> int:
        if self._drafting is None:
            return 0
        return reserved(request.seed, self._drafting.num_reserved, self._drafting.random_reserved)

    def stats(self) -> EngineStats:
        with self._state:
            waiting = len(self._loop.waiting) + len(self._submitted)
        return EngineStats(num_tokens=self._loop.num_tokens, num_running=len(self._loop.active), num_waiting=waiting)

    def close(self) -> None:
        """End the thread and free the model. Requests that still wait raise RuntimeError."""
        with self._state:
            if self._closing:
                return
            self._closing = True
            self._state.notify()
        self._thread.join()
        del self._loop.forward
        leave(self._followers)

    def _decode(self, ids: list[int]) -> str:
        with self._tokenizer_lock:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _run(self) -> None:
        """The thread: hand rows to the loop, step it, hand results back."""
        try:
            if self._num_threads is not None:
                torch.set_num_threads(self._num_threads)  # of this thread's parallel regions
            self._loop.cost = self._measure()
            while self._exchange():
                for row in self._loop.step():
                    self._settle(row, None)
            error: BaseException = RuntimeError("the torch engine is closed")
        except BaseException as caught:  # whatever it is, those who wait must hear of it
            error = caught
            if self._followers is not None:
                traceback.print_exc()
                self._followers.abandon()
        with self._state:
            self._error = error
            rows = list(self._pending)
        for row in rows:
            self._settle(row, error)

    def _measure(self) -> StepCost | None:
        """What guesses cost, where it is asked: a fixed block, a fixed number of iterations and no guesses need not."""
        loop, drafting = self._loop, self._drafting
        if drafting is None or drafting.decoder != "auto" or drafting.max_iterations is not None:
            return None
        if loop.temperature > 0 or loop.block_size == 1:
            return None
        num_rows = loop.kv_cache_tokens // (CONTEXT + loop.block_size)
        return StepCost.measure(
            loop.forward, max(1, min(num_rows, loop.max_num_seqs)), loop.block_size, max_positions=self._limit
        )

    def _exchange(self) -> bool:
        """Wait for something to do and take in what callers left. False when the engine closes."""
        with self._state:
            self._state.wait_for(lambda: self._closing or self._submitted or self._cancelled or self._loop.busy)
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
            closing = self._closing
        for row in submitted:
            self._loop.submit(row)
        for row in cancelled:
            self._loop.cancel(row)
        return not closing

    def _settle(self, row: Row, error: BaseException | None) -> None:
        """Wake the caller of a row, if it still waits."""
        with self._state:
            entry = self._pending.pop(row, None)
        if entry is not None:
            settle(*entry, error)


def end_tokens(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token id that ends an answer, the most usual one first."""
    ids = generation.eos_token_id
    every = [end_of_turn(tokenizer), tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])]
    return list(dict.fromkeys(i for i in every if i is not None))
