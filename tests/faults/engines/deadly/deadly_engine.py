"""Stands in for the torch engine, in its process: answers in capitals, and words in a prompt kill what answers it."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from actors.engines.base import Completion, EngineStats, Request

SECONDS = 0.05


class TorchEngine:
    """`KILL-ENGINE` in a prompt kills this process, `KILL-ACTOR` its owner; `SLOW` takes half a minute.

    The engine's model folder keeps a diary: `deaths` has the prompt that killed, and how many ran beside it; `starts`
    the pid of the owner of each engine.
    """

    def __init__(self, config: Any, num_threads: int, followers: Any = None) -> None:
        self._diary = Path(config.model) / "deaths"
        with self._diary.with_name("starts").open("a") as file:
            file.write(f"{os.getppid()}\n")
        self._num_running = self._num_tokens = 0

    async def generate(self, request: Request) -> Completion:
        text = request.prompt if isinstance(request.prompt, str) else request.prompt[-1][1]
        self._num_running += 1
        await asyncio.sleep(30 if "SLOW" in text else SECONDS)
        for word, victim in (("KILL-ENGINE", os.getpid()), ("KILL-ACTOR", os.getppid())):
            if word in text:
                with self._diary.open("a") as file:
                    file.write(f"{self._num_running} {text}\n")
                os.kill(victim, signal.SIGKILL)
                await asyncio.sleep(60)
        self._num_running -= 1
        self._num_tokens += len(text)
        return Completion(text.upper(), "stop", len(text), len(text))

    def stats(self) -> EngineStats:
        return EngineStats(self._num_tokens, self._num_running, 0)

    def close(self) -> None: ...
