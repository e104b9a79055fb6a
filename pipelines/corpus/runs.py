"""Run records and their fingerprints: what made the rows, and refusing to mix two makings without being told to."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from actors.contract import ConfigError
from pipelines.corpus.storage import Storage

ABSENT = "(not there)"


def digest(fingerprint: Mapping[str, Any]) -> str:
    """16 hex digits of a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def latest_run(output: Storage) -> dict[str, Any] | None:
    """The last run record; None before the first run."""
    numbers = [int(name[:6]) for name in output.sizes("runs") if name.endswith(".json")]
    if not numbers:
        return None
    record: dict[str, Any] = json.loads(output.read(f"runs/{max(numbers):06d}.json"))
    return record


def create_run(output: Storage, record: dict[str, Any]) -> int:
    """Write the next run record, exclusively. Returns its number."""
    number = (latest_run(output) or {"number": 0})["number"] + 1
    while not output.create(f"runs/{number:06d}.json", json.dumps({"number": number, **record}, indent=1).encode()):
        number += 1
    return int(number)


def check_input_root(before: str, now: str, *, has_rows: bool, accept_changes: bool) -> None:
    """Raise ConfigError where shards are named below another folder than in the last run: all would look new.

    Data that was moved as it is keeps its paths below the root, and its versions where the store keeps ETags or
    modification times: `run.accept_changes=true` goes on with it.
    """
    if before != now and has_rows and not accept_changes:
        raise ConfigError(
            f"input.path is rooted at {now} and was at {before} in the last run: shards are known by their path below "
            f"that, so rows that are done would be made again. Spell input.path so that it is rooted where it was, "
            f"take another output.root, or, where the data itself has moved, run.accept_changes=true"
        )


def check_fingerprint(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    has_unpublished: bool,
    has_published: bool,
    accept_changes: bool,
) -> None:
    """Raise ConfigError, naming each key that differs, where the rows of two makings would come together unasked.

    While committed units wait to be published another fingerprint is never accepted: one partition, one making. After
    that it takes `run.accept_changes=true`, and applies to new rows only.
    """
    changes = [key for key in sorted({*before, *now}) if before.get(key, ABSENT) != now.get(key, ABSENT)]
    if not changes or not (has_unpublished or has_published):
        return
    told = "; ".join(f"{key} was {before.get(key, ABSENT)!r} and is {now.get(key, ABSENT)!r}" for key in changes)
    if has_unpublished:
        raise ConfigError(
            f"the config has changed while units of the last run wait to be published: {told}. "
            f"Run once more with the old values, or take another output.root"
        )
    if not accept_changes:
        raise ConfigError(
            f"the config has changed since the last partition: {told}. "
            f"run.accept_changes=true applies it to new rows only"
        )
