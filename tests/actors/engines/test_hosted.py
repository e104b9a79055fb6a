"""An engine in a process of its own: the same answers, and deaths that only the guilty request does not survive."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from actors.contract import ConfigError, RowError, TransientError
from actors.engines.base import Completion, EngineConfig, EngineStats, Request
from actors.engines.hosted import HARMLESS, MAX_ATTEMPTS, MAX_STARTS, HostedEngine, Suspect
from actors.engines.process import EngineDied, EngineProcess, end_group_with_this_process
from tests.processes import assert_gone

DOES_NOT_START = f"does not start: the engine's process ended with 7 while it was starting, {MAX_STARTS} times over"


class Scripted:
    """Answers with the prompt; `poison` in it kills the process, and every start is noted in a file.

    Beside that file, `.broken` ends each start, `.broken-once` the next one, `.slow` makes it take a minute, and
    `.deadly` makes every prompt kill but the one that stands in it, and `.grouped` gives it a group of its own.
    """

    def __init__(self, config: EngineConfig, num_threads: int) -> None:
        if config.model == "wrong":
            raise ConfigError("the model is wrong")
        self.starts = Path(config.model)
        with self.starts.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if self.starts.with_suffix(".broken").exists():
            os._exit(7)
        if self.starts.with_suffix(".broken-once").exists():
            self.starts.with_suffix(".broken-once").unlink()
            os._exit(7)
        if self.starts.with_suffix(".slow").exists():
            time.sleep(60)
        if self.starts.with_suffix(".grouped").exists():
            end_group_with_this_process()

    async def generate(self, request: Request) -> Completion:
        assert isinstance(request.prompt, str)
        await asyncio.sleep(0.01 if "poison" in request.prompt else 0.05)
        deadly = self.starts.with_suffix(".deadly")
        if "poison" in request.prompt or (deadly.exists() and request.prompt != deadly.read_text()):
            os.kill(os.getpid(), signal.SIGKILL)
        if "bad" in request.prompt:
            raise RowError("prompt_too_long", "too long")
        if "hang" in request.prompt:
            await asyncio.sleep(3600)
        if "chatter" in request.prompt:
            print("what a library prints", flush=True)
        if "bug" in request.prompt:
            if "threads" in request.prompt:
                threading.Thread(target=time.sleep, args=(3600,)).start()  # which alone would keep the process alive
            raise ZeroDivisionError("a bug of the engine")
        if "mistake" in request.prompt:
            raise ConfigError("there is no chat template")
        return Completion(request.prompt.upper(), "stop", 1, 1)

    def stats(self) -> EngineStats:
        return EngineStats(1, 2, 3)

    def close(self) -> None:
        self.starts.with_suffix(".closed").touch()


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    return tmp_path / "starts"


def config_of(starts: Path) -> EngineConfig:
    return EngineConfig(model=str(starts))


def num_starts(starts: Path) -> int:
    return len(starts.read_text().split())


async def ask(engine: HostedEngine, prompts: list[str]) -> list[str]:
    async def one(prompt: str) -> str:
        try:
            return (await engine.generate(Request(prompt, 0))).text
        except RowError as error:
            return error.cause

    return list(await asyncio.gather(*map(one, prompts)))


def test_answers_row_errors_and_stats_pass_through(starts: Path) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)
    assert asyncio.run(ask(engine, ["a", "bad", "b"])) == ["A", "prompt_too_long", "B"]
    assert engine.stats() == EngineStats(1, 2, 3)
    engine.close()
    assert starts.with_suffix(".closed").exists()
    assert not psutil.pid_exists(engine.pid)


def test_a_poison_request_fails_alone_and_its_neighbours_are_answered(starts: Path) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)
    prompts = [f"p{number}" for number in range(31)]
    prompts.insert(17, "poison")
    answers = asyncio.run(ask(engine, prompts))
    engine.close()
    assert answers.pop(17) == "engine_crash"
    assert answers == [f"P{number}" for number in range(31)]
    halvings = 6  # 32 requests, all together first
    assert num_starts(starts) <= 1 + 1 + halvings + MAX_ATTEMPTS


def test_two_poison_requests_are_both_found(starts: Path) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)
    answers = asyncio.run(ask(engine, ["poison 1", "a", "b", "poison 2", "c"]))
    engine.close()
    assert answers == ["engine_crash", "A", "B", "engine_crash", "C"]


def test_a_death_from_outside_costs_no_request(starts: Path) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)

    async def killed() -> list[str]:
        asking = asyncio.create_task(ask(engine, ["a", "b", "c"]))
        await asyncio.sleep(0.02)
        os.kill(engine.pid, signal.SIGKILL)
        return [*(await asking), *(await ask(engine, ["d"]))]

    assert asyncio.run(killed()) == ["A", "B", "C", "D"]
    engine.close()
    assert num_starts(starts) == 2


def test_what_an_engine_dies_of_is_told_step_by_step(starts: Path) -> None:
    told: list[tuple[list[str], list[list[str]], list[str]]] = []

    def names(suspects: list[Suspect]) -> list[str]:
        return sorted(str(suspect.request.prompt) for suspect in suspects)

    def remember(running: list[Suspect], waiting: list[list[Suspect]], guilty: list[Suspect]) -> None:
        told.append((names(running), [names(group) for group in waiting], names(guilty)))

    engine = HostedEngine(Scripted, config_of(starts), 1, max_attempts=2, remember=remember)
    asyncio.run(ask(engine, ["a", "poison"]))
    engine.close()
    both, alone = ["a", "poison"], ["poison"]
    steps = [(both, [], []), (both, [], []), (["a"], [alone], []), (alone, [], []), (alone, [], []), ([], [], alone)]
    assert told == steps


def test_kills_in_lives_before_count(starts: Path) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1, max_attempts=3)

    async def killing() -> None:
        await engine.generate(Request("poison", 0, num_kills=2))

    with pytest.raises(RowError) as told:
        asyncio.run(killing())
    engine.close()
    assert (told.value.cause, told.value.attempts) == ("engine_crash", 3)
    assert num_starts(starts) <= 1 + 2


def test_requests_that_come_during_an_inquiry_wait_and_are_answered(starts: Path) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)

    async def later() -> list[str]:
        asking = asyncio.create_task(ask(engine, ["poison", "a"]))
        await asyncio.sleep(0.3)
        return [*(await ask(engine, ["late"])), *(await asking)]

    assert asyncio.run(later()) == ["LATE", "engine_crash", "A"]
    engine.close()


def test_a_death_during_the_first_start_is_survived(starts: Path) -> None:
    starts.with_suffix(".broken-once").touch()
    engine = HostedEngine(Scripted, config_of(starts), 1)
    assert asyncio.run(ask(engine, ["a"])) == ["A"]
    engine.close()
    assert num_starts(starts) == 2


def test_an_engine_that_cannot_start_again_ends_every_request_with_an_error(starts: Path) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)
    starts.with_suffix(".broken").touch()

    async def broken() -> list[BaseException | Completion]:
        requests = [engine.generate(Request(prompt, 0)) for prompt in ("poison", "a")]
        return await asyncio.gather(*requests, return_exceptions=True)

    for answer in asyncio.run(broken()):
        assert isinstance(answer, ConfigError)
        assert DOES_NOT_START in str(answer)
    assert num_starts(starts) == 1 + MAX_STARTS


def test_an_engine_that_breaks_while_suspects_are_tried_ends_every_request_with_an_error(starts: Path) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)

    async def broken() -> list[BaseException | Completion]:
        requests = [engine.generate(Request(prompt, 0)) for prompt in ("poison", "a, hang")]
        asking = asyncio.gather(*requests, return_exceptions=True)
        while num_starts(starts) < 2:
            await asyncio.sleep(0.01)
        starts.with_suffix(".broken").touch()  # the inquiry has begun: the next death in it is the last one
        return await asyncio.wait_for(asking, 60)

    for answer in asyncio.run(broken()):
        assert isinstance(answer, ConfigError)
        assert DOES_NOT_START in str(answer)


@pytest.mark.parametrize("num_requests", [1, 8])
def test_an_engine_that_dies_of_everything_is_an_outage_and_condemns_nobody(starts: Path, num_requests: int) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)
    starts.with_suffix(".deadly").touch()

    async def broken() -> list[BaseException | Completion]:
        requests = [engine.generate(Request(f"p{number}", 0)) for number in range(num_requests)]
        return await asyncio.gather(*requests, return_exceptions=True)

    answers = asyncio.run(broken())
    assert [type(answer) for answer in answers] == [TransientError] * num_requests
    assert "dies of every request" in str(answers[0])
    assert "\n" not in str(answers[0])
    assert num_starts(starts) == 1 + MAX_STARTS


def test_an_engine_that_no_longer_answers_what_it_has_answered_before_condemns_nobody(starts: Path) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)

    async def breaking() -> list[str]:
        answers = await ask(engine, ["a", "b", "poison"])
        starts.with_suffix(".deadly").write_text(str(HARMLESS.prompt))
        with pytest.raises(TransientError):
            await ask(engine, ["c"])
        return answers

    assert asyncio.run(breaking()) == ["A", "B", "engine_crash"]


@pytest.mark.parametrize("num_requests", [1, 2])
def test_a_job_that_is_nothing_but_poison_comes_to_its_end(starts: Path, num_requests: int) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)
    assert asyncio.run(ask(engine, ["poison"] * num_requests)) == ["engine_crash"] * num_requests
    engine.close()


def test_a_mistake_that_a_request_brings_to_light_is_told_and_kills_nothing(starts: Path) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)
    with pytest.raises(ConfigError, match="there is no chat template"):
        asyncio.run(engine.generate(Request("mistake", 0)))
    assert num_starts(starts) == 1
    engine.close()


def test_an_engine_that_never_starts_is_told_in_one_line(starts: Path) -> None:
    starts.with_suffix(".broken").touch()
    with pytest.raises(ConfigError) as told:
        HostedEngine(Scripted, config_of(starts), 1)
    assert DOES_NOT_START in str(told.value)
    assert "\n" not in str(told.value)
    assert num_starts(starts) == MAX_STARTS


def test_an_engines_own_exception_is_a_death_not_a_row_error(starts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process = EngineProcess(Scripted, config_of(starts), 1)
    with pytest.raises(EngineDied, match="ended with 1"):
        asyncio.run(asyncio.wait_for(process.generate(Request("bug with threads", 0)), 20))
    assert "ZeroDivisionError: a bug of the engine" in capfd.readouterr().err


def test_what_an_engine_prints_is_no_result(starts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = HostedEngine(Scripted, config_of(starts), 1)
    asyncio.run(engine.generate(Request("chatter", 0)))
    engine.close()
    out, err = capfd.readouterr()
    assert (out, "what a library prints" in err) == ("", True)


def test_a_wrong_config_is_told_as_such(starts: Path) -> None:
    with pytest.raises(ConfigError, match="the model is wrong"):
        HostedEngine(Scripted, EngineConfig(model="wrong"), 1)


def test_the_process_ends_with_its_owner(starts: Path) -> None:
    process = EngineProcess(Scripted, config_of(starts), 1)
    with socket.socket(fileno=os.dup(process._pipe.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)  # what the end of the owner does, while its reader waits on the same socket
    deadline = time.monotonic() + 20
    while process._child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process._child.poll() == 0


OWNER = """
import sys
from actors.engines.base import EngineConfig
from actors.engines.process import EngineProcess
from tests.actors.engines.test_hosted import Scripted

EngineProcess(Scripted, EngineConfig(model=sys.argv[1]), 1)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_hanging_engine_with_a_group_of_its_own_ends_with_its_owner(starts: Path) -> None:
    """Ray ends what is in the group of an actor that died; who leaves that group must see to itself."""
    starts.with_suffix(".grouped").touch()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", OWNER, str(starts)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        engine = psutil.Process(int(starts.read_text()))
        engine.suspend()
        owner.kill()
    assert_gone([engine])


def test_an_engine_that_is_still_being_built_ends_with_its_owner(starts: Path) -> None:
    starts.with_suffix(".slow").touch()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(starts)], env=environment)
    try:
        deadline = time.monotonic() + 50
        while not starts.exists() or not starts.read_text().endswith("\n"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        engine = psutil.Process(int(starts.read_text()))
    finally:
        owner.kill()
        owner.wait()
    try:
        engine.wait(20)
    except psutil.TimeoutExpired:
        engine.kill()
        pytest.fail("the engine goes on being built for nobody")


def test_a_hanging_engine_is_closed_by_force(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engines.process.EXIT_WAIT_S", 0.2)
    process = EngineProcess(Scripted, config_of(starts), 1)
    os.kill(process.pid, signal.SIGSTOP)
    process.close()
    assert not psutil.pid_exists(process.pid)
