"""Exporters: what each makes, that `datasets` reads it back, and that real chats come through whole."""

import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.contract import ConfigError
from pipelines.preferences import schema
from pipelines.preferences.dataset import json_line
from pipelines.preferences.exporters import EXPORTERS
from pipelines.preferences.exporters.llamafactory import TAGS
from pipelines.preferences.settings import BuildConfig, BuildPreferencesConfig, CorpusConfig
from tests.pipelines.preferences import examples

CASES = [(export, strategy) for export, exporter in EXPORTERS.items() for strategy in sorted(exporter.strategies)]
ROW = "system-turns"
ANSWER, WORSE = ({"role": "assistant", "content": text} for text in examples.ANSWERS[ROW])
CHAT = examples.CHATS[ROW]
GPT = [
    {"from": "system", "value": "You answer in one sentence."},
    {"from": "human", "value": "Name a river."},
    {"from": "gpt", "value": "The Elbe."},
    {"from": "human", "value": "Where does it end?"},
]
CARRIED = {"prompt_id": ROW, "topic": f"of {ROW}"}
PAIR = CARRIED | {"chosen_model": "aligner", "chosen_policy": "large", "chosen_kind": "aligned", "weight": 1.0}
PAIR |= {"rejected_model": "small", "rejected_policy": "small", "rejected_kind": "response", "margin": 4.25}
REWARDS = {"chosen_reward": 1.25, "rejected_reward": -3.0}
SINGLE = CARRIED | {"reward": 1.25, "model": "aligner", "policy": "large", "kind": "aligned"}
MADE: dict[tuple[str, str], dict[str, Any]] = {
    ("trl", "pairs"): {"prompt": CHAT, "chosen": [ANSWER], "rejected": [WORSE], **PAIR, **REWARDS},
    ("kto", "unpaired"): {"prompt": CHAT, "completion": [ANSWER], "label": True, **SINGLE},
    ("axolotl", "pairs"): {"messages": CHAT, "chosen": ANSWER, "rejected": WORSE, **PAIR, **REWARDS},
    ("axolotl", "unpaired"): {"completion": [*CHAT, ANSWER], "label": True, **SINGLE},
    ("llamafactory", "pairs"): {
        "conversations": GPT,
        "chosen": {"from": "gpt", "value": ANSWER["content"]},
        "rejected": {"from": "gpt", "value": WORSE["content"]},
        **PAIR,
        **REWARDS,
    },
    ("llamafactory", "unpaired"): {
        "conversations": [*GPT, {"from": "gpt", "value": ANSWER["content"]}],
        "kto_tag": True,
        **SINGLE,
    },
    ("openrlhf", "pairs"): {"chosen": [*CHAT, ANSWER], "rejected": [*CHAT, WORSE], **PAIR, **REWARDS},
    ("ultrafeedback", "pairs"): {
        "prompt": "Where does it end?",
        "chosen": [*CHAT, ANSWER],
        "rejected": [*CHAT, WORSE],
        "messages": [*CHAT, ANSWER],
        "score_chosen": 1.25,
        "score_rejected": -3.0,
        **PAIR,
    },
}


def table(strategy: str) -> pa.Table:
    made: pa.Table = getattr(examples, strategy)()
    return made


@pytest.mark.parametrize(("export", "strategy"), MADE)
def test_row_is_what_the_trainer_reads(export: str, strategy: str) -> None:
    rows = EXPORTERS[export].convert(table(strategy)).to_pylist()
    assert next(row for row in rows if row["prompt_id"] == ROW) == MADE[export, strategy]


@pytest.mark.parametrize(("export", "strategy"), CASES)
def test_rows_do_not_depend_on_their_table(export: str, strategy: str) -> None:
    """A part may begin in the middle of a table, hold chunks of it or no row at all."""
    convert, rows = EXPORTERS[export].convert, table(strategy)
    whole = convert(rows)
    whole.validate(full=True)
    assert whole["prompt_id"].to_pylist() == rows["prompt_id"].to_pylist()
    assert convert(rows.slice(1, 3)) == whole.slice(1, 3)
    assert convert(pa.concat_tables([rows.slice(0, 2), rows.slice(2)])).combine_chunks() == whole
    assert convert(rows.slice(0, 0)).schema == convert(rows.schema.empty_table()).schema == whole.schema


@pytest.mark.parametrize("export", [export for export, strategy in CASES if strategy == "steps"])
def test_steps_follow_what_both_have_in_common(export: str) -> None:
    rows = EXPORTERS[export].convert(table("steps")).to_pylist()
    texts = {chat: tuple(f"Let us see. {text}" for text in pair) for chat, pair in examples.ANSWERS.items()}
    assert {row["prompt_id"]: pair_of(export, row)[1:] for row in rows} == texts


def test_triple_has_its_best_answer_as_reference() -> None:
    rows = EXPORTERS["trl"].convert(table("triple")).to_pylist()
    assert [row["reference"] for row in rows] == [
        [{"role": "assistant", "content": f"{name} at its best."}] for name in examples.CHATS
    ]
    assert {row["prompt_id"]: pair_of("trl", row)[1:] for row in rows} == examples.ANSWERS


@pytest.mark.parametrize(("export", "strategy"), CASES)
def test_kept_column_may_not_have_a_name_that_the_trainer_reads(export: str, strategy: str) -> None:
    known = {*schema.STRATEGIES[strategy].names, "topic"}
    made = set(EXPORTERS[export].convert(table(strategy)).column_names) - known
    assert made <= EXPORTERS[export].names
    given = {"build": BuildConfig(strategy=strategy, reward="r"), "export": export}
    for name in EXPORTERS[export].names:
        with pytest.raises(ConfigError, match=f"keep_columns may not name {name}: export={export}"):
            BuildPreferencesConfig(input=CorpusConfig(keep_columns=[name]), **given)


@pytest.mark.parametrize("form", ["parquet", "json"])
@pytest.mark.parametrize(("export", "strategy"), CASES)
def test_datasets_reads_back_what_was_written(export: str, strategy: str, form: str, tmp_path: Path) -> None:
    exported = EXPORTERS[export].convert(table(strategy))
    assert loaded(exported, form, tmp_path) == exported.to_pylist()


def test_kept_column_of_what_json_has_no_type_for_is_written() -> None:
    assert json.loads(json_line({"day": datetime.date(2026, 1, 2)})) == {"day": "2026-01-02"}


@examples.needs_hh_harmless
@pytest.mark.parametrize("form", ["parquet", "json"])
@pytest.mark.parametrize("export", [export for export, strategy in CASES if strategy == "pairs"])
def test_real_pairs_come_through_whole(export: str, form: str, tmp_path: Path) -> None:
    real = examples.hh_harmless()
    rows = loaded(EXPORTERS[export].convert(real), form, tmp_path)
    assert len(rows) == 1400
    assert [pair_of(export, row) for row in rows] == [
        (row["prompt"], row["chosen"], row["rejected"]) for row in real.to_pylist()
    ]


@examples.needs_hh_harmless
@pytest.mark.parametrize("form", ["parquet", "json"])
@pytest.mark.parametrize("export", [export for export, strategy in CASES if strategy == "unpaired"])
def test_real_answers_come_through_whole(export: str, form: str, tmp_path: Path) -> None:
    real = examples.hh_harmless_unpaired()
    rows = loaded(EXPORTERS[export].convert(real), form, tmp_path)
    assert len(rows) == 2800
    assert [single_of(export, row) for row in rows] == [
        (row["prompt"], row["completion"], row["label"]) for row in real.to_pylist()
    ]


def loaded(table: pa.Table, form: str, folder: Path) -> list[dict[str, Any]]:
    """The rows as `datasets` has them, from a file of that form."""
    path = folder / f"part.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    else:
        path.write_bytes(b"".join(map(json_line, table.to_pylist())))
    rows = datasets.load_dataset(form, data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    return list(rows)


def pair_of(export: str, row: dict[str, Any]) -> tuple[examples.Chat, str, str]:
    """What an exported pair says, back from the trainer's columns: prompt, chosen and rejected."""
    chosen, rejected = row["chosen"], row["rejected"]
    if export == "trl":
        (chosen,), (rejected,) = chosen, rejected
        prompt = row["prompt"]
    elif export == "axolotl":
        prompt = row["messages"]
    elif export == "llamafactory":
        prompt, (chosen, rejected) = untagged(row["conversations"]), untagged([chosen, rejected])
    else:
        (*prompt, chosen), (*same, rejected) = chosen, rejected
        assert prompt == same
    assert chosen["role"] == rejected["role"] == "assistant"
    return prompt, chosen["content"], rejected["content"]


def single_of(export: str, row: dict[str, Any]) -> tuple[examples.Chat, str, bool]:
    """What an exported single answer says: prompt, completion and label."""
    if export == "kto":
        prompt, (answer,), label = row["prompt"], row["completion"], row["label"]
    elif export == "axolotl":
        (*prompt, answer), label = row["completion"], row["label"]
    else:
        (*prompt, answer), label = untagged(row["conversations"]), row["kto_tag"]
    assert answer["role"] == "assistant"
    return prompt, answer["content"], label


def untagged(turns: examples.Chat) -> examples.Chat:
    """LLaMA-Factory's messages with the usual names."""
    roles = {tag: role for role, tag in TAGS.items()}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
