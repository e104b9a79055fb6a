"""An engine in a process of its own: what kills the engine (a CUDA error, the OOM killer) does not kill the actor."""

import asyncio
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection, Pipe
from typing import Any

from actors.contract import ConfigError, RowError
from actors.engines.base import Completion, Engine, EngineConfig, EngineStats, Request, settle

STATS_EVERY_S = 0.5
STDERR = 2
EXIT_WAIT_S = 10.0

_WATCH = """
import os, select, signal, sys, time
select.select([int(each) for each in sys.argv[2:]], [], [])
for number in (signal.SIGTERM, *[0] * 30, signal.SIGKILL):
    try:
        os.killpg(int(sys.argv[1]), number)
    except ProcessLookupError:
        break
    time.sleep(0.1)
"""

Build = Callable[[EngineConfig, int], Engine]
Message = tuple[Any, ...]
"""What goes through the pipe: a word that says what it is, and what belongs to it."""


class EngineDied(Exception):
    """The engine's process is gone, and this request was running or waiting in it."""


class EngineProcess:
    """The same engine, one process away. Built when the child says that it is ready.

    Args:
        build: makes the engine in the child; a module's function, so that it can be pickled.

    Raises:
        ConfigError: the engine says that the config is wrong.
        EngineDied: it died while it was being built.
    """

    def __init__(self, build: Build, config: EngineConfig, num_threads: int) -> None:
        ours, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._child = subprocess.Popen(
            [sys.executable, "-c", f"from actors.engines.process import serve; serve({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdout=STDERR,  # what libraries print there is no result of the job
            env=environment,
        )
        theirs.close()  # so that the end of the child is the end of the pipe
        self._pipe = ours
        self._write = threading.Lock()
        self._state = threading.Lock()  # guards the three below
        self._pending: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[Completion]]] = {}
        self._next = 0
        self._dead = False
        self._stats = EngineStats(0, 0, 0)
        self._send(("build", build, config, num_threads))
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            raise EngineDied(f"the engine's process ended with {self._child.wait()} while it was starting") from None
        if kind == "failed":
            self._child.wait()
            raise value
        threading.Thread(target=self._read, name="engine-process-reader", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._child.pid

    async def generate(self, request: Request) -> Completion:
        """Raises RowError, whatever else the engine raised, or EngineDied."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()
        with self._state:
            if self._dead:
                raise EngineDied(self._obituary())
            number = self._next
            self._next += 1
            self._pending[number] = (loop, future)
        self._send(("generate", number, request))
        try:
            return await future
        except asyncio.CancelledError:
            with self._state:
                self._pending.pop(number, None)
            self._send(("cancel", number))
            raise

    def stats(self) -> EngineStats:
        """As the child last told, at most half a second ago."""
        return self._stats

    def close(self) -> None:
        """End the child, by force if it does not end by itself within EXIT_WAIT_S seconds."""
        self._send(("close",))
        try:
            self._child.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _send(self, message: Message) -> None:
        data = pickle.dumps(message)
        try:
            with self._write:
                self._pipe.send_bytes(data)
        except OSError:
            return  # the child is dead; the reader finds that out too, and tells everyone who waits

    def _read(self) -> None:
        while True:
            try:
                kind, *values = self._pipe.recv()
            except (EOFError, OSError):
                break
            if kind == "stats":
                self._stats = values[0]
                continue
            number, result = values
            with self._state:
                entry = self._pending.pop(number, None)
            if entry:
                settle(*entry, result)
        self._child.wait()
        with self._state:
            self._dead = True
            pending, self._pending = self._pending, {}
        for entry in pending.values():
            settle(*entry, EngineDied(self._obituary()))

    def _obituary(self) -> str:
        code = self._child.wait()
        return (
            f"the engine's process was killed by signal {-code}"
            if code < 0
            else f"the engine's process ended with {code}"
        )


# --- the child ------------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """The child's life: build, then answer until the pipe ends. The owner's end is this process's at any time."""
    pipe = Connection(descriptor)
    _, build, config, num_threads = pipe.recv()
    taker: Future[Callable[[Message], object]] = Future()
    threading.Thread(target=_read, args=(pipe, taker), name="pipe-reader", daemon=True).start()
    code = 0
    try:
        engine: Engine = build(config, num_threads)
        pipe.send(("ready", os.getpid()))
        asyncio.run(_answer(pipe, taker, engine))
        engine.close()
    except ConfigError as error:
        pipe.send(("failed", error))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that the engine left would keep this process, and those who wait for its end, for ever


def _read(pipe: Connection, taker: "Future[Callable[[Message], object]]") -> None:
    """Hand on what the owner sends. From before the engine is built: a model that loads holds its GPUs already."""
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # the owner is gone: nothing that is still being made has a reader
        taker.result()(message)


async def _answer(pipe: Connection, taker: "Future[Callable[[Message], object]]", engine: Engine) -> None:
    loop = asyncio.get_running_loop()
    tasks: dict[int, asyncio.Task[None]] = {}
    closing = loop.create_future()
    failed: list[BaseException] = []

    def send(*message: Any) -> None:
        try:
            pipe.send(message)
        except OSError:
            os._exit(0)  # as in `_read`

    async def generate(number: int, request: Request) -> None:
        try:
            result: Completion | BaseException = await engine.generate(request)
        except (RowError, ConfigError) as error:  # a model without a chat template comes to light with the first chat
            result = error
        except Exception as error:  # the engine's own fault: it must not answer anyone again
            failed.append(error)
            if not closing.done():
                closing.set_result(None)
            return
        finally:
            tasks.pop(number, None)
        if not tasks:
            send("stats", engine.stats())  # the owner may look at them as soon as it has its last answer
        send("done", number, result)

    def take(message: Message) -> None:
        kind, *values = message
        if kind == "generate":
            tasks[values[0]] = loop.create_task(generate(*values))
        elif kind == "cancel" and values[0] in tasks:
            tasks[values[0]].cancel()
        elif kind == "close" and not closing.done():
            closing.set_result(None)

    taker.set_result(lambda message: loop.call_soon_threadsafe(take, message))
    last = None
    while not closing.done():
        stats = engine.stats()
        if stats != last:
            send("stats", stats)
            last = stats
        await asyncio.wait([closing], timeout=STATS_EVERY_S)
    if failed:
        raise failed[0]  # ends the process with a full trace; the parent sees the pipe end


def end_group_with_this_process() -> None:
    """Make this process the head of a process group which a small process ends when this one is gone, however it went.

    For an engine that has processes of its own below it. vLLM's engine core, or a rank in a collective, does not notice
    when its owner is killed: it would keep its GPU for ever. The group ends with this process's own owner, too: a
    process that hangs cannot see to that, and Ray ends what an actor leaves behind in the actor's group only.
    """
    os.setpgid(0, 0)
    watched = [os.pidfd_open(pid) for pid in (os.getpid(), os.getppid())]
    command = [sys.executable, "-S", "-c", _WATCH, str(os.getpid()), *map(str, watched)]
    nowhere = subprocess.DEVNULL
    subprocess.Popen(
        command, pass_fds=watched, start_new_session=True, stdin=nowhere, stdout=nowhere, stderr=nowhere
    )  # never waited for: it ends after this process
    for descriptor in watched:
        os.close(descriptor)
