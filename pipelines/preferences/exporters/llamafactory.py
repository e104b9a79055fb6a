"""LLaMA-Factory's sharegpt format with its default tags, of ranked pairs and of KTO."""

import json

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.preferences.arrow import whole
from pipelines.preferences.exporters.columns import (
    CONTENT,
    ROLE,
    answers,
    conversation,
    lists,
    message,
    others,
)

SPLITS = ("train", "validation", "test")
TAGS = {"system": "system", "user": "human", "assistant": "gpt"}
FIELDS = ("from", "value")

READ = """\
```bash
llamafactory-cli train --dataset_dir <this folder> --dataset train …
```

The datasets `train`, `validation` and `test` are described in `dataset_info.json`, beside this card."""


def dataset_info(strategy: str) -> str:
    """`dataset_info.json`: a dataset for each split, read through the dataset card, which knows the files."""
    ranking = strategy != "unpaired"
    names = ["messages", *(["chosen", "rejected"] if ranking else ["kto_tag"])]
    columns = {name: "conversations" if name == "messages" else name for name in names}
    known = {"script_url": ".", "formatting": "sharegpt", "ranking": ranking, "columns": columns}
    return json.dumps({split: {**known, "split": split} for split in SPLITS}, indent=2) + "\n"


def llamafactory(table: pa.Table) -> pa.Table:
    """Pairs: `conversations`, which ends with the user's message, and `chosen` and `rejected` as one message each.
    Unpaired: `conversations` up to the answer, and `kto_tag` (true: desirable). Then the other columns.

    Roles and fields have the names that LLaMA-Factory takes where `dataset_info.json` names no `tags`: with some of
    them named, the others would be none, and every chat with a system message would be skipped.
    """
    prompts = whole(table["prompt"])
    if "label" in table.column_names:
        chats = conversation(prompts, whole(table["completion"]))
        made = {"conversations": _tagged(chats), "kto_tag": table["label"]}
        return pa.table({**made, **others(table, "prompt", "completion", "label")})
    sides = zip(("chosen", "rejected"), answers(table), strict=True)
    made = {name: message(texts, TAGS["assistant"], FIELDS) for name, texts in sides}
    return pa.table({"conversations": _tagged(prompts), **made, **others(table, "prompt", *made)})


def _tagged(chats: pa.ListArray) -> pa.ListArray:
    turns = chats.flatten()
    names = pa.array(TAGS.values()).take(pc.index_in(pc.struct_field(turns, ROLE), pa.array(TAGS)))
    fields = [pa.field(name, pa.string(), False) for name in FIELDS]
    tagged = pa.StructArray.from_arrays([names, pc.struct_field(turns, CONTENT)], fields=fields)
    return lists(pc.list_value_length(chats).to_numpy(), tagged)
