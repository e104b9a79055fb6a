"""The columns of the corpus, of unit files and of the quarantine. Field names are API: readers depend on them."""

import pyarrow as pa

from actors.contract import ALIGNED_LIST, PROBLEM, PROMPT, RESPONSES, REWARDS

VERSION = 2
"""Part of every run's fingerprint; raised when a field is added, or its meaning changes."""

SOURCE = pa.struct(
    [
        pa.field("shard", pa.string(), False),  # path below the input root
        pa.field("row_group", pa.int32(), False),  # counted from 0
        pa.field("row", pa.int64(), False),  # of the whole shard, counted from 0
    ]
)

PROMPT_ID = pa.field("prompt_id", pa.string(), False)
"""The user's id, or `h:` and 32 hex digits of a hash of the prompt; `row:<shard>:<row>` where neither could be read."""

RESERVED = ("unit", "shard", "stored", "reward_notes", "run")
"""Besides the columns: labels of a travelling unit, what it brings along, and the key in partitions' paths."""

CORPUS = pa.schema(
    [
        PROMPT_ID,
        pa.field("prompt", PROMPT, False),  # a chat; a string prompt is one user message
        pa.field("responses", RESPONSES, False),  # one per candidate, failed ones included: at least one is ok
        pa.field("aligned", ALIGNED_LIST, False),  # parallel to `responses`
        pa.field("rewards", REWARDS),  # null where nothing was scored
        pa.field("source", SOURCE, False),
    ]
)
"""One row per prompt. The user's `input.keep_columns` follow, with the types of the input."""

QUARANTINE = pa.schema(
    [
        PROMPT_ID,
        pa.field("source", SOURCE, False),
        pa.field("unit", pa.string(), False),  # that held it; a retry makes a unit of its own
        *PROBLEM,  # stage, cause, error_class, message, attempts
        pa.field("input", pa.string()),  # the whole input row as JSON; null where its row group cannot be read
        pa.field("prompt", PROMPT),  # null where it is what is wrong
        pa.field("responses", RESPONSES),  # what was made before it failed; null where it failed earlier
        pa.field("aligned", ALIGNED_LIST),
    ]
)
"""One row per input row that has no usable candidate."""

UNIT = pa.schema(
    [
        PROMPT_ID,
        pa.field("prompt", PROMPT),
        pa.field("responses", RESPONSES),
        pa.field("aligned", ALIGNED_LIST),
        pa.field("rewards", REWARDS),
        pa.field("source", SOURCE, False),  # in what this job reads
        pa.field("published_source", SOURCE),  # where that is a corpus: the row's `source` there, which it keeps
        pa.field("status", pa.string(), False),  # ok | quarantined
        pa.field("problem", PROBLEM),  # null when ok
        pa.field("input", pa.string()),  # as in QUARANTINE; null when ok
    ]
)
"""One row per input row of the unit, in input order. The kept columns follow."""
