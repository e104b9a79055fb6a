"""A storage that can be stopped before any of its operations: killed there, or held while others go on."""

import threading
from collections.abc import Callable
from pathlib import Path

from pipelines.corpus.storage import Storage


class Killed(BaseException):
    """What ends a process without asking it."""


class Stepped(Storage):
    """The same root; `before(n)` is called before the nth operation, from 0 on.

    Args:
        base: the root.
        before: may raise `Killed`, run another publisher to its end, or wait.
        reads: count reading operations too, not only those that change something.
    """

    def __init__(self, base: Storage, before: Callable[[int], None], *, reads: bool = False) -> None:
        self.__dict__.update(base.__dict__)
        self._before, self._reads = before, reads
        self.num_steps = 0
        self._lock = threading.Lock()

    def _step(self, changes: bool) -> None:
        if changes or self._reads:
            with self._lock:
                number = self.num_steps
                self.num_steps += 1
            self._before(number)

    def read(self, path: str) -> bytes:
        self._step(changes=False)
        return super().read(path)

    def exists(self, path: str) -> bool:
        self._step(changes=False)
        return super().exists(path)

    def sizes(self, folder: str) -> dict[str, int]:
        self._step(changes=False)
        return super().sizes(folder)

    def folders(self, folder: str) -> list[str]:
        self._step(changes=False)
        return super().folders(folder)

    def create_file(self, path: str, write: Callable[[Path], None]) -> bool:
        self._step(changes=True)
        return super().create_file(path, write)

    def put(self, path: str, data: bytes) -> None:
        self._step(changes=True)
        super().put(path, data)

    def delete(self, paths: list[str]) -> None:
        for path in paths:  # a publisher may stop in the middle of it
            self._step(changes=True)
            super().delete([path])


def at(step: int, action: Callable[[], None]) -> Callable[[int], None]:
    """Do `action` before one step."""

    def before(number: int) -> None:
        if number == step:
            action()

    return before


def kill() -> None:
    raise Killed
