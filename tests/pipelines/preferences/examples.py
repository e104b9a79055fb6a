"""Tables as strategies make them, of chats that a format easily loses something of, and of real ones.

The real ones are 1,400 pairs of HH-RLHF, `hh_harmless_pairs.parquet` (columns `prompt`, a list of messages, `chosen`
and `rejected`, strings) in the folder BURNISH_EVAL_DATA: evaluation data that is in no repository. Tests that need them
are skipped without it (see the README on `make test`).
"""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.contract import PROMPT
from pipelines.preferences import schema

EVAL_DATA = Path(os.environ.get("BURNISH_EVAL_DATA", "none"))


def needs(name: str) -> pytest.MarkDecorator:
    """Skips where the file is not there."""
    advice = f"set BURNISH_EVAL_DATA to a folder that holds {name} (README: Two commands)"
    return pytest.mark.skipif(not (EVAL_DATA / name).exists(), reason=advice)


needs_hh_harmless = needs("hh_harmless_pairs.parquet")

Chat = list[dict[str, str]]

SYSTEM = {"role": "system", "content": "You answer in one sentence."}
CHATS: dict[str, Chat] = {
    "single": [{"role": "user", "content": "Which is larger, 2/3 or 3/5?"}],
    "system": [SYSTEM, {"role": "user", "content": "Why is the sky blue?"}],
    "turns": [
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Elbe."},
        {"role": "user", "content": "And one in Asia?\n\nNot the Yangtze."},
    ],
    "system-turns": [
        SYSTEM,
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Elbe."},
        {"role": "user", "content": "Where does it end?"},
    ],
    "unicode": [{"role": "user", "content": 'Naïve café?\u2028東京 "10 %" of {x} \\n 🎉'}],
}
ANSWERS = {  # chosen, rejected
    "single": ("2/3 is larger: 10/15 against 9/15.", "3/5."),
    "system": ("Blue light is scattered most.", "Because it is.\n\nOr is it?"),
    "turns": ("The Mekong.", "The Yangtze."),
    "system-turns": ("In the North Sea.", "In the sea"),
    "unicode": ('東京 🎉\u2028\n- oui\n- "non"', "A"),
}


def pairs() -> pa.Table:
    """A row of `pairs` for each chat, with the kept column `topic`."""
    return _table("pairs", [_pair(name) for name in CHATS])


def unpaired() -> pa.Table:
    return _singles(pairs())


def curriculum() -> pa.Table:
    return _table("curriculum", [{**_pair(name), "phase": 1 + number % 2} for number, name in enumerate(CHATS)])


def triple() -> pa.Table:
    known = {"best_reward": 2.0, "best_model": "large", "best_policy": "large", "best_kind": "response"}
    return _table("triple", [{**_pair(name), "best": f"{name} at its best.", **known} for name in CHATS])


def steps() -> pa.Table:
    """As `pairs`, with a common first sentence of each two answers, and a last one behind the step that differs."""
    common, rest = "Let us see. ", " That is it."
    rows = []
    for pair in map(_pair, CHATS):
        full = {f"full_{side}": common + pair[side] + rest for side in ("chosen", "rejected")}
        steps = {side: f"{pair[side]} " for side in ("chosen", "rejected")}  # with the white space before the next one
        rows.append({**pair, **full, **steps, "prefix": common})
    return _table("steps", rows)


def hh_harmless() -> pa.Table:
    """The real pairs, without rewards. Four have an empty answer, and in three a role speaks twice in a row."""
    real = pq.read_table(EVAL_DATA / "hh_harmless_pairs.parquet")
    columns: dict[str, Any] = {name: pa.repeat("hh", len(real)) for name in schema.STRATEGIES["pairs"].names}
    columns |= {name: pa.nulls(len(real), pa.float64()) for name in ("chosen_reward", "rejected_reward", "margin")}
    columns |= {"prompt_id": [str(number) for number in range(len(real))], "prompt": real["prompt"].cast(PROMPT)}
    columns |= {"chosen": real["chosen"], "rejected": real["rejected"], "weight": pa.repeat(1.0, len(real))}
    columns |= {"partition": pa.repeat(pa.scalar(1, pa.int32()), len(real))}
    return pa.table(columns, schema.STRATEGIES["pairs"])


def hh_harmless_unpaired() -> pa.Table:
    return _singles(hh_harmless()).drop_columns(["topic"])


def _singles(pairs: pa.Table) -> pa.Table:
    """Each pair's answers one after the other, the chosen one desirable; rewards of 1 and 0 where it has none."""
    rows = []
    for pair in pairs.to_pylist():
        for label, side in ((True, "chosen"), (False, "rejected")):
            known = {name: pair[f"{side}_{name}"] for name in ("reward", *schema.PROVENANCE)}
            if known["reward"] is None:
                known["reward"] = float(label)
            rows.append({**pair, "completion": pair[side], "label": label, **known})
    return _table("unpaired", rows)


def _row(name: str) -> dict[str, Any]:
    return {"prompt_id": name, "prompt": CHATS[name], "split": "train", "partition": 1, "topic": f"of {name}"}


def _pair(name: str) -> dict[str, Any]:
    rewards = {"chosen_reward": 1.25, "rejected_reward": -len(name) / 4, "margin": 1.25 + len(name) / 4}
    known = {"chosen_model": "aligner", "chosen_policy": "large", "chosen_kind": "aligned"}
    known |= {"rejected_model": "small", "rejected_policy": "small", "rejected_kind": "response"}
    sides = dict(zip(("chosen", "rejected"), ANSWERS[name], strict=True))
    return {**_row(name), **sides, **rewards, **known, "weight": 1.0}


def _table(strategy: str, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema.STRATEGIES[strategy].append(pa.field("topic", pa.string())))
