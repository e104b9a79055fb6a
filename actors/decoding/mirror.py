"""A `Forward` on several ranks at once: what the first does to its model and cache, the others do in the same order.

The decode loop runs on the first rank alone and knows nothing of it. Every rank holds a shard of the model, takes part
in the collectives of every forward, and keeps the K and V of its own heads in a cache of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.decoding.forward import Forward, SlotCache

Command = tuple[Any, ...]
"""What was done, and with which arguments; small, picklable, and free of tensors on a device."""


class MirroredCache(SlotCache):
    """Tells of what the loop does to it, before it is done. Writing is part of the forward, on every rank."""

    def __init__(self, tell: Callable[[Command], None]) -> None:
        super().__init__()
        self._tell = tell

    def resize(self, slots: int, capacity: int, used: int) -> None:
        self._tell(("resize", slots, capacity, used))
        super().resize(slots, capacity, used)

    def copy(self, source: int, target: int, length: int) -> None:
        self._tell(("copy", source, target, length))
        super().copy(source, target, length)


class MirroredForward(Forward):
    """The first rank's.

    Args:
        tell: hands a command to every other rank, which will `obey` it.
    """

    def __init__(self, model: PreTrainedModel, tell: Callable[[Command], None]) -> None:
        super().__init__(model)
        self._tell = tell
        self.cache = MirroredCache(tell)

    def __call__(
        self, first: int, tokens: Sequence[Sequence[int]], starts: Sequence[int], num_logits: Sequence[int]
    ) -> Tensor | None:
        self._tell(("forward", first, tokens, starts, num_logits))
        return super().__call__(first, tokens, starts, num_logits)


@torch.inference_mode()
def obey(forward: Forward, command: Command) -> None:
    """Do on another rank what the first one told. Its logits are dropped: the first rank alone chooses tokens."""
    kind, *arguments = command
    if kind == "forward":
        forward(*arguments)
    elif kind == "resize":
        forward.cache.resize(*arguments)
    elif kind == "copy":
        forward.cache.copy(*arguments)
    else:
        raise ValueError(f"no rank can {kind}")
