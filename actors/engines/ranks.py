"""The ranks of a tensor parallel torch engine: the first is the engine's process, the others are its children.

No torch here: the children import it while this process does.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

from actors.engines.base import EngineConfig
from actors.engines.process import EXIT_WAIT_S, end_group_with_this_process


class Followers:
    """Ranks 1, 2, … For the main thread of a process of its own, which becomes the head of a process group.

    None of them can go on without the others. When one ends, this process ends at once with 1, whatever collective it
    is in, and so do the rest; when this one ends, however it went, so do they. Its owner builds the engine anew.

    Args:
        num_threads: CPU threads of each rank.
        life: the module whose `follow(descriptor)` is what such a rank does.

    Attributes:
        store: descriptor of the file where the ranks meet, the same in all of them.
    """

    def __init__(self, config: EngineConfig, num_threads: int, life: str) -> None:
        end_group_with_this_process()
        self.store = os.memfd_create("ranks")  # a file without a name: no death leaves it behind
        self._pipes: list[Connection] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._ending = False
        for rank in range(1, config.tensor_parallel_size):
            ours, theirs = Pipe()
            command = f"from {life} import follow; follow({theirs.fileno()})"
            fds = [theirs.fileno(), self.store]
            self._children.append(subprocess.Popen([sys.executable, "-c", command], pass_fds=fds))
            theirs.close()  # so that the end of the child is the end of the pipe
            ours.send((config, rank, self.store, num_threads))
            self._pipes.append(ours)
        threading.Thread(target=self._watch, name="burnish-ranks", daemon=True).start()

    def tell(self, command: tuple[Any, ...]) -> None:
        """Hand a command to all of them. Raises OSError when one is gone."""
        data = pickle.dumps(command)
        for pipe in self._pipes:
            pipe.send_bytes(data)

    def dismiss(self) -> None:
        """Let them end when they have done what they were told."""
        self._ending = True
        for pipe in self._pipes:
            pipe.close()

    def close(self) -> None:
        """Wait for those that were dismissed to end, and use force where they do not."""
        for child in self._children:
            try:
                child.wait(EXIT_WAIT_S / 2)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        os.close(self.store)

    def abandon(self) -> NoReturn:
        """End them and this process, at once: an interpreter that ends in good order may wait for a collective."""
        self._ending = True
        for rank, child in enumerate(self._children, 1):
            code = child.poll()
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
                print(f"rank {rank} of the engine {how}, and the engine with it", file=sys.stderr, flush=True)
        for child in self._children:
            child.kill()
        for child in self._children:  # what they hold of a GPU must be free before the next engine starts
            child.wait()
        os._exit(1)

    def _watch(self) -> None:
        """Wait for the first end of a child. A collective that it leaves may raise here, or wait for half an hour."""
        wait([os.pidfd_open(child.pid) for child in self._children])
        if not self._ending:
            self.abandon()


def commands(pipe: Connection) -> Iterator[tuple[Any, ...]]:
    """What rank 0 tells one of the others, until it closes the pipe or is gone."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield pipe.recv()
