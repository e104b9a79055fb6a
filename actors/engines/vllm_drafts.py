"""Drafts inside vLLM: answers that are there already, on their way from the engine to the processes that check them.

vLLM asks a proposer, in each process that holds a part of the model, for guesses at the next tokens of every request,
and checks them in its next step. The proposer is told no request ids, so a request is known by its prompt tokens: the
engine puts the draft of each live request into a folder, in a file named by them. Both ends map that file, which is how
the engine learns what became of the draft.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.decoding.cost import StepCost, block_sizes
from actors.decoding.parallel import Drafter, Record

FOLDER = "BURNISH_DRAFTS"
"""Environment variable by which a proposer finds the folder of its engine."""
MAX_GUESSES = 31
"""Most guesses at a request in one step. vLLM makes room for that many logits of every request; 128 is its limit."""

_PREFIX = "burnish-drafts-"
_COSTS = "costs.json"
_STEPS, _ACCEPTED, _MAX_TOKENS, _MAX_GUESSES, _HEADER = range(5)  # of a draft's file: numbers, then the draft's tokens

Tokens = NDArray[np.int32]
Costs = Mapping[int, Mapping[int, float]]
"""Seconds of steps by their numbers of requests and of positions, as `StepCost` has them."""


def numbered(costs: Mapping[str, Mapping[str, float]]) -> Costs:
    """Costs that JSON has given back with text for numbers."""
    return {int(num): {int(positions): s for positions, s in curve.items()} for num, curve in costs.items()}


# --- the engine's end -----------------------------------------------------------------------------------------------


class DraftFolder:
    """The drafts of one engine, in memory where the system has a folder for that. Its child processes inherit the way.

    Args:
        costs: what steps cost, and a guess is made where it earns its position; null makes every guess there is.
    """

    def __init__(self, costs: Costs | None) -> None:
        memory = Path("/dev/shm")
        parent = memory if memory.is_dir() else Path(tempfile.gettempdir())
        for other in parent.glob(f"{_PREFIX}*"):
            _remove_if_left(other)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        hidden = self.path / "costs.part"
        self._lock = hidden.open("w")  # shows, while this process lives, that the folder is in use
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._lock.write(json.dumps(costs))
        self._lock.flush()
        hidden.rename(self.path / _COSTS)
        os.environ[FOLDER] = str(self.path)
        self._live: dict[str, tuple[Tokens, int]] = {}  # by name: the mapped file, how many requests it is for

    @contextlib.contextmanager
    def holding(
        self, prompt: Sequence[int], draft: Sequence[int], *, max_tokens: int, max_guesses: int = MAX_GUESSES
    ) -> Iterator["Outcome"]:
        """Hold a request's draft while the request lives. Requests of one prompt share the draft of the first.

        A folder that is gone is no error: the request goes on without its draft.
        """
        name = _name(np.array(prompt, np.int32))
        mapped, users = self._live.get(name, (None, 0))
        if mapped is None:
            try:
                mapped = _write(self.path / name, [0, 0, max_tokens, max_guesses, *draft])
            except OSError:
                yield Outcome(None)
                return
        self._live[name] = (mapped, users + 1)
        try:
            yield Outcome(mapped)
        finally:
            mapped, users = self._live.pop(name)
            if users > 1:
                self._live[name] = (mapped, users - 1)
            else:
                (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


@dataclass(frozen=True)
class Outcome:
    """What became of a draft."""

    mapped: Tokens | None

    def counts(self, num_tokens: int) -> tuple[int, int] | tuple[None, None]:
        """(steps, guesses that stayed) of an answer of `num_tokens` tokens; nulls where no proposer saw its request.

        A step makes one token of its own behind the guesses that it accepts. Where the answer ended among a step's
        tokens, that one is no part of it, nor are the guesses behind the end. Behind a stop string vLLM goes on until
        it is told: then there are steps too many, and guesses that stayed may be missed.
        """
        if self.mapped is None or not self.mapped[_STEPS]:
            return None, None
        steps, accepted = int(self.mapped[_STEPS]), int(self.mapped[_ACCEPTED])
        num_cut = steps + accepted - num_tokens
        return steps, accepted - min(accepted, max(0, num_cut - 1))


def _remove_if_left(folder: Path) -> None:
    """Remove the folder of an engine that was killed."""
    with contextlib.suppress(OSError), (folder / _COSTS).open() as costs:
        fcntl.flock(costs, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, numbers: list[int]) -> Tokens:
    """A new file, which shows up whole, as mapped memory; that stays when the file is removed."""
    hidden = path.with_suffix(".part")
    hidden.write_bytes(np.array(numbers, np.int32).tobytes())  # not through the map: a full disk would be a SIGBUS
    mapped = _map(hidden)
    hidden.rename(path)
    return mapped


def _map(path: Path) -> Tokens:
    return np.memmap(path, np.int32, "r+").view(np.ndarray)  # the same memory, without the subclass's slow indexing


def _name(prompt: Tokens) -> str:
    return hashlib.blake2b(prompt.tobytes(), digest_size=16).hexdigest()


# --- the proposer's end ---------------------------------------------------------------------------------------------


class DraftProposer:
    """vLLM's custom proposer: its guesses at a request's next tokens are what the request's draft says there.

    A guess is made where it pays: its chance to be right, as the requests so far have taught, against what one more
    position costs in a step. A request whose draft is poor gets no guesses. Its tokens are still compared with the
    draft, which costs nothing, so it may get some again.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._num_guesses = int(vllm_config.speculative_config.num_speculative_tokens)
        self._limit = int(vllm_config.model_config.max_model_len)
        self._num_kept = 2 * int(vllm_config.scheduler_config.max_num_seqs)
        self._folder = Path(os.environ.get(FOLDER, os.devnull))
        costs = None
        with contextlib.suppress(OSError):  # without its folder there are no drafts, and nothing else is wrong
            costs = json.loads((self._folder / _COSTS).read_text())
        self._cost = StepCost(numbered(costs)) if costs else None
        self._drafts, self._predictions = Record(), Record()
        self._requests: list[_Request | None] = []  # as they stood in the last batch, behind them those out of it

    def load_model(self, *_: Any, **__: Any) -> None:
        """There is none."""

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens: NDArray[Any], token_ids: NDArray[Any], **_: Any
    ) -> list[list[int]]:
        """Guesses for the next step, at most `num_speculative_tokens` for each request in the batch.

        Args:
            sampled_token_ids: of each request, what this step has made; none while its prompt is still being read.
            num_tokens: [requests], of prompts with what is made of the answers.
            token_ids: int32 [requests, max_model_len], those tokens.
        """
        requests: list[_Request | None] = []
        for i, (made, end) in enumerate(zip(sampled_token_ids, num_tokens.tolist(), strict=False)):
            request = None
            if made:
                request = self._request(i, token_ids[i, : end - len(made)])
                request.advance(made)
            requests.append(request)
        present = set(map(id, requests))
        absent = (request for request in self._requests if request and id(request) not in present)
        self._requests = [*requests, *absent][: max(self._num_kept, len(requests))]
        offers, chances = [], []
        for request in requests:
            most = min(self._num_guesses, request.room(self._limit)) if request and request.has_draft else 0
            offer, chance = request.drafter.offer(most) if request and most > 0 else ([], np.empty(0))
            offers.append(offer[: request.max_guesses] if request else offer)
            chances.append(chance)
        if self._cost is None or not any(offers):
            return offers
        return [offer[:size] for offer, size in zip(offers, block_sizes(chances, self._cost), strict=True)]

    def _request(self, i: int, tokens: Tokens) -> "_Request":
        """The one whose prompt and answer before this step these are."""
        content = tokens.tobytes()
        beside = self._requests[i : i + 1]
        for known in (*beside, *self._requests):  # elsewhere: the batch has closed a gap, or it was out for a while
            if known is not None and known.content == content:
                return known
        mapped: Tokens = np.zeros(_HEADER, np.int32)
        with contextlib.suppress(OSError):  # it has no draft
            mapped = _map(self._folder / _name(tokens))
        return _Request(content, mapped, Drafter(mapped[_HEADER:].tolist(), 0, self._drafts, self._predictions))


class _Request:
    """A request in the proposer's eyes: what it says so far, and its draft, of no tokens where it has none."""

    def __init__(self, content: bytes, mapped: Tokens, drafter: Drafter) -> None:
        self.content = bytearray(content)
        self.drafter = drafter
        self._mapped = mapped
        self._num_prompt = len(content) // mapped.itemsize
        self._num_tokens = self._num_steps = 0
        self._max_tokens, self.max_guesses = int(mapped[_MAX_TOKENS]), int(mapped[_MAX_GUESSES])
        self.has_draft = len(mapped) > _HEADER

    def advance(self, made: list[int]) -> None:
        self.content += array("i", made).tobytes()
        self._num_tokens += len(made)
        self._num_steps += 1
        if self.has_draft:
            # What it is by now, not what to add: each process of a tensor parallel group writes the same.
            self._mapped[_STEPS], self._mapped[_ACCEPTED] = self._num_steps, self._num_tokens - self._num_steps
            self.drafter.learn(made, len(made) - 1)

    def room(self, limit: int) -> int:
        """Most guesses that could stay, in a row of `limit` tokens: behind them a step makes a token of its own."""
        return min(self._max_tokens, limit - self._num_prompt) - self._num_tokens - 1
