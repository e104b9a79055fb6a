"""The torch engine serves many callers from one thread, fails rows alone, and never leaves a caller hanging."""

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from actors.contract import ConfigError, RowError
from actors.decoding import loop
from actors.decoding.cost import StepCost
from actors.engines.base import Completion, DraftingConfig, EngineConfig, Request
from actors.engines.prompts import load_tokenizer
from actors.engines.torch_engine import TorchEngine

TIMEOUT = 20  # seconds; a hang fails instead of stalling the suite


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), **({"dtype": "float32", "device": "cpu", "max_tokens": 16} | settings))


@pytest.fixture
def engine(llama_folder: Path) -> Iterator[TorchEngine]:
    engine = TorchEngine(config_of(llama_folder, max_num_seqs=4), num_threads=1)
    yield engine
    engine.close()


def chat(i: int) -> Request:
    return Request(prompt=(("user", f"Give me {i} reasons."),), seed=i)


async def together(engine: TorchEngine, requests: list[Request]) -> list[Any]:
    tasks = [engine.generate(request) for request in requests]
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), TIMEOUT)


def wait_until_idle(engine: TorchEngine) -> None:
    done = threading.Event()
    for _ in range(TIMEOUT * 100):
        stats = engine.stats()
        if stats.num_running == stats.num_waiting == 0:
            return
        done.wait(0.01)
    raise AssertionError(f"still busy: {engine.stats()}")


def crowd_and_alone(folder: Path) -> tuple[list[Any], list[Any]]:
    """What ten candidates come to together, and one at a time, the last one first."""
    engine = TorchEngine(config_of(folder, temperature=1.0, max_num_seqs=3), 1)
    requests = [chat(i) for i in range(10)]
    crowd = asyncio.run(together(engine, requests))
    alone = [asyncio.run(together(engine, [request]))[0] for request in reversed(requests)][::-1]
    assert engine.stats().num_tokens == sum(completion.num_tokens for completion in [*crowd, *alone])
    engine.close()
    return crowd, alone


def test_candidates_do_not_depend_on_their_company(llama_folder: Path) -> None:
    crowd, alone = crowd_and_alone(llama_folder)
    assert crowd == alone
    assert len({completion.text for completion in crowd}) == 10


def test_the_comparison_finds_draws_of_the_engine(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that draw from one stream, whatever their seeds."""
    stream = np.random.default_rng(0)
    monkeypatch.setattr(loop, "uniforms", lambda seed, count: stream.random(count))
    crowd, alone = crowd_and_alone(llama_folder)
    assert crowd != alone


def test_completion_counts_and_text(engine: TorchEngine, tokenizer: PreTrainedTokenizerBase) -> None:
    [made] = asyncio.run(together(engine, [Request(prompt="The quick brown", seed=0)]))
    assert isinstance(made, Completion)
    assert made.num_prompt_tokens == len(tokenizer("The quick brown")["input_ids"])
    assert made.finish_reason == "length"
    assert made.num_tokens == 16


MARKING = """
import os, pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
pathlib.Path(os.environ["BURNISH_TEST_MARK"]).touch()
class Config(LlamaConfig): ...
class Model(LlamaForCausalLM): ...
class Tokenizer(PreTrainedTokenizerFast): ...
"""
AUTO_MAPS = {
    "config.json": {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "modeling_own.Tokenizer"]},
}


@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_code_in_a_models_folder_is_never_run(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Where transformers knows the type the model is loaded without its code, and else refused."""
    mark = tmp_path / "mark"
    monkeypatch.setenv("BURNISH_TEST_MARK", str(mark))
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    (folder / "modeling_own.py").write_text(MARKING)
    for name, auto_map in AUTO_MAPS.items():
        told = json.loads((folder / name).read_text())
        if "model_type" in told:
            told["model_type"] = model_type
        (folder / name).write_text(json.dumps(told | {"auto_map": auto_map}))
    if model_type == "llama":
        engine = TorchEngine(config_of(folder), 1)
        [made] = asyncio.run(together(engine, [chat(1)]))
        engine.close()
        assert isinstance(made, Completion)
    else:
        with pytest.raises(ConfigError):
            TorchEngine(config_of(folder), 1)
    assert not mark.exists()


def test_several_event_loops_share_an_engine(engine: TorchEngine) -> None:
    results: dict[int, list[Any]] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: asyncio.run(together(engine, [chat(0), chat(i)]))}))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len({results[i][0].text for i in range(3)}) == 1


def test_bad_requests_fail_alone(llama_folder: Path) -> None:
    engine = TorchEngine(config_of(llama_folder, max_model_len=60), 1)
    long = Request(prompt="word " * 100, seed=0)
    made = asyncio.run(together(engine, [chat(1), long, Request(prompt="", seed=0), chat(2)]))
    assert [type(result) for result in made] == [Completion, RowError, RowError, Completion]
    assert [made[1].cause, made[2].cause] == ["prompt_too_long", "empty_prompt"]
    assert made[1].message.endswith("prompt tokens + 16 max_tokens exceed the model's 60")
    engine.close()


def test_limit_is_the_models_own_when_that_is_shorter(llama_folder: Path) -> None:
    engine = TorchEngine(config_of(llama_folder, max_model_len=100_000, max_tokens=500), 1)
    [made] = asyncio.run(together(engine, [Request(prompt="word " * 30, seed=0)]))
    assert isinstance(made, RowError)
    assert made.message.endswith("exceed the model's 512")
    engine.close()


def test_stop_string_and_eos_of_the_generation_config(
    llama_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = TorchEngine(config_of(llama_folder), 1)
    [free] = asyncio.run(together(engine, [chat(1)]))
    engine.close()
    stop = free.text[4:6]
    engine = TorchEngine(config_of(llama_folder, stop=[stop]), 1)
    [cut] = asyncio.run(together(engine, [chat(1)]))
    engine.close()
    assert (cut.text, cut.finish_reason) == (free.text[: free.text.index(stop)], "stop")

    folder = shutil.copytree(llama_folder, tmp_path / "eos")
    ids = tokenizer(free.text, add_special_tokens=False)["input_ids"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [511, *ids]}))
    engine = TorchEngine(config_of(folder), 1)
    [ended] = asyncio.run(together(engine, [chat(1)]))
    engine.close()
    assert ended.finish_reason == "stop"
    assert ended.num_tokens < free.num_tokens


def test_cancelled_request_leaves_the_batch(llama_folder: Path) -> None:
    engine = TorchEngine(config_of(llama_folder, max_tokens=400, max_num_seqs=2), 1)

    async def cancel_most() -> Completion:
        tasks = [asyncio.create_task(engine.generate(chat(i))) for i in range(4)]
        await asyncio.sleep(0.1)
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks[1:], return_exceptions=True)
        assert all(task.cancelled() for task in tasks[1:])
        return await asyncio.wait_for(tasks[0], TIMEOUT)

    made = asyncio.run(cancel_most())
    assert made.text == asyncio.run(together(engine, [chat(0)]))[0].text
    wait_until_idle(engine)
    engine.close()


def test_caller_whose_event_loop_closed_does_no_harm(engine: TorchEngine) -> None:
    caller = asyncio.new_event_loop()
    task = caller.create_task(engine.generate(chat(1)))
    caller.run_until_complete(asyncio.sleep(0))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    caller.close()
    wait_until_idle(engine)
    assert isinstance(asyncio.run(together(engine, [chat(2)]))[0], Completion)


def test_death_of_the_thread_reaches_everyone(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(3))

    def step() -> list[Any]:
        if next(steps, None) is None:
            raise MemoryError("out of memory")
        return []

    monkeypatch.setattr(engine._loop, "step", step)
    made = asyncio.run(together(engine, [chat(i) for i in range(6)]))
    assert [type(error) for error in made] == [MemoryError] * 6
    [late] = asyncio.run(together(engine, [chat(7)]))
    assert isinstance(late, MemoryError)


def test_close_releases_those_who_wait(llama_folder: Path) -> None:
    engine = TorchEngine(config_of(llama_folder, max_tokens=400), 1)

    async def close_early() -> list[Any]:
        tasks = [asyncio.create_task(engine.generate(chat(i))) for i in range(3)]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.close)
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), TIMEOUT)

    assert all("closed" in str(error) for error in asyncio.run(close_early()))
    assert not engine._thread.is_alive()
    engine.close()


# --- drafts -----------------------------------------------------------------------------------------------------------


def drafting(folder: Path, requests: list[Request], **settings: Any) -> list[Completion]:
    config = DraftingConfig(model=str(folder), **({"dtype": "float32", "device": "cpu", "max_tokens": 16} | settings))
    engine = TorchEngine(config, 1)
    made = asyncio.run(together(engine, requests))
    engine.close()
    assert all(isinstance(completion, Completion) for completion in made), made
    return made


@pytest.fixture(scope="module")
def plain(llama_folder: Path) -> list[Completion]:
    """What is made of ten chats without a draft."""
    engine = TorchEngine(config_of(llama_folder), 1)
    made = asyncio.run(together(engine, [chat(i) for i in range(10)]))
    engine.close()
    return made


def with_drafts(drafts: list[str]) -> list[Request]:
    return [Request(chat(i).prompt, i, draft) for i, draft in enumerate(drafts)]


@pytest.mark.parametrize("decoder", ["auto", "parallel", "greedy"])
def test_a_draft_changes_the_forwards_and_not_the_answer(
    llama_folder: Path, plain: list[Completion], decoder: str
) -> None:
    requests = with_drafts([made.text for made in plain])
    made = drafting(llama_folder, requests, decoder=decoder, block_size=8)
    assert [(each.text, each.num_tokens) for each in made] == [(each.text, each.num_tokens) for each in plain]
    if decoder == "greedy":
        assert {(each.iterations, each.accepted) for each in made} == {(None, None)}
    else:
        assert all(each.iterations + each.accepted >= each.num_tokens for each in made)
        assert decoder == "auto" or sum(each.iterations for each in made) < sum(each.num_tokens for each in made)


FREE = {1: {1: 1.0, 2: 1.0}}
DEAR = {rows: {rows: 1.0, rows + 1: 100.0} for rows in range(1, 11)}  # no guess is worth that


@pytest.mark.parametrize(
    ("settings", "costs"),
    [
        ({}, FREE),
        ({}, DEAR),
        ({"decoder": "parallel"}, None),
        ({"decoder": "greedy"}, None),
        ({"block_size": 1}, None),
        ({"max_iterations": 2}, None),
        ({"temperature": 0.8}, None),
    ],
)
def test_auto_alone_guesses_by_the_costs_that_it_measures(
    llama_folder: Path,
    plain: list[Completion],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    costs: dict[int, dict[int, float]] | None,
) -> None:
    def measure(*_: Any, **__: Any) -> StepCost:
        assert costs is not None
        return StepCost(costs)

    monkeypatch.setattr(StepCost, "measure", measure)
    made = drafting(llama_folder, with_drafts([made.text for made in plain]), **({"block_size": 8} | settings))
    if costs is not None:
        assert [each.text for each in made] == [each.text for each in plain]
        assert (sum(each.accepted or 0 for each in made) > 0) == (costs is FREE)


def test_without_a_draft_only_a_parallel_decoder_guesses(llama_folder: Path, plain: list[Completion]) -> None:
    requests = [chat(i) for i in range(10)]
    assert drafting(llama_folder, requests, decoder="auto", num_reserved=3) == plain
    made = drafting(llama_folder, requests, decoder="parallel", block_size=8)
    assert [each.text for each in made] == [each.text for each in plain]
    assert all(each.iterations is not None for each in made)


def test_a_sampled_row_has_no_use_for_its_draft(llama_folder: Path) -> None:
    drafts, none = with_drafts(["The quick brown fox"] * 10), [chat(i) for i in range(10)]
    made = drafting(llama_folder, drafts, temperature=0.8)
    assert made == drafting(llama_folder, none, temperature=0.8)
    assert len({each.text for each in made}) == 10


def test_many_iterations_arrive_where_the_fixed_point_is_and_few_do_not(
    llama_folder: Path, plain: list[Completion]
) -> None:
    requests = with_drafts(["A preference is a pair of answers to one prompt."] * 10)
    done = drafting(llama_folder, requests, max_iterations=16, block_size=16)
    assert [each.text for each in done] == [each.text for each in plain]
    few = drafting(llama_folder, requests, max_iterations=2, block_size=16)
    assert not {each.text for each in few} & {each.text for each in plain}
    assert {each.iterations for each in few} <= {1, 2}


@pytest.mark.parametrize("max_iterations", [None, 3])
def test_reserved_tokens_begin_the_answer_and_are_not_counted(
    llama_folder: Path, tokenizer: PreTrainedTokenizerBase, max_iterations: int | None
) -> None:
    draft = "The quick brown fox jumps over"
    ids = tokenizer(draft)["input_ids"]
    settings = {"num_reserved": 4, "max_iterations": max_iterations, "block_size": 16}
    made = drafting(llama_folder, with_drafts([draft] * 10), **settings)
    assert all(each.text.startswith(tokenizer.decode(ids[:4])) for each in made)
    assert max(each.num_tokens or 0 for each in made) == 16 - 4
    drawn = drafting(llama_folder, with_drafts([draft] * 10), random_reserved=True, **settings)
    assert drawn == drafting(llama_folder, with_drafts([draft] * 10), random_reserved=True, **settings)
    assert len({each.num_tokens for each in drawn if each.finish_reason == "length"}) > 2


BEYOND = "beyond the model"  # the tokenizer knows it as one token, the model has no row for it


@pytest.fixture(scope="module")
def beyond_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(llama_folder, tmp_path_factory.mktemp("beyond") / "model")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([BEYOND])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_that_the_model_does_not_know_fails_its_row_alone(beyond_folder: Path, plain: list[Completion]) -> None:
    engine = TorchEngine(config_of(beyond_folder), 1)
    made = asyncio.run(together(engine, [chat(0), Request(f"How {BEYOND}?", 0), chat(2)]))
    engine.close()
    assert [made[0], made[2]] == [plain[0], plain[2]]
    assert isinstance(made[1], RowError) and made[1].cause == "rejected_by_engine"


@pytest.mark.parametrize("max_iterations", [None, 2])
def test_a_draft_ends_where_the_model_does_not_know_it(beyond_folder: Path, max_iterations: int | None) -> None:
    drafts = [f"A preference is {BEYOND} a pair of answers", "A preference is "]
    settings = {"max_iterations": max_iterations, "block_size": 8, "decoder": "parallel"}
    made, cut = drafting(beyond_folder, [Request(chat(1).prompt, 1, draft) for draft in drafts], **settings)
    assert made == cut
    config = DraftingConfig(
        model=str(beyond_folder), dtype="float32", device="cpu", max_tokens=16, num_reserved=8, **settings
    )
    engine = TorchEngine(config, 1)
    failed, well = asyncio.run(together(engine, with_drafts(drafts)))
    engine.close()
    assert isinstance(failed, RowError) and failed.cause == "rejected_by_engine"
    assert isinstance(well, Completion)


def test_a_model_without_an_end_of_sequence_cannot_fill_a_draft_up(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "endless")
    (folder / "chat_template.jinja").unlink()  # it ends turns
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: v for key, v in settings.items() if not key.startswith("eos_")}))
    with pytest.raises(ConfigError, match="has no end-of-sequence token to fill a draft up with"):
        drafting(folder, [], max_iterations=2)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["folder", "model.safetensors"])
def test_missing_model_is_a_config_error(llama_folder: Path, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "gone"
    if missing != "folder":
        shutil.copytree(llama_folder, folder)
        (folder / missing).rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError) as caught:
        TorchEngine(config_of(folder), None)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
