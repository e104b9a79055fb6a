"""How the next token is chosen: greedily, or drawn by inverse CDF with one uniform per row and position."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NUM_HEAD = 256  # tokens looked at first for top_p; a wider nucleus costs that row a full sort
BLOCK = 256  # tokens per block when the whole vocabulary is sampled


def uniforms(seed: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): position t's depends on (seed, t) alone, so batches and order change no text.

    From Philox's raw 64-bit words, a stream that NumPy keeps stable between its versions.
    """
    words = np.random.Philox(key=seed).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def reserved(seed: int, most: int, random: bool) -> int:
    """How many leading tokens of a draft a row keeps: `most` of them, or 0 to `most` as its seed has it."""
    return int(uniforms(seed, 1)[0] * (most + 1)) if random else most


def greedy(logits: Tensor) -> Tensor:
    """The first of the most likely tokens: [positions, vocabulary] to int64 [positions], on the device."""
    return logits.max(-1).indices  # 4 times as fast as argmax in bfloat16


def draw(logits: Tensor, draws: np.ndarray, *, temperature: float, top_k: int | None, top_p: float) -> list[int]:
    """Draw one token per row. Waits for the device once, or twice for a wide nucleus.

    `top_k` cuts first and the rest is renormalised, then `top_p` keeps the fewest most likely tokens whose mass reaches
    it (of equal ones the lower id first), then the draw falls among what is left, in the order of ids.

    Args:
        logits: [rows, vocabulary], any float dtype.
        draws: float64 [rows], in [0, 1).
        temperature: above 0.

    Returns:
        Token ids [rows].
    """
    scaled = logits.float() / temperature
    u = torch.from_numpy(draws).to(scaled.device, non_blocking=True)[:, None]  # else it would wait for the logits
    if top_k is None and top_p == 1:
        return _invert_all(scaled.softmax(-1), u).tolist()
    vocabulary = scaled.shape[1]
    k = min(top_k or NUM_HEAD, vocabulary)
    ids = scaled.topk(k).indices.sort().values
    head = scaled.gather(1, ids)
    log_mass = (head if top_k else scaled).logsumexp(-1, keepdim=True)
    probs = _nucleus(head, log_mass, top_p)
    tokens = ids.gather(1, _invert(probs, u))
    if top_k or k == vocabulary:
        return tokens[:, 0].tolist()
    # The head decides a row unless its nucleus reaches the head's last value: tokens as likely may lie outside.
    wide = ((probs > 0) & (head == head.amin(-1, keepdim=True))).any(-1, keepdim=True)
    chosen = torch.cat([tokens, wide.long()], 1).tolist()
    rows = [row for row, (_, is_wide) in enumerate(chosen) if is_wide]
    result = [token for token, _ in chosen]
    if rows:
        full = _invert(_nucleus(scaled[rows], log_mass[rows], top_p), u[rows])
        for row, token in zip(rows, full[:, 0].tolist(), strict=True):
            result[row] = token
    return result


def _nucleus(scores: Tensor, log_mass: Tensor, top_p: float) -> Tensor:
    """Probabilities exp(scores - log_mass), float64 [rows, n], with 0 outside the nucleus. Columns in order of ids."""
    probs = (scores.double() - log_mass.double()).exp()
    if top_p == 1:
        return probs
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    ranked = probs.gather(1, order)
    keep = ranked.cumsum(-1) - ranked < top_p
    return torch.zeros_like(probs).scatter(1, order, ranked * keep)


def _invert(probs: Tensor, u: Tensor) -> Tensor:
    """The column, int64 [rows, 1], where the cumulated probs (float64 [rows, n], any total) pass u ([rows, 1])."""
    cdf = probs.cumsum(-1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)


def _invert_all(probs: Tensor, u: Tensor) -> Tensor:
    """As `_invert` for float32 probs [rows, vocabulary], int64 [rows]: first the block of columns, then the column in
    it, which is 30 times as fast as cumulating the whole vocabulary in float64."""
    blocks = F.pad(probs, (0, -probs.shape[1] % BLOCK)).view(len(probs), -1, BLOCK)
    mass = blocks.sum(-1, dtype=torch.float64)
    ends = mass.cumsum(-1)
    target = u * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True)
    cdf = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    # Two sums of the same block may differ in the last bit: stay inside it.
    last = torch.nextafter(cdf[:, -1:], torch.zeros_like(target))
    rest = (target - (ends - mass).gather(1, block)).clamp(min=0).minimum(last)
    return (block * BLOCK + torch.searchsorted(cdf, rest, right=True))[:, 0]
