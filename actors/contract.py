"""What pipelines and actors agree on: the unit table, its Arrow types, row errors and config field metadata.

This is the one module that `pipelines/corpus/` and `actors/` both import; neither imports the other.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import pyarrow as pa

# --- the unit table -------------------------------------------------------------------------------------------------
#
# A unit is a `pyarrow.Table` with one row per input row. Stages add columns to it and never drop, add or reorder rows.

MESSAGE = pa.struct([pa.field("role", pa.string(), False), pa.field("content", pa.string(), False)])
PROMPT = pa.list_(pa.field("element", MESSAGE, False))
"""A chat: system (optional, first), then user and assistant in turn, user last. Null only where `problem` is set."""

RESPONSE_FIELDS = [
    pa.field("text", pa.string(), False),  # without reasoning, stripped of surrounding white space
    pa.field("reasoning", pa.string()),  # a reasoning model's thinking; null when there was none
    pa.field("model", pa.string(), False),  # as configured: folder name, hub id or provenance label
    pa.field("status", pa.string(), False),  # ok | failed
    pa.field("error", pa.string()),  # a RowError's text when failed
    pa.field("finish_reason", pa.string()),  # stop | length; null when failed or stored
    pa.field("num_prompt_tokens", pa.int32()),  # tokens the model read; null when failed or stored
    # Tokens the model made, without end-of-sequence and without what `diffpo` reserved of the response; null likewise.
    pa.field("num_tokens", pa.int32()),
    pa.field("seed", pa.int64(), False),  # of this candidate's sampling
]
RESPONSE = pa.struct(RESPONSE_FIELDS)
ALIGNED = pa.struct(
    [
        *RESPONSE_FIELDS,
        # Forward passes of a parallel decoder; null where one token was made at a time, where the text is one that was
        # made for an earlier candidate of the row (`AlignerConfig.ignores_response`), and when failed. Made again, the
        # same text may take others: how far a pass comes depends on what else is in the batch.
        pa.field("iterations", pa.int32()),
        pa.field("accepted", pa.int32()),  # tokens of its guesses that the text kept; null likewise
        pa.field("changed", pa.bool_()),  # text differs from the response's; null when failed
    ]
)
RESPONSES = pa.list_(pa.field("element", RESPONSE, False))
ALIGNED_LIST = pa.list_(pa.field("element", ALIGNED, False))

REWARD = pa.struct(
    [
        pa.field("name", pa.string(), False),  # of the reward: its model's, unless the config gives another
        # A score of each candidate, more is better; null where the candidate failed, or could not be scored.
        pa.field("response", pa.list_(pa.float64()), False),  # parallel to `responses`
        pa.field("aligned", pa.list_(pa.float64()), False),  # parallel to `aligned`
    ]
)
REWARDS = pa.list_(pa.field("element", REWARD, False))
"""One element per reward; null where nothing was scored."""

REWARD_NOTES = pa.list_(
    pa.struct(
        [
            pa.field("reward", pa.string(), False),  # its name
            pa.field("note", pa.string(), False),  # SCORED; why a text has no score; how a judge decided
            pa.field("message", pa.string()),  # what went wrong with a text that has no score; null for other notes
        ]
    )
)
"""What is to be counted of a row's scoring. The manifest has the counts."""
SCORED = "scored"
"""The note of a text that has a score, unless that is certain: a judge's of the text that it compares others with."""

PROBLEM = pa.struct(
    [
        pa.field("stage", pa.string(), False),  # read | policy | aligner | publish
        pa.field("cause", pa.string(), False),  # a slug to group and to retry by, e.g. prompt_too_long
        pa.field("error_class", pa.string(), False),
        pa.field("message", pa.string(), False),
        pa.field("attempts", pa.int32(), False),
    ]
)
"""Why a row is quarantined; null for every row that is well."""

_ROWS = "rows"


def pack(unit: pa.Table, /, **labels: str) -> pa.Table:
    """Wrap a unit of n rows into a table of ONE row: the form that travels through Ray Data.

    `labels` become string columns of that row: what is said of the unit as a whole. The n rows are one cell of bytes,
    an Arrow IPC stream: nested columns Ray would take apart in Python, array by array, wherever a block goes.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, unit.schema) as stream:
        stream.write_table(unit)
    data = sink.getvalue()
    ends = pa.array([0, data.size], pa.int64()).buffers()[1]
    rows = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, data])
    return pa.table({**{name: pa.array([label]) for name, label in labels.items()}, _ROWS: rows})


def unpack(packed: pa.Table) -> pa.Table:
    """The unit's rows, labels left out. Raises ValueError unless there is one unit: two must never share a call."""
    if packed.num_rows != 1:
        raise ValueError(f"a stage must receive one unit at a time, got {packed.num_rows}")
    with pa.ipc.open_stream(packed[_ROWS][0].as_buffer()) as stream:
        return stream.read_all().combine_chunks()


def with_columns(packed: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """The packed unit with more columns of n values, or with some replaced."""
    unit = unpack(packed)
    labels = {name: label(packed, name) for name in packed.column_names if name != _ROWS}
    return pack(pa.table({**{name: unit[name] for name in unit.column_names}, **columns}), **labels)


def label(packed: pa.Table, name: str) -> str:
    """A label that `pack` was given."""
    value: str = packed[name][0].as_py()
    return value


# --- seeds ----------------------------------------------------------------------------------------------------------


def candidate_seed(run_seed: int, prompt_id: str, candidate: int, stage: str) -> int:
    """Seed of one candidate at one stage, in [0, 2**63): from what the row is, never from where it was or with whom."""
    key = f"{run_seed}\x00{stage}\x00{candidate}\x00{prompt_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


# --- errors ---------------------------------------------------------------------------------------------------------


class ConfigError(ValueError):
    """A user's mistake: one line that names the fix. The job exits with 2, without a trace."""


class RowError(Exception):
    """An error of one request: that candidate fails, its neighbours go on.

    `cause` is the slug under which the row may be quarantined and later retried; `attempts` is how often the request
    was made. Its text, `<cause>: <message>` or `<cause> (<n> attempts): <message>`, holds all three.
    """

    def __init__(self, cause: str, message: str, attempts: int = 1) -> None:
        super().__init__(cause, message, attempts)
        self.cause = cause
        self.message = message
        self.attempts = attempts

    def __str__(self) -> str:
        tried = f" ({self.attempts} attempts)" if self.attempts > 1 else ""
        return f"{self.cause}{tried}: {self.message}"

    @classmethod
    def parse(cls, text: str) -> "RowError":
        """The error of a text that one was written as."""
        found = re.fullmatch(r"([^ :]*)(?: \(([0-9]+) attempts\))?: (.*)", text, re.DOTALL)
        if found is None:
            raise ValueError(f"{text!r} is not a row error's text")
        return cls(found[1], found[3], int(found[2] or 1))


class TransientError(Exception):
    """An outage of a store or endpoint: never quarantined. The job ends with 5 and can be resumed."""


# --- secrets --------------------------------------------------------------------------------------------------------

_SECRET = re.compile(
    r"(^|_)(secret|password|passwd|token|key|credentials?|authorization|sas|connection_string)(_|$)", re.IGNORECASE
)
_BETWEEN_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]")
_USER_IN_URL = re.compile(
    r"://[^/@\s:]+:[^/@\s]+@|[?&](sig|signature|x-amz-signature|x-goog-signature|token)=", re.IGNORECASE
)


def refuse_secrets(name: str, value: Any) -> None:
    """Raise ConfigError where a config's value holds, at any depth, what is named or written like a secret.

    A config is kept with the output and goes through Ray's own records: what must not be read there has no place in it.
    """
    where = "put them where the file system looks for them, such as AWS_SECRET_ACCESS_KEY or a role of the node"
    if isinstance(value, dict):
        for key, item in value.items():
            if _SECRET.search(_BETWEEN_WORDS.sub("_", str(key))) and item not in (None, False, True):
                raise ConfigError(
                    f"{name}.{key}: secrets do not go into a config, which is kept with the output; {where}"
                )
            refuse_secrets(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            refuse_secrets(f"{name}.{number}", item)
    elif isinstance(value, str) and _USER_IN_URL.search(value):
        raise ConfigError(f"{name}: a URL here must hold no user, password or signature; {where}")


# --- config fields --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doc:
    """What a config field's metadata says: its help line, and whether its value can change a row of the corpus."""

    help: str
    changes_rows: bool


def option(default: Any, help: str, *, changes_rows: bool = False) -> Any:
    """A documented config field. `changes_rows=True` puts its value into the run's fingerprint."""
    metadata = {"doc": Doc(help, changes_rows)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type, help: str) -> Any:
    """A config field that is a section of its own."""
    return field(default_factory=kind, metadata={"doc": Doc(help, changes_rows=False)})


_OUTSIDE: dict[str, Callable[[float], bool]] = {
    "more than 0": lambda value: value <= 0,
    "0 or more": lambda value: value < 0,
    "1 or more": lambda value: value < 1,
    "at least 1": lambda value: value < 1,
}


def refuse_unless(section: Any, bound: str, *keys: str) -> None:
    """Raise ConfigError for a key of a config section that is not "more than 0", "0 or more", "1 or more" or "at least
    1", in these words; one that is None is not looked at."""
    for key in keys:
        value = getattr(section, key)
        if value is not None and _OUTSIDE[bound](value):
            raise ConfigError(f"{key} must be {bound}, got {value}")


def is_set(section: Any, key: str) -> bool:
    """Whether a key of a config section has another value than its default."""
    (found,) = (each for each in fields(section) if each.name == key)
    default = found.default if found.default_factory is MISSING else found.default_factory()
    return bool(getattr(section, key) != default)
