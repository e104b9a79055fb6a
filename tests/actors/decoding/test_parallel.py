"""A draft changes how long an answer takes, never the answer; a number of iterations gives what its definition says."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from actors.decoding import loop as loop_module
from actors.decoding.cost import StepCost
from actors.decoding.forward import ATTENTION, Forward, SlotCache
from actors.decoding.loop import DecodeLoop, Row
from actors.decoding.parallel import Denoiser, Drafter, Record
from tests.tiny_models import SHAPE

VOCABULARY = 40  # so few that guesses come true by chance and rows end early
EOS = 2
MAX_TOKENS = 30
KINDS: dict[str, Any] = {
    "llama": (LlamaConfig, {}),
    "gemma2": (Gemma2Config, {"sliding_window": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 32}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "mistral": (MistralConfig, {"sliding_window": 16}),
}
COSTS = {
    "fixed": None,
    "free": StepCost({1: {1: 1.0, 1000: 1.0}}),
    "knee": StepCost({1: {1: 1.0, 16: 1.1, 32: 2.0}, 6: {6: 1.2, 48: 2.0, 96: 6.0}}),
    "dear": StepCost({1: {1: 1.0, 2: 2.0}}),
}

many = settings(derandomize=True, deadline=None, max_examples=60)


@cache
def random_model(kind: str, seed: int) -> PreTrainedModel:
    config_class, extra = KINDS[kind]
    torch.manual_seed(seed)
    config = config_class(vocab_size=VOCABULARY, **(SHAPE | extra))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """Prompts and drafts for a model, and how they are batched."""

    model: PreTrainedModel
    prompts: list[tuple[int, ...]]
    drafts: list[list[int]]
    num_reserved: int
    loop: dict[str, Any]

    def decode(self, *, drafts: Sequence[Sequence[int] | None] | None = None, **changes: Any) -> list[Row]:
        """Finished rows; `changes` to the loop's settings."""
        kwargs: dict[str, Any] = {"eos": [EOS], "kv_cache_tokens": 1 << 16}
        loop = DecodeLoop(Forward(self.model), str, **(kwargs | self.loop | changes))
        rows = [
            Row(prompt, MAX_TOKENS, seed=0, draft=draft, num_reserved=self.num_reserved)
            for prompt, draft in zip(self.prompts, self.drafts if drafts is None else drafts, strict=True)
        ]
        for row in rows:
            loop.submit(row)
        while loop.busy:
            loop.step()
        return rows

    def greedy(self) -> list[Row]:
        return self.decode(block_size=1, max_iterations=None, cost=None)


TOKENS = st.lists(st.integers(0, VOCABULARY - 1).filter(lambda token: token != EOS), max_size=MAX_TOKENS + 8)


@st.composite
def cases(draw: Callable[[Any], Any]) -> Case:
    """Drafts are what the model would say, with tokens put in, left out and replaced; or anything at all."""
    model = random_model(draw(st.sampled_from(sorted(KINDS))), draw(st.integers(0, 2)))
    prompts = draw(st.lists(TOKENS.filter(len).map(tuple), min_size=1, max_size=7))
    prompts += draw(st.lists(st.sampled_from(prompts), max_size=2))  # candidates of one prompt
    loop = {
        "block_size": draw(st.integers(2, 12)),
        "max_num_seqs": draw(st.integers(1, 6)),
        "kv_cache_tokens": draw(st.sampled_from([128, 256, 1 << 16])),
        "cost": COSTS[draw(st.sampled_from(sorted(COSTS)))],
    }
    case = Case(model, prompts, [[] for _ in prompts], 0, loop)
    drafts = []
    for row in case.greedy():
        draft = list(row.tokens)
        for _ in range(draw(st.integers(0, 3))):
            at, gone = draw(st.integers(0, len(draft))), draw(st.integers(0, 4))
            draft[at : at + gone] = draw(TOKENS)[:4]
        drafts.append(draw(st.just(draft) | st.just(draft) | TOKENS))
    return Case(model, prompts, drafts, draw(st.sampled_from([0, 0, 1, 5, 50])), loop)


# --- the fixed point ------------------------------------------------------------------------------------------------


@many
@given(cases())
def test_any_draft_gives_greedy_decoding_in_no_more_forwards(case: Case) -> None:
    for made, greedy in zip(case.decode(), case.greedy(), strict=True):
        assert (made.tokens, made.text, made.finish_reason) == (greedy.tokens, greedy.text, greedy.finish_reason)
        assert made.iterations <= greedy.iterations
        assert made.accepted >= len(made.tokens) - made.num_reserved - made.iterations
        assert made.tokens[: made.num_reserved] == list(made.draft or ())[: made.num_reserved]


@many
@given(cases())
def test_an_exact_draft_costs_a_forward_a_block(case: Case) -> None:
    drafts = [row.tokens for row in case.greedy()]
    block = case.loop["block_size"]
    for row in case.decode(drafts=drafts, cost=None):
        num_made = len(row.tokens) - row.num_reserved
        assert row.iterations <= math.ceil(num_made / block) + 1


# --- a number of iterations ---------------------------------------------------------------------------------------


def denoise(case: Case, row: int, num_iterations: int) -> tuple[list[int], str]:
    """The definition, without a cache: every token of the response is replaced by what follows those before it."""
    prompt, draft = case.prompts[row], case.drafts[row]
    length = min(MAX_TOKENS, max(len(draft), case.loop["block_size"]))
    num_reserved = min(case.num_reserved, len(draft), length - 1)
    guess = (draft + [EOS] * length)[:length]
    case.model.set_attn_implementation("eager")
    for _ in range(num_iterations):
        with torch.inference_mode():
            logits = case.model(torch.tensor([[*prompt, *guess]])).logits[0]
        guess[num_reserved:] = logits[len(prompt) + num_reserved - 1 : -1].argmax(-1).tolist()
    case.model.set_attn_implementation(ATTENTION)
    return (guess[: guess.index(EOS)], "stop") if EOS in guess else (guess, "length")


@many
@given(cases(), st.sampled_from([1, 2, 3, 6, MAX_TOKENS]))
def test_iterations_equal_their_definition(case: Case, num_iterations: int) -> None:
    for i, row in enumerate(case.decode(max_iterations=num_iterations, cost=None)):
        assert (row.tokens, row.finish_reason) == denoise(case, i, num_iterations)
        assert row.iterations <= num_iterations
