"""The columns of `ranked`, the one intermediate table, and of what each strategy makes of it. Field names are API."""

import pyarrow as pa

from actors.contract import PROMPT

VERSION = 3
"""Part of every run's fingerprint; raised when a field comes, goes or changes its meaning."""

CANDIDATE = pa.struct(
    [
        pa.field("text", pa.string(), False),  # never empty or white space
        pa.field("kind", pa.string(), False),  # response | aligned
        pa.field("candidate", pa.int32(), False),  # index in the corpus row's `responses`, and so in its `aligned`
        pa.field("model", pa.string(), False),  # that made the text: a policy, or the aligner
        pa.field("policy", pa.string(), False),  # that made the response: itself, or what was aligned
        pa.field("finish_reason", pa.string()),  # null where the text was stored
        pa.field("num_tokens", pa.int32()),  # null where one of the prompt's texts was stored: then characters count
        pa.field("reward", pa.float64()),  # the chosen reward or weighted sum, less its length's part; null without one
        pa.field("rank", pa.int32(), False),  # 1 = best; equal rewards share a rank ("1224")
    ]
)

PROMPT_ID = pa.field("prompt_id", pa.string(), False)
CHAT = pa.field("prompt", PROMPT, False)
SPLIT = pa.field("split", pa.string(), False)  # train | validation | test
PARTITION = pa.field("partition", pa.int32(), False)  # the corpus's run= number

RANKED = pa.schema(
    [
        PROMPT_ID,
        CHAT,
        PARTITION,
        pa.field("candidates", pa.list_(pa.field("element", CANDIDATE, False)), False),  # usable ones, best first
    ]
)
"""One row per prompt; a prompt of which no candidate is usable has an empty list. Kept columns follow."""


def _texts(*names: str) -> list[pa.Field]:
    return [pa.field(name, pa.string(), False) for name in names]


def _rewards(*names: str) -> list[pa.Field]:
    """Null where the dataset is built without a reward."""
    return [pa.field(name, pa.float64()) for name in names]


def _list(name: str, item: pa.DataType) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("element", item, False)), False)


def _provenance(*sides: str) -> list[pa.Field]:
    """Of each side's text what made it, whose response it is or was aligned from, and which of the two it is."""
    return _texts(*(f"{side}_{name}" for name in PROVENANCE for side in sides))


PROVENANCE = ("model", "policy", "kind")
"""Fields of CANDIDATE that tell where a text comes from."""

WEIGHT = pa.field("weight", pa.float64(), False)  # 1.0 unless weighted by semantic similarity
WEIGHED = {
    "pairs": "chosen", "curriculum": "chosen", "triple": "chosen", "steps": "full_chosen", "refinement": "improved"
}  # fmt: skip
"""The answer by whose similarity with the prompt a row is weighted, by strategy: those that compare two answers."""

_PAIR = [
    *_texts("chosen", "rejected"),
    *_rewards("chosen_reward", "rejected_reward", "margin"),
    *_provenance("chosen", "rejected"),
]
_COLUMNS = {
    "pairs": [*_PAIR, WEIGHT],
    "unpaired": [
        *_texts("completion"),
        pa.field("label", pa.bool_(), False),
        pa.field("reward", pa.float64(), False),
        *_texts(*PROVENANCE),
    ],
    "ranked": [
        _list("completions", pa.string()),
        _list("rewards", pa.float64()),
        _list("ranks", pa.int32()),
        _list("models", pa.string()),
        _list("policies", pa.string()),
        _list("kinds", pa.string()),
    ],
    "curriculum": [*_PAIR, WEIGHT, pa.field("phase", pa.int32(), False)],  # 1 = easiest: the largest margin
    "triple": [
        *_texts("best", "chosen", "rejected"),
        *_rewards("best_reward", "chosen_reward", "rejected_reward", "margin"),  # of chosen over rejected
        *_provenance("best", "chosen", "rejected"),
        WEIGHT,
    ],
    "steps": [
        *_texts("prefix", "chosen", "rejected", "full_chosen", "full_rejected"),
        *_rewards("chosen_reward", "rejected_reward", "margin"),
        *_provenance("chosen", "rejected"),
        WEIGHT,
    ],
    "refinement": [
        *_texts("response", "improved"),
        *_rewards("response_reward", "improved_reward", "margin"),
        *_provenance("response", "improved"),
        WEIGHT,
    ],
    "trajectory": [
        _list("states", pa.string()),
        _list("rewards", pa.float64()),
        _list("models", pa.string()),
        _list("policies", pa.string()),
        _list("kinds", pa.string()),
    ],
}

STRATEGIES = {name: pa.schema([PROMPT_ID, CHAT, *columns, SPLIT, PARTITION]) for name, columns in _COLUMNS.items()}
"""What each strategy makes, by its name. Texts are plain strings, the prompt stays a list of messages. Kept columns
of the corpus follow."""

_NAMES = dict.fromkeys(name for columns in STRATEGIES.values() for name in columns.names)
MODELS = tuple(name for name in _NAMES if name.rpartition("_")[2] in ("model", "models", "policy", "policies"))
"""The columns of strategies that name the models of texts and whose answers they are."""

DROPPED = pa.schema(
    [
        PROMPT_ID,
        pa.field("shard", pa.string(), False),  # the corpus's part, below the corpus's root
        pa.field("row", pa.int64(), False),  # of that part, counted from 0
        pa.field("cause", pa.string(), False),
    ]
)
"""One row per prompt of the corpus from which nothing was made."""
