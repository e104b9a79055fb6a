"""DiffPO's two losses, and the module that makes both of a batch in one forward pass.

Chen et al., *DiffPO*, ACL 2025 (arXiv 2503.04240), with y(T) the best answer to a prompt x and y(t) a worse one:

    L = L_AR + ω L_Con
    L_AR  = E [ - Σ_i log q(y(T)_i | x, y(T)_<i) ]
    L_Con = E [ Σ_i KL( q⁻(· | x, y(T)_<i) ‖ q(· | x, y(t)_<i) ) ]

q⁻ is q without a gradient, and i counts the tokens of y(T), its end of sequence included: what pads a batch has no part
in it. A shorter y(t) goes on with ends of sequence, for so does a guess that the decoder begins with: else every token
behind its end would take an iteration of its own. Up to the first token in which y(t) differs from y(T) both
distributions are one, where the divergence and its gradient are 0: those positions are not computed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from actors.contract import ConfigError
from actors.training.trajectories import Batch

Head = Callable[[Tensor], Tensor]
"""Hidden states [n, hidden size] to logits [n, vocabulary]."""

LOGITS_AT_ONCE = 1 << 24
"""Logits that are there at the same time of one sequence (64 MiB of float32): they are made again in the backward pass,
for those of a batch and a large vocabulary would take more memory than all else."""


def autoregressive(head: Head, hidden: Tensor, targets: Tensor, rows_at_once: int) -> Tensor:
    """L_AR of sequences, without the mean over them: a scalar, Σ_i - log q(y(T)_i | x, y(T)_<i).

    Args:
        hidden: [n, hidden size], the state before each target.
        targets: int64 [n].
        rows_at_once: positions whose logits are there at the same time.
    """

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_precise(head(hidden)), targets, reduction="sum")

    return _summed(chunk, hidden, targets, rows_at_once=rows_at_once)


def consistency(head: Head, teacher: Tensor, student: Tensor, rows_at_once: int) -> Tensor:
    """L_Con of sequences, without the mean over them: a scalar, Σ_i KL( q⁻(· | x, y(T)_<i) ‖ q(· | x, y(t)_<i) ).

    Args:
        teacher, student: [n, hidden size], the states at the same places of y(T) and of y(t). No gradient flows into
            the teacher's, nor through its distribution into the head.
    """

    def chunk(teacher: Tensor, student: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = _precise(head(teacher)).log_softmax(-1)
        moved = _precise(head(student)).log_softmax(-1)
        return F.kl_div(moved, fixed, reduction="sum", log_target=True)

    return _summed(chunk, teacher, student, rows_at_once=rows_at_once)


def _summed(chunk: Callable[..., Tensor], *tensors: Tensor, rows_at_once: int) -> Tensor:
    """The sum of what `chunk` makes of the tensors' rows, so many at a time. Nothing of a chunk is kept but its sum."""
    parts = zip(*(torch.split(tensor, rows_at_once) for tensor in tensors), strict=True)
    sums = [checkpoint(chunk, *each, use_reentrant=False, preserve_rng_state=False) for each in parts]
    return torch.stack(sums).sum()


def _precise(values: Tensor) -> Tensor:
    """In float32 at least: a softmax over a large vocabulary is too coarse in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class DiffPOLoss(nn.Module):
    """Both losses of a batch, the model inside: all that is differentiated happens in this module's forward, so that
    it can be wrapped by DDP and sharded by FSDP as a whole.

    Raises ConfigError for a model whose logits are more than its head's matrix, capped or not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config(decoder=True)
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._rows_at_once = max(1, LOGITS_AT_ONCE // config.vocab_size)
        self._check_head()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(L_AR, L_Con) of the batch, summed over its trajectories: two scalars, float32 or wider."""
        states = self._states(input_ids=batch.ids, attention_mask=batch.mask).flatten(0, 1)
        ar = autoregressive(self._head, states[batch.before_targets], batch.targets, self._rows_at_once)
        if not len(batch.student):
            return ar, ar.new_zeros(())
        return ar, consistency(self._head, states[batch.teacher], states[batch.student], self._rows_at_once)

    def _states(self, **inputs: Any) -> Tensor:
        found: Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return found

    def _head(self, states: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(states)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    @torch.no_grad()
    def _check_head(self) -> None:
        was_training = self.model.training
        self.model.eval()
        ids = torch.arange(4, device=self.model.device)[None]
        ours, theirs = self._head(self._states(input_ids=ids)[0]), self.model(input_ids=ids, use_cache=False).logits[0]
        self.model.train(was_training)
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
            raise ConfigError(
                f"{type(self.model).__name__} cannot be trained here: its logits are more than its output matrix makes"
            )
