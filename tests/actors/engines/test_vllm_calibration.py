"""`decoder: auto` inside vLLM is decided before the engine starts, by what steps cost here; that is measured once."""

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.contract import ConfigError
from actors.engines import vllm_calibration, vllm_engine
from actors.engines.base import DraftingConfig, EngineConfig
from actors.engines.vllm_calibration import Calibration, calibrated
from actors.engines.vllm_drafts import MAX_GUESSES, DraftFolder

GOOD = Calibration(32, 0.100, {1: {1: 0.02, 8: 0.02}, 32: {32: 0.101, 64: 0.11, 128: 0.14}})
DEAR = Calibration(32, 0.100, {32: {32: 0.108, 64: 0.11, 128: 0.14}})  # a proposer that never guesses costs 8 %
FLAT = Calibration(32, 0.100, {32: {32: 0.101, 64: 0.20}})  # a position costs what a token is worth
KEY = {"model": "m", "max_num_seqs": 32, "engine_kwargs": {"sizes": (1, 2)}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path))
    return tmp_path / "calibration"


def never() -> Calibration:
    raise AssertionError("there is one already")


def test_drafts_pay_where_poor_ones_cost_little_and_good_ones_gain() -> None:
    assert [calibration.pays for calibration in (GOOD, DEAR, FLAT)] == [True, False, False]
    assert GOOD.without == pytest.approx(0.100 / 0.101) and GOOD.most == pytest.approx(4 / 1.4)
    assert (
        str(GOOD) == "32 requests make 320 tokens/s, with a proposer 0.99x by poor drafts and up to 2.86x by right ones"
    )


def test_what_was_measured_is_kept(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert calibrated(KEY, lambda: GOOD) == GOOD
    (path,) = cache.glob("*.json")
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"decoder auto: {GOOD}; drafts ({path})"
    assert calibrated(KEY, never) == GOOD
    assert calibrated({**KEY, "max_num_seqs": 64}, lambda: FLAT) == FLAT
    assert calibrated(KEY, never) == GOOD
    assert "no drafts" in capfd.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: "",
        lambda kept: json.dumps(kept)[:40],
        lambda kept: "[]",
        lambda kept: json.dumps(kept | {"key": {}}),
        lambda kept: json.dumps(kept | {"drafting": []}),
        lambda kept: json.dumps(kept | {"drafting": {}}),
        lambda kept: json.dumps(kept | {"drafting": {"32": {"64": 0.1}}}),
        lambda kept: json.dumps(kept | {"drafting": {"32": {"32": -0.1}}}),
        lambda kept: json.dumps(kept | {"plain_s": "fast"}),
        lambda kept: json.dumps({name: value for name, value in kept.items() if name != "plain_s"}),
        lambda kept: json.dumps(kept | {"of_a_later_version": 1}),
    ],
)
def test_a_damaged_calibration_is_made_anew(cache: Path, damage: Callable[[dict[str, Any]], str]) -> None:
    calibrated(KEY, lambda: GOOD)
    (path,) = cache.glob("*.json")
    path.write_text(damage(json.loads(path.read_text())))
    assert calibrated(KEY, lambda: FLAT) == FLAT
    assert calibrated(KEY, never) == FLAT


def test_where_nothing_can_be_kept_it_is_measured_each_time(cache: Path) -> None:
    cache.write_text("in the way")
    assert [calibrated(KEY, lambda each=each: each) for each in (GOOD, FLAT)] == [GOOD, FLAT]  # type: ignore[misc]


def test_a_machine_on_which_nothing_can_be_measured_has_no_drafts() -> None:
    with pytest.raises(vllm_calibration.NotMeasured, match=r"seconds -0.1, .*tried again after 60 minutes"):
        calibrated(KEY, lambda: Calibration(32, -0.1, {32: {32: 0.1}}))


class Deaf:
    """Stands in for a vLLM whose proposer finds no draft."""

    async def generate(self, *_: Any) -> AsyncIterator[None]:
        yield None


def test_a_step_whose_guesses_no_proposer_saw_is_no_measurement() -> None:
    with contextlib.closing(DraftFolder(None)) as folder:
        how: dict[str, Any] = {"drafts": [[4, 5, 6]], "folder": folder}
        elapsed = partial(vllm_calibration._elapsed, cast(Any, Deaf()), [[1, 2, 3]], 1, 2, **how)
        assert asyncio.run(elapsed(1)) > 0  # reads the prompt alone
        with pytest.raises(vllm_calibration.Impossible, match="saw no guesses"):
            asyncio.run(elapsed(2))


def test_where_drafts_find_no_memory_there_are_none() -> None:
    def measure() -> Calibration:
        raise OSError("No space left on device")

    with pytest.raises(vllm_calibration.NotMeasured, match="No space left"):
        calibrated(KEY, measure)


def test_engines_that_start_together_measure_once() -> None:
    measured = []

    def measure() -> Calibration:
        time.sleep(0.2)
        measured.append(GOOD)
        return GOOD

    threads = [threading.Thread(target=calibrated, args=(KEY, measure)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1


class Machine:
    """Stands in for vLLM: a step takes what it is told to by its guesses, and the beginning of a request a second.

    Args:
        seconds: of a step, by the number of guesses at each request.
        pace: of each engine that is started, what it multiplies all seconds by.
        busy: of how many measurements one, drawn at random, takes twice as long.
    """

    def __init__(self, seconds: dict[int, float], pace: Callable[[int], float] = lambda n: 1.0, busy: int = 0) -> None:
        self.seconds, self.pace, self.busy = seconds, pace, busy
        self.started: list[int] = []
        self.draws = random.Random(0)

    def start(self, num_guesses: int) -> Any:
        self.started.append(num_guesses)
        return SimpleNamespace(shutdown=lambda timeout: None)

    async def elapsed(self, llm: Any, prompts: Any, count: int, num: int, max_tokens: int, **_: Any) -> float:
        late = 2 if self.busy and self.draws.randrange(self.busy) == 0 else 1
        return late * self.pace(len(self.started)) * (1 + (max_tokens - 1) * self.seconds[num])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], Calibration]:
    def measured(machine: Machine) -> Calibration:
        monkeypatch.setattr(vllm_calibration, "_elapsed", machine.elapsed)
        return vllm_calibration.measure(machine.start, num_requests=4, max_guesses=31, max_model_len=512, num_words=64)

    return measured


KINKED = {0: 0.04, 1: 0.09, 3: 0.05, 7: 0.06, 15: 0.30, 31: 0.60}
"""Two positions a request are dearer than four, as on some CPUs; beyond eight the arithmetic sets the pace."""


def test_more_positions_are_measured_behind_a_kink_and_not_far_behind_the_best(
    measured: Callable[[Machine], Calibration],
) -> None:
    found = measured(Machine(KINKED))
    assert list(found.drafting[4]) == [4, 8, 16, 32, 64]
    assert list(found.drafting[1]) == [1, 2, 4, 8, 16]
    assert found.most == pytest.approx(8 * 0.04 / 0.06)


def test_a_machine_that_slows_down_does_not_make_a_proposer_dear(measured: Callable[[Machine], Calibration]) -> None:
    machine = Machine(KINKED, pace=lambda number: 1 + number / 10)
    assert measured(machine).without == pytest.approx(1)
    assert machine.started == [0, 31, 0]


def test_what_else_a_machine_does_is_not_measured(measured: Callable[[Machine], Calibration]) -> None:
    busy, quiet = measured(Machine(KINKED, busy=3)), measured(Machine(KINKED))
    assert busy.plain_s == pytest.approx(quiet.plain_s)
    assert busy.drafting[4] == pytest.approx(quiet.drafting[4])


def config_of(folder: Path, **settings: Any) -> DraftingConfig:
    return DraftingConfig(**{"engine": "vllm", "model": str(folder), "max_num_seqs": 8, **settings})


PLAIN: Any = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512, get_vocab_size=lambda: 512))


@pytest.mark.parametrize(("calibration", "expected"), [(GOOD, (MAX_GUESSES, GOOD.drafting)), (DEAR, (0, None))])
def test_auto_is_what_the_calibration_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: Calibration, expected: Any
) -> None:
    monkeypatch.setattr(vllm_engine, "measure", lambda start, **_: calibration)
    assert vllm_engine._decoder(config_of(tmp_path), 2, PLAIN) == expected


def test_auto_is_greedy_where_vllm_does_not_start_with_a_proposer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], cache: Path
) -> None:
    def fails(start: Any, **_: Any) -> Calibration:
        raise RuntimeError("Engine core initialization failed.")

    tried: list[int] = []
    monkeypatch.setattr(vllm_engine, "measure", lambda start, **_: tried.append(1) or fails(start))
    for _ in range(3):  # the second and third, of a neighbour or after a death, do not start vLLM for it again
        assert vllm_engine._decoder(config_of(tmp_path), 2, PLAIN) == (0, None)
        (path,) = cache.glob("*.json")
        told = f"Engine core initialization failed. (tried again after 60 minutes, or once {path} is removed)"
        assert capfd.readouterr().err == f"decoder auto: no drafts: {told}\n"
    assert len(tried) == 1
    monkeypatch.setattr(vllm_engine, "measure", lambda start, **_: GOOD)
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"failed_at": kept["failed_at"] - vllm_calibration.FAILED_FOR_S}))
    assert vllm_engine._decoder(config_of(tmp_path), 2, PLAIN) == (MAX_GUESSES, GOOD.drafting)
    monkeypatch.setattr(vllm_engine, "measure", fails)
    assert vllm_engine._decoder(config_of(tmp_path), 2, PLAIN) == (MAX_GUESSES, GOOD.drafting)


@pytest.mark.parametrize(
    ("settings", "num_guesses"),
    [
        ({"decoder": "greedy"}, 0),
        ({"decoder": "auto", "temperature": 0.5}, 0),
        ({"decoder": "auto", "block_size": 1}, 0),
        ({"decoder": "auto", "max_num_seqs": vllm_engine.AUTO_MAX_SEQS_ON_CPU + 1}, 0),
        ({"decoder": "auto", "engine_kwargs": {"speculative_config": {"method": "ngram"}}}, 0),
        ({"decoder": "parallel"}, MAX_GUESSES),
        ({"decoder": "parallel", "block_size": 9}, 8),
    ],
)
def test_nothing_is_measured_where_nothing_is_to_be_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], num_guesses: int
) -> None:
    monkeypatch.setattr(vllm_engine, "measure", lambda start, **_: never())
    assert vllm_engine._decoder(config_of(tmp_path, **settings), 2, PLAIN) == (num_guesses, None)


@pytest.mark.parametrize("max_num_seqs", [vllm_engine.AUTO_MAX_SEQS, vllm_engine.AUTO_MAX_SEQS + 1])
def test_on_a_gpu_more_requests_are_worth_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_num_seqs: int
) -> None:
    asked = []
    monkeypatch.setattr(vllm_engine.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(vllm_engine, "measure", lambda start, **_: asked.append(1) or GOOD)
    found = vllm_engine._decoder(config_of(tmp_path, max_num_seqs=max_num_seqs), 2, PLAIN)
    worth = max_num_seqs <= vllm_engine.AUTO_MAX_SEQS
    assert (found, asked) == (((MAX_GUESSES, GOOD.drafting), [1]) if worth else ((0, None), []))


def test_the_bounds_are_told_with_the_key() -> None:
    (decoder,) = [field for field in fields(DraftingConfig) if field.name == "decoder"]
    bounds = f"above {vllm_engine.AUTO_MAX_SEQS}, or {vllm_engine.AUTO_MAX_SEQS_ON_CPU} on CPUs)"
    assert bounds in decoder.metadata["doc"].help


def test_a_policy_has_no_drafts(tmp_path: Path) -> None:
    assert vllm_engine._decoder(EngineConfig(engine="vllm", model=str(tmp_path)), 2, PLAIN) == (0, None)


def test_two_sources_of_guesses_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, decoder="parallel", engine_kwargs={"speculative_config": {"method": "ngram"}})
    with pytest.raises(ConfigError, match="speculative_config makes guesses of its own"):
        vllm_engine._decoder(config, 2, PLAIN)
