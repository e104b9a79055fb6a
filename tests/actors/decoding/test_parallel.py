"""A draft changes how long an answer takes, never the answer; a number of iterations gives what its definition says."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
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
from actors.decoding import sampling
from actors.decoding.cost import StepCost
from actors.decoding.forward import ATTENTION, Forward, SlotCache
from actors.decoding.loop import DecodeLoop, Row
from actors.decoding.parallel import BEHIND_WRONG, START, Denoiser, Drafter, Record
from actors.decoding.stopping import until_stop
from tests.tiny_models import SHAPE

VOCABULARY = 40  # so few that guesses come true by chance and rows end early
EOS = 2
MAX_TOKENS = 24
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

many = settings(derandomize=True, max_examples=25)


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
    max_tokens: int = MAX_TOKENS

    def decode(
        self,
        *,
        drafts: Sequence[Sequence[int] | None] | None = None,
        watch: Callable[[DecodeLoop], object] | None = None,
        **changes: Any,
    ) -> list[Row]:
        """Finished rows; `changes` to the loop's settings. `watch` gets the loop before its first row."""
        kwargs: dict[str, Any] = {"eos": [EOS], "kv_cache_tokens": 1 << 16}
        loop = DecodeLoop(Forward(self.model), str, **(kwargs | self.loop | changes))
        rows = [
            Row(prompt, self.max_tokens, seed=0, draft=draft, num_reserved=self.num_reserved)
            for prompt, draft in zip(self.prompts, self.drafts if drafts is None else drafts, strict=True)
        ]
        if watch is not None:
            watch(loop)
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
    prompts = draw(st.lists(TOKENS.filter(len).map(tuple), min_size=1, max_size=5))
    prompts += draw(st.lists(st.sampled_from(prompts), max_size=2))  # candidates of one prompt
    loop = {
        "block_size": draw(st.integers(1, 12)),
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
    max_tokens = draw(st.sampled_from([MAX_TOKENS, MAX_TOKENS, MAX_TOKENS, 7, 1]))
    return Case(model, prompts, drafts, draw(st.sampled_from([0, 0, 1, 5, 50])), loop, max_tokens)


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
    length = min(case.max_tokens, max(len(draft), case.loop["block_size"]))
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
    made = case.decode(max_iterations=num_iterations, cost=None)
    for i, row in enumerate(made):
        assert (row.tokens, row.finish_reason) == denoise(case, i, num_iterations)
        assert row.iterations <= num_iterations
    for row, fixed in zip(made, after_heads(case, made), strict=True):
        num_fixed = min(row.num_reserved + num_iterations, row.max_tokens)
        assert row.tokens[:num_fixed] == fixed[:num_fixed]


def after_heads(case: Case, rows: list[Row]) -> list[list[int]]:
    """What greedy decoding makes of each row's prompt with its reserved tokens behind it, these included."""
    follows = Case(case.model, [row.head for row in rows], [[] for _ in rows], 0, case.loop).greedy()
    return [[*row.tokens[: row.num_reserved], *each.tokens] for row, each in zip(rows, follows, strict=True)]


@pytest.mark.parametrize("num_iterations", [None, 2, MAX_TOKENS])
def test_forwards_are_bounded_and_batched_all_the_same(
    monkeypatch: pytest.MonkeyPatch, num_iterations: int | None
) -> None:
    case = fixed_case()
    whole = case.decode(max_iterations=num_iterations, block_size=20)
    totals = []
    real = Forward.__call__

    def counted(self: Forward, first: int, tokens: Any, starts: Any, num_logits: Any) -> Any:
        if any(num_logits):
            totals.append(sum(num_logits))
            assert len(tokens) == 1 or totals[-1] <= 32
        return real(self, first, tokens, starts, num_logits)

    monkeypatch.setattr(Forward, "__call__", counted)
    monkeypatch.setattr(loop_module, "STEP_TOKENS", 32)
    parts = case.decode(max_iterations=num_iterations, block_size=20)
    assert [row.tokens for row in parts] == [row.tokens for row in whole]
    assert [row.iterations for row in parts] == [row.iterations for row in whole]
    assert max(totals) >= 20


# --- what is forwarded, and what is waited for ------------------------------------------------------------------------


class Forwarded:
    """Notes what the steps of a loop forward of each row: (position of the first token, the tokens). No prefill."""

    def __init__(self, loop: DecodeLoop) -> None:
        self.loop, self.real, self.cache = loop, loop.forward, loop.forward.cache
        self.of: defaultdict[Row, list[tuple[int, list[int]]]] = defaultdict(list)
        loop.forward = self  # type: ignore[assignment]

    def __call__(self, first: int, tokens: Any, starts: list[int], num_logits: list[int]) -> Any:
        if any(num_logits):
            for row, forwarded, start in zip(self.loop.active[first:], tokens, starts, strict=False):
                self.of[row].append((start, list(forwarded)))
        return self.real(first, tokens, starts, num_logits)

    def num_positions(self, row: Row) -> int:
        """Of the answer: what predicts its first token is the first of them."""
        return sum(len(tokens[max(0, len(row.prompt) - 1 - start) :]) for start, tokens in self.of[row])


@many
@given(cases(), st.sampled_from([None, 1, 3, MAX_TOKENS]))
def test_what_is_final_is_never_forwarded_again(case: Case, num_iterations: int | None) -> None:
    """A position is final where its token and all before it are those of the finished row."""
    noted: list[Forwarded] = []
    more = {} if num_iterations is None else {"cost": None}
    case.decode(max_iterations=num_iterations, watch=lambda loop: noted.append(Forwarded(loop)), **more)
    for row, steps in noted[0].of.items():
        whole = [*row.prompt, *row.tokens]
        final: set[int] = set()
        for start, tokens in steps:
            num_right = next((i for i, token in enumerate(tokens) if whole[start + i : start + i + 1] != [token]), None)
            right = set(range(start, start + (len(tokens) if num_right is None else num_right)))
            assert not right & final
            final |= right


@pytest.mark.parametrize("block_size", [8, MAX_TOKENS])
@pytest.mark.parametrize("num_iterations", [None, 6])
def test_a_right_draft_is_forwarded_once_and_of_a_poor_one_less_each_time(
    block_size: int, num_iterations: int | None
) -> None:
    right = fixed_case(block_size=block_size, eos=[])
    for quality in ("right", "poor"):
        drafts = [row.tokens if quality == "right" else [VOCABULARY - 1] * MAX_TOKENS for row in right.greedy()]
        noted: list[Forwarded] = []
        rows = right.decode(
            drafts=drafts,
            max_iterations=num_iterations,
            watch=lambda loop: noted.append(Forwarded(loop)),  # noqa: B023
        )
        for row in rows:
            num_positions = noted[0].num_positions(row)
            if quality == "right":
                assert num_positions == MAX_TOKENS
            else:  # what is certain is left out, which is at least one token more each time
                most = block_size if num_iterations is None else MAX_TOKENS
                assert num_positions <= sum(min(most, MAX_TOKENS - done) for done in range(row.iterations))
                assert row.iterations == (num_iterations or row.iterations)


def test_the_block_slides_whole_behind_what_is_certain() -> None:
    """It neither shrinks to what was left of it, nor begins at multiples of its length."""
    noted: list[Forwarded] = []
    fixed_case(block_size=5).decode(watch=lambda loop: noted.append(Forwarded(loop)))
    begins = []
    for row, steps in noted[0].of.items():
        for start, tokens in steps:
            begins.append(max(0, start + 1 - len(row.prompt)))  # of the answer, what is certain
            assert len(tokens[max(0, len(row.prompt) - 1 - start) :]) == min(5, MAX_TOKENS - begins[-1])
    assert any(begin % 5 for begin in begins), "a wrong guess has moved it"


def test_iterations_over_the_whole_response_are_not_weighed() -> None:
    with pytest.raises(ValueError, match="no guess of it may be weighed"):
        fixed_case().decode(max_iterations=3, cost=COSTS["knee"])


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for the device: reading a value of a tensor, or its shape off its values; and
    sending it what was made here, if not told to go on meanwhile."""

    READS = frozenset({"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__",
                       "cpu", "numpy", "nonzero", "unique", "masked_select", "equal", "allclose"})  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made_here: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        masked = name in ("__getitem__", "__setitem__") and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool
            for part in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        sent = name == "to" and any(args[0] is each for each in self.made_here)
        if name in self.READS or masked or (sent and not (kwargs or {}).get("non_blocking")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 1),
        ({"cost": COSTS["knee"]}, 1),
        ({"max_iterations": 4}, 1),
        ({"block_size": 1}, 1),
        ({"temperature": 0.8}, 1),
        ({"temperature": 0.8, "top_k": 5, "top_p": 0.9}, 1),
        ({"temperature": 0.8, "top_p": 0.9}, 1),  # the first values hold the whole nucleus
        ({"temperature": 50.0, "top_p": 0.99}, 2),  # they do not: as `draw` says
    ],
)
def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], most: int) -> None:
    """Rows come and go meanwhile, and a step may take several forwards."""
    monkeypatch.setattr(loop_module, "STEP_TOKENS", 16)
    monkeypatch.setattr(sampling, "NUM_HEAD", 32)
    case, counts = fixed_case(), []
    real, from_numpy = DecodeLoop.step, torch.from_numpy

    def watched(self: DecodeLoop) -> list[Row]:
        with Waits() as waits:

            def noted(array: np.ndarray) -> torch.Tensor:
                waits.made_here.append(from_numpy(array))
                return waits.made_here[-1]

            monkeypatch.setattr(torch, "from_numpy", noted)
            finished = real(self)
        counts.append(len(waits.names))
        return finished

    monkeypatch.setattr(DecodeLoop, "step", watched)
    case.decode(**settings)
    monkeypatch.setattr(torch, "from_numpy", from_numpy)
    assert len(counts) > 2
    assert max(counts) == most


# --- mutations that the comparisons above must notice -----------------------------------------------------------------


def fixed_case(**changes: Any) -> Case:
    """Six rows of a llama, in drafts of which every seventh token is wrong."""
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in (3, 20, 9, 14, 1, 30)]
    loop = {"block_size": 8, "max_num_seqs": 4, "eos": [EOS]} | changes
    case = Case(random_model("llama", 0), prompts, [[] for _ in prompts], 0, loop)
    drafts = [[(t % 30) + 3 if i % 7 == 3 else t for i, t in enumerate(row.tokens)] for row in case.greedy()]
    return Case(case.model, prompts, drafts, 0, loop)


def is_exact(case: Case) -> bool:
    try:
        return [row.tokens for row in case.decode()] == [row.tokens for row in case.greedy()]
    except (IndexError, ValueError):
        return False


def follows_its_definition(case: Case, num_iterations: int) -> bool:
    made = case.decode(max_iterations=num_iterations)
    return all(row.tokens == denoise(case, i, num_iterations)[0] for i, row in enumerate(made))


def test_without_a_mutation_all_is_well() -> None:
    assert is_exact(fixed_case())
    assert follows_its_definition(fixed_case(), 3)


def test_accepting_a_token_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Drafter.learn
    monkeypatch.setattr(Drafter, "learn", lambda self, predictions, right: real(self, predictions, right + 1))
    assert not is_exact(fixed_case())


def test_freezing_a_position_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Denoiser.learn
    monkeypatch.setattr(Denoiser, "learn", lambda self, predictions, right: real(self, predictions, right + 1))
    assert not follows_its_definition(fixed_case(), 3)


@pytest.mark.parametrize("num_iterations", [None, 4])
def test_keeping_keys_of_a_wrong_guess_is_noticed(monkeypatch: pytest.MonkeyPatch, num_iterations: int | None) -> None:
    """As if the token that replaced a wrong guess were not run again: its position keeps what the guess has left."""
    real = Forward.__call__

    def forgetful(self: Forward, first: int, tokens: Any, starts: list[int], num_logits: Any) -> Any:
        old = [[layer[first + i, :, at].clone() for i, at in enumerate(starts)] for layer in self.cache.keys]
        result = real(self, first, tokens, starts, num_logits)
        for layer, kept in zip(self.cache.keys, old, strict=False):
            for i, at in enumerate(starts):
                if kept[i].any() and at > 0:
                    layer[first + i, :, at] = kept[i]
        return result

    case = fixed_case(max_num_seqs=1, kv_cache_tokens=64)
    monkeypatch.setattr(Forward, "__call__", forgetful)
    assert not (is_exact(case) if num_iterations is None else follows_its_definition(case, num_iterations))


@pytest.mark.parametrize("num_iterations", [None, 4])
def test_writing_guesses_a_position_off_is_noticed(monkeypatch: pytest.MonkeyPatch, num_iterations: int | None) -> None:
    real = SlotCache.aim

    def astray(self: SlotCache, first: int, rows: int, slots: Any, positions: Any, length: int) -> None:
        if rows < len(positions) and positions.min() > 0:
            positions = positions - 1
        real(self, first, rows, slots, positions, length)

    case = fixed_case()
    monkeypatch.setattr(SlotCache, "aim", astray)
    assert not (is_exact(case) if num_iterations is None else follows_its_definition(case, num_iterations))


# --- ends -----------------------------------------------------------------------------------------------------------


class Scripted:
    """Stands in for the model: after a right beginning it says a given text, after a wrong one no sense."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.cache = SlotCache()

    def __call__(self, first: int, tokens: Any, starts: list[int], num_logits: list[int]) -> torch.Tensor:
        says = []
        for row, start, num in zip(tokens, starts, num_logits, strict=True):
            for i in range(len(row) - num, len(row)):
                right = list(row[1 : i + 1]) == self.tokens[start : start + i]
                says.append(self.tokens[start + i] if right and start + i < len(self.tokens) else 7)
        return F.one_hot(torch.tensor(says), 512).float()


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        (["END"], "one two "),
        (["o END th"], "one tw"),
        (["three", "two"], "one "),
        (["nothing"], "one two END three"),
    ],
)
@pytest.mark.parametrize("num_iterations", [None, 1, 2])
@pytest.mark.parametrize("block_size", [2, 5, 64])
def test_stop_string_inside_a_block_cuts_the_text(
    tokenizer: PreTrainedTokenizerBase, stop: list[str], want: str, num_iterations: int | None, block_size: int
) -> None:
    tokens = tokenizer("one two END three", add_special_tokens=False)["input_ids"]
    loop = DecodeLoop(
        Scripted([*tokens, EOS]),  # type: ignore[arg-type]
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        eos=[EOS],
        stop=stop,
        block_size=block_size,
        max_iterations=num_iterations,
        max_num_seqs=1,
        kv_cache_tokens=64,
    )
    row = Row((5,), 60, seed=0, draft=[*tokens, 9, 9])
    loop.submit(row)
    while loop.busy:
        loop.step()
    assert (row.text, row.finish_reason) == (want, "stop")
    assert row.accepted <= len(row.tokens)


ANSWER = "one two END three"


@pytest.mark.parametrize("stop", [["END"], ["e tw"], ["three", "two END"], ["begin"], [": one"], ["nothing"]])
@pytest.mark.parametrize("num_iterations", [None, 2])
def test_stop_string_may_begin_in_reserved_tokens_or_lie_in_them(
    tokenizer: PreTrainedTokenizerBase, stop: list[str], num_iterations: int | None
) -> None:
    """However many are reserved, the text ends where it would if the model had said them too, in both engines."""
    kept = tokenizer("a beginning, longer than any stop string is: ", add_special_tokens=False)["input_ids"]
    tokens = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    answer = [*kept, *tokens]
    ends = [end for end in range(len(answer) + 1) if any(text in decode(answer[:end]) for text in stop)]
    said = decode(answer[: ends[0]] if ends else answer)
    want = said[: min([said.find(text) for text in stop if text in said], default=None)]
    for num_reserved in range(1, len(answer) + 1):
        num_made = max(0, (ends[0] if ends else len(answer)) - num_reserved)
        loop = DecodeLoop(
            Scripted([*answer, EOS]),  # type: ignore[arg-type]
            decode,
            eos=[EOS],
            stop=stop,
            block_size=5,
            max_iterations=num_iterations,
            max_num_seqs=1,
            kv_cache_tokens=64,
        )
        row = Row((5,), 60, seed=0, draft=[*answer, 9, 9], num_reserved=num_reserved)
        loop.submit(row)
        while loop.busy:
            loop.step()
        assert (row.text, len(row.tokens) - num_reserved, row.finish_reason) == (want, num_made, "stop")
        found = until_stop(decode, answer[:num_reserved], answer[num_reserved:], stop)
        assert found == ((num_made, want) if ends else None)


@pytest.mark.parametrize("num_iterations", [None, 3])
def test_no_guess_lies_behind_the_last_token_that_a_row_may_have(num_iterations: int | None) -> None:
    """Rows that fill the cache to its end, with drafts that go on: one more position would be another row's."""
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, VOCABULARY, (40,), generator=generator).tolist()) for _ in range(4)]
    loop = {"block_size": 16, "max_num_seqs": 4, "kv_cache_tokens": 4 * 64, "eos": []}
    case = Case(random_model("llama", 0), prompts, [[] for _ in prompts], 0, loop)
    assert len(prompts[0]) + MAX_TOKENS == 64
    drafts = [[*row.tokens, *range(3, 23)] for row in case.greedy()]
    made = case.decode(drafts=drafts, max_iterations=num_iterations)
    assert [row.tokens for row in made] == [draft[:MAX_TOKENS] for draft in drafts]


def test_a_row_ends_with_its_frozen_eos() -> None:
    """However many iterations are left, and however much behind the end of the answer still changes."""
    case = fixed_case()
    ended = [row for row in case.decode(max_iterations=1000, block_size=MAX_TOKENS) if row.finish_reason == "stop"]
    assert ended
    for row in ended:
        assert row.iterations <= len(row.tokens) + 1


# --- what a row guesses -----------------------------------------------------------------------------------------------


def play(truth: list[int], draft: list[int], block_size: int, drafter: Drafter | None = None) -> list[int]:
    """The sizes of the steps in which a model that says `truth`, and nonsense after a wrong guess, is followed."""
    drafter = drafter or Drafter(draft, 0, Record(), Record())
    steps, made = [], 0
    while made < len(truth):
        guess, chances = drafter.offer(min(block_size, len(truth) - made) - 1)
        assert len(guess) == len(chances)
        assert (np.diff(chances) <= 0).all()
        num_right = next((i for i, g in enumerate(guess) if g != truth[made + i]), len(guess))
        nonsense = [-1] * (len(guess) - num_right)
        new = drafter.learn([*truth[made : made + num_right + 1], *nonsense], num_right)
        assert new == truth[made : made + num_right + 1]
        made += len(new)
        steps.append(len(new))
    return steps


TEXT = list(range(100, 160))


@pytest.mark.parametrize(
    ("truth", "num_steps"),
    [
        (TEXT, 4),  # 60 tokens in blocks of 16
        ([*TEXT[:20], 7, *TEXT[21:]], 5),  # a substitution ends a block
        ([*TEXT[:20], 7, 8, *TEXT[20:]], 9),  # the two put in, and the two that show where the draft goes on
        ([*TEXT[:20], *TEXT[25:]], 6),  # left out: two tokens later the place is found
        ([*TEXT[30:], *TEXT[:30]], 8),  # the other way round
    ],
)
def test_draft_is_followed_through_an_edit(truth: list[int], num_steps: int) -> None:
    assert len(play(truth, TEXT, 16)) <= num_steps
    assert sum(play(truth, TEXT, 16)) == len(truth)


def test_without_alignment_an_insertion_spoils_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drafter, "_align", lambda self: None)
    assert len(play([*TEXT[:20], 7, 8, *TEXT[20:]], TEXT, 16)) > 30


def test_of_equal_places_the_nearest_is_taken() -> None:
    draft = [1, 2, 10, 11, 1, 2, 20, 21, 1, 2, 30, 31]
    drafter = Drafter(draft, 0, Record(), Record())
    for token in [1, 2, 10, 11, 40, 1, 2]:  # one more than expected: the second 1, 2 is nearest
        drafter.learn([token], 0)
    assert drafter.offer(2)[0] == [20, 21]


def test_predictions_are_guessed_where_they_have_been_right() -> None:
    """A draft that is always wrong, and a model whose predictions behind a wrong guess are right."""
    drafter = Drafter([7] * 60, 0, Record(), Record())
    sizes, made = [], 0
    while made < 40:
        guess, _ = drafter.offer(7)
        num_right = next((i for i, g in enumerate(guess) if g != TEXT[made + i]), len(guess))
        made += len(drafter.learn(TEXT[made : made + len(guess) + 1], num_right))
        sizes.append(num_right + 1)
    assert max(sizes[:2]) == 1
    assert sum(sizes[-4:]) > 8


def test_guesses_behind_a_wrong_one_are_worth_less_than_their_chance() -> None:
    drafts = Record()
    drafter = Drafter(list(range(8)), 0, drafts, Record())
    assert drafter.offer(3)[1].tolist() == drafts.survival(START, 3).tolist()
    drafter.learn([99], 0)
    assert drafter.offer(3)[0] == [1, 2, 3]
    assert drafter.offer(3)[1].tolist() == pytest.approx(BEHIND_WRONG * drafter._drafts.survival(0, 3))
    drafter.learn([1], 0)
    assert drafter.offer(3)[1].tolist() == drafter._drafts.survival(1, 3).tolist()


def test_new_row_begins_with_what_the_loop_has_learned() -> None:
    shared = Record(), Record()
    before = Drafter(TEXT, 0, *shared).offer(5)[1]
    for _ in range(5):
        play(TEXT, TEXT, 16, Drafter(TEXT, 0, *shared))
    good = Drafter(TEXT, 0, *shared).offer(5)[1]
    for _ in range(50):
        play(TEXT, [7] * 60, 16, Drafter([7] * 60, 0, *shared))
    poor = Drafter(TEXT, 0, *shared).offer(5)[1]
    assert (good > before).all()
    assert (poor < before).all()
