"""The decode loop: a continuously refilled batch of rows, decoded one position of every row a step."""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from actors.decoding.forward import Forward
from actors.decoding.sampling import choose, uniforms

GRAIN = 64  # tokens; a row's share of the cache is rounded up to it, so that few sizes occur
PREFILL_TOKENS = 8192  # most padded tokens of one prefill; bounds its activations


@dataclass(eq=False)
class Row:
    """One candidate on its way. The loop fills in everything below `seed`.

    Attributes:
        prompt: token ids, at least one.
        tokens: what the model made, without the end-of-sequence token.
        text: set when the row ends; cut before a stop string.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    draws: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens that the row holds now."""
        return len(self.prompt) + len(self.tokens)

    @property
    def room(self) -> int:
        """Cache positions that the row may come to need."""
        return -(-(len(self.prompt) + self.max_tokens) // GRAIN) * GRAIN


class DecodeLoop:
    """Rows in, finished rows out. Synchronous, for one thread; an exception from `step` leaves it unusable.

    The rows in `active` lie in slots 0, 1, … of the cache without holes, so that every forward runs on a view of them.
    Of an active row all positions but the last are in the cache: its last token is what the next step runs.

    Args:
        decode: token ids to text, without special tokens.
        eos: token ids that end a row.
        stop: strings that end a row.
        kv_cache_tokens: bound on slots x positions of the cache; a single row may exceed it.
    """

    def __init__(
        self,
        forward: Forward,
        decode: Callable[[list[int]], str],
        *,
        eos: Collection[int],
        stop: Collection[str] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        max_num_seqs: int,
        kv_cache_tokens: int,
    ) -> None:
        self.forward = forward
        self.decode = decode
        self.eos = frozenset(eos)
        self.stop = tuple(stop)
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.max_num_seqs = max_num_seqs
        self.kv_cache_tokens = kv_cache_tokens
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []
        self.num_tokens = 0
        # A token is at least a byte of text; some slack for characters that the tail begins in the middle of.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 8

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active)

    def submit(self, row: Row) -> None:
        if self.temperature > 0:
            row.draws = uniforms(row.seed, row.max_tokens)
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
        """Admit what fits, advance every active row by one token, and return the rows that ended."""
        whole = self._admit()
        if not self.active:
            return []
        if whole:
            tokens, starts = torch.tensor([self.active[0].prompt]), [0]
        else:
            tokens = torch.tensor([[row.tokens[-1] if row.tokens else row.prompt[-1]] for row in self.active])
            starts = [row.length - 1 for row in self.active]
        logits = self.forward(0, tokens, starts, num_logits=1)
        assert logits is not None
        draws = None
        if self.temperature > 0:
            draws = np.array([row.draws[len(row.tokens)] for row in self.active if row.draws is not None])
        chosen = choose(logits[:, -1], draws, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        for row, token in zip(self.active, chosen, strict=True):
            self._extend(row, token)
        finished = [row for row in self.active if row.finish_reason]
        if finished:
            self._release(set(finished))
        return finished

    def _extend(self, row: Row, token: int) -> None:
        """Append one token and end the row if it is time to."""
        if token in self.eos:
            row.finish_reason = "stop"
        else:
            row.tokens.append(token)
            self.num_tokens += 1
            if self._ends_in_stop(row):
                return
            if len(row.tokens) == row.max_tokens:
                row.finish_reason = "length"
        if row.finish_reason:
            row.text = self.decode(row.tokens)

    def _ends_in_stop(self, row: Row) -> bool:
        if not self.stop:
            return False
        tail = self.decode(row.tokens[-self._tail :])
        if not any(text in tail for text in self.stop):
            return False
        whole = self.decode(row.tokens)
        cuts = [at for text in self.stop if (at := whole.find(text)) >= 0]
        if not cuts:  # a tail decoded alone may differ from the whole at its first character
            return False
        row.text, row.finish_reason = whole[: min(cuts)], "stop"
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
        slot_of = {row.prompt: slot for slot, row in enumerate(self.active)}
        firsts = {row.prompt: row for row in group if row.prompt not in slot_of}
        copies = [row for row in group if row is not firsts.get(row.prompt)]
        for batch in _batches(sorted(firsts.values(), key=lambda row: len(row.prompt))):
            self._prefill(batch)
        slot_of |= {row.prompt: slot for slot, row in enumerate(self.active) if firsts.get(row.prompt) is row}
        for row in copies:
            self.forward.cache.copy(slot_of[row.prompt], len(self.active), row.length - 1)
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
        """Run the prompts but for their last tokens, padded on the right, in the slots behind the active rows."""
        width = max(len(row.prompt) for row in rows) - 1
        if width:
            tokens = torch.zeros(len(rows), width, dtype=torch.long)
            for i, row in enumerate(rows):
                tokens[i, : len(row.prompt) - 1] = torch.tensor(row.prompt[:-1])
            self.forward(len(self.active), tokens, [0] * len(rows), num_logits=0)
        self.active.extend(rows)


def _batches(rows: list[Row]) -> Iterator[list[Row]]:
    """Cut rows, sorted by length, into prefills that are neither too big nor mostly padding."""
    batch: list[Row] = []
    for row in rows:
        if batch:
            too_big = (len(batch) + 1) * len(row.prompt) > PREFILL_TOKENS
            if too_big or len(row.prompt) > 2 * len(batch[0].prompt) + GRAIN:
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch
