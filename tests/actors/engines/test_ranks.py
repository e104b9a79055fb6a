"""Two ranks say what one says, in every kind of model; their deaths cost no request and leave no process behind.

Real tensor parallel groups on the CPU: each start takes ten seconds on two cores, so they are few and shared.
"""

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, PreTrainedModel

from actors.contract import ConfigError
from actors.decoding import loop
from actors.decoding.cost import StepCost
from actors.decoding.forward import Forward
from actors.decoding.loop import DecodeLoop, Row
from actors.decoding.sampling import uniforms
from actors.engines import build_engine
from actors.engines.base import Completion, DraftingConfig, EngineConfig, Request
from actors.engines.footprint import footprint
from actors.engines.hosted import HostedEngine
from actors.engines.process import EngineDied
from actors.engines.torch_engine import TorchEngine
from actors.engines.torch_model import check_shards, load_model
from tests.processes import assert_gone

ROOT = Path(__file__).parents[3]
TIMEOUT = 120  # seconds; a hang fails instead of stalling the suite
KINDS = ["llama", "tied", "gemma2", "qwen2", "mistral"]
NUM_CASES = 4  # of each kind


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    defaults = {"dtype": "float32", "device": "cpu", "max_tokens": 24, "stop": ["th", "."], "max_num_seqs": 6}
    kind = DraftingConfig if "decoder" in settings else EngineConfig
    return kind(model=str(folder), **(defaults | settings))


@pytest.fixture(scope="module")
def greedy(llama_folder: Path) -> Iterator[HostedEngine]:
    yield from hosted(config_of(llama_folder, decoder="auto", block_size=8, tensor_parallel_size=2))


@pytest.fixture(scope="module")
def sampling(llama_folder: Path) -> Iterator[HostedEngine]:
    yield from hosted(config_of(llama_folder, temperature=0.8, top_p=0.95, tensor_parallel_size=2))


def hosted(config: EngineConfig) -> Iterator[HostedEngine]:
    engine = build_engine(config, 2)
    assert isinstance(engine, HostedEngine)
    yield engine
    family = family_of(engine)
    engine.close()
    assert_gone(family)


def family_of(engine: HostedEngine) -> list[psutil.Process]:
    """Rank 0, its watch and its followers, as far as they are there."""
    try:
        return [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def follower_of(engine: HostedEngine) -> psutil.Process:
    (follower,) = [child for child in psutil.Process(engine.pid).children() if "follow(" in child.cmdline()[-1]]
    return follower


def make_requests(count: int) -> list[Request]:
    """Prompts of 20 to 100 tokens; of every eight, three are candidates of one prompt."""
    texts = [f"Give me {max(5, i % 8) + i // 8 * 8} reasons" + ", and one more" * (i % 5) for i in range(count)]
    return [Request((("user", text),), seed) for seed, text in enumerate(texts)]


async def together(engine: Any, requests: list[Request]) -> list[Any]:
    tasks = [engine.generate(request) for request in requests]
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), TIMEOUT)


def by_one_rank(folder: Path, requests: list[Request], **settings: Any) -> list[Any]:
    engine = TorchEngine(config_of(folder, **settings), 1)
    made = asyncio.run(together(engine, requests))
    engine.close()
    return made


def test_two_ranks_answer_greedily_like_one_whatever_the_draft(greedy: HostedEngine, llama_folder: Path) -> None:
    requests = make_requests(48)
    expected = by_one_rank(llama_folder, requests)
    drafts = [None, "Every answer ends", *(made.text for made in expected[2:])]
    drafted = [replace(request, draft=draft) for request, draft in zip(requests, drafts, strict=True)]
    assert len({made.num_tokens for made in expected}) > 8  # so that rows leave and come all the time
    assert len({made.text for made in expected}) > 24
    made = asyncio.run(together(greedy, drafted))
    assert [replace(each, iterations=None, accepted=None) for each in made] == expected
    assert made[0] == expected[0]
    assert sum(each.accepted for each in made[2:]) > 0


def test_two_ranks_sample_like_one(sampling: HostedEngine, llama_folder: Path) -> None:
    requests = make_requests(48)
    expected = by_one_rank(llama_folder, requests, temperature=0.8, top_p=0.95)
    assert len({made.text for made in expected}) > 40
    assert asyncio.run(together(sampling, requests)) == expected


def test_a_rank_that_drew_by_arrival_would_be_found(
    sampling: HostedEngine, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(48)
    arrivals = itertools.count()
    monkeypatch.setattr(loop, "uniforms", lambda seed, count: uniforms(next(arrivals), count))
    mutated = by_one_rank(llama_folder, requests[::-1], temperature=0.8, top_p=0.95)[::-1]
    assert asyncio.run(together(sampling, requests)) != mutated


def test_death_of_a_follower_costs_no_request(
    sampling: HostedEngine, llama_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    requests = make_requests(160)
    family = family_of(sampling)

    async def killed() -> list[Any]:
        asking = asyncio.create_task(together(sampling, requests))
        while sampling.stats().num_running == 0:
            await asyncio.sleep(0.01)
        follower_of(sampling).kill()
        return await asking

    assert asyncio.run(killed()) == by_one_rank(llama_folder, requests, temperature=0.8, top_p=0.95)
    assert sampling.pid != family[0].pid
    assert_gone(family)


def test_followers_end_with_rank_0(sampling: HostedEngine) -> None:
    """The last test of this engine: its process is asked directly, so that nobody builds a new one."""
    family = family_of(sampling)
    assert len(family) >= 3
    process = sampling._process

    async def killed() -> list[Any]:
        asking = asyncio.create_task(together(process, make_requests(160)))
        while sampling.stats().num_running == 0:
            await asyncio.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        return await asking

    assert EngineDied in {type(made) for made in asyncio.run(killed())} <= {EngineDied, Completion}
    assert_gone(family)


# --- logits -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def logits_of(forward: Forward) -> list[torch.Tensor]:
    """Of a block of positions per row, then of one each, behind a prefill that is longer than every window."""
    tokens = torch.randint(3, 512, (3, 30), generator=torch.Generator().manual_seed(0)).tolist()
    forward.cache.resize(3, 64, used=0)
    forward(0, [row[:20] for row in tokens], [0, 0, 0], [0, 0, 0])
    block = forward(0, [tokens[0][20:26], tokens[1][20:21], tokens[2][20:26]], [20, 11, 17], [6, 1, 3])
    forward.cache.copy(2, 1, 23)
    one = forward(0, [row[26:27] for row in tokens], [26, 23, 23], [1, 1, 1])
    assert block is not None and one is not None
    return [block, one]


def tokens_of(forward: Forward, seed: int) -> list[tuple[dict[str, Any], list[list[int]], list[list[int]]]]:
    """(settings, greedy answers, answers in blocks) of random cases, up to the fixed point, in blocks that are whole or
    weighed, and by a number of iterations. Drafts are greedy answers, mostly altered. Ranks that run this in step need
    no mirror."""
    rng = random.Random(seed)
    found = []
    for number in range(NUM_CASES):
        prompts = [[rng.randrange(3, 512) for _ in range(rng.randint(1, 25))] for _ in range(rng.randint(1, 6))]
        num_iterations = rng.randint(1, 5) if number % 2 else None
        loop = {"block_size": rng.randint(1, 12), "max_num_seqs": rng.randint(1, 6), "max_iterations": num_iterations}
        cost = StepCost({1: {1: 1.0, 16: 1.1, 32: 2.0}, 6: {6: 1.2, 48: 2.0}}) if number % 4 == 2 else None
        max_tokens = rng.randint(1, 14)
        greedy = decoded(forward, prompts, [None] * len(prompts), max_tokens, max_num_seqs=6)
        drafts = [altered(answer, rng) for answer in greedy]
        found.append((loop, greedy, decoded(forward, prompts, drafts, max_tokens, cost=cost, **loop)))
    return found


def altered(answer: list[int], rng: random.Random) -> list[int]:
    """With up to two places at which tokens are left out and put in."""
    draft = list(answer)
    for _ in range(rng.randint(0, 2)):
        at = rng.randint(0, len(draft))
        draft[at : at + rng.randint(0, 3)] = [rng.randrange(3, 512) for _ in range(rng.randint(0, 3))]
    return draft


def decoded(
    forward: Forward, prompts: list[list[int]], drafts: Sequence[list[int] | None], max_tokens: int, **settings: Any
) -> list[list[int]]:
    loop = DecodeLoop(forward, str, eos=[2], kv_cache_tokens=1 << 12, **settings)
    rows = [Row(tuple(prompt), max_tokens, 0, draft) for prompt, draft in zip(prompts, drafts, strict=True)]
    for row in rows:
        loop.submit(row)
    while loop.busy:
        loop.step()
    return [row.tokens for row in rows]


def loaded_bytes(model: PreTrainedModel) -> int:
    """Of the parameters that this rank holds."""
    local = (each.to_local() if isinstance(each, DTensor) else each for each in model.parameters())
    return sum(each.numel() * each.element_size() for each in local)


RANK = """
import sys
import torch
from actors.decoding.forward import Forward
from actors.engines.base import EngineConfig
from actors.engines.torch_model import join_ranks, load_model
from tests.actors.engines.test_ranks import config_of, loaded_bytes, logits_of, tokens_of

rank, store, out, *folders = sys.argv[1:]
torch.set_num_threads(1)
join_ranks(int(rank), 2, int(store), "cpu")
models = [load_model(config_of(folder, tensor_parallel_size=2)) for folder in folders]
found = [(logits_of(Forward(m)), tokens_of(Forward(m), seed), loaded_bytes(m)) for seed, m in enumerate(models)]
if rank == "0":
    torch.save(found, out)
"""


def test_shards_of_every_kind_add_up_and_take_what_was_told(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folders = [str(model_folder(kind)) for kind in KINDS]
    store, out = os.memfd_create("ranks"), tmp_path / "logits"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(store), str(out), *folders],
            pass_fds=[store], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        assert [rank.wait(TIMEOUT) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        os.close(store)
    for seed, (sharded, cases, num_bytes) in enumerate(torch.load(out)):
        kind, folder = KINDS[seed], folders[seed]
        told = footprint(config_of(Path(folder), tensor_parallel_size=2))
        assert told is not None
        assert told.weight_bytes == num_bytes, kind
        model = load_model(config_of(Path(folder)))
        assert cases == tokens_of(Forward(model), seed), kind
        for drafting, greedy, made in cases:
            assert made == greedy or drafting["max_iterations"], (kind, drafting)
        for ours, theirs in zip(sharded, logits_of(Forward(model)), strict=True):
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5), kind


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(3, "num_attention_heads of 4"), (4, "num_key_value_heads of 2")])
def test_heads_that_cannot_be_shared_out_are_a_config_error(llama_folder: Path, size: int, count: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_shards(config_of(llama_folder, tensor_parallel_size=size))
    assert str(caught.value) == f"tensor_parallel_size is {size}, which does not divide the model's {count}"


def test_a_model_without_a_plan_is_a_config_error(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is 2, but transformers has no plan to split a gpt2 model"):
        check_shards(config_of(tmp_path, tensor_parallel_size=2))


def test_too_few_gpus_are_a_config_error(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="is 2, but a replica sees 1 GPUs; set num_gpus to 2"):
        check_shards(config_of(llama_folder, device="auto", tensor_parallel_size=2))


def test_a_mistake_is_told_although_a_follower_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_TEST", str(tmp_path))  # what is left would not be a child of this process any more
    with pytest.raises(ConfigError, match="no tokenizer at"):
        build_engine(config_of(tmp_path / "gone", tensor_parallel_size=2), 2)
    assert_gone([process for process in psutil.process_iter() if environment_of(process) == str(tmp_path)])


def environment_of(process: psutil.Process) -> str | None:
    """BURNISH_TEST of a process, if that can be read and is set."""
    try:
        return process.environ().get("BURNISH_TEST")
    except psutil.Error:
        return None
