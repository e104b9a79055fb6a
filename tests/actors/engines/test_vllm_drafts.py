"""Drafts reach vLLM's proposer, are found again after what the model says otherwise, and stop where they do not pay.

`Batch` stands in for vLLM where only its bookkeeping matters; real engines on the CPU are below.
"""

import asyncio
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from transformers import PreTrainedTokenizerBase
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input

from actors.decoding.parallel import Drafter
from actors.engines import build_engine
from actors.engines.base import Completion, DraftingConfig, EngineConfig, EngineStats, Messages, Request
from actors.engines.hosted import HostedEngine
from actors.engines.prompts import encode_prompt, load_tokenizer
from actors.engines.torch_engine import TorchEngine
from actors.engines.vllm_calibration import PROMPT_TOKENS
from actors.engines.vllm_drafts import FOLDER, DraftFolder, DraftProposer, Outcome
from actors.engines.vllm_engine import VllmEngine, make_vllm_config, start_core
from actors.recipes import RecipeConfig, aligner_input
from tests.tiny_models import build_tiny_llama

LIMIT = 200  # tokens of a row
CHEAP = {1: {1: 1.0, 512: 1.0}}  # positions are free
DEAR = {1: {1: 1.0, 512: 512.0}}  # a position costs what a token is worth


class Asked:
    """A request to `Batch`: what the model will say to it, and what happens on the way."""

    def __init__(self, prompt: list[int], answer: list[int], draft: list[int] | None) -> None:
        self.prompt, self.answer, self.draft = prompt, answer, draft
        self.made: list[int] = []
        self.num_steps = self.num_accepted = self.num_guessed = 0
        self.guesses: list[int] = []
        self.outcome = Outcome(None)


class Batch:
    """vLLM's persistent batch around a proposer: admits, checks guesses, closes gaps, and leaves requests out at times.

    The model says `answer`, then 1 for ever.
    """

    def __init__(self, folder: DraftFolder, *, size: int = 4, num_guesses: int = 8, seed: int = 0) -> None:
        self.folder, self.size, self.num_guesses = folder, size, num_guesses
        self.random = random.Random(seed)
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(num_speculative_tokens=num_guesses),
            model_config=SimpleNamespace(max_model_len=LIMIT),
            scheduler_config=SimpleNamespace(max_num_seqs=size),
        )
        self.proposer = DraftProposer(config)
        self.tokens = np.zeros((size, LIMIT), np.int32)
        self.num_steps = 0

    def run(self, asked: Sequence[Asked]) -> None:
        waiting, running, out, held = list(asked), [], [], {}
        while waiting or running or out:
            while out and len(running) < self.size:
                running.append(out.pop())
            while waiting and len(running) < self.size:
                one = waiting.pop(0)
                if one.draft is not None:
                    held[one] = self.folder.holding(one.prompt, one.draft, max_tokens=len(one.answer))
                    one.outcome = held[one].__enter__()
                running.append(one)
            self.step(running)
            for i in reversed(range(len(running))):
                one = running[i]
                leaves = len(one.made) >= len(one.answer)
                if leaves or (self.random.random() < 0.1 and len(running) > 1):
                    last = running.pop()  # it fills the gap
                    if i < len(running):
                        running[i] = last
                    if not leaves:
                        out.append(one)
                    elif one in held:
                        held.pop(one).__exit__(None, None, None)

    def step(self, running: list[Asked]) -> None:
        self.num_steps += 1
        sampled = []
        for one in running:
            says = [*one.answer, *[1] * LIMIT][len(one.made) :]
            num = next((n for n, guess in enumerate(one.guesses) if guess != says[n]), len(one.guesses))
            reads = not one.made and self.random.random() < 0.2  # its prompt is in two chunks
            sampled.append([] if reads else says[: num + 1])
            one.made += sampled[-1]
            one.num_steps += not reads
            one.num_accepted += num
            one.num_guessed += len(one.guesses)
        for i, one in enumerate(running):
            row = one.prompt + one.made
            self.tokens[i, : len(row)] = row
        num_tokens = np.array([len(one.prompt) + len(one.made) for one in running])
        proposed = self.proposer.propose(sampled, num_tokens, self.tokens, slot_mappings=None)
        assert len(proposed) == len(running)
        for one, guesses in zip(running, proposed, strict=True):
            assert len(guesses) <= self.num_guesses and len(one.prompt) + len(one.made) + len(guesses) < LIMIT
            one.guesses = list(guesses)


@pytest.fixture
def folder() -> Iterator[DraftFolder]:
    folder = DraftFolder(None)
    yield folder
    folder.close()
    assert not folder.path.exists()


def draw(generator: random.Random, num: int) -> list[int]:
    return [generator.randrange(2, 500) for _ in range(num)]


def altered(answer: list[int], generator: random.Random) -> list[int]:
    """With a run of tokens put in, one taken out, and one replaced, at least 20 tokens apart."""
    at = generator.randrange(5, 10)
    answer = answer[:at] + draw(generator, generator.randrange(1, 4)) + answer[at:]
    answer = answer[: at + 25] + answer[at + 25 + generator.randrange(1, 4) :]
    num = generator.randrange(1, 4)
    return answer[: at + 50] + draw(generator, num) + answer[at + 50 + num :]


def make_asked(num: int, draft: str, seed: int = 0) -> list[Asked]:
    generator = random.Random(seed)
    asked = []
    for _ in range(num):
        prompt, answer = draw(generator, generator.randrange(1, 20)), draw(generator, 90)
        drafts = {
            "exact": answer, "altered": altered(answer, generator), "garbage": draw(generator, 90),
            "short": answer[:40], "empty": [], "none": None,
        }  # fmt: skip
        asked.append(Asked(prompt, answer, drafts[draft]))
    return asked


def test_an_exact_draft_takes_the_fewest_steps(folder: DraftFolder) -> None:
    asked = make_asked(30, "exact")
    Batch(folder).run(asked)
    assert {one.num_steps for one in asked} == {1 + -(-89 // 9)}  # the first token comes without a guess


def test_a_request_is_known_wherever_it_stands_in_the_batch(folder: DraftFolder) -> None:
    """`Batch` moves requests and leaves them out; a proposer that looks for them in one place loses their drafts."""
    real = DraftProposer._request

    def beside(proposer: DraftProposer, i: int, tokens: np.ndarray) -> Any:
        everywhere, proposer._requests = proposer._requests, proposer._requests[i : i + 1]
        found = real(proposer, 0, tokens)
        proposer._requests = everywhere
        return found

    asked = make_asked(30, "exact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftProposer, "_request", beside)
        Batch(folder).run(asked)
    assert max(one.num_steps for one in asked) > 20


@pytest.mark.parametrize("seed", range(4))
def test_a_draft_is_found_again_behind_what_differs(folder: DraftFolder, seed: int) -> None:
    asked = make_asked(30, "altered", seed)
    Batch(folder, seed=seed).run(asked)
    # 90 tokens. At each of three places: the guesses end, up to three tokens that are not in the draft, and two by
    # which the place is found again, all of them one by one.
    assert max(one.num_steps for one in asked) <= 11 + 3 * (1 + 3 + 2)
    unaligned = [Asked(one.prompt, one.answer, one.draft) for one in asked]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "_align", lambda self: None)
        Batch(folder, seed=seed).run(unaligned)
    assert sum(one.num_steps for one in unaligned) > 2 * sum(one.num_steps for one in asked)


@pytest.mark.parametrize("kind", ["exact", "altered", "garbage", "short", "empty", "none"])
def test_what_became_of_a_draft_is_told(folder: DraftFolder, kind: str) -> None:
    asked = make_asked(30, kind)
    Batch(folder).run(asked)
    for one in asked:
        expected = (one.num_steps, one.num_accepted) if one.draft else (None, None)
        assert one.outcome.counts(len(one.made)) == expected
    assert not [path for path in folder.path.iterdir() if path.suffix != ".json"]


def test_guesses_behind_the_end_of_an_answer_did_not_stay() -> None:
    told = Outcome(np.array([3, 10, 100, 31], np.int32))  # 13 tokens in three steps
    assert [told.counts(num) for num in (13, 12, 11, 10)] == [(3, 10), (3, 10), (3, 9), (3, 8)]


def test_guesses_end_where_nothing_more_is_wanted(folder: DraftFolder) -> None:
    (one,) = make_asked(1, "exact")
    one.draft = [*one.answer, *[1] * 50]  # the model would go on like this
    Batch(folder).run([one])
    assert len(one.made) == len(one.answer)


def test_requests_of_one_prompt_do_not_disturb_each_other(folder: DraftFolder) -> None:
    asked = [Asked([5, 6, 7], list(range(100, 190)), list(range(100 + i, 190))) for i in (0, 0, 3)]
    Batch(folder, size=3).run([*asked, Asked([5, 6, 7, 100], list(range(101, 191)), list(range(101, 191)))])
    assert all(one.num_steps < 30 for one in asked)


def test_positions_that_are_free_are_all_used_and_dear_ones_not() -> None:
    steps = {}
    for name, costs in {"cheap": CHEAP, "dear": DEAR}.items():
        folder = DraftFolder(costs)
        for kind in ("exact", "garbage"):
            asked = make_asked(60, kind)
            Batch(folder).run(asked)
            steps[name, kind] = [sum(one.num_steps for one in asked), sum(one.num_guessed for one in asked)]
        folder.close()
    tokens = 60 * 90
    assert steps["cheap", "exact"][0] <= 60 * 12
    assert steps["dear", "exact"][1] <= 0.01 * tokens and steps["dear", "garbage"][1] <= 0.01 * tokens
    assert steps["cheap", "garbage"][0] <= tokens


def test_poor_drafts_stop_and_good_ones_go_on_beside_them() -> None:
    """A step of four positions costs 1, and each further one an eighth of what a token is worth."""
    folder = DraftFolder({4: {4: 1.0, 512: 1.0 + 508 / 32}})
    good, poor = make_asked(20, "exact"), make_asked(20, "garbage", seed=1)
    Batch(folder).run([one for pair in zip(good, poor, strict=True) for one in pair])
    folder.close()
    assert sum(one.num_guessed for one in poor) <= 0.2 * sum(len(one.made) for one in poor)
    assert sum(one.num_steps for one in good[5:]) <= 0.35 * sum(len(one.made) for one in good[5:])


def test_without_its_folder_nothing_is_drafted_and_nothing_breaks(folder: DraftFolder) -> None:
    batch = Batch(folder)
    folder.close()
    asked = make_asked(10, "exact")
    batch.run(asked)
    Batch(folder).run(make_asked(3, "exact"))  # nor when the proposer is built without one
    assert all(one.num_guessed == 0 and one.outcome.counts(90) == (None, None) for one in asked)


LEAVE = "import os; from actors.engines.vllm_drafts import DraftFolder; print(DraftFolder(None).path); os._exit(1)"


def test_the_folder_of_a_killed_engine_is_removed_by_the_next_one(folder: DraftFolder) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    ran = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, env=environment)
    left = Path(ran.stdout.strip())
    assert left.is_dir(), ran.stderr
    DraftFolder(None).close()
    assert not left.exists() and folder.path.is_dir()


def test_a_full_disk_costs_a_request_its_draft(folder: DraftFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    asked = make_asked(3, "exact")
    Batch(folder).run(asked)
    assert all(one.num_guessed == 0 for one in asked)


class Says:
    """Stands in for vLLM, which takes reserved tokens for the prompt: makes the tokens behind it, one at a time."""

    def __init__(self, answer: list[int], num_prompt: int) -> None:
        self.answer, self.num_prompt = answer, num_prompt
        self.num_made = 0

    async def generate(self, prompt: Any, *_: Any) -> AsyncIterator[Any]:
        tokens = self.answer[len(prompt["prompt_token_ids"]) - self.num_prompt :]
        for self.num_made, token in enumerate(tokens, 1):
            finish_reason = "stop" if self.num_made == len(tokens) else None
            part = SimpleNamespace(token_ids=[token], text="", finish_reason=finish_reason, stop_reason=None)
            yield SimpleNamespace(outputs=[part])


def test_a_stop_string_that_vllm_cannot_see_ends_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    text, stop = "one two END three", "o E"
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = tokenizer("Say it.", add_special_tokens=False)["input_ids"]
    end = next(num for num in range(len(answer)) if stop in tokenizer.decode(answer[:num]))
    begins = next(num for num in range(len(answer)) if "two" in tokenizer.decode(answer[:num]))
    for num_reserved in range(begins, len(answer)):
        engine = VllmEngine.__new__(VllmEngine)  # without the core that it starts
        engine._config = DraftingConfig("vllm", "m", num_reserved=num_reserved, stop=[stop], max_tokens=40)
        engine._tokenizer, engine._drafts, engine._end_of_turn = tokenizer, None, None
        engine._limit, engine._num_words, engine._ends, engine._names = 512, 512, [], itertools.count()
        engine._num_tokens = engine._num_running = engine._num_waiting = 0
        engine._llm = says = Says([*answer, tokenizer.eos_token_id], len(prompt))  # type: ignore[assignment]
        made = asyncio.run(engine.generate(Request("Say it.", 0, text)))
        num_tokens = max(0, end - num_reserved)
        assert made == Completion("one tw", "stop", len(prompt), num_tokens)
        assert engine.stats() == EngineStats(num_tokens, 0, 0)
        assert says.num_made == max(1, num_tokens)  # it is told to stop


# --- real engines ---------------------------------------------------------------------------------------------------

TIMEOUT = 300  # seconds; a hang fails instead of stalling the suite
MAX_TOKENS = 48
MODEL_LEN = 400  # some prompts fill it with their answers
GUESSES = 8
STOP = ["fox c", "throw"]
RECIPES: tuple[Any, ...] = ("aligner", "metaaligner", "rewrite")
BEYOND = "beyond the model"  # the tokenizer knows it as one token, the model has no row for it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that says whole words, so that the text of an answer has the tokens of the answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build_tiny_llama(tmp_path_factory.mktemp("drafts"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = [i for word, i in tokenizer.get_vocab().items() if re.fullmatch("Ġ[a-z]+", word)]
    silent = sorted(set(range(model.config.vocab_size)) - {*words, tokenizer.eos_token_id})
    model.lm_head.weight.data[silent] = 0.0
    model.save_pretrained(folder)
    tokenizer.add_tokens([BEYOND])
    tokenizer.save_pretrained(folder)
    return folder


def config_of(model: Path, **settings: Any) -> DraftingConfig:
    defaults = {
        "engine": "vllm", "dtype": "float32", "device": "cpu", "max_tokens": MAX_TOKENS, "max_num_seqs": 8,
        "decoder": "parallel", "block_size": GUESSES + 1, "max_model_len": MODEL_LEN,
        "stop": STOP,
    }  # fmt: skip
    return DraftingConfig(model=str(model), **(defaults | settings))


def make_all(engine: Any, requests: Sequence[Request]) -> list[Completion]:
    async def make() -> list[Completion]:
        return await asyncio.wait_for(asyncio.gather(*map(engine.generate, requests)), TIMEOUT)

    return asyncio.run(make())


def chats(num: int, drafts: Sequence[str | None] | None = None) -> list[Request]:
    return [Request((("user", f"Give me {i} reasons."),), i, drafts[i] if drafts else None) for i in range(num)]


@pytest.fixture(scope="module")
def plain(model: Path) -> list[Completion]:
    """What the torch engine says, one token at a time; `test_vllm_engine.py` shows that plain vLLM says the same."""
    made = []
    for stop in ([], STOP):
        config = EngineConfig("torch", str(model), dtype="float32", device="cpu", max_tokens=MAX_TOKENS, stop=stop)
        engine = TorchEngine(config, 2)
        without, made = made, make_all(engine, chats(32))
        engine.close()
    ends = {(one.finish_reason, other.finish_reason) for one, other in zip(without, made, strict=True)}
    assert ends == {("length", "length"), ("stop", "stop"), ("length", "stop")}  # the last: by a stop string alone
    assert len({completion.text for completion in made}) > 28
    return made


@pytest.fixture(scope="module")
def drafting(model: Path) -> Iterator[HostedEngine]:
    engine = build_engine(config_of(model), 2)
    assert isinstance(engine, HostedEngine)
    yield engine
    engine.close()


def draft_of(text: str, kind: str) -> str:
    words = text.split()
    middle = len(words) // 2
    return {
        "exact": text,
        "altered": " ".join(["", *words[:middle], "more", "words", *words[middle + 2 :], "more"]),
        "shifted": " ".join(["", *words[3:]]),
        "garbage": " the model and the answer<|im_end|> of every token" * 5,
        "beyond": f"{text[: len(text) // 2]}{BEYOND}{text}",
        "empty": "",
    }[kind]


def fewest_steps(completion: Completion) -> int:
    """Steps of vLLM where every guess is right, of an answer that no stop string ended.

    What one ends goes on for some steps, until vLLM's front end has told the engine: more of them on a busy machine.
    """
    assert completion.finish_reason == "length"
    return 1 + -(-completion.num_tokens // (GUESSES + 1))


def same(made: list[Completion], plain: list[Completion]) -> bool:
    return [(m.text, m.finish_reason, m.num_tokens) for m in made] == [
        (p.text, p.finish_reason, p.num_tokens) for p in plain
    ]


@pytest.mark.parametrize("kind", ["exact", "altered", "shifted", "garbage", "beyond", "empty"])
def test_drafts_change_no_answer(drafting: HostedEngine, plain: list[Completion], kind: str) -> None:
    made = make_all(drafting, chats(32, [draft_of(completion.text, kind) for completion in plain]))
    assert same(made, plain)
    for completion in made:
        assert completion.iterations is not None and completion.accepted is not None
        num_more = completion.iterations + completion.accepted - completion.num_tokens
        # The end may have been guessed; behind a stop string vLLM goes on until it is told.
        assert num_more >= 0 if completion.finish_reason == "stop" else num_more == 0
        if completion.finish_reason == "length":
            assert kind != "exact" or completion.iterations <= fewest_steps(completion)
            assert kind != "altered" or completion.iterations <= 16
    assert sum(completion.finish_reason == "length" for completion in made) > 8


def test_answers_without_a_draft_stand_beside_those_with_one(drafting: HostedEngine, plain: list[Completion]) -> None:
    made = make_all(drafting, chats(32, [completion.text if i % 2 else None for i, completion in enumerate(plain)]))
    assert same(made, plain)
    assert all((completion.iterations is not None) == bool(i % 2) for i, completion in enumerate(made))


def filling(tokenizer: PreTrainedTokenizerBase, number: int, answer: str) -> Messages | str:
    """What an aligner reads, with so long a question that its longest answer fills the model to the last position."""
    question = f"Give me {number} reasons."
    while True:
        prompt = aligner_input(RecipeConfig(recipe="aligner"), (("user", question),), answer)
        missing = MODEL_LEN - MAX_TOKENS - len(encode_prompt(tokenizer, prompt))
        if missing == 0:
            return prompt
        assert missing > 0
        question += " and one more" if missing > 20 else "z"


def test_the_answer_in_an_aligners_prompt_is_its_draft(
    drafting: HostedEngine, model: Path, plain: list[Completion]
) -> None:
    """As the three recipes for correction make prompts; first with the policy's answers, then with what is right."""
    tokenizer, requests = load_tokenizer(str(model)), []
    for i, answer in enumerate(completion.text for completion in plain[:8]):
        asked = (("user", f"Give me {i} reasons."),)
        prompts = [aligner_input(RecipeConfig(recipe=recipe), asked, answer) for recipe in RECIPES]
        requests += [Request(prompt, i, answer) for prompt in (*prompts, filling(tokenizer, i, answer))]
    config = EngineConfig("torch", str(model), dtype="float32", device="cpu", max_tokens=MAX_TOKENS, stop=STOP)
    engine = TorchEngine(config, 2)
    expected = make_all(engine, requests)
    engine.close()
    assert len({completion.text for completion in expected}) > 24
    full = [each for each in expected if each.num_prompt_tokens + each.num_tokens == MODEL_LEN]
    assert len(full) > 2
    made = make_all(drafting, requests)
    assert same(made, expected)
    assert all(completion.iterations is not None for completion in made)
    made = make_all(drafting, [replace(each, draft=e.text) for each, e in zip(requests, expected, strict=True)])
    assert same(made, expected)
    until_the_limit = [completion for completion in made if completion.finish_reason == "length"]
    assert len(until_the_limit) > 8
    assert all(completion.iterations <= fewest_steps(completion) for completion in until_the_limit)


def test_an_engine_outlives_its_folder(drafting: HostedEngine, plain: list[Completion]) -> None:
    (core,) = [child for child in psutil.Process(drafting.pid).children() if child.children()]
    shutil.rmtree(core.environ()[FOLDER])
    made = make_all(drafting, chats(32, [completion.text for completion in plain]))
    assert same(made, plain)
    assert all(completion.iterations is None for completion in made)


@pytest.mark.long
def test_two_shards_keep_reserved_tokens_as_the_torch_engine_does(model: Path, plain: list[Completion]) -> None:
    beginnings = ["", "", "", " the fox", " the throw away"]  # the last two begin or hold a stop string
    drafts = [beginnings[i % 5] + draft_of(completion.text, "altered") for i, completion in enumerate(plain)]
    requests = chats(32, drafts)
    settings = {"num_reserved": 6, "random_reserved": True}
    torch_engine = TorchEngine(config_of(model, engine="torch", decoder="auto", **settings), 2)
    expected = make_all(torch_engine, requests)
    torch_engine.close()
    assert not same(expected, plain)
    engine = build_engine(config_of(model, tensor_parallel_size=2, **settings), 2)
    made = make_all(engine, requests)
    engine.close()
    assert same(made, expected)
    assert sum(completion.accepted or 0 for completion in made) > 32  # counted once, though each shard has a proposer
    undisturbed = [completion for i, completion in enumerate(made) if i % 5 < 3 and completion.iterations]
    assert all(completion.iterations <= completion.num_tokens + 1 for completion in undisturbed)


@pytest.mark.long
def test_vllm_without_drafts_says_the_same(model: Path, plain: list[Completion]) -> None:
    engine = build_engine(config_of(model, decoder="greedy"), 2)
    made = make_all(engine, chats(32))
    engine.close()
    assert same(made, plain)


@pytest.mark.long
def test_what_a_calibration_times_reads_no_prompt_again(model: Path) -> None:
    llm = start_core(make_vllm_config(config_of(model), 0))
    prompt = tokens_input([5] * PROMPT_TOKENS)

    async def cached() -> int | None:
        async for output in llm.generate(prompt, SamplingParams(max_tokens=2), str(time.monotonic_ns())):
            found: int | None = output.num_cached_tokens
        return found

    async def twice() -> list[int | None]:
        return [await cached(), await cached()]

    try:
        assert asyncio.run(twice()) == [0, PROMPT_TOKENS - 1]
    finally:
        llm.shutdown(timeout=1)


@pytest.mark.long
def test_auto_measures_once_and_changes_no_answer(
    model: Path, plain: list[Completion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path))
    kept = []
    for _ in range(2):
        engine = build_engine(config_of(model, decoder="auto"), 2)
        made = make_all(engine, chats(32, [completion.text for completion in plain]))
        engine.close()
        assert same(made, plain)
        (path,) = tmp_path.glob("calibration/*.json")
        kept.append(path.stat().st_mtime_ns)
    assert kept[0] == kept[1]
