"""What a reward model is trained on and what it is held to: pairs as it reads them, and which of them are neither."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.contract import ConfigError, RowError, is_set
from actors.engines.base import Request, ScoringConfig
from actors.training.reward_settings import Pair, RewardTrainingConfig
from pipelines.corpus.shards import Listed
from pipelines.settings import SiteConfig
from pipelines.training.pairs import Preference, PreferenceFiles, is_held_out, prompt_key
from pipelines.training.reward_settings import PairsConfig

Encode = Callable[[Preference], Pair]
"""A pair as the model reads it. Raises RowError for one that the reward pool could not score."""


@dataclass(frozen=True)
class Material:
    """The pairs of a run.

    Attributes:
        train, held_out: no prompt is in both.
        left_out: how many are neither, by cause.
        files: what was read: path, bytes and version (the checksum that a manifest tells, else that of its store).
    """

    train: list[Pair]
    held_out: list[Pair]
    left_out: Counter[str]
    files: list[dict[str, Any]]


def digest_of(pairs: Sequence[Pair]) -> str:
    """How many there are, and 16 hex digits over their texts, in their order."""
    found = hashlib.sha256()
    for pair in pairs:
        for text in (pair.chosen, pair.rejected):
            found.update(len(text).to_bytes(4, "big") + text.tobytes())
    return f"{len(pairs)} pairs, {found.hexdigest()[:16]}"


@dataclass
class _Found:
    """What was found in some files."""

    pairs: list[Pair] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    files: list[dict[str, Any]] = field(default_factory=list)


def gather(
    given: PairsConfig, training: RewardTrainingConfig, site: SiteConfig, encode: Encode, limit: int | None
) -> Material:
    """Read the pairs and hold some of them out.

    What is held out is not trained on, whichever file it is in: `held_out_prompt` counts those pairs. Longer texts
    than `training.max_tokens` are not trained on (`too_long`), but held-out ones are scored whatever their length.

    Args:
        limit: most pairs to train on, drawn by the seed.

    Raises ConfigError where there is nothing to train on, or nothing held out.
    """
    source = PreferenceFiles(given.path, site.storage_options, site.storage_retry_s)
    splits = source.by_split()
    found = _read(source, splits.get("train", []), encode)
    if given.test_path is not None:
        other = PreferenceFiles(given.test_path, site.storage_options, site.storage_retry_s, key="input.test_path")
        of_other = other.by_split()
        test = _read(other, of_other.get("test") or of_other.get("train", []), encode)
    elif "test" in splits:
        if is_set(given, "test_fraction"):
            raise ConfigError(f"input.test_fraction has no effect: {given.path!r} has a split `test`")
        test = _read(source, splits["test"], encode)
    else:
        test = _Found([pair for pair in found.pairs if is_held_out(pair.prompt, given.test_fraction)])
        found.pairs = [pair for pair in found.pairs if not is_held_out(pair.prompt, given.test_fraction)]
    left_out = found.left_out + test.left_out
    unseen = {pair.prompt for pair in test.pairs}
    known = [pair for pair in found.pairs if pair.prompt not in unseen]
    pairs = [pair for pair in known if pair.longest <= training.max_tokens]
    left_out += Counter(held_out_prompt=len(found.pairs) - len(known), too_long=len(known) - len(pairs))
    if limit is not None and limit < len(pairs):
        drawn = np.sort(np.random.default_rng(training.seed).permutation(len(pairs))[:limit])
        left_out["beyond_limit"] += len(pairs) - limit
        pairs = [pairs[each] for each in drawn]
    for what, there in (("to train on", pairs), ("held out", test.pairs)):
        if not there:
            told = ", ".join(f"{count} {cause}" for cause, count in sorted(left_out.items())) or "none"
            raise ConfigError(f"no pair of input.path {given.path!r} is {what} (left out: {told})")
    return Material(pairs, test.pairs, left_out, found.files + test.files)


def encoder(base: ScoringConfig) -> Encode:
    """What makes a model's pairs, by the functions with which the reward pool makes what it scores.

    Raises ConfigError where there is no such model, or, when it is called, where that has no chat template.
    """
    from transformers import AutoConfig  # takes seconds to import, as what reads its tokenizer does

    from actors.engines.footprint import longest
    from actors.engines.prompts import check_room, load_failure, load_tokenizer
    from actors.rewards.heads import scored_ids

    try:
        told = AutoConfig.from_pretrained(base.model, revision=base.revision, trust_remote_code=False)
        limit, pad = longest(told, None), told.get_text_config().pad_token_id
    except (OSError, ValueError) as error:
        raise ConfigError(load_failure("model config", base.model, error)) from error
    tokenizer = load_tokenizer(base.model, base.revision)

    def ids(preference: Preference, answer: str) -> "array[int]":
        read = scored_ids(tokenizer, Request((*preference.prompt, ("assistant", answer)), 0), pad)
        check_room(read, 0, limit)
        return array("i", read)

    return lambda each: Pair(prompt_key(each.prompt), ids(each, each.chosen), ids(each, each.rejected))


def _read(source: PreferenceFiles, files: Sequence[Listed], encode: Encode) -> _Found:
    found = _Found()
    for listed in files:
        found.files.append({"path": listed.path, "num_bytes": listed.size, "version": listed.tag})
        for row in source.rows(listed):
            try:
                if isinstance(row, RowError):
                    raise row
                found.pairs.append(encode(row))
            except RowError as error:
                found.left_out[error.cause] += 1
    return found
