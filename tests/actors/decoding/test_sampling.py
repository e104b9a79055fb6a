"""Sampling draws from exactly the distribution that temperature, top_k and top_p describe, one uniform a position."""

import numpy as np
import pytest
import torch

from actors.decoding import sampling
from actors.decoding.sampling import draw, greedy, uniforms


def reference(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float) -> np.ndarray:
    """Probabilities by the definition, in float64, over a full sort."""
    scores = logits.double().numpy() / temperature
    order = np.argsort(-scores, kind="stable")
    ranked = np.exp(scores[order] - scores.max())
    if top_k is not None:
        ranked[top_k:] = 0
    ranked /= ranked.sum()
    ranked[np.cumsum(ranked) - ranked >= top_p] = 0
    probs = np.zeros_like(ranked)
    probs[order] = ranked / ranked.sum()
    return probs


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.7, None, 1.0), (1.0, 20, 1.0), (1.0, None, 0.8), (1.3, 40, 0.9), (2.0, None, 0.99)],
)
@pytest.mark.parametrize("vocabulary", [300, 1000])
def test_draws_cover_the_exact_distribution(
    temperature: float, top_k: int | None, top_p: float, vocabulary: int
) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    probs = reference(logits, temperature, top_k, top_p)
    num = 4000
    draws = (np.arange(num) + 0.5) / num  # evenly spread draws: counts may be off by one, not by chance
    tokens = draw(logits.expand(num, -1), draws, temperature=temperature, top_k=top_k, top_p=top_p)
    counts = np.bincount(tokens, minlength=vocabulary)
    assert np.abs(counts - num * probs).max() <= 1.01
    assert counts[probs == 0].sum() == 0


def test_random_draws_pass_chi_square() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    probs = reference(logits, 1.0, None, 1.0)
    draws = np.concatenate([uniforms(seed, 20) for seed in range(1000)])
    tokens = draw(logits.expand(len(draws), -1), draws, temperature=1.0, top_k=None, top_p=1.0)
    expected = len(draws) * probs
    chi2 = float((((np.bincount(tokens, minlength=50) - expected) ** 2) / expected).sum())
    assert chi2 < 49 + 5 * (2 * 49) ** 0.5


def test_draw_depends_on_seed_and_position_alone() -> None:
    assert (uniforms(7, 100)[:40] == uniforms(7, 40)).all()
    assert not np.isin(uniforms(8, 100), uniforms(7, 100)).any()
    assert uniforms(2**63 - 1, 3).dtype == np.float64
    assert uniforms(7, 2).tolist() == [0.8720734548204873, 0.29536538151378355]  # a corpus outlives a NumPy version


@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16 makes ties
def test_top_p_head_equals_full_sort(monkeypatch: pytest.MonkeyPatch, scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(200, 2000, generator=generator) * scale).to(dtype)
    draws = np.random.default_rng(0).random(200)
    settings = {"temperature": 1.0, "top_k": None, "top_p": 0.9}
    fast = draw(logits, draws, **settings)
    monkeypatch.setattr(sampling, "NUM_HEAD", 2000)
    assert fast == draw(logits, draws, **settings)


def test_last_uniform_never_picks_an_impossible_token() -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 3] = 0.0
    for uniform in (0.0, 1 - 2.0**-53):
        for top_k, top_p in ((None, 1.0), (5, 1.0), (None, 0.5)):
            assert draw(logits, np.array([uniform]), temperature=1.0, top_k=top_k, top_p=top_p) == [3]


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(2, 1000, dtype=torch.bfloat16)
    logits[0, [5, 700]] = 1.0
    logits[1, [900, 901]] = 2.0
    assert greedy(logits).tolist() == [5, 900]
