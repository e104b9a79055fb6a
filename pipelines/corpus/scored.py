"""What became of scoring: how many texts have a score, why others have none, and how many of them may be published."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from actors.contract import SCORED

MESSAGE_LENGTH = 300


def noted(rows: pa.Table) -> dict[str, Any]:
    """Of a unit that may have `reward_notes`: how often each was made, "<reward>: <note>", and of those that tell why a
    text has no score the first, as `unscored`: its prompt_id and message."""
    counts: Counter[str] = Counter()
    unscored: dict[str, dict[str, str]] = {}
    if "reward_notes" in rows.column_names:
        columns = (rows[name].to_pylist() for name in ("prompt_id", "reward_notes"))
        for prompt_id, notes in zip(*columns, strict=True):
            for note in notes or []:
                name = f"{note['reward']}: {note['note']}"
                counts[name] += 1
                if note["message"] is not None and name not in unscored:
                    unscored[name] = {"prompt_id": prompt_id, "message": _line(note["message"])}
    return {"reward_notes": dict(counts), "unscored": unscored}


def summed(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """What `noted` tells of units, of all of them; units of earlier versions have none of it, or less."""
    counts: Counter[str] = Counter()
    unscored: dict[str, dict[str, str]] = {}
    for found in facts:
        counts.update(found.get("reward_notes", {}))
        unscored = found.get("unscored", {}) | unscored
    return {"reward_notes": dict(counts), "unscored": unscored}


def failures(told: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Of a plan or manifest: the texts that a reward could not score, by cause, the most frequent first."""
    found: defaultdict[str, dict[str, int]] = defaultdict(dict)
    counts = Counter({name: told["reward_notes"][name] for name in told.get("unscored", {})})
    for name, count in counts.most_common():
        reward, _, cause = name.rpartition(": ")
        found[reward][cause] = count
    return dict(found)


def first_failure(told: Mapping[str, Any], reward: str) -> str:
    """The first text with a reward's most frequent failure, and what it was."""
    cause = next(iter(failures(told)[reward]))
    first = told["unscored"][f"{reward}: {cause}"]
    return f"{cause} of {first['prompt_id']}: {first['message']}"


def refusal(plan: Mapping[str, Any], most: float) -> str | None:
    """Why a plan must not be: a reward could not score more than the share `most` of its texts. None where it may."""
    for reward, causes in failures(plan).items():
        num_failed = sum(causes.values())
        num_texts = num_failed + plan["reward_notes"].get(f"{reward}: {SCORED}", 0)
        if num_failed > most * num_texts:
            return (
                f"reward {reward}: {num_failed} of {num_texts} texts have no score, more than "
                f"run.max_unscored_fraction={most:g} allows; nothing is published. The first is "
                f"{first_failure(plan, reward)}. run.max_unscored_fraction=1 publishes them all the same, and "
                f"score_corpus.py scores them anew, into another root; to make these rows again instead, delete the "
                f"folder `units` of the output root"
            )
    return None


def _line(message: str) -> str:
    text = " ".join(message.split())[:MESSAGE_LENGTH]
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
