"""What the strategies share: candidates end to end, which pairs of them may be used, and the columns of a pair."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.preferences import schema
from pipelines.preferences.arrow import whole
from pipelines.preferences.ranked import Bools, Floats, Ints, lengths
from pipelines.preferences.settings import BuildConfig


class Made(NamedTuple):
    """What a strategy makes of a `ranked` table.

    Attributes:
        columns: its own columns by name; prompt, split and the like are added to every strategy's alike.
        row: int64[k], ascending: the row of `ranked` that each of the k rows comes from.
        causes: of each row of `ranked`: why nothing comes from it; "" where something does. Object array of str.
        chosen_length, rejected_length: int64[k], as `Candidates.length`; None where a row has no two sides.
    """

    columns: dict[str, pa.Array]
    row: Ints
    causes: npt.NDArray[np.object_]
    chosen_length: Ints | None = None
    rejected_length: Ints | None = None


@dataclass(frozen=True)
class Candidates:
    """The m candidates of n rows of `ranked`, end to end, best first within each row.

    Attributes:
        values: struct array of m, as `schema.CANDIDATE`.
        first: int64[n + 1], where each row begins.
        row: int64[m].
        reward: float64[m]; NaN where there is none.
        length: int64[m], in tokens or, where they were not counted, in characters: in one unit within a row.
        prompt_ids: string array of n.
        is_distinct: whether no two texts of a row are the same (see `normal`).
    """

    values: pa.StructArray
    first: Ints
    row: Ints
    reward: Floats
    length: Ints
    prompt_ids: pa.Array
    is_distinct: bool

    @property
    def num_rows(self) -> int:
        return len(self.first) - 1

    @property
    def is_aligned(self) -> Bools:
        return np.asarray(pc.equal(self.values.field("kind"), "aligned"))

    @property
    def in_tokens(self) -> Bools:
        """Whose length is in tokens, not in characters."""
        return np.asarray(self.values.field("num_tokens").is_valid())

    @property
    def has_rewards(self) -> bool:
        return bool(self.values.field("reward").null_count < len(self.values))

    def take(self, name: str, places: Ints) -> pa.Array:
        """A field of the candidates at these places."""
        return self.values.field(name).take(pa.array(places))


def candidates(ranked: pa.Table, *, distinct: bool = False) -> Candidates:
    """The candidates of `ranked`; `distinct`: of several with one text (see `normal`) only the best of each row."""
    lists = whole(ranked["candidates"])
    values, counts = lists.flatten(), np.asarray(lists.value_lengths(), np.int64)
    row = np.repeat(np.arange(len(counts)), counts)
    if distinct:
        keys = pd.util.hash_array(
            np.asarray(normal(values.field("text")).to_numpy(zero_copy_only=False), object), categorize=False
        )
        is_first = ~pd.DataFrame({"row": row, "key": keys}).duplicated().to_numpy()
        values, row = values.filter(pa.array(is_first)), row[is_first]
    return Candidates(
        values=values,
        first=np.searchsorted(row, np.arange(len(counts) + 1)),
        row=row,
        reward=np.asarray(values.field("reward").to_numpy(zero_copy_only=False), np.float64),
        length=lengths(values.field("num_tokens"), values.field("text")),
        prompt_ids=whole(ranked["prompt_id"]),
        is_distinct=distinct,
    )


def normal(texts: pa.Array) -> pa.Array:
    """Texts with every run of white space as one space. Case stays: to mend it is to better an answer."""
    return pc.binary_join(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts)), " ")


# --- pairs ----------------------------------------------------------------------------------------------------------


class Picked(NamedTuple):
    """Of some rows a pair each, in row order: int64[k] of places, and the causes of all rows as `Made.causes`."""

    found: Candidates
    chosen: Ints
    rejected: Ints
    causes: npt.NDArray[np.object_]


def preferred(ranked: pa.Table, build: BuildConfig) -> Picked:
    """Of each row the pair that `build.prefer` means, where it may be used."""
    if build.prefer == "aligned":
        return best_aligned(ranked, build)
    found = candidates(ranked, distinct=True)
    row = np.flatnonzero(np.diff(found.first) > 1)
    chosen, rejected = found.first[row], found.first[row + 1] - 1
    if build.prefer == "best_random":  # of those that are worse enough, which are the last of their row
        best = found.reward[found.first[found.row]]
        is_worse = (found.reward < best) & ~falls_short(best, found.reward, build.min_margin)
        num_worse = np.bincount(found.row[is_worse], minlength=found.num_rows)[row]
        draws = seeded(found.prompt_ids.take(pa.array(row)), build.seed) % np.maximum(num_worse, 1).astype(np.uint64)
        rejected = rejected - draws.astype(np.int64)
    kept, causes = sift(found, chosen, rejected, build)
    return Picked(found, chosen[kept], rejected[kept], causes)


def best_aligned(ranked: pa.Table, build: BuildConfig) -> Picked:
    """Of each row the best aligned text that may be preferred to its response, and that response."""
    found = candidates(ranked)
    number = np.asarray(found.values.field("candidate"), np.int64)
    key = found.row * (number.max(initial=0) + 1) + number
    aligned, responses = np.flatnonzero(found.is_aligned), np.flatnonzero(~found.is_aligned)
    responses = responses[np.argsort(key[responses])]
    at = np.searchsorted(key[responses], key[aligned])
    has_both = np.isin(key[aligned], key[responses])
    chosen, rejected = aligned[has_both], responses[at[has_both]]
    _, first = np.unique(found.row[chosen], return_index=True)
    kept, causes = sift(found, chosen[first], rejected[first], build)
    is_left = np.isin(found.row[chosen], found.row[chosen[first[~kept]]])
    is_left[first] = False
    left = np.flatnonzero(is_left)  # of rows whose best may not be used
    left = left[sift(found, chosen[left], rejected[left], build)[0]]
    _, once = np.unique(found.row[chosen[left]], return_index=True)
    used = np.sort(np.concatenate([first[kept], left[once]]))
    causes[found.row[chosen[used]]] = ""
    return Picked(found, chosen[used], rejected[used], causes)


def seeded(texts: pa.Array, seed: int) -> npt.NDArray[np.uint64]:
    """A hash of each text (SipHash keyed by the seed): the same whatever the text stands with."""
    values = np.asarray(texts.to_numpy(zero_copy_only=False), object)
    return pd.util.hash_array(values, hash_key=f"{seed:016d}"[-16:], categorize=False)


def sift(found: Candidates, chosen: Ints, rejected: Ints, build: BuildConfig) -> tuple[Bools, npt.NDArray[np.object_]]:
    """Which of k pairs, in row order, may be used (bool[k]), and why a row has none (object[n], "" where it has)."""
    refused = np.full(len(chosen), "", object)
    longer, shorter = (side(found.length[chosen], found.length[rejected]) for side in (np.maximum, np.minimum))
    if build.max_length_ratio is not None:
        refused[longer > build.max_length_ratio * np.maximum(shorter, 1)] = "length_ratio"
    margin = found.reward[chosen] - found.reward[rejected]
    refused[falls_short(found.reward[chosen], found.reward[rejected], build.min_margin)] = "small_margin"
    refused[margin < 0] = "aligned_lost"
    refused[margin == 0] = "tie"
    if not found.is_distinct:
        asked = np.flatnonzero(~(margin < 0))  # the others are refused anyway, and comparing texts takes time
        one, other = (normal(found.take("text", side[asked])) for side in (chosen, rejected))
        refused[asked[np.asarray(pc.equal(one, other))]] = "same_text"
    causes = why_none(found, found.row[chosen], refused)
    return refused == "", causes


def falls_short(better: Floats, worse: Floats, least: float) -> Bools:
    """Where the difference is less than `least` by more than rounding: 0.3 - 0.2 is 0.1 here."""
    short: Bools = better - worse < least - 1e-12 * np.maximum(np.abs(better), np.abs(worse))
    return short


def why_none(found: Candidates, row: Ints, refused: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    """Of each row the first of its refusals, `one_candidate` where nothing could be compared, "" where one is used."""
    causes = np.full(found.num_rows, "one_candidate", object)
    rows, once = np.unique(row, return_index=True)
    causes[rows] = refused[once]
    causes[row[refused == ""]] = ""
    return causes


def pair_columns(found: Candidates, chosen: Ints, rejected: Ints) -> dict[str, pa.Array]:
    """The columns of pairs: texts, rewards, margin and provenance."""
    columns = texts(found, chosen=chosen, rejected=rejected)
    columns |= rewards(found, chosen_reward=chosen, rejected_reward=rejected)
    columns["margin"] = margin(found, chosen, rejected)
    return columns | provenance(found, chosen=chosen, rejected=rejected)


def texts(found: Candidates, **places: Ints) -> dict[str, pa.Array]:
    """Texts of the candidates at these places, by column."""
    return {name: found.take("text", each) for name, each in places.items()}


def rewards(found: Candidates, **places: Ints) -> dict[str, pa.Array]:
    """Rewards of the candidates at these places, by column; null without a reward."""
    return {name: found.take("reward", each) for name, each in places.items()}


def provenance(found: Candidates, **places: Ints) -> dict[str, pa.Array]:
    """Where the candidates at these places come from, by side: its model, policy and kind."""
    return {f"{side}_{name}": found.take(name, each) for name in schema.PROVENANCE for side, each in places.items()}


def margin(found: Candidates, better: Ints, worse: Ints) -> pa.Array:
    """By how much the reward of one is above the other's; null without a reward."""
    return pc.subtract(found.take("reward", better), found.take("reward", worse))


def listed(found: Candidates, places: Ints, row: Ints, *names: str) -> dict[str, pa.Array]:
    """Fields of candidates as a list for each of the rows `row` (ascending), by the field's name."""
    first = np.searchsorted(found.row[places], [*row, found.num_rows]) if len(places) else np.zeros(len(row) + 1)
    offsets = pa.array(np.asarray(first, np.int32))
    return {name: pa.ListArray.from_arrays(offsets, found.take(name, places)) for name in names}
