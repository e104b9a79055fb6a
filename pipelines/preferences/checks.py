"""The checked facts of a dataset: counted per unit, summed over the units, refused where a row is not what it must be.

What a unit counts are sums and moments, so that a dataset's facts do not depend on the order or the number of workers,
nor on how its rows were cut into units.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.preferences import schema
from pipelines.preferences.arrow import whole
from pipelines.preferences.picks import Candidates, Made, normal, seeded
from pipelines.preferences.ranked import Bools, Floats, Ints

NUM_RESAMPLES = 1000
NUM_GROUPS = 512
COUNTED_IN = ("tokens", "characters")
MOMENTS = {"n", "x", "y", "xx", "yy", "xy"}
BETTER = {  # (better text, worse text) of each strategy; the rewards are <name>_reward
    "pairs": [("chosen", "rejected")],
    "curriculum": [("chosen", "rejected")],
    "steps": [("chosen", "rejected"), ("full_chosen", "full_rejected")],
    "triple": [("best", "chosen"), ("chosen", "rejected"), ("best", "rejected")],
    "refinement": [("improved", "response")],
}
MAY_BE_EMPTY = ("prefix",)
BROKEN = {
    "empty_side": "rows with an empty side",
    "equal_pair": "pairs of equal texts",
    "non_finite_reward": "candidates or rows whose reward is not finite",
    "wrong_order": "rows whose better side has the lower reward",
}


def violations(strategy: str, rows: pa.Table) -> dict[str, int]:
    """How many of the rows that a strategy made break each rule of BROKEN."""
    broken = {name: np.zeros(rows.num_rows, bool) for name in BROKEN}
    for field in (each for each in rows.schema if each.name in schema.STRATEGIES[strategy].names):
        column = whole(rows[field.name])
        if pa.types.is_list(field.type) and field.name != "prompt":
            row, column = _parents(column), column.flatten()
        else:
            row = np.arange(rows.num_rows)
        if pa.types.is_string(column.type) and field.name not in MAY_BE_EMPTY and field.name != "prompt_id":
            broken["empty_side"][row[np.asarray(pc.equal(pc.utf8_trim_whitespace(column), ""))]] = True
        if pa.types.is_float64(column.type):
            broken["non_finite_reward"][row[np.asarray(pc.invert(pc.fill_null(pc.is_finite(column), True)))]] = True
    for better, worse in BETTER.get(strategy, []):
        texts = [normal(whole(rows[name])) for name in (better, worse)]
        broken["equal_pair"] |= np.asarray(pc.equal(*texts))
        names = [f"{name}_reward" for name in (better, worse)]
        if set(names) <= set(rows.column_names):
            lower = pc.fill_null(pc.less(rows[names[0]], rows[names[1]]), False)
            broken["wrong_order"] |= np.asarray(lower)
    if "rewards" in rows.column_names:  # best first, or a path upwards
        lists = whole(rows["rewards"])
        row, steps = _parents(lists), np.diff(np.asarray(lists.flatten(), np.float64))
        is_wrong = (steps < 0) if strategy == "trajectory" else (steps > 0)
        broken["wrong_order"][row[1:][is_wrong & (np.diff(row) == 0)]] = True
    return {name: int(found.sum()) for name, found in broken.items()}


def _parents(lists: pa.ListArray) -> Any:
    return np.repeat(np.arange(len(lists)), np.asarray(lists.value_lengths(), np.int64))


def facts(strategy: str, rows: pa.Table, found: Candidates, made: Made, seed: int) -> dict[str, Any]:
    """A unit's sums. `rows` are what the strategy made, before they are exported; `found` what it made them of."""
    broken = violations(strategy, rows)
    if found.has_rewards:
        broken["non_finite_reward"] += int((~np.isfinite(found.reward)).sum())
    told: dict[str, Any] = {"broken": broken, "length": _length(found), "aligned": gains(found, seed)}
    if made.chosen_length is not None and made.rejected_length is not None:
        more = made.chosen_length - made.rejected_length
        told["pairs"] = {"num": len(more), "chosen_longer": int((more > 0).sum())}
        for name, those in _by_count(found.in_tokens[found.first[made.row]]):
            told["pairs"][name] = {"num": int(those.sum()), "more": int(more[those].sum())}
        if "chosen_kind" in rows.column_names:
            lost = pc.and_(pc.equal(rows["chosen_kind"], "response"), pc.equal(rows["rejected_kind"], "aligned"))
            told["pairs"]["aligned_lost"] = int(pc.sum(lost).as_py() or 0)
    return told


def _by_count(in_tokens: Bools) -> Iterator[tuple[str, Bools]]:
    """What lengths are in, and where they are, for each of COUNTED_IN that there is."""
    for name, those in zip(COUNTED_IN, (in_tokens, ~in_tokens), strict=True):
        if those.any():
            yield name, those


def _length(found: Candidates) -> dict[str, dict[str, float]]:
    """Moments of length (x) and reward (y) over all candidates, apart for tokens and characters: their number, means,
    and sums of squares and products about the means."""
    if not found.has_rewards or not np.isfinite(found.reward).all():
        return {}
    told = {}
    for name, those in _by_count(found.in_tokens):
        x, y = found.length[those].astype(np.float64), found.reward[those]
        dx, dy = x - x.mean(), y - y.mean()
        told[name] = {
            "n": len(x), "x": float(x.mean()), "y": float(y.mean()), "xx": float(dx @ dx), "yy": float(dy @ dy),
            "xy": float(dx @ dy),
        }  # fmt: skip
    return told


def gains(found: Candidates, seed: int) -> dict[str, Any]:
    """Aligned texts beside their responses: how many are worse by the reward, and the mean rewards of each prompt
    before and after.

    For the interval prompts are in NUM_GROUPS groups by a hash of their ids, whose gains and prompts are summed: such
    sums of units add up to those of the dataset, as samples drawn from each unit would not.
    """
    number = np.asarray(found.values.field("candidate"), np.int64)
    key = found.row * (number.max(initial=0) + 1) + number
    aligned, responses = np.flatnonzero(found.is_aligned), np.flatnonzero(~found.is_aligned)
    _, before, after = np.intersect1d(key[responses], key[aligned], assume_unique=True, return_indices=True)
    before, after = responses[before], aligned[after]
    if not found.has_rewards or not len(before) or not np.isfinite(found.reward).all():
        return {}
    gain = found.reward[after] - found.reward[before]
    prompts, place, counts = np.unique(found.row[before], return_inverse=True, return_counts=True)
    means = [np.bincount(place, found.reward[side]) / counts for side in (before, after)]
    group = (seeded(found.prompt_ids.take(pa.array(prompts)), seed) % np.uint64(NUM_GROUPS)).astype(np.int64)
    return {
        "num": len(gain),
        "num_lost": int((gain < 0).sum()),
        "num_tied": int((gain == 0).sum()),
        "num_prompts": len(prompts),
        "before": float(means[0].sum()),
        "after": float(means[1].sum()),
        "group_gains": np.bincount(group, means[1] - means[0], NUM_GROUPS).tolist(),
        "group_prompts": np.bincount(group, minlength=NUM_GROUPS).tolist(),
    }


def summed(found: Iterable[Any]) -> Any:
    """Sums of dicts, lists and numbers of one shape, and the moments of all; a dict may lack keys that others have."""
    items = list(found)
    if all(isinstance(item, dict) for item in items):
        if items and all(item.keys() == MOMENTS for item in items):
            return _merged(items)
        keys = dict.fromkeys(key for item in items for key in item)
        return {key: summed(item[key] for item in items if key in item) for key in keys}
    if all(isinstance(item, list) for item in items):
        return [summed(each) for each in zip(*items, strict=True)]
    return math.fsum(items) if any(isinstance(item, float) for item in items) else sum(items)


def _merged(items: list[dict[str, float]]) -> dict[str, float]:
    """Moments of all that the items are the moments of (Chan et al., 1983): never a difference of large sums."""
    n = sum(item["n"] for item in items)
    mean = {name: math.fsum(item["n"] * item[name] for item in items) / n for name in ("x", "y")}

    def about(one: str, other: str) -> float:
        far = (item["n"] * (item[one] - mean[one]) * (item[other] - mean[other]) for item in items)
        return math.fsum([*far, *(item[one + other] for item in items)])

    return {"n": n, **mean, "xx": about("x", "x"), "yy": about("y", "y"), "xy": about("x", "y")}


def report(sums: dict[str, Any]) -> dict[str, Any]:
    """What the sums of a dataset say: means, correlation and slope of length, the gain with its 95% interval."""
    told: dict[str, Any] = {"broken": sums.get("broken", {})}
    if pairs := sums.get("pairs", {}):
        told["num_pairs"] = pairs["num"]
        if pairs["num"]:
            for name in COUNTED_IN:
                if name in pairs:
                    told[f"mean_chosen_minus_rejected_{name}"] = pairs[name]["more"] / pairs[name]["num"]
            told["share_chosen_longer"] = pairs["chosen_longer"] / pairs["num"]
            if "aligned_lost" in pairs:
                told["share_of_pairs_won_by_response"] = pairs["aligned_lost"] / pairs["num"]
    for name, found in sums.get("length", {}).items():
        if _vary(found, "x") and _vary(found, "y"):
            told[f"correlation_of_reward_with_{name}"] = found["xy"] / math.sqrt(found["xx"] * found["yy"])
            told[f"reward_slope_by_{name}"] = found["xy"] / found["xx"]
    if aligned := sums.get("aligned", {}):
        num = aligned["num_prompts"]
        told |= {
            "reward_before": aligned["before"] / num,
            "reward_after": aligned["after"] / num,
            "reward_gain": (aligned["after"] - aligned["before"]) / num,
            "reward_gain_95": _interval(np.array(aligned["group_gains"]), np.array(aligned["group_prompts"])),
            "share_aligned_lost": aligned["num_lost"] / aligned["num"],
            "share_aligned_tied": aligned["num_tied"] / aligned["num"],
        }
    return told


def _interval(sums: Floats, nums: Ints) -> list[float]:
    """95% interval of the mean of what groups sum up, by bootstrap (percentiles) over those that have anything."""
    sums, nums = sums[nums > 0], nums[nums > 0]
    draws = np.random.default_rng(0).integers(0, len(nums), (NUM_RESAMPLES, len(nums)))
    low, high = np.percentile(sums[draws].sum(axis=1) / nums[draws].sum(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def _vary(moments: dict[str, float], name: str) -> bool:
    """Whether values are not all the same, but for what rounding makes of it."""
    return moments[name * 2] > moments["n"] * (1e-12 * moments[name]) ** 2


def refusal(sums: dict[str, Any]) -> str | None:
    """Why a dataset may not be published; None where it may."""
    broken = {name: count for name, count in sums.get("broken", {}).items() if count}
    if not broken:
        return None
    return ", ".join(f"{count} {BROKEN[name]}" for name, count in broken.items())
