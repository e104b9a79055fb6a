"""TRL's conversational preference format, for DPOTrainer and RewardTrainer."""

import pyarrow as pa

from actors.contract import MESSAGE
from pipelines.preferences.arrow import whole


def trl(pairs: pa.Table) -> pa.Table:
    """`prompt`, `chosen` and `rejected` as message lists, `margin` where the reward has one, then the kept columns.

    Chosen and rejected are the assistant's one message after the prompt (TRL, "Dataset formats", preference,
    conversational, explicit prompt).
    """
    columns = {name: pairs[name] for name in pairs.column_names if name not in ("split", "partition")}
    for name in ("chosen", "rejected"):
        columns[name] = as_messages(pairs[name])
    return pa.table(columns)


def as_messages(texts: pa.ChunkedArray, role: str = "assistant") -> pa.ListArray:
    """Each text as a list of one message."""
    texts = whole(texts)
    messages = pa.StructArray.from_arrays([pa.repeat(role, len(texts)), texts], fields=list(MESSAGE))
    return pa.ListArray.from_arrays(pa.array(range(len(texts) + 1), pa.int32()), messages)
