"""Trajectories as token ids, exactly as a DiffPO aligner meets them, and the batches that are made of them.

Which trajectories and which y(t) a step sees follows from its number, the seed and the data alone: a training that goes
on from a checkpoint sees what an undisturbed one would have seen, however many processes either has.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from actors.candidates import as_messages
from actors.contract import ConfigError, RowError
from actors.engines.base import EngineConfig, Messages
from actors.engines.footprint import longest
from actors.engines.prompts import (
    before_unknown,
    check_room,
    check_words,
    encode_draft,
    encode_prompt,
    load_failure,
    load_tokenizer,
)
from actors.engines.torch_engine import end_tokens
from actors.recipes.diffpo import diffpo
from actors.training.aligner_settings import TrainingConfig

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One row of a `trajectory` dataset.

    Attributes:
        messages: the prompt.
        prompt: its token ids, up to where the answer begins.
        states: of y(0) … y(T), at least two: token ids that end with the end of sequence, unless they were cut.
        texts: of the same.
    """

    messages: Messages
    prompt: Ids
    states: tuple[Ids, ...]
    texts: tuple[str, ...]

    @property
    def length(self) -> int:
        """Tokens of a sequence x y(T)."""
        return len(self.prompt) + len(self.states[-1])


@dataclass(frozen=True)
class Vocabulary:
    """What text becomes for a model.

    Attributes:
        end: tokens that end an answer, the most usual one first.
        num_words: tokens that the model knows.
        limit: tokens of prompt and answer together that it has places for.
    """

    tokenizer: PreTrainedTokenizerBase
    end: list[int]
    num_words: int
    limit: int


def vocabulary(base: EngineConfig) -> Vocabulary:
    """Of a model on this node's disk or at the hub. Raises ConfigError where there is none or it ends no answer."""
    tokenizer = load_tokenizer(base.model, base.revision)
    try:
        config = AutoConfig.from_pretrained(base.model, revision=base.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(load_failure("model config", base.model, error)) from error
    try:
        generation = GenerationConfig.from_pretrained(base.model, revision=base.revision)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    end = end_tokens(generation, tokenizer)
    if not end:
        raise ConfigError(f"{base.model!r} has no end-of-sequence token: its answers could not end")
    return Vocabulary(tokenizer, end, config.get_text_config(decoder=True).vocab_size, longest(config, None))


def encoded(words: Vocabulary, row: Mapping[str, Any], config: TrainingConfig) -> Trajectory | None:
    """A dataset's row (`prompt`, `states`) by the functions that encode it for inference; None where its prompt is too
    long, or refused by the model's chat template."""
    messages = as_messages(row["prompt"])
    try:
        prompt = encode_prompt(words.tokenizer, diffpo(messages))
        check_words(prompt, words.num_words)
        check_room(prompt, config.max_tokens, words.limit)
    except RowError:
        return None
    if len(prompt) > config.max_prompt_tokens:
        return None
    drafts = (before_unknown(encode_draft(words.tokenizer, text), words.num_words) for text in row["states"])
    states = (np.array([*draft, words.end[0]][: config.max_tokens], np.int32) for draft in drafts)
    return Trajectory(messages, np.array(prompt, np.int32), tuple(states), tuple(row["states"]))


# --- which ones a step sees -----------------------------------------------------------------------------------------


def drawn(
    step: int, num_steps: int, trajectories: Sequence[Trajectory], config: TrainingConfig
) -> list[tuple[int, int]]:
    """What step `step` (from 0) of `num_steps` sees: `batch_size` times (which trajectory, which t < T).

    Each epoch is a permutation of all trajectories; t is drawn evenly from 0 … T-1. With `curriculum` from those next
    to T first: at first from T-1 alone, after half of the steps from all.
    """
    found = []
    for at in range(step * config.batch_size, (step + 1) * config.batch_size):
        epoch, place = divmod(at, len(trajectories))
        chosen = int(_permutation(config.seed, epoch, len(trajectories))[place])
        worse = len(trajectories[chosen].states) - 1
        first = int(worse * (1 - min(1.0, 2 * step / num_steps))) if config.curriculum else 0
        rng = np.random.default_rng([config.seed, epoch, chosen])
        found.append((chosen, int(rng.integers(min(first, worse - 1), worse))))
    return found


@functools.lru_cache(2)  # asked for again and again
def _permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Sequences x y(T), and below them x y(t) of the same trajectories, padded on the right.

    Places count positions of all sequences end to end, row by row, padding included.

    Attributes:
        ids: int64 [sequences, longest].
        mask: int64, likewise: 1 where there is a token.
        before_targets: int64 [a], the place before each token of a y(T): where it is predicted.
        targets: int64 [a], those tokens.
        teacher, student: int64 [c], the places in x y(T) and in x y(t) where the same token of y(T) is predicted, from
            the first that is predicted from different tokens to the last.
    """

    ids: Tensor
    mask: Tensor
    before_targets: Tensor
    targets: Tensor
    teacher: Tensor
    student: Tensor


def batch(some: Iterable[tuple[Trajectory, int]], *, consistent: bool, device: torch.device) -> Batch:
    """The batch of trajectories, each with its t. Without `consistent` it has no sequence x y(t)."""
    chosen = [(each.prompt, each.states[-1], guess(each.states[t], len(each.states[-1]))) for each, t in some]
    rows = [np.concatenate([prompt, best]) for prompt, best, _ in chosen]
    if consistent:
        rows += [np.concatenate([prompt, other]) for prompt, _, other in chosen]
    width = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    before_targets, teacher, student = [], [], []
    for number, (prompt, best, other) in enumerate(chosen):
        start = number * width + len(prompt) - 1
        before_targets.append(np.arange(start, start + len(best)))
        if consistent:
            teacher.append(start + differing(best, other))
            student.append(teacher[-1] + len(chosen) * width)
    targets = np.concatenate([best for _, best, _ in chosen]).astype(np.int64)
    host = [ids, mask, np.concatenate(before_targets), targets]
    host += [np.concatenate(places) if places else np.empty(0, np.int64) for places in (teacher, student)]
    return Batch(*(torch.from_numpy(each).to(device) for each in host))


def guess(state: Ids, length: int) -> Ids:
    """An answer as far as `length` tokens, filled up with the end of sequence where it is shorter: what the decoder
    begins with. What was cut has no end, but it is not shorter than any other."""
    return np.concatenate([state[:length], np.repeat(state[-1:], max(0, length - len(state)))])


def differing(best: Ids, other: Ids) -> npt.NDArray[np.int64]:
    """Which tokens of `best`, counted from 0, are predicted from other ones there than in `other`, which is as long."""
    unequal = np.flatnonzero(best != other)
    return np.arange(unequal[0] + 1 if len(unequal) else len(best), len(best))
