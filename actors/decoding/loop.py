"""The decode loop: a continuously refilled batch of rows, each advanced by one token or more a step."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from actors.decoding.cost import StepCost, block_sizes, worth
from actors.decoding.forward import STEP_TOKENS, Forward
from actors.decoding.parallel import Denoiser, Drafter, Guesser, Record
from actors.decoding.sampling import draw, greedy, uniforms
from actors.decoding.stopping import cut

GRAIN = 64  # tokens; a row's share of the cache is rounded up to it, so that few sizes occur
PREFILL_TOKENS = 8192  # most cells, rows x longest, of one prefill; bounds its activations


@dataclass(eq=False)
class Row:
    """One candidate on its way. The loop fills in everything below `num_reserved`.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: most tokens of the answer, at least 1.
        draft: an answer to begin with, without an end-of-sequence token; None: the row makes one token a step.
        num_reserved: of the draft's leading tokens, which are the answer's too; at least one token is made behind them.
        tokens: the answer, without the end-of-sequence token.
        text: set when the row ends; cut before a stop string.
        guesser: where the row's guesses come from; None: it makes none.
        iterations: forwards after the prefill.
        accepted: tokens of the answer that were guessed before they were certain.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    draft: Sequence[int] | None = None
    num_reserved: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    draws: np.ndarray | None = None
    guesser: Guesser | None = None
    iterations: int = 0
    accepted: int = 0

    @property
    def head(self) -> tuple[int, ...]:
        """What is there before the first token is made."""
        return (*self.prompt, *self.tokens[: self.num_reserved])

    @property
    def length(self) -> int:
        """Tokens that the row holds now."""
        return len(self.prompt) + len(self.tokens)

    @property
    def steps_left(self) -> float:
        """How many steps the row is likely to need still: the tokens to come, at the pace of those that it has made."""
        num_left = self.guesser.num_left if self.guesser else self.max_tokens - len(self.tokens)
        return num_left * (self.iterations + 1) / (len(self.tokens) - self.num_reserved + 1)

    @property
    def room(self) -> int:
        """Cache positions that the row may come to need."""
        return -(-(len(self.prompt) + self.max_tokens) // GRAIN) * GRAIN


class DecodeLoop:
    """Rows in, finished rows out. Synchronous, for one thread; an exception from `step` leaves it unusable.

    The rows in `active` lie in slots 0, 1, … of the cache without holes, so that every forward runs on a view of them.
    Of an active row all positions but the last are in the cache: its last token is what the next step runs, with the
    row's guesses behind it.

    Args:
        decode: token ids to text, without special tokens.
        eos: token ids that end a row; guesses end in the first one, and a number of iterations needs one.
        stop: strings that end a row, wherever in its answer they begin.
        block_size: most positions of a row with a draft in one forward.
        max_iterations: None decodes such a row up to the fixed point, which is what greedy decoding makes; a number
            iterates that often over its draft, filled up to `block_size`. Both need a temperature of 0.
        cost: what guesses are weighed by; None: every such row fills its block.
        kv_cache_tokens: bound on slots x positions of the cache; a single row may exceed it.
    """

    def __init__(
        self,
        forward: Forward,
        decode: Callable[[list[int]], str],
        *,
        eos: Sequence[int],
        stop: Collection[str] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        block_size: int = 1,
        max_iterations: int | None = None,
        cost: StepCost | None = None,
        max_num_seqs: int,
        kv_cache_tokens: int,
    ) -> None:
        if max_iterations is not None and cost is not None:
            raise ValueError("a number of iterations is over the whole response: no guess of it may be weighed")
        self.forward = forward
        self.decode = decode
        self.eos = list(eos)
        self.stop = tuple(stop)
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.block_size = block_size
        self.max_iterations = max_iterations
        self.cost = cost
        self.max_num_seqs = max_num_seqs
        self.kv_cache_tokens = kv_cache_tokens
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []
        self.num_tokens = 0
        # What rows to come begin with.
        self._drafts, self._predictions = Record(), Record()
        # A token is at least a byte of text; some slack for characters that the tail begins in the middle of.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 8

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active)

    def submit(self, row: Row) -> None:
        if self.temperature > 0:
            row.draws = uniforms(row.seed, row.max_tokens)
        draft = list(row.draft or ())
        guesses = row.draft is not None and self.temperature == 0
        if guesses and self.max_iterations is not None:
            row.max_tokens = min(row.max_tokens, max(len(draft), self.block_size))
        row.num_reserved = min(row.num_reserved, len(draft), row.max_tokens - 1)
        row.tokens = draft[: row.num_reserved]
        if guesses and self.max_iterations is not None:
            guess = (draft + self.eos[:1] * row.max_tokens)[row.num_reserved : row.max_tokens]
            row.guesser = Denoiser(guess, self.max_iterations)
        elif guesses and self.block_size > 1:
            row.guesser = Drafter(draft + self.eos[:1], row.num_reserved, self._drafts, self._predictions)
        self.waiting.append(row)

    @torch.inference_mode()
    def cancel(self, row: Row) -> None:
        """Forget a row, wherever it is; one that has ended already is no matter."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.active:
            self._release({row})

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Admit what fits, advance every active row, and return the rows that ended."""
        whole = self._admit()
        if not self.active:
            return []
        guesses = self._guess()
        starts = [0 if whole else row.length - 1 for row in self.active]
        tokens = [
            [*(row.head[start:] if whole or not row.tokens else row.tokens[-1:]), *guess]
            for row, start, guess in zip(self.active, starts, guesses, strict=True)
        ]
        predictions = iter(self._predict(tokens, starts, [len(guess) + 1 for guess in guesses]))
        for row, guess in zip(self.active, guesses, strict=True):
            self._advance(row, guess, [next(predictions) for _ in range(len(guess) + 1)])
        finished = [row for row in self.active if row.finish_reason]
        if finished:
            self._release(set(finished))
        return finished

    def _guess(self) -> list[list[int]]:
        """What each active row runs behind its last token."""
        guesses: list[list[int]] = []
        chances = []
        for row in self.active:
            most = min(self.block_size, row.max_tokens - len(row.tokens)) - 1
            offer, chance = row.guesser.offer(most) if row.guesser else ([], np.empty(0))
            guesses.append(offer)
            chances.append(chance)
            if row.guesser and self.cost is None:
                offer += self.eos[:1] * (most - len(offer))
        if self.cost is None:
            return guesses
        weights = None if self.waiting else worth([row.steps_left for row in self.active])
        sizes = block_sizes(chances, self.cost, weights)
        return [guess[:size] for guess, size in zip(guesses, sizes, strict=True)]

    def _predict(self, tokens: list[list[int]], starts: list[int], num_logits: list[int]) -> list[int]:
        """What follows the last `num_logits` tokens of every active row, row by row. Waits for the device once."""
        if self.temperature > 0:
            logits = self.forward(0, tokens, starts, num_logits)
            assert logits is not None
            draws = np.array([row.draws[len(row.tokens)] for row in self.active if row.draws is not None])
            return draw(logits, draws, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        parts = []
        for part in _parts([len(row) for row in tokens]):
            logits = self.forward(part.start, tokens[part], starts[part], num_logits[part])
            assert logits is not None
            parts.append(greedy(logits))
        predictions: list[int] = torch.cat(parts).tolist()
        return predictions

    def _advance(self, row: Row, guess: list[int], predictions: list[int]) -> None:
        """Add to a row what the predictions behind its last token and its guesses make certain."""
        row.iterations += 1
        num_right = 0
        while num_right < len(guess) and guess[num_right] == predictions[num_right]:
            num_right += 1
        made = predictions[:1] if row.guesser is None else row.guesser.learn(predictions, num_right)
        num_before = len(row.tokens)
        for token in made:
            self._extend(row, token)
            if row.finish_reason:
                break
        row.accepted += min(num_right, len(row.tokens) - num_before)

    def _extend(self, row: Row, token: int) -> None:
        """Append one token and end the row if it is time to."""
        if len(row.tokens) == row.num_reserved and self._ends_in_stop(row, row.num_reserved):
            return  # what was reserved holds a stop string already
        if token in self.eos:
            row.finish_reason = "stop"
        else:
            row.tokens.append(token)
            self.num_tokens += 1
            if self._ends_in_stop(row, self._tail):
                return
            if len(row.tokens) == row.max_tokens:
                row.finish_reason = "length"
        if row.finish_reason:
            row.text = self.decode(row.tokens)

    def _ends_in_stop(self, row: Row, num_new: int) -> bool:
        """Whether a stop string that ends among the row's last `num_new` tokens has ended it."""
        if not self.stop or cut(self.decode(row.tokens[len(row.tokens) - num_new :]), self.stop) is None:
            return False
        text = cut(self.decode(row.tokens), self.stop)
        if text is None:  # a tail decoded alone may differ from the whole at its first character
            return False
        row.text, row.finish_reason = text, "stop"
        return True

    def _release(self, gone: set[Row]) -> None:
        """Take rows out and close the holes with the last ones."""
        kept = [slot for slot, row in enumerate(self.active) if row not in gone]
        holes = [slot for slot, row in enumerate(self.active[: len(kept)]) if row in gone]
        for hole, last in zip(holes, [slot for slot in kept if slot >= len(kept)], strict=True):
            self.forward.cache.copy(last, hole, self.active[last].length - 1)
            self.active[hole] = self.active[last]
        del self.active[len(kept) :]

    # --- admission ----------------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Move waiting rows into slots, first come first served, and prefill them.

        Waits until an eighth of the slots is free: one prefill of several rows costs decoding less than several of one.
        Returns True where a row has no company: its whole prompt is left to this step, which saves it a forward.
        """
        free = self.max_num_seqs - len(self.active)
        if not self.waiting or (self.active and free < max(1, self.max_num_seqs // 8)):
            return False
        group: list[Row] = []
        longest = max((row.room for row in self.active), default=0)
        while self.waiting and len(group) < free:
            num_rows = len(self.active) + len(group) + 1
            room = max(longest, self.waiting[0].room)
            if num_rows > 1 and num_rows * room > self.kv_cache_tokens:
                break
            longest = room
            group.append(self.waiting.popleft())
        if not group:
            return False
        self._make_room(len(self.active) + len(group), longest)
        if len(group) == 1 and not self.active:
            self.active.extend(group)
            return True
        slot_of = {row.head: slot for slot, row in enumerate(self.active)}
        firsts = {row.head: row for row in group if row.head not in slot_of}
        copies = [row for row in group if row is not firsts.get(row.head)]
        for batch in _batches(sorted(firsts.values(), key=lambda row: row.length)):
            self._prefill(batch)
        slot_of |= {row.head: slot for slot, row in enumerate(self.active) if firsts.get(row.head) is row}
        for row in copies:
            self.forward.cache.copy(slot_of[row.head], len(self.active), row.length - 1)
            self.active.append(row)
        return False

    def _make_room(self, slots: int, capacity: int) -> None:
        """Grow the cache, in coarse steps so that it happens seldom, or trade capacity that no row needs for slots."""
        cache = self.forward.cache
        if slots <= cache.slots and capacity <= cache.capacity:
            return
        capacity = max(capacity, min(2 * cache.capacity, self.kv_cache_tokens // slots))
        slots = max(slots, min(self.max_num_seqs, self.kv_cache_tokens // capacity))
        cache.resize(slots, capacity, used=len(self.active))

    def _prefill(self, rows: list[Row]) -> None:
        """Run what the rows begin with but for the last tokens, in the slots behind the active rows."""
        tokens = [row.head[:-1] for row in rows]
        if any(tokens):
            self.forward(len(self.active), tokens, [0] * len(rows), [0] * len(rows))
        self.active.extend(rows)


def _batches(rows: list[Row]) -> Iterator[list[Row]]:
    """Cut rows, sorted by length, into prefills that are neither too big nor, where attention lays them out, mostly
    padding."""
    batch: list[Row] = []
    for row in rows:
        if batch:
            too_big = (len(batch) + 1) * row.length > PREFILL_TOKENS
            if too_big or row.length > 2 * batch[0].length + GRAIN:
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


def _parts(sizes: list[int]) -> Iterator[slice]:
    """Cut rows of so many positions into forwards of at most STEP_TOKENS, or of one row."""
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > STEP_TOKENS:
            yield slice(first, i)
            first, total = i, 0
        total += size
    yield slice(first, len(sizes))
