"""What a job will take, before anything starts: tokens from a sample of its rows, hours and cost from the last run."""

import bisect
import functools
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from actors.candidates import as_messages, split_reasoning
from actors.contract import RowError
from actors.engines.adapters import with_tokenizer
from actors.engines.base import Messages
from actors.engines.by_url import described
from actors.engines.footprint import footprint
from actors.policy import policy_prompt
from actors.pool import PoolConfig
from actors.recipes import aligner_input
from pipelines.corpus.plan import Plan
from pipelines.corpus.read import Span, read_checked
from pipelines.corpus.shards import Input, InputConfig
from pipelines.settings import AlignCorpusConfig, pools

SAMPLE_ROWS = 2048
SAMPLE_GROUPS = 32
SAMPLE_S = 20.0
"""Seconds of reading, and of each pool's tokenizing, after which the sample is left as small as it is."""

NOT_THERE_YET = "\ufffc"
"""Stands in an aligner's prompt where an answer is going to be."""

Row = dict[str, Any]


# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """Prompts that differ in nothing that is known yet.

    Attributes:
        num_prompts: how many of them there are.
        num_answers: candidates that are asked for, of all of them together.
        num_to_come: most tokens that will stand where NOT_THERE_YET does.
    """

    prompt: Messages | str
    num_prompts: int
    num_answers: int
    num_to_come: int = 0


@dataclass(frozen=True)
class Tokens:
    """What one pool is going to read and make, estimated from `num_rows` rows; exact where the plan has no others.

    Attributes:
        lengths: tokens of each prompt in the sample, sorted; () where the tokenizer is not known (`openai`). An answer
            in an aligner's prompt that is yet to be made counts as its policy's `max_tokens`.
        num_too_long: of these, prompts that leave no room for `max_tokens`.
        num_failed: rows of the sample whose prompts cannot be made or tokenized.
        num_prompt_tokens: of the plan's prompts that fit, each read once however many candidates it has.
        num_answers: candidates that the plan asks for.
        is_bound: there are such answers, so that lengths and num_prompt_tokens are more than there will be.
    """

    num_rows: int
    lengths: tuple[int, ...]
    num_too_long: int
    num_failed: int
    num_prompt_tokens: int
    num_answers: int
    is_bound: bool

    def quantile(self, share: float) -> int:
        """The shortest length that `share` of the prompts do not exceed."""
        return self.lengths[max(1, math.ceil(share * len(self.lengths))) - 1]


def tokens(config: AlignCorpusConfig, name: str, rows: list[Row], num_rows: int) -> Tokens:
    """Of the pool `name`, for `num_rows` rows like those of a sample. Raises ConfigError: there is no tokenizer."""
    pool = pools(config)[name]
    found = footprint(pool)
    limit = found.max_len if found else pool.max_model_len
    counted: list[tuple[int, Ask]] = []
    num_seen = num_failed = 0
    deadline = time.monotonic() + SAMPLE_S
    for row in rows:
        if num_seen and time.monotonic() > deadline:
            break
        num_seen += 1
        try:
            counted += [(0 if pool.engine == "openai" else _length(pool, ask), ask) for ask in asks(config, name, row)]
        except RowError:
            num_failed += 1
    fitting = [(length, ask) for length, ask in counted if not limit or length + pool.max_tokens <= limit]
    longest = sorted(length + ask.num_to_come for length, ask in counted for _ in range(ask.num_prompts))
    scale = num_rows / max(1, num_seen)
    return Tokens(
        num_rows=num_seen,
        lengths=() if pool.engine == "openai" else tuple(longest),
        num_too_long=sum(limit is not None and length + pool.max_tokens > limit for length in longest),
        num_failed=num_failed,
        num_prompt_tokens=round(scale * sum((length + ask.num_to_come) * ask.num_prompts for length, ask in fitting)),
        num_answers=round(scale * sum(ask.num_answers for _, ask in fitting)),
        is_bound=any(ask.num_to_come for _, ask in counted),
    )


def sample(source: Input, config: InputConfig, plan: Plan) -> list[Row]:
    """Rows of the plan in random order: all where they are few, else the first of row groups from all over it."""
    counts = [span.num_rows for span in plan.spans]
    if plan.num_rows > SAMPLE_ROWS or len(counts) > SAMPLE_GROUPS:
        ends = list(itertools.accumulate(counts))
        points = [(2 * point + 1) * plan.num_rows // (2 * SAMPLE_GROUPS) for point in range(SAMPLE_GROUPS)]
        hits = Counter(bisect.bisect_right(ends, point) for point in points)
        counts = [hits[number] * SAMPLE_ROWS // SAMPLE_GROUPS for number in range(len(counts))]
    wanted = [(span, count) for span, count in zip(plan.spans, counts, strict=True) if count]
    order = random.Random(0)
    order.shuffle(wanted)
    rows: list[Row] = []
    deadline = time.monotonic() + SAMPLE_S
    for span, count in wanted:
        if rows and time.monotonic() > deadline:
            break
        rows.extend(itertools.islice(_rows(source, config, span), count))
    order.shuffle(rows)
    return rows


def _rows(source: Input, config: InputConfig, span: Span) -> Iterator[Row]:
    for _, unit in read_checked(source, config, span):
        names = [name for name in ("prompt", "stored", "problem") if name in unit.column_names]
        yield from unit.select(names).to_pylist()


def asks(config: AlignCorpusConfig, name: str, row: Row) -> list[Ask]:
    """What a row asks of a pool, if all goes well before. Raises RowError where the aligner's recipe fails."""
    if row["problem"] is not None:
        return []
    policies: dict[str, Any] = {other: pool for other, pool in pools(config).items() if other != "aligner"}
    if name in policies:
        policy = policies[name]
        return [Ask(policy_prompt(policy, row["prompt"]), 1, policy.num_candidates)]
    found = []
    for policy in policies.values():
        answers = [NOT_THERE_YET]
        if policy.engine == "stored":
            stored = [split_reasoning(text, policy.reasoning_end)[1] for text in row["stored"] or []]
            answers = [text for text in stored if text]
        for answer in answers:
            prompt = aligner_input(config.aligner, as_messages(row["prompt"]), answer)
            written = prompt if isinstance(prompt, str) else "".join(content for _, content in prompt)
            to_come = policy.max_tokens * written.count(NOT_THERE_YET) if answer == NOT_THERE_YET else 0
            count = 1 if policy.engine == "stored" else policy.num_candidates
            found.append(Ask(prompt, count, count, to_come))
    if config.aligner.recipe == "diffpo" and found:  # all of them ask the same
        num_answers = 1 if config.aligner.ignores_response else sum(ask.num_answers for ask in found)
        return [Ask(found[0].prompt, 1, num_answers)]
    return found


def _length(pool: PoolConfig, ask: Ask) -> int:
    from actors.engines.prompts import encode_prompt

    return len(encode_prompt(tokenizer(pool), ask.prompt))


def tokenizer(pool: PoolConfig) -> Any:
    """The tokenizer of a pool's model, loaded once."""
    here = with_tokenizer(described(pool))
    return _loaded(here.model, here.revision)


@functools.cache
def _loaded(model: str, revision: str | None) -> Any:
    from actors.engines.prompts import load_tokenizer  # transformers takes a second to import

    return load_tokenizer(model, revision)


# --- time -----------------------------------------------------------------------------------------------------------


def seconds_at(pace: Mapping[str, Any], num_rows: int) -> float:
    """Seconds that `num_rows` rows take a job as fast as a run of that pace (`write_pace`), its start-up included."""
    return float(pace["startup_s"] + num_rows * (pace["seconds"] - pace["startup_s"]) / pace["num_rows"])


def gpu_hours_at(pace: Mapping[str, Any], num_rows: int) -> dict[str, float]:
    """By pool: each holds its GPUs for as long as the job runs, whether they are busy or not."""
    return {name: seconds_at(pace, num_rows) / 3600 * pool["num_gpus"] for name, pool in pace["pools"].items()}
