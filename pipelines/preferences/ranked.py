"""From corpus rows to `ranked`, the one intermediate: the usable candidates of every prompt, best first."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actors.contract import ConfigError
from pipelines.preferences import schema
from pipelines.preferences.arrow import whole
from pipelines.preferences.settings import BuildConfig

KINDS = ("response", "aligned")
REASONS = ("", "failed", "other_kind", "other_policy", "unfinished", "empty", "not_scored")
"""Why a candidate is not used; of several reasons the first counts."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Ranked(NamedTuple):
    """A unit's prompts with their candidates.

    Attributes:
        table: as `schema.RANKED`, kept columns after it; row for row what came in.
        causes: of each prompt: why it has no candidate; "" where it has one. Object array of str.
        unused: candidates that are not used, by reason.
    """

    table: pa.Table
    causes: npt.NDArray[np.object_]
    unused: Counter[str]


def rank(rows: pa.Table, partition: int, build: BuildConfig, keep_columns: list[str]) -> Ranked:
    """Rank the candidates of corpus rows.

    Candidates go by reward, those of one reward by number, a response before what was aligned from it. Without a reward
    what was aligned comes before the responses, and shares rank 1.

    Args:
        rows: with the corpus's columns prompt_id, prompt, responses, aligned, `rewards` where it is scored, and the
            kept columns.
        partition: the corpus's run= number.

    Raises ConfigError where a row has other numbers of rewards than candidates.
    """
    counts, found = _candidates(rows, build)
    row = np.concatenate([np.repeat(np.arange(len(counts)), counts)] * 2)
    number = np.concatenate([places(counts)] * 2)
    is_aligned = np.arange(len(row)) >= len(row) // 2
    reason = _reasons(found, is_aligned, build)
    num_tokens = _counted_alike(found.num_tokens, row, reason == 0)
    reward = found.reward
    if build.length_slope:
        reward = reward - build.length_slope * lengths(num_tokens, found.text)
    key = reward if build.weights else is_aligned.astype(np.float64)
    order = np.lexsort((is_aligned, number, -key, row))
    order = order[reason[order] == 0]
    if build.single_policy:
        policy = np.asarray(found.policy.dictionary_encode().indices, np.int64)[order]
        mates = number[order] if build.compares_aligned else policy
        order = order[_of_one_policy(policy, mates, row[order])]
    first = np.searchsorted(row[order], np.arange(len(counts) + 1))
    taken = pa.array(order)
    candidates = pa.StructArray.from_arrays(
        [
            found.text.take(taken),
            pa.array(KINDS).take(pa.array(is_aligned[order].astype(np.int32))),
            pa.array(number[order].astype(np.int32)),
            found.model.take(taken),
            found.policy.take(taken),
            found.finish_reason.take(taken),
            num_tokens.take(taken),
            pa.array(reward[order]) if build.weights else pa.nulls(len(order), pa.float64()),
            pa.array(ranks(key[order], row[order], first)),
        ],
        fields=list(schema.CANDIDATE),
    )
    columns = {
        "prompt_id": rows["prompt_id"],
        "prompt": rows["prompt"],
        "partition": pa.repeat(pa.scalar(partition, pa.int32()), rows.num_rows),
        "candidates": pa.ListArray.from_arrays(pa.array(first.astype(np.int32)), candidates),
        **{name: rows[name] for name in keep_columns},
    }
    kept = [pa.field(name, rows.schema.field(name).type) for name in keep_columns]
    unused = Counter({REASONS[code]: int(num) for code, num in enumerate(np.bincount(reason)) if code and num})
    unused["other_policy"] += int((reason == 0).sum()) - len(order)
    return Ranked(pa.table(columns).cast(pa.schema([*schema.RANKED, *kept])), _causes(reason, row, first), +unused)


class _Found(NamedTuple):
    """Every candidate of the rows, used or not: first all responses, then all that is aligned, each in row order."""

    text: pa.Array
    model: pa.Array
    policy: pa.Array
    status: pa.Array
    finish_reason: pa.Array
    num_tokens: pa.Array
    reward: Floats
    is_scored: Bools


def _candidates(rows: pa.Table, build: BuildConfig) -> tuple[Ints, _Found]:
    """Candidates of each row on either side, and all of them end to end."""
    lists = [whole(rows[name]) for name in ("responses", "aligned")]
    counts, also = (np.asarray(each.value_lengths(), np.int64) for each in lists)
    if (counts != also).any():
        raise ConfigError("a row of the corpus has other numbers of responses and of aligned texts")
    responses, aligned = (each.flatten() for each in lists)

    def both(name: str) -> pa.Array:
        return pa.concat_arrays([responses.field(name), aligned.field(name)])

    policy = responses.field("model")
    reward, is_scored = np.zeros(2 * len(policy)), np.ones(2 * len(policy), bool)
    for name, weight in build.weights.items():
        sides = [_reward(rows, counts, name, side) for side in KINDS]
        reward = reward + weight * np.concatenate([values for values, _ in sides])
        is_scored &= np.concatenate([known for _, known in sides])
    policies = pa.concat_arrays([policy, policy])
    return counts, _Found(
        both("text"), both("model"), policies, both("status"), both("finish_reason"), both("num_tokens"), reward,
        is_scored,
    )  # fmt: skip


def _counted_alike(num_tokens: pa.Array, row: Ints, is_used: Bools) -> pa.Array:
    """The numbers of tokens; null for all texts of a row of which a used one's were not counted, as those of stored
    texts are not: texts that are compared are all counted in tokens, or all in characters."""
    if not num_tokens.null_count:
        return num_tokens
    uncounted = np.isin(row, row[np.asarray(num_tokens.is_null()) & is_used])
    return pc.if_else(pa.array(uncounted), pa.scalar(None, num_tokens.type), num_tokens)


def lengths(num_tokens: pa.Array, text: pa.Array) -> Ints:
    """Tokens of each text, or its characters where they were not counted."""
    if num_tokens.null_count:
        num_tokens = pc.coalesce(num_tokens, pc.utf8_length(text))
    return np.asarray(num_tokens, np.int64)


def _reward(rows: pa.Table, counts: Ints, name: str, side: str) -> tuple[Floats, Bools]:
    """Reward `name` of every candidate of one side, and which of them have one."""
    reward, known = np.full(counts.sum(), np.nan), np.zeros(counts.sum(), bool)
    if "rewards" not in rows.column_names:
        return reward, known
    scores = whole(rows["rewards"])
    owner = np.repeat(np.arange(len(counts)), np.asarray(pc.fill_null(scores.value_lengths(), 0), np.int64))
    scores = scores.flatten()
    at = np.flatnonzero(np.asarray(pc.and_(pc.equal(scores.field("name"), name), scores.field(side).is_valid())))
    owner, once = np.unique(owner[at], return_index=True)
    lists = scores.field(side).take(pa.array(at[once]))
    if (np.asarray(lists.value_lengths(), np.int64) != counts[owner]).any():
        raise ConfigError(f"reward {name!r} of the corpus scores another number of candidates than a row has")
    is_here = np.repeat(np.isin(np.arange(len(counts)), owner), counts)
    values = lists.flatten()
    reward[is_here] = values.to_numpy(zero_copy_only=False)
    known[is_here] = np.asarray(values.is_valid())
    return reward, known


def _reasons(found: _Found, is_aligned: Bools, build: BuildConfig) -> npt.NDArray[np.int8]:
    """Why each candidate is not used, as its place in REASONS; 0 where it is."""
    is_named = np.ones(len(is_aligned), bool)
    if build.models:
        is_named &= np.asarray(pc.is_in(found.policy, pa.array(build.models)))
    if build.exclude_models:
        is_named &= ~np.asarray(pc.is_in(found.policy, pa.array(build.exclude_models)))
    finish = pc.fill_null(found.finish_reason, "stop")
    is_finished = pc.is_in(finish, pa.array(build.require_finish)) if build.require_finish else finish.is_valid()
    right = {
        "failed": np.asarray(pc.equal(found.status, "ok")),
        "other_kind": is_aligned == (build.candidates == "aligned") if build.candidates != "all" else is_named | True,
        "other_policy": is_named,
        "unfinished": np.asarray(is_finished),
        "empty": np.asarray(pc.not_equal(pc.utf8_trim_whitespace(found.text), "")),
        "not_scored": found.is_scored,
    }
    reason = np.zeros(len(is_aligned), np.int8)
    for code in range(len(REASONS) - 1, 0, -1):
        reason[~right[REASONS[code]]] = code
    return reason


def places(counts: Ints) -> Ints:
    """0, 1, … within each row, for rows of `counts` items."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(starts, counts)


def _of_one_policy(policy: Ints, mates: Ints, row: Ints) -> Bools:
    """Which of sorted candidates are of their row's one policy: that of the best candidate with another to compare it
    with, one of the same `mates`; where there is none, that of the best."""
    _, group, counts = np.unique(np.stack([row, mates]), axis=1, return_inverse=True, return_counts=True)
    order = np.lexsort((counts[group.ravel()] == 1, row))  # stable
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    found: Bools = policy == np.repeat(policy[order[starts]], np.diff([*starts, len(row)]))
    return found


def ranks(key: Floats, row: Ints, first: Ints) -> npt.NDArray[np.int32]:
    """1 + the number of better candidates of the row, for candidates in the order of `ranked` ("1224")."""
    places = np.arange(len(row))
    is_new = np.ones(len(row), bool)
    is_new[1:] = (row[1:] != row[:-1]) | (key[1:] != key[:-1])
    best_of_equals = np.maximum.accumulate(np.where(is_new, places, 0))
    return (best_of_equals - first[row] + 1).astype(np.int32)


def _causes(reason: npt.NDArray[np.int8], row: Ints, first: Ints) -> npt.NDArray[np.object_]:
    """Of each row without candidates the reason of that which came furthest; "" elsewhere."""
    furthest = np.zeros(len(first) - 1, np.int8)
    np.maximum.at(furthest, row, reason)
    told = np.where(furthest == 0, "no_candidate", np.array(REASONS, object)[furthest])
    return np.where(np.diff(first) == 0, told, "").astype(object)
