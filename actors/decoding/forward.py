"""The one forward primitive of decoding: some tokens of every row through a causal LM, over a KV cache of our own.

The tokens of all rows are packed into one sequence, so that a matrix multiplication pays for no padding: one row may
bring a single token, another a block of guesses. Only attention lays the rows out beside each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from actors.contract import ConfigError

ATTENTION = "burnish_grouped"
"""The name to load a model with (`attn_implementation=ATTENTION`)."""
STEP_TOKENS = 1024
"""Most positions to ask logits of in one forward, of several rows: past every knee, and no more logits than fit."""
COPY_CELLS = 4
"""Cells of attention that take as long as copying the K and V of one row: both grow with what the row holds."""
SPLIT_CELLS = 16
"""Cells that a second grid must save beyond that, as it is one more call a layer."""


@dataclass(frozen=True)
class Grid:
    """Rows of a forward beside each other, as attention takes them: `count` of them, of `width` cells each.

    Attributes:
        rows: int64 [count], which ones of the forward's; None: all, in order.
    """

    count: int
    width: int
    rows: Tensor | None


@dataclass(frozen=True)
class Layout:
    """How the packed positions of a forward lie in the cells of grids, grid by grid and row by row.

    Attributes:
        spread: int64 [cells], the packed position of every cell; cells behind a row's last repeat one, and so do those
            of a row that another grid holds whole. None where the packed sequence is the only grid.
        packed: int64 [total], the cell of every packed position; None with `spread`.
    """

    grids: tuple[Grid, ...]
    spread: Tensor | None
    packed: Tensor | None


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention that reads the KV heads where they lie, instead of repeating them for every query head.

    The query heads that share a KV head become extra query positions of it. On a CPU in bfloat16 this is 5 to 8 times
    as fast as transformers' `sdpa`, which copies K and V once per query head. Honours Gemma-2's score capping, which
    `sdpa` silently drops.

    Args:
        query: [1, heads, total, head_dim], packed.
        key, value: [rows, kv_heads, length, head_dim].
        attention_mask: bool [cells, 1, 1, length], True where visible. None, of one grid: causal, from position 0, when
            its width is above 1, and everything visible when it is 1.

    Returns:
        [1, total, heads, head_dim], packed, and no weights.
    """
    if position_bias is not None:
        raise ValueError("models with a learned position bias are not supported")
    query = query[0].transpose(0, 1)
    if layout.spread is not None:
        query = query.index_select(0, layout.spread)
    sizes = [grid.count * grid.width for grid in layout.grids]
    masks = [None] if attention_mask is None else torch.split(attention_mask, sizes)
    parts = [
        _attention(cells, key, value, mask, grid, scaling, softcap)
        for grid, cells, mask in zip(layout.grids, torch.split(query, sizes), masks, strict=True)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    if layout.packed is not None:
        out = out.index_select(0, layout.packed)
    return out[None], None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    grid: Grid,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Of one grid: [cells, heads, head_dim] in and out."""
    if grid.rows is not None:
        key, value = key.index_select(0, grid.rows), value.index_select(0, grid.rows)
    cells, heads, head_dim = query.shape
    rows, q = grid.count, grid.width
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads
    query = query.reshape(rows, q, heads, head_dim).transpose(1, 2)
    if mask is None and q > 1 and softcap is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=group > 1)
    else:
        if mask is None and q > 1:
            mask = torch.ones(q, length, dtype=torch.bool, device=query.device).tril()[None, None]
        elif mask is not None:
            mask = mask.view(rows, 1, q, length)
        query = query.reshape(rows, kv_heads, group * q, head_dim)
        if mask is not None and group > 1:
            mask = mask.expand(-1, -1, group, -1) if q == 1 else mask.tile(1, 1, group, 1)
        if softcap is None:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        else:
            scores = query @ key.transpose(2, 3) * (head_dim**-0.5 if scaling is None else scaling)
            scores = torch.tanh(scores / softcap) * softcap
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            out = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return out.reshape(rows, heads, q, -1).transpose(1, 2).reshape(cells, heads, -1)


# No mask function goes with it: `Forward` builds every mask, and transformers hands a 4D mask, or None, through.
AttentionInterface.register(ATTENTION, grouped_attention)


_Cache: Any = Cache  # transformers' types come and go with its lazy imports


class SlotCache(_Cache):  # type: ignore[misc]
    """K and V of the active rows, one row a slot: position p of a row lies at [slot, :, p].

    Per layer one tensor each, [slots, kv_heads, capacity, head_dim]. Positions that were never written hold zeros and
    positions behind a row's length hold what an earlier row or a wrong guess left: finite, and never visible.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.slots = 0
        self.capacity = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._first = self._end = self._length = 0
        self._slots = self._positions = torch.empty(0, dtype=torch.long)
        self._index: dict[int, Tensor] = {}

    def resize(self, slots: int, capacity: int, used: int) -> None:
        """Give room to `slots` rows of `capacity` tokens, keeping the first `used` slots. Layer by layer, so that the
        old and the new cache are never both whole in memory."""
        kept = min(capacity, self.capacity)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
                new[:used, :, :kept] = old[:used, :, :kept]
                tensors[layer] = new
        self.slots, self.capacity = slots, capacity

    def aim(self, first: int, rows: int, slots: Tensor, positions: Tensor, length: int) -> None:
        """Say where the next forward writes and reads: `rows` slots from `first` on, at `slots` and `positions` (int64
        [total], packed), seeing cache positions 0 to `length`."""
        self._first, self._end, self._length = first, first + rows, length
        self._slots, self._positions = slots, positions
        self._index = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [1, kv_heads, total, head_dim] where `aim` said; return views [rows, kv_heads, length, head_dim]."""
        kv_heads = key_states.shape[1]
        if layer_idx == len(self.keys):
            for tensors, states in ((self.keys, key_states), (self.values, value_states)):
                tensors.append(states.new_zeros(self.slots, kv_heads, self.capacity, states.shape[3]))
        index = self._index.get(kv_heads)
        if index is None:  # the same in every layer
            heads = self._slots[:, None] * kv_heads + torch.arange(kv_heads, device=self._slots.device)
            index = self._index[kv_heads] = (heads * self.capacity + self._positions[:, None]).flatten()
        views = []
        for tensor, states in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            head_dim = states.shape[3]
            tensor.view(-1, head_dim).index_copy_(0, index, states[0].transpose(0, 1).reshape(-1, head_dim))
            views.append(tensor[self._first : self._end, :, : self._length])
        return views[0], views[1]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]


class Forward:
    """A causal LM and its `SlotCache`, run on any contiguous range of slots.

    Prefill, one-position decoding and a block of guesses per row are all `__call__`; they differ in numbers alone.

    Raises ConfigError for a model whose memory is not a K and a V per position.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        self.window: int | None = getattr(config, "sliding_window", None)
        default = "full_attention" if self.window is None else "sliding_attention"
        kinds = set(getattr(config, "layer_types", None) or [default])
        unsupported = (
            model.config.is_encoder_decoder
            or model._is_stateful
            or not kinds <= {"full_attention", "sliding_attention"}
            or getattr(config, "attention_chunk_size", None) is not None
            or getattr(config, "num_kv_shared_layers", 0) != 0
            or not model._supports_attention_backend
            or not model._supports_sdpa
        )
        if unsupported:
            raise ConfigError(
                f"the torch engine cannot run {type(model).__name__}: it needs a decoder-only model with plain or"
                " sliding-window attention in every layer; choose another model"
            )
        self.model = model
        self.cache = SlotCache()
        self.mixed = len(kinds) == 2
        self.slides = "sliding_attention" in kinds
        self.device = model.device

    def __call__(
        self, first: int, tokens: Sequence[Sequence[int]], starts: Sequence[int], num_logits: Sequence[int]
    ) -> Tensor | None:
        """Run tokens of the rows in slots first, first + 1, … and put their K and V into the cache.

        Args:
            tokens: of every row, any number, in all at least one; row i's stand from position starts[i] on. Its key at
                position j is seen from position p when j <= p (and j > p - window in a sliding layer), so what lies
                behind a row's positions disturbs nothing.
            num_logits: of every row's last so many of its tokens logits are made. With zeros the base model runs alone.

        Returns:
            Logits [sum of num_logits, vocabulary], row by row, as the model's own forward makes them, in its dtype;
            None for zeros.
        """
        counts = np.array([len(row) for row in tokens])
        rows, width, total = len(counts), int(counts.max()), int(counts.sum())
        begins = counts.cumsum() - counts
        row_of = np.arange(rows).repeat(counts)
        offsets = np.arange(total) - begins[row_of]
        host = [
            np.fromiter(chain.from_iterable(tokens), np.int64, total),
            first + row_of,
            np.asarray(starts)[row_of] + offsets,
        ]
        ragged = width * rows > total
        # Two shapes need no mask: fresh rows are causal from 0 on, and one position at the same end of each sees all.
        plain = max(starts) == 0 or (width == 1 and not ragged and min(starts) == max(starts))
        wide = _wide(counts) if ragged and not plain else np.empty(0, np.int64)
        widths = [width] if not wide.size else [int(np.delete(counts, wide).max()), width]
        if ragged:
            members = [np.arange(rows), wide][: len(widths)]
            host += [*_cells(counts, members, widths), wide]
        some = 0 < sum(num_logits) < total
        if some:
            host.append(np.flatnonzero(offsets >= (counts - num_logits)[row_of]))
        # One transfer for all of it.
        together = torch.from_numpy(np.concatenate(host)).to(self.device, non_blocking=True)
        ids, slots, positions, *rest = torch.split(together, [len(each) for each in host])
        spread, packed, wide_rows = rest[:3] if ragged else (None, None, None)
        grids = [Grid(rows, widths[0], None)] + [Grid(len(wide), each, wide_rows) for each in widths[1:]]
        layout = Layout(tuple(grids), spread, packed)
        length = max(start + len(row) for start, row in zip(starts, tokens, strict=True))
        binds = self.slides and self.window is not None and length > self.window
        mask: Tensor | dict[str, Tensor | None] | None = None
        if not plain or binds:
            length = min(-(-length // 8) * 8, self.cache.capacity)  # CUDA kernels want aligned mask rows
            seen_from = (positions if spread is None else positions[spread]).view(-1, 1, 1, 1)
            keys = torch.arange(length, device=self.device)
            causal = keys <= seen_from
            mask = causal
            if binds:
                assert self.window is not None
                sliding = causal & (keys > seen_from - self.window)
                mask = {"full_attention": causal, "sliding_attention": sliding} if self.mixed else sliding
        self.cache.aim(first, rows, slots, positions, length)
        inputs = {
            "input_ids": ids[None],
            "attention_mask": mask,
            "position_ids": positions[None],
            "past_key_values": self.cache,
            "use_cache": True,
            "layout": layout,
        }
        if not any(num_logits):
            self.model.base_model(**inputs)
            return None
        logits: Tensor = self.model(**inputs, logits_to_keep=rest[-1] if some else 0).logits[0]
        return logits


def _wide(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows that get a grid of their own, as padding the others to them would cost more; none where it would not."""
    ordered = np.sort(counts)
    num_wide = len(counts) - np.searchsorted(ordered, ordered, side="right")
    cells = len(counts) * ordered + num_wide * (ordered[-1] + COPY_CELLS) + SPLIT_CELLS * (num_wide > 0)
    return np.flatnonzero(counts > ordered[cells.argmin()])


def _cells(
    counts: npt.NDArray[np.int64], members: list[npt.NDArray[np.int64]], widths: list[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`spread` and `packed` of a layout: a row that is in several grids lies in the last of them."""
    begins = counts.cumsum() - counts
    spread, packed, first = [], np.empty(counts.sum(), np.int64), 0
    for rows, width in zip(members, widths, strict=True):
        columns, inside = np.arange(width), counts[rows, None]
        positions = (begins[rows, None] + np.minimum(columns, inside - 1)).clip(0)
        cells = first + np.arange(positions.size).reshape(positions.shape)
        packed[positions[columns < inside]] = cells[columns < inside]
        spread.append(positions.ravel())
        first += positions.size
    return np.concatenate(spread), packed
