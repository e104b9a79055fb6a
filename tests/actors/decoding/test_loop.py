"""The decode loop makes what the model alone would make, whatever else is in the batch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from actors.contract import ConfigError
from actors.decoding import loop as loop_module
from actors.decoding.forward import ATTENTION, Forward, Layout, SlotCache
from actors.decoding.loop import DecodeLoop, Row
from actors.engines.base import EngineConfig
from actors.engines.torch_model import load_model

MAX_TOKENS = 20
SAMPLED = {"temperature": 0.8, "top_p": 0.95}
Prompts = list[tuple[int, ...]]


def make_prompts(num: int, *, longest: int = 40, seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num,), generator=generator).tolist()
    return [tuple(torch.randint(3, 512, (n,), generator=generator).tolist()) for n in lengths]


def make_loop(model: PreTrainedModel, **settings: Any) -> DecodeLoop:
    defaults: dict[str, Any] = {"eos": [2], "max_num_seqs": 8, "kv_cache_tokens": 1 << 16}
    return DecodeLoop(Forward(model), str, **(defaults | settings))


def finish(loop: DecodeLoop, rows: Sequence[Row]) -> list[list[int]]:
    for row in rows:
        loop.submit(row)
    while loop.busy:
        loop.step()
    return [row.tokens for row in rows]


def decode(model: PreTrainedModel, prompts: Prompts, **settings: Any) -> list[list[int]]:
    rows = [Row(prompt, MAX_TOKENS, seed=i) for i, prompt in enumerate(prompts)]
    return finish(make_loop(model, **settings), rows)


def generate(folder: Path, prompts: Prompts) -> list[list[int]]:
    """What transformers' `generate` makes of each prompt alone. `eager` attention: `sdpa` drops Gemma-2's caps."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
        answers.append([token for token in made[0, len(prompt) :].tolist() if token != 2])
    return answers


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2", "mistral"])
def test_greedy_equals_generate(model_folder: Callable[[str], Path], kind: str) -> None:
    folder = model_folder(kind)
    model = load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu"))
    prompts = make_prompts(16)
    want = generate(folder, prompts)
    assert decode(model, prompts) == want
    assert decode(model, prompts, max_num_seqs=1) == want


def test_sliding_window_is_shorter_than_the_sequences(model_folder: Callable[[str], Path]) -> None:
    """Without its window the model says something else, so that the exactness test above tests it."""
    model = load_model(EngineConfig(model=str(model_folder("mistral")), dtype="float32", device="cpu"))
    prompts = make_prompts(16)
    windowed = decode(model, prompts)
    loop = make_loop(model)
    loop.forward.window = None
    assert finish(loop, [Row(prompt, MAX_TOKENS, seed=0) for prompt in prompts]) != windowed


# --- invariance: what must not change a text, and mutations that show the comparison is able to fail ----------------


def changed(model: PreTrainedModel, settings: dict[str, Any]) -> list[str]:
    """The ways of batching that change the tokens of 40 prompts, against one row at a time."""
    prompts = make_prompts(40)
    alone = decode(model, prompts, max_num_seqs=1, **settings)
    ways = {
        "batch of 5, refilled": decode(model, prompts, max_num_seqs=5, **settings),
        "batch of 32, refilled": decode(model, prompts, max_num_seqs=32, **settings),
        "all at once": decode(model, prompts, max_num_seqs=40, **settings),
        "scarce cache": decode(model, prompts, kv_cache_tokens=256, **settings),
    }
    rows = [Row(prompt, MAX_TOKENS, seed=i) for i, prompt in enumerate(prompts)]
    finish(make_loop(model, **settings), rows[::-1])
    ways["submitted in reverse"] = [row.tokens for row in rows]
    rows = [Row(prompt, MAX_TOKENS, seed=i) for i, prompt in enumerate(prompts)]
    loop = make_loop(model, **settings)
    for row in rows:  # trickling in while others are decoded
        loop.submit(row)
        loop.step()
    finish(loop, [])
    ways["trickling in"] = [row.tokens for row in rows]
    return [way for way, tokens in ways.items() if tokens != alone]


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_batching_changes_no_text(llama: PreTrainedModel, settings: dict[str, Any]) -> None:
    assert changed(llama, settings) == []


def test_invariance_fails_when_draws_follow_the_batch(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = iter(range(10**9))
    real = loop_module.uniforms
    monkeypatch.setattr(loop_module, "uniforms", lambda seed, count: real(next(stream), count))
    assert changed(llama, SAMPLED)


def test_invariance_fails_without_the_mask(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = llama.forward

    def unmasked(**kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        return real(**kwargs | {"attention_mask": None if mask is None else torch.ones_like(mask)})

    monkeypatch.setattr(llama, "forward", unmasked)
    assert changed(llama, {})


def test_invariance_fails_with_positions_of_another_row(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = llama.forward

    def shifted(**kwargs: Any) -> Any:
        positions = kwargs["position_ids"]
        return real(**kwargs | {"position_ids": positions[:, :1].expand_as(positions)})

    monkeypatch.setattr(llama, "forward", shifted)
    assert changed(llama, {})


def test_invariance_fails_when_keys_land_at_another_rows_offset(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SlotCache.aim

    def astray(self: SlotCache, first: int, rows: int, slots: Any, positions: torch.Tensor, length: int) -> None:
        if rows == len(positions):  # one of each
            positions = positions[:1].expand_as(positions)
        real(self, first, rows, slots, positions, length)

    monkeypatch.setattr(SlotCache, "aim", astray)
    assert changed(llama, {})


def test_invariance_fails_when_holes_are_not_filled(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotCache, "copy", lambda self, source, target, length: None)
    assert changed(llama, {})


# --- a block of guesses is the same primitive -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "grids"),
    [([9, 36, 5, 18], [(4, 6)]), ([38, 31, 3, 18], [(4, 3), (1, 35)]), ([4, 39, 36, 20], [(4, 9), (1, 36)])],
    ids=["like", "one wide", "one wide, others unlike"],
)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2", "mistral"])
def test_blocks_of_positions_equal_the_whole(
    model_folder: Callable[[str], Path], kind: str, ends: list[int], grids: list[tuple[int, int]]
) -> None:
    """Rows of different lengths, some tokens of each in one forward: the logits are those of the model on the whole."""
    model = load_model(EngineConfig(model=str(model_folder(kind)), dtype="float32", device="cpu"))
    starts = [3, 30, 0, 17]
    tokens = torch.randint(3, 512, (4, 40), generator=torch.Generator().manual_seed(0)).tolist()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        whole = model(torch.tensor(tokens)).logits
    model.set_attn_implementation(ATTENTION)
    forward = Forward(model)
    forward.cache.resize(5, 64, 0)
    with torch.inference_mode():
        forward(1, [row[:start] for row, start in zip(tokens, starts, strict=True)], [0] * 4, [0] * 4)
        block = [row[start:end] for row, start, end in zip(tokens, starts, ends, strict=True)]
        laid_out = laid_out_by(model)
        got = forward(1, block, starts, [1, 1, 3, 0])
        one = forward(1, [row[end : end + 1] for row, end in zip(tokens, ends, strict=True)], ends, [1] * 4)
    assert got is not None and one is not None
    assert [(grid.count, grid.width) for grid in laid_out[0].grids] == grids
    want = torch.cat([whole[row, end - num : end] for row, (end, num) in enumerate(zip(ends, [1, 1, 3], strict=False))])
    assert torch.allclose(got, want, atol=1e-4)
    assert torch.allclose(one, whole[range(4), ends], atol=1e-4)


def laid_out_by(model: PreTrainedModel) -> list[Layout]:
    """The layouts of the model's forwards to come, as they come."""
    found: list[Layout] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: found.append(kwargs["layout"]), with_kwargs=True)
    return found


# --- admission ------------------------------------------------------------------------------------------------------


class Recorder:
    """Counts the forwards of a loop: rows of each, the longest of them, and for how many positions logits."""

    def __init__(self, loop: DecodeLoop) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.cells = 0
        self.real = loop.forward
        self.cache = loop.forward.cache
        loop.forward = self  # type: ignore[assignment]

    def __call__(self, first: int, tokens: Any, starts: list[int], num_logits: list[int]) -> Any:
        self.calls.append((len(tokens), max(map(len, tokens)), sum(num_logits)))
        self.cells = max(self.cells, self.cache.slots * self.cache.capacity)
        return self.real(first, tokens, starts, num_logits)

    @property
    def prefills(self) -> list[tuple[int, int]]:
        return [(rows, q) for rows, q, num_logits in self.calls if num_logits == 0]


def test_candidates_of_one_prompt_are_prefilled_once(llama: PreTrainedModel) -> None:
    prompts = [prompt for prompt in make_prompts(4) for _ in range(4)]
    alone = decode(llama, prompts, max_num_seqs=1, **SAMPLED)
    loop = make_loop(llama, max_num_seqs=6, **SAMPLED)
    recorder = Recorder(loop)
    assert finish(loop, [Row(prompt, MAX_TOKENS, seed=i) for i, prompt in enumerate(prompts)]) == alone
    assert sum(rows for rows, _ in recorder.prefills) < 8  # 4, and what its siblings had left before a late candidate
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


def test_prefill_makes_no_logits_and_stays_bounded(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "PREFILL_TOKENS", 128)
    loop = make_loop(llama, max_num_seqs=32)
    recorder = Recorder(loop)
    finish(loop, [Row(prompt, 4, seed=0) for prompt in make_prompts(32)])
    assert len(recorder.prefills) > 1
    assert all(rows * q <= 128 for rows, q in recorder.prefills)
    assert all(q == 1 for _, q, logits in recorder.calls if logits)


def test_prefills_wait_for_an_eighth_of_the_slots(llama: PreTrainedModel) -> None:
    loop = make_loop(llama, max_num_seqs=32, eos=[])
    recorder = Recorder(loop)
    finish(loop, [Row(prompt, 2 + i % 7, seed=0) for i, prompt in enumerate(make_prompts(96))])
    assert len(recorder.prefills) <= 2 * 64 / 4


def test_a_row_that_ends_makes_room_for_the_next(llama: PreTrainedModel) -> None:
    loop = make_loop(llama, max_num_seqs=16, eos=[])
    for i, prompt in enumerate(make_prompts(64)):
        loop.submit(Row(prompt, 2 + i % 7, seed=0))
    fewest = 16
    while loop.waiting:
        loop.step()
        fewest = min(fewest, len(loop.active) if loop.waiting else fewest)
    assert 16 - fewest <= 16 // 8 + 16 // 7 + 1  # what is waited for, and what ends in one step


@pytest.mark.parametrize("bound", [128, 300, 1000])
def test_cache_stays_within_its_bound(llama: PreTrainedModel, bound: int) -> None:
    loop = make_loop(llama, max_num_seqs=32, kv_cache_tokens=bound)
    recorder = Recorder(loop)
    finish(loop, [Row(prompt, 1 + i % 60, seed=0) for i, prompt in enumerate(make_prompts(40))])
    assert 0 < recorder.cells <= bound


def test_row_longer_than_the_bound_runs_alone(llama: PreTrainedModel) -> None:
    loop = make_loop(llama, max_num_seqs=8, kv_cache_tokens=64, eos=[])
    recorder = Recorder(loop)
    finish(loop, [Row(prompt, 100, seed=0) for prompt in make_prompts(3)])
    assert all(rows == 1 for rows, _, _ in recorder.calls)


def test_cancelled_rows_leave_the_others_alone(llama: PreTrainedModel) -> None:
    prompts = make_prompts(24)
    want = decode(llama, prompts)
    loop = make_loop(llama)
    rows = [Row(prompt, MAX_TOKENS, seed=i) for i, prompt in enumerate(prompts)]
    for row in rows:
        loop.submit(row)
    for _ in range(3):
        loop.step()
    gone = [rows[0], rows[3], rows[7], rows[20]]
    for row in gone:
        loop.cancel(row)
    finish(loop, [])
    assert [row.tokens for row in rows if row not in gone] == [
        tokens for row, tokens in zip(rows, want, strict=True) if row not in gone
    ]
    assert not any(row.finish_reason for row in gone)


# --- ends -----------------------------------------------------------------------------------------------------------


def test_any_of_several_eos_ends_a_row(llama: PreTrainedModel) -> None:
    prompt = make_prompts(1)[0]
    [free] = decode(llama, [prompt], eos=[])
    row = Row(prompt, MAX_TOKENS, seed=0)
    finish(make_loop(llama, eos=[511, free[5]]), [row])
    assert row.tokens == free[: free.index(free[5])]
    assert row.finish_reason == "stop"


def test_max_tokens_ends_a_row(llama: PreTrainedModel) -> None:
    row = Row(make_prompts(1)[0], 7, seed=0)
    finish(make_loop(llama, eos=[]), [row])
    assert (len(row.tokens), row.finish_reason) == (7, "length")


class Scripted:
    """Stands in for the model: says a given text, one token a step."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.cache = SlotCache()

    def __call__(self, first: int, tokens: Any, starts: list[int], num_logits: list[int]) -> torch.Tensor:
        return F.one_hot(torch.tensor([self.tokens[start] for start in starts]), 512).float()


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("one two END three", ["END"], "one two "),
        ("one two END three", ["three", "two"], "one "),
        ("one two END three", ["o END th"], "one tw"),
        ("one 東京 two", ["京"], "one 東"),
        ("one 東京 two", ["東京"], "one "),
        ("one two", ["one two three"], "one two"),
        ("END", ["END"], ""),
    ],
)
def test_stop_string_cuts_the_text(tokenizer: PreTrainedTokenizerBase, text: str, stop: list[str], want: str) -> None:
    tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    loop = DecodeLoop(
        Scripted(tokens),  # type: ignore[arg-type]
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        eos=[2],
        stop=stop,
        max_num_seqs=1,
        kv_cache_tokens=64,
    )
    row = Row((5,), 60, seed=0)
    finish(loop, [row])
    assert (row.text, row.finish_reason) == (want, "stop")


# --- models it cannot run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("break_it", ["encoder-decoder", "recurrent", "chunked", "own attention"])
def test_model_without_a_plain_cache_is_refused(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, break_it: str
) -> None:
    if break_it == "encoder-decoder":
        monkeypatch.setattr(llama.config, "is_encoder_decoder", True)
    elif break_it == "recurrent":
        monkeypatch.setattr(llama.config, "layer_types", ["linear_attention", "full_attention"], raising=False)
    elif break_it == "chunked":
        monkeypatch.setattr(llama.config, "layer_types", ["chunked_attention", "full_attention"], raising=False)
    else:
        monkeypatch.setattr(type(llama), "_supports_sdpa", False)
    with pytest.raises(ConfigError, match="cannot run LlamaForCausalLM"):
        Forward(llama)
