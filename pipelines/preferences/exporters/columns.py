"""The columns that several exporters are made of: answers, messages and whole conversations."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actors.contract import MESSAGE
from pipelines.preferences.arrow import whole

ROLE, CONTENT = (field.name for field in MESSAGE)


def answers(table: pa.Table) -> tuple[pa.Array, pa.Array]:
    """Chosen and rejected as the texts that follow the prompt; of `steps`, the common sentences and one step each.

    Those sentences are as likely in both texts, so they cancel out in every loss that goes by the difference of
    log-probabilities, DPO's among them. What is left is the steps, and the end of turn that a trainer puts after each,
    though the answer went on there: chosen and rejected end alike, yet it is not as likely after the one as after the
    other. White space between sentences that such a text ends with is left out, as no answer ends with any.
    """
    chosen, rejected = (whole(table[side]) for side in ("chosen", "rejected"))
    if "prefix" not in table.column_names:
        return chosen, rejected
    prefix = whole(table["prefix"])
    one, other = (pc.binary_join_element_wise(prefix, step, "") for step in (chosen, rejected))
    return pc.utf8_rtrim_whitespace(one), pc.utf8_rtrim_whitespace(other)


def message(texts: pa.Array, role: str = "assistant", names: tuple[str, str] = (ROLE, CONTENT)) -> pa.StructArray:
    """Each text as a message of one role; `names` are those of the message's two fields."""
    fields = [pa.field(name, pa.string(), False) for name in names]
    return pa.StructArray.from_arrays([pa.repeat(role, len(texts)), texts], fields=fields)


def messages(texts: pa.Array) -> pa.ListArray:
    """Each text as a list of one message, the assistant's."""
    return lists(np.ones(len(texts), np.int32), message(texts))


def conversation(prompts: pa.ListArray, texts: pa.Array) -> pa.ListArray:
    """Each prompt's messages with the assistant's text as one more."""
    lengths = pc.list_value_length(prompts).to_numpy()
    turns = pa.concat_arrays([prompts.flatten(), message(texts)])
    num_before = len(turns) - len(texts)
    order = np.insert(np.arange(num_before), np.cumsum(lengths), np.arange(num_before, len(turns)))
    return lists(lengths + 1, turns.take(pa.array(order)))


def last_content(prompts: pa.ListArray) -> pa.Array:
    """The text of each prompt's last message."""
    ends = np.cumsum(pc.list_value_length(prompts).to_numpy())
    return pc.struct_field(prompts.flatten(), CONTENT).take(pa.array(ends - 1))


def lists(lengths: npt.NDArray[np.int32], values: pa.Array) -> pa.ListArray:
    """`values` cut into lists of `lengths`."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def others(table: pa.Table, *used: str) -> dict[str, pa.ChunkedArray]:
    """The columns that are carried along: all but those in `used`, and where a row belongs, which its file tells."""
    return {name: table[name] for name in table.column_names if name not in {*used, "split", "partition"}}
