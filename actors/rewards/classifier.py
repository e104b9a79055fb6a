"""Sequence classification models as rewards: batches of like lengths through a Hugging Face model in this process.

With `tensor_parallel_size` > 1 this process is rank 0 and holds one shard of the model, as in the `torch` engine.
"""

import asyncio
import contextlib
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from actors.contract import ConfigError
from actors.engines.base import Completion, EngineStats, Request, ScoringConfig, settle
from actors.engines.footprint import longest
from actors.engines.prompts import check_room, load_failure, load_tokenizer
from actors.engines.ranks import Followers
from actors.engines.torch_model import check_shards, device_of, leave, live, load_shard
from actors.rewards.heads import check_head, scored_ids


@dataclass(eq=False)
class Asked:
    """A text to be scored, and who waits for it."""

    ids: list[int]
    caller: asyncio.AbstractEventLoop
    future: "asyncio.Future[float]"


class Classifier:
    """Holds the model and the thread that runs it. `generate` may be awaited from any event loop, or several.

    Args:
        num_threads: CPU threads of torch in that thread.
        followers: the other ranks, when `tensor_parallel_size` > 1. An error of the model then ends this process.

    Raises ConfigError when the model is not there, has no safetensors, no head of one label, or needs its own code.
    """

    def __init__(self, config: ScoringConfig, num_threads: int, followers: Followers | None = None) -> None:
        self._config, self._num_threads, self._followers = config, num_threads, followers
        self._tokenizer = load_tokenizer(config.model, config.revision)
        check_head(config)
        if followers is None:
            self._model = load_classifier(config)
        else:
            check_shards(config)
            self._model = load_shard(config, 0, followers.store, load_classifier)
        self._limit = longest(self._model.config, config.max_model_len)
        self._state = threading.Condition()  # guards the four below
        self._waiting: list[Asked] = []
        self._num_running = self._num_tokens = 0
        self._error: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="burnish-classifier", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> Completion:
        """Score a chat by its last message.

        Raises:
            RowError: `prompt_too_long`, `empty_prompt`, or the causes of `encode_prompt`.
            ConfigError: a chat for a model without a chat template.
            BaseException: what ended the thread, now or earlier; RuntimeError after `close`.
        """
        ids = scored_ids(self._tokenizer, request, pad_token(self._model))
        check_room(ids, 0, self._limit)
        caller = asyncio.get_running_loop()
        asked = Asked(ids, caller, caller.create_future())
        with self._state:
            if self._error is not None:
                raise self._error
            self._waiting.append(asked)
            self._state.notify()
        try:
            score = await asked.future
        except asyncio.CancelledError:
            with self._state, contextlib.suppress(ValueError):
                self._waiting.remove(asked)
            raise
        return Completion("", None, len(ids), 0, score=score)

    def stats(self) -> EngineStats:
        """Tokens are those that were read."""
        with self._state:
            return EngineStats(self._num_tokens, self._num_running, len(self._waiting))

    def close(self) -> None:
        """End the thread and free the model. Requests that still wait raise RuntimeError."""
        with self._state:
            if self._closing:
                return
            self._closing = True
            self._state.notify()
        self._thread.join()
        del self._model
        leave(self._followers)

    def _run(self) -> None:
        """The thread: batch after batch, as long as there are texts."""
        batch: list[Asked] = []
        try:
            torch.set_num_threads(self._num_threads)  # of this thread's parallel regions
            while batch := self._taken():
                ids = [asked.ids for asked in batch]
                if self._followers is not None:
                    self._followers.tell((ids,))
                scores = score_batch(self._model, ids)
                with self._state:
                    self._num_running = 0
                    self._num_tokens += sum(map(len, ids))
                for asked, score in zip(batch, scores, strict=True):
                    settle(asked.caller, asked.future, score)
            error: BaseException = RuntimeError("the classifier is closed")
        except BaseException as caught:  # whatever it is, those who wait must hear of it
            error = caught
            if self._followers is not None:
                traceback.print_exc()
                self._followers.abandon()
            for asked in batch:
                settle(asked.caller, asked.future, error)
        with self._state:
            self._error = error
            waiting, self._waiting = self._waiting, []
        for asked in waiting:
            settle(asked.caller, asked.future, error)

    def _taken(self) -> list[Asked]:
        """Wait for texts and take a batch of them; [] when the engine closes."""
        with self._state:
            self._state.wait_for(lambda: self._closing or self._waiting)
            if self._closing:
                return []
            lengths = [len(asked.ids) for asked in self._waiting]
            chosen = set(batch_of(lengths, self._config.max_num_seqs, self._config.batch_tokens))
            batch = [asked for number, asked in enumerate(self._waiting) if number in chosen]
            self._waiting = [asked for number, asked in enumerate(self._waiting) if number not in chosen]
            self._num_running = len(batch)
            return batch


def batch_of(lengths: Sequence[int], max_rows: int, max_tokens: int) -> list[int]:
    """Numbers of the rows to run next: the one that has waited longest, and those nearest to it in length.

    As many as fit into `max_rows` and, padded to the longest of them, into `max_tokens`; the first one in any case.
    """
    batch, widest = [0], lengths[0]
    for number in sorted(range(1, len(lengths)), key=lambda number: abs(lengths[number] - lengths[0])):
        widest = max(widest, lengths[number])
        if len(batch) == max_rows or (len(batch) + 1) * widest > max_tokens:
            break
        batch.append(number)
    return batch


@torch.inference_mode()
def score_batch(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[float]:
    """The model's logit of each row of token ids."""
    return [float(score) for score in batch_logits(model, rows).cpu()]


def batch_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The model's logit of each row of token ids, which are padded on the right: float32[n], with its gradient.

    Hugging Face takes the logit at the rightmost token that is not `pad_token_id`. Rows come without such tokens at
    their end (`scored_ids`); where the model has none, one that no row holds stands in for it.
    """
    config = model.config.get_text_config()
    pad = config.pad_token_id
    filling = (
        pad
        if pad is not None
        else min(set(range(len(rows) * max(map(len, rows)) + 1)) - {i for row in rows for i in row})
    )
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[filling] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    try:
        config.pad_token_id = filling
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        config.pad_token_id = pad
    return logits[:, 0].float()


def pad_token(model: PreTrainedModel) -> int | None:
    pad: int | None = model.config.get_text_config().pad_token_id
    return pad


def load_classifier(config: ScoringConfig) -> PreTrainedModel:
    """Load the model onto its device, from safetensors alone; a rank's shard of it where there are several.

    Raises ConfigError in one line, also where the files hold no head: a random one would be made up for it.
    """
    device = device_of(config)
    size = config.tensor_parallel_size
    disable_progress_bar()
    try:
        model: Any
        model, told = AutoModelForSequenceClassification.from_pretrained(
            config.model,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            distributed_config=DistributedConfig(tp_size=size, tp_plan="auto") if size > 1 else None,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(load_failure("sequence classification model", config.model, error)) from error
    if missing := sorted(told["missing_keys"]):
        raise ConfigError(f"{config.model!r} is no reward model: its files hold no {', '.join(missing[:3])}")
    moved: PreTrainedModel = model.to(device).eval()
    return moved


def follow(descriptor: int) -> None:
    """The life of a rank above 0: run the batches that rank 0 runs."""
    live(descriptor, load_classifier, lambda model: partial(_obey, model))


def _obey(model: PreTrainedModel, command: tuple[list[list[int]]]) -> None:
    score_batch(model, *command)
