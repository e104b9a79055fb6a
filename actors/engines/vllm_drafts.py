"""Drafts inside vLLM: answers that are there already, on their way from the engine to the processes that check them.

vLLM asks a proposer, in each process that holds a part of the model, for guesses at the next tokens of every request,
and checks them in its next step. The proposer is told no request ids, so a request is known by its prompt tokens: the
engine puts the draft of each live request into a folder, in a file named by them. Both ends map that file, which is how
the engine learns what became of the draft.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = "BURNISH_DRAFTS"
"""Environment variable by which a proposer finds the folder of its engine."""
MAX_GUESSES = 31
"""Most guesses at a request in one step. vLLM makes room for that many logits of every request; 128 is its limit."""

_COSTS = "costs.json"
_STEPS, _ACCEPTED, _MAX_TOKENS, _MAX_GUESSES, _HEADER = range(5)  # of a draft's file: numbers, then the draft's tokens
_LONGEST_MATCH = 8
_MEMORY = 1000  # tokens; of what all requests have taught, half is forgotten then
_CAUTION = 4  # tokens that a request must have seen to go by them as much as by what the others have taught

Tokens = NDArray[np.int32]
Costs = Sequence[tuple[int, float]]
"""(positions, seconds) of steps, by rising positions."""


# --- the engine's end -----------------------------------------------------------------------------------------------


class DraftFolder:
    """The drafts of one engine, in memory where the system has a folder for that. Its child processes inherit the way.

    Args:
        costs: what steps cost, and a guess is made where it earns its position; null makes every guess there is.
    """

    def __init__(self, costs: Costs | None) -> None:
        memory = Path("/dev/shm")
        self.path = Path(tempfile.mkdtemp(prefix="burnish-drafts-", dir=memory if memory.is_dir() else None))
        (self.path / _COSTS).write_text(json.dumps(costs))
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


@dataclass(frozen=True)
class Outcome:
    """What became of a draft."""

    mapped: Tokens | None

    def counts(self, num_tokens: int) -> tuple[int, int] | tuple[None, None]:
        """(steps, guesses that stayed) of a request that gave `num_tokens` tokens; nulls where no proposer saw it.

        A step makes one token of its own behind the guesses that it accepts. Where the answer ended among a step's
        tokens, that one is gone, and so are the guesses behind the end.
        """
        if self.mapped is None or not self.mapped[_STEPS]:
            return None, None
        steps, accepted = int(self.mapped[_STEPS]), int(self.mapped[_ACCEPTED])
        num_cut = steps + accepted - num_tokens
        return steps, accepted - max(0, num_cut - 1)


def _write(path: Path, numbers: list[int]) -> Tokens:
    """A new file, which shows up whole, as mapped memory; that stays when the file is removed."""
    hidden = path.with_suffix(".part")
    hidden.write_bytes(np.array(numbers, np.int32).tobytes())  # not through the map: a full disk would be a SIGBUS
    mapped = np.memmap(hidden, np.int32, "r+")
    hidden.rename(path)
    return mapped


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
        self._pace = None if costs is None else Pace(costs)
        self._habit = Habit(None)
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
        for i, made in enumerate(sampled_token_ids):
            request = None
            if made:
                request = self._request(i, token_ids[i, : int(num_tokens[i]) - len(made)])
                request.advance(made)
            requests.append(request)
        present = set(map(id, requests))
        absent = (request for request in self._requests if id(request) not in present)
        self._requests = [*requests, *absent][: max(self._num_kept, len(requests))]
        rooms = [min(self._num_guesses, self._limit - r.end - 1, r.room()) if r else 0 for r in requests]
        drafted = [(r, i) for i, r in enumerate(requests) if r and rooms[i] > 0]
        lengths = [rooms[i] for _, i in drafted]
        if self._pace and drafted:
            first, further = zip(*(request.habit.next() for request, _ in drafted), strict=True)
            lengths = self._pace.lengths(first, further, lengths, len(requests))
        guesses: list[list[int]] = [[] for _ in requests]
        for (request, i), length in zip(drafted, lengths, strict=True):
            guesses[i] = request.draft.guesses(length)
        return guesses

    def _request(self, i: int, tokens: Tokens) -> "_Request":
        """The one whose prompt and answer before this step these are."""
        content = tokens.tobytes()
        beside = self._requests[i : i + 1]
        for known in (*beside, *self._requests):  # elsewhere: the batch has closed a gap, or it was out for a while
            if known is not None and known.content == content:
                return known
        mapped: Tokens = np.zeros(_HEADER, np.int32)
        with contextlib.suppress(OSError):  # it has no draft
            mapped = np.memmap(self._folder / _name(tokens), np.int32, "r+")
        return _Request(content, mapped, self._habit)


class _Request:
    """A request in the proposer's eyes: what it says so far, and its draft, of no tokens where it has none."""

    def __init__(self, content: bytes, mapped: Tokens, shared: "Habit") -> None:
        self.content = bytearray(content)
        self.draft = AlignedDraft(mapped[_HEADER:].tolist())
        self.habit = Habit(shared)
        self._mapped = mapped
        self._num_tokens = self._num_steps = 0

    @property
    def end(self) -> int:
        return len(self.content) // np.dtype(np.int32).itemsize

    def advance(self, made: list[int]) -> None:
        self.content += np.array(made, np.int32).tobytes()
        self._num_tokens += len(made)
        self._num_steps += 1
        if len(self._mapped) > _HEADER:
            # What it is by now, not what to add: each process of a tensor parallel group writes the same.
            self._mapped[_STEPS], self._mapped[_ACCEPTED] = self._num_steps, self._num_tokens - self._num_steps
            for token in made:
                self.habit.learn(self.draft.confirm(token), self.draft.found)

    def room(self) -> int:
        """Guesses that could stay: the step makes one token of its own behind them."""
        num_left = int(self._mapped[_MAX_TOKENS]) - self._num_tokens - 1
        return min(int(self._mapped[_MAX_GUESSES]), num_left, self.draft.num_left)


# --- what to guess, and how much of it ------------------------------------------------------------------------------


class AlignedDraft:
    """A draft, and the place in it that stands for the next token of the answer.

    `found` tells whether the token before that place is also the answer's newest.
    """

    def __init__(self, tokens: list[int]) -> None:
        self.found = True
        self._tokens = tokens
        self._at = 0
        self._made: list[int] = []
        self._behind: dict[tuple[int, int], list[int]] | None = None  # places in the draft by the two tokens before

    @property
    def num_left(self) -> int:
        return max(0, len(self._tokens) - self._at)

    def guesses(self, most: int) -> list[int]:
        return self._tokens[self._at : self._at + most]

    def confirm(self, token: int) -> bool | None:
        """Take the answer's next token; true if the draft had it there, null if it has ended.

        After a wrong one the place is found again: where the longest run of the answer's newest tokens, two at least,
        stands in the draft, nearest to the old place among equals. Else the token is taken for a substitute.
        """
        right = self._tokens[self._at] == token if self._at < len(self._tokens) else None
        self._at += 1
        self._made.append(token)
        self.found = bool(right) or self._realign()
        return right

    def _realign(self) -> bool:
        if self._behind is None:
            self._behind = {}
            for place, pair in enumerate(zip(self._tokens, self._tokens[1:], strict=False), 2):
                self._behind.setdefault(pair, []).append(place)
        places = self._behind.get((self._made[-2], self._made[-1])) if len(self._made) > 1 else None
        if not places:
            return False
        self._at = max(places, key=lambda place: (self._match(place), -abs(place - self._at)))
        return True

    def _match(self, place: int) -> int:
        """How many of the answer's newest tokens stand before this place in the draft, of those that are looked at."""
        most = min(_LONGEST_MATCH, place, len(self._made))
        return next((n for n in range(most) if self._tokens[place - 1 - n] != self._made[-1 - n]), most)


class Habit:
    """How often drafts are right where the token before was right, and where it was wrong.

    Args:
        shared: of all requests, which learns with this one and is what this one expects before it has seen much; null:
            this is that one, and it forgets, so that it follows the requests of the day.
    """

    def __init__(self, shared: "Habit | None") -> None:
        self._shared = shared
        self._wrong, self._right = ([0, 0], [0, 0]) if shared else ([3, 1], [1, 9])  # by whether the last was right
        self._last = True

    def learn(self, right: bool | None, found: bool) -> None:
        """Whether the draft had a token, null where it has ended, and whether it goes on behind that token."""
        if right is not None:
            self._count(self._last, right)
            if self._shared is not None:
                self._shared._count(self._last, right)
        self._last = found

    def next(self) -> tuple[float, float]:
        """(chance of the next guess, chance of each further one where the one before it is right)."""
        return self._rate(self._last), self._rate(True)

    def _count(self, last: bool, right: bool) -> None:
        counts = self._right if right else self._wrong
        counts[last] += 1
        if self._shared is None and counts[last] == _MEMORY:
            self._right[last] //= 2
            self._wrong[last] //= 2

    def _rate(self, last: bool) -> float:
        right, wrong = self._right[last], self._wrong[last]
        if self._shared is None:
            return right / (right + wrong)
        return (right + _CAUTION * self._shared._rate(last)) / (right + wrong + _CAUTION)


class Pace:
    """How many guesses to make at each request, so that the tokens expected from a step, by its cost, are most.

    Up to the knee, where a step waits for memory, a position is nearly free and every guess is made; beyond it, where a
    step waits for arithmetic, a guess must be likelier than what a position there costs.
    """

    def __init__(self, costs: Costs) -> None:
        positions, seconds = zip(*costs, strict=True)
        slope = (seconds[-1] - seconds[-2]) / (positions[-1] - positions[-2]) if len(costs) > 1 else 0.0
        far = 64 * positions[-1]
        self._positions = (*positions, far)
        self._seconds = (*seconds, seconds[-1] + max(slope, 0.0) * (far - positions[-1]))

    def lengths(
        self, first: Sequence[float], further: Sequence[float], rooms: list[int], num_requests: int
    ) -> list[int]:
        """Guesses at each drafted request, at most `rooms` of them, in a step of `num_requests` requests."""
        steps = np.arange(max(rooms))
        chances = np.array(first)[:, None] * np.array(further)[:, None] ** steps
        chances[steps >= np.array(rooms)[:, None]] = 0.0
        best_first = np.argsort(-chances, axis=None, kind="stable")
        gains = np.concatenate([[0.0], np.cumsum(chances.ravel()[best_first])])
        seconds = np.interp(num_requests + np.arange(len(gains)), self._positions, self._seconds)
        num = int(np.argmax((num_requests + gains) / seconds))
        return np.bincount(best_first[:num] // len(steps), minlength=len(rooms)).tolist()  # type: ignore[no-any-return]
