"""Weights of pairs by how near the chosen answer stays to the prompt, from a local sentence encoder."""

import functools
from typing import Any

import numpy as np
import pyarrow as pa

from actors.contract import ConfigError
from pipelines.preferences.arrow import whole

BATCH = 64
MAX_TOKENS = 512


def semantic_weights(encoder: str, prompts: pa.ChunkedArray, chosen: pa.Array, alpha: float) -> pa.Array:
    """exp(-alpha * (1 - cosine)) of each pair's prompt (its last user message) and chosen answer, as Sem-DPO's
    weight of a pair (arXiv:2507.20133): 1 where they mean the same, smaller the further apart. float64[n].

    Args:
        encoder: folder of a transformers encoder with its tokenizer; embeddings are its mean over tokens.

    Raises ConfigError where there is none in the folder.
    """
    asked = [chat[-1]["content"] for chat in whole(prompts).to_pylist()]
    answers = whole(chosen).to_pylist()
    cosines = (embeddings(encoder, asked) * embeddings(encoder, answers)).sum(axis=1)
    return pa.array(np.exp(-alpha * (1 - cosines)))


def embeddings(folder: str, texts: list[str]) -> Any:
    """float64[n, d] of length 1. Texts are batched by length; in float32 what a text shares its batch with changes no
    more than the last digits."""
    import torch

    tokenizer, model = _encoder(folder)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    rows = np.zeros((len(texts), model.config.hidden_size))
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        batch = tokenizer(
            [texts[place] for place in places], padding=True, truncation=True, max_length=MAX_TOKENS,
            return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        rows[places] = ((hidden * mask).sum(1) / mask.sum(1)).double().numpy()
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


@functools.lru_cache(1)
def _encoder(folder: str) -> Any:
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"build.semantic_encoder: no encoder in {folder!r}: {str(error).splitlines()[0]}") from None
    return tokenizer, model.eval()
