"""The vLLM engine says what the torch engine says, fails rows alone, survives its core and outlives nobody.

Real engines on the CPU: each start takes about 25 s, so there are few and tests share them.
"""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.contract import ConfigError, RowError
from actors.engines import build_engine
from actors.engines.base import EngineConfig, Request
from actors.engines.hosted import HostedEngine
from actors.engines.torch_engine import TorchEngine
from tests.processes import assert_gone
from tests.tiny_models import CHAT_TEMPLATE, build_tiny_llama

ROOT = Path(__file__).parents[3]
TIMEOUT = 300  # seconds; a hang fails instead of stalling the suite
STOP = ["th", "é"]
NUM_SAMPLED = 20  # fewer texts than SAMPLED comes to
TURN_END = "pful"  # a token that the tiny model often makes
BEYOND = "beyond the model"  # the tokenizer knows it as one token, the model has no row for it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose answers end in every way: ten further tokens count as its end of sequence, and its template
    ends turns with one more."""
    from transformers import AutoTokenizer

    folder = build_tiny_llama(tmp_path_factory.mktemp("vllm"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *range(300, 310)]}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([BEYOND])
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_END]})
    ends = f"{{{{ '{TURN_END}' if message.role == 'assistant' else '<|im_end|>' }}}}"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", ends)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    defaults = {"engine": "vllm", "dtype": "float32", "device": "cpu", "max_tokens": 24, "stop": STOP}
    return EngineConfig(model=str(folder), **(defaults | settings))


@pytest.fixture(scope="module")
def greedy(folder: Path) -> Iterator[HostedEngine]:
    yield from hosted(config_of(folder))


@pytest.fixture(scope="module")
def sampling(folder: Path) -> Iterator[HostedEngine]:
    yield from hosted(config_of(folder, temperature=1.0, max_tokens=200, stop=[]))


def hosted(config: EngineConfig) -> Iterator[HostedEngine]:
    engine = build_engine(config, 2)
    assert isinstance(engine, HostedEngine)
    yield engine
    processes = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    assert len(processes) >= 4  # itself, its watch, the core, the core's worker
    engine.close()
    assert_gone(processes)


def said(word: str, lines: Iterable[str]) -> Iterator[Any]:
    """The JSON behind `word` in those lines that begin with it."""
    return (json.loads(line.removeprefix(word)) for line in lines if line.startswith(word))


def core_of(engine: HostedEngine) -> psutil.Process:
    """vLLM's engine core: the child of the engine's process that has a child, its worker."""
    (core,) = [child for child in psutil.Process(engine.pid).children() if child.children()]
    return core


def chat(i: int) -> Request:
    return Request(prompt=(("user", f"Give me {i} reasons."),), seed=i)


async def together(engine: Any, requests: list[Request]) -> list[Any]:
    tasks = [engine.generate(request) for request in requests]
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), TIMEOUT)


def by_torch(folder: Path, requests: list[Request], **settings: Any) -> list[Any]:
    engine = TorchEngine(config_of(folder, engine="torch", **settings), 2)
    made = asyncio.run(together(engine, requests))
    engine.close()
    return made


def test_greedy_completions_are_those_of_the_torch_engine(greedy: HostedEngine, folder: Path) -> None:
    requests = [*map(chat, range(48)), *(Request(f"Two cores, {i} batch", seed=0) for i in range(16))]
    expected = by_torch(folder, requests)
    assert asyncio.run(together(greedy, requests)) == expected
    without_stop = by_torch(folder, requests, stop=[])
    ends = {(one.finish_reason, other.finish_reason) for one, other in zip(expected, without_stop, strict=True)}
    assert ends == {("length", "length"), ("stop", "stop"), ("stop", "length")}  # the last: by a stop string alone
    assert not any(stop in completion.text for completion in expected for stop in STOP)
    assert len({completion.text for completion in expected}) > 48


def test_bad_requests_fail_alone(greedy: HostedEngine) -> None:
    long = Request(prompt="word " * 500, seed=0)
    requests = [chat(1), long, Request("", 0), Request(f"How {BEYOND}?", 0), chat(2)]
    made = asyncio.run(together(greedy, requests))
    assert [made[0], made[4]] == asyncio.run(together(greedy, [chat(1), chat(2)]))
    causes = [error.cause for error in made if isinstance(error, RowError)]
    assert causes == ["prompt_too_long", "empty_prompt", "rejected_by_engine"]
    assert made[1].message.endswith("prompt tokens + 24 max_tokens exceed the model's 512")


SAMPLED = [*map(chat, range(18)), *(Request(prompt=chat(0).prompt, seed=2**62 + seed) for seed in range(6))]


def crowd_and_alone(engine: HostedEngine, seeded: Callable[[Request], Request]) -> tuple[list[Any], list[Any]]:
    """What SAMPLED come to together, and every third of them by itself, the last one first."""
    crowd = asyncio.run(together(engine, [seeded(request) for request in SAMPLED]))
    return crowd, [asyncio.run(together(engine, [seeded(request)]))[0] for request in SAMPLED[::-3]][::-1]


def test_sampled_candidates_do_not_depend_on_their_company(sampling: HostedEngine) -> None:
    before = sampling.stats().num_tokens
    crowd, alone = crowd_and_alone(sampling, lambda request: request)
    assert sampling.stats().num_tokens - before == sum(completion.num_tokens for completion in [*crowd, *alone])
    assert (sampling.stats().num_running, sampling.stats().num_waiting) == (0, 0)
    assert alone == crowd[2::3]
    assert num_texts(crowd) > NUM_SAMPLED


def num_texts(made: list[Any]) -> int:
    return len({completion.text for completion in made})


@pytest.mark.long
def test_the_comparison_finds_seeds_by_arrival_and_one_seed_for_all(sampling: HostedEngine) -> None:
    arrivals = itertools.count()
    crowd, alone = crowd_and_alone(sampling, lambda request: replace(request, seed=next(arrivals)))
    assert alone != crowd[2::3]
    crowd, _ = crowd_and_alone(sampling, lambda request: replace(request, seed=1))
    assert num_texts(crowd) <= NUM_SAMPLED


@pytest.mark.long
def test_death_of_the_engine_core_costs_no_request(sampling: HostedEngine) -> None:
    requests = [chat(i) for i in range(300)]  # most of them still wait when it dies
    expected = asyncio.run(together(sampling, requests))
    first = core_of(sampling)
    family = [psutil.Process(sampling.pid), *psutil.Process(sampling.pid).children(recursive=True)]

    async def killed() -> list[Any]:
        asking = asyncio.create_task(together(sampling, requests))
        await asyncio.sleep(0.3)
        assert not asking.done()
        first.kill()
        return await asking

    assert asyncio.run(killed()) == expected
    assert core_of(sampling) != first
    assert_gone(family)


OWNER = """
import asyncio, json, sys
from actors.engines import build_engine
from actors.engines.base import EngineConfig, Request

async def make(engine):
    requests = [Request((("user", f"Give me {i} reasons."),), i) for i in range(16)]
    return [made.text for made in await asyncio.gather(*map(engine.generate, requests))]

engine = build_engine(EngineConfig(**json.loads(sys.argv[1])), 2)
print("made:", json.dumps(asyncio.run(make(engine))), flush=True)
sys.stdin.read()
"""


@pytest.mark.long
def test_two_shards_say_the_same_and_die_with_their_owner(greedy: HostedEngine, folder: Path) -> None:
    """A real tensor parallel group of two processes on the CPU; takes up to a minute on two cores."""
    expected = [made.text for made in asyncio.run(together(greedy, [chat(i) for i in range(16)]))]
    settings = {"model": str(folder), "engine": "vllm", "dtype": "float32", "max_tokens": 24, "stop": STOP}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, json.dumps(settings | {"tensor_parallel_size": 2})],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert owner.stdout is not None
        made = next(said("made:", iter(owner.stdout.readline, "")))  # vLLM logs on stdout too
        assert made == expected
        family = psutil.Process(owner.pid).children(recursive=True)
        assert len(family) >= 5  # the engine's process, its watch, the core and two workers
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert_gone(family)


REFUSALS = """
import dataclasses, json, sys
from actors.contract import ConfigError
from actors.engines.base import EngineConfig
from actors.engines.vllm_engine import VllmEngine

for changes in json.loads(sys.argv[2]):
    try:
        VllmEngine(EngineConfig(engine="vllm", model=sys.argv[1], **changes), 1)
    except ConfigError as error:
        print("told:", json.dumps(str(error)), flush=True)
"""


def test_mistakes_are_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "engine_kwargs.gpu_memory_utilisation: vllm has no such argument; did you mean gpu_memory_utilization?": {
            "engine_kwargs": {"gpu_memory_utilisation": 0.5}
        },
        "max_num_batched_tokens": {"engine_kwargs": {"max_num_batched_tokens": "many"}},
        "max_model_len (4096)": {"max_model_len": 4096},
        "temperature must be in [0, 2]": {"temperature": 2.5},
        "device is cuda": {"device": "cuda"},
    }
    ran = subprocess.run(
        [sys.executable, "-c", REFUSALS, str(folder), json.dumps(list(cases.values()))],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    told = list(said("told:", ran.stdout.splitlines()))
    assert len(told) == len(cases), ran.stderr[-2000:]
    for expected, message in zip(cases, told, strict=True):
        assert expected in message
        assert "\n" not in message


PREFIX_CACHING = """
import sys
from unittest.mock import patch
from vllm.config import ModelConfig
from actors.engines.base import EngineConfig
from actors.engines.vllm_engine import make_vllm_config

with patch.object(ModelConfig, "is_prefix_caching_supported", False):  # which is what vLLM goes by unless it is told
    made = make_vllm_config(EngineConfig(engine="vllm", model=sys.argv[1], device="cpu"))
sys.exit(not made.cache_config.enable_prefix_caching)
"""


def test_prefixes_are_cached_whatever_vllm_would_choose(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PREFIX_CACHING, str(folder)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_a_missing_model_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer at"):
        build_engine(config_of(tmp_path / "gone"), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine_kwargs": {"dtype": "half"}}, "engine_kwargs.dtype: dtype has a key of its own"),
        ({"engine_kwargs": {"trust_remote_code": True}}, "trust_remote_code is not to be had"),
        ({"engine": "openai", "tensor_parallel_size": 2}, "tensor_parallel_size has no effect with engine=openai"),
        ({"engine": "torch", "engine_kwargs": {"seed": 1}}, "engine_kwargs.seed"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"base_url": "http://127.0.0.1/v1"}, "base_url has no effect with engine=vllm: it is for openai"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        EngineConfig(**({"model": "m", "engine": "vllm"} | settings))
