"""Run records and their fingerprints: what made the rows, and refusing to mix two makings without being told to."""

import contextlib
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from actors.contract import ConfigError
from pipelines.corpus.commit import unit_facts
from pipelines.corpus.parquet import Damaged
from pipelines.corpus.state import KINDS, State, kinds_of
from pipelines.corpus.storage import Storage

ABSENT = "(not there)"
PACE = "-pace.json"


def digest(fingerprint: Mapping[str, Any]) -> str:
    """16 hex digits of a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two fingerprints, by key, each in words: `KEY was X and is Y`."""
    return {
        key: f"{key} was {before.get(key, ABSENT)!r} and is {now.get(key, ABSENT)!r}"
        for key in sorted({*before, *now})
        if before.get(key, ABSENT) != now.get(key, ABSENT)
    }


def latest_run(output: Storage) -> dict[str, Any] | None:
    """The last run record; None before the first run."""
    number = _last_number(output)
    return _read_run(output, number) if number else None


def making_run(output: Storage, state: State) -> dict[str, Any] | None:
    """The record of the run that made the newest rows there are, committed ones before published; None without any.

    It is not always the last: one may have ended before its first commit.
    """
    for unit in state.committed:
        with contextlib.suppress(Damaged, FileNotFoundError):  # found out, or published by another, at publishing
            return _read_run(output, unit_facts(output, unit, state.sizes[unit])["run"])
    if state.partitions:
        return _read_run(output, max(state.partitions[-1].plan["runs"]))
    return None


def _read_run(output: Storage, number: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(output.read(f"runs/{number:06d}.json"))
    return record


def _last_number(output: Storage) -> int:
    return max((int(name[:6]) for name in output.sizes("runs") if name.endswith(".json")), default=0)


def create_run(output: Storage, record: dict[str, Any]) -> int:
    """Write the next run record, exclusively. Returns its number."""
    number = _last_number(output) + 1
    while not output.create(f"runs/{number:06d}.json", json.dumps({"number": number, **record}, indent=1).encode()):
        number += 1
    return int(number)


def write_pace(output: Storage, run: int, pace: Mapping[str, Any]) -> None:
    """Write how fast run `run` was, beside its record.

    Args:
        pace: `digest` of the run's fingerprint; `num_rows` made in `seconds`, the first `startup_s` of them until every
            pool had an engine; `pools`: by name the `num_gpus` that each came to hold and the `num_tokens` it made.
    """
    output.create(f"runs/{run:06d}{PACE}", json.dumps({"run": run, **pace}, indent=1).encode())


def latest_pace(output: Storage) -> dict[str, Any] | None:
    """What `write_pace` wrote last; None where no run has come to its end."""
    names = [name for name in output.sizes("runs") if name.endswith(PACE)]
    if not names:
        return None
    pace: dict[str, Any] = json.loads(output.read(f"runs/{max(names)}"))
    return pace


def refuse_other_kind(output: Storage) -> None:
    """Raise ConfigError where the root holds another of KINDS: its card, runs and units would become a mixture."""
    found = kinds_of(output)
    run = None if found else latest_run(output)
    if run is not None:  # which has not come to a partition
        found = {"preferences" if "build" in run["config"] else "corpus"}
    for kind in sorted(found - {output.partitions}):
        raise ConfigError(
            f"output.root {output.url!r} holds {KINDS[kind]}: take another folder for {KINDS[output.partitions]}"
        )


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
    fixed: Collection[str] = (),
) -> None:
    """Raise ConfigError, naming each key that differs, where the rows of two makings would come together unasked.

    While committed units wait to be published another fingerprint is never accepted: one partition, one making. After
    that it takes `run.accept_changes=true`, and applies to new rows only; to keys that are `fixed` it never does.
    """
    found = changes(before, now)
    if not found or not (has_unpublished or has_published):
        return
    bound = [told for key, told in found.items() if key in fixed and not has_unpublished]
    told = "; ".join(bound or found.values())
    if bound:
        raise ConfigError(
            f"the config has changed since the last partition: {told}. "
            f"Rows made so do not go together with those that are there; take another output.root"
        )
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
