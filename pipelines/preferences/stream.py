"""The job's data flow on Ray: tasks that read, build and commit units, none of which holds more than one at once."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from pipelines import report
from pipelines.cluster import data_context, mistakes_told
from pipelines.corpus.plan import Plan
from pipelines.corpus.tasks import Call, Tasks, grouped
from pipelines.preferences.build import Builder, named
from pipelines.preferences.index import duplicates, missing, write_index
from pipelines.preferences.settings import BuildPreferencesConfig
from pipelines.progress import watched

UNITS_PER_TASK = 8
NUM_NAMED = 4


def run(config: BuildPreferencesConfig, calls: Sequence[Call], wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run the calls, `run.num_workers` at the same time. Yields their reports' rows, each with the name of what is
    `done`.

    Ends the process with exit code 4, after a diagnosis, when nothing gets done for `run.stall_minutes`.

    Args:
        wanted: the names of all that is to be done, in the order of the calls.
    """
    done: set[str] = set()
    moved_at = time.monotonic()

    def diagnosis() -> Iterator[str]:
        left = [name for name in wanted if name not in done]
        yield f"{len(done)} of {len(wanted)} are done; the first that are not: {'; '.join(left[:NUM_NAMED])}"
        if not done:
            yield "no task has reported yet: each needs a free CPU of the cluster"
        yield "what is committed is kept; the same command resumes"

    with watched(lambda: time.monotonic() - moved_at, diagnosis, config.run.stall_minutes * 60):
        for row in reports(config, calls):
            moved_at = time.monotonic()
            done.add(row["done"])
            yield row


def reports(config: BuildPreferencesConfig, calls: Sequence[Call]) -> Iterator[dict[str, Any]]:
    """Run the calls on Ray. Raises ConfigError for a mistake that only a task could find."""
    data_context(1)  # byte: every report a block of its own, which is told at once
    num_workers = config.run.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    made = ray.data.read_datasource(Tasks(calls), num_cpus=1, concurrency=num_workers, override_num_blocks=len(calls))
    with mistakes_told():
        yield from made.iter_rows()


def build_all(config: BuildPreferencesConfig, builder: Builder, plan: Plan) -> None:
    """Index the prompts that are new, then build and commit every unit of the plan, telling how it goes."""
    again = {}
    if config.prompts.dedup != "none":
        listing = builder.source.listing()
        new = missing(builder.output, listing, config.prompts.dedup)
        index = [partial(_indexed, builder, listed, config.prompts.dedup) for listed in new]
        if index:
            num_rows = sum(each["rows"] for each in run(config, index, [listed.path for listed in new]))
            report.say(f"indexed: {num_rows} prompts of {len(index)} parts")
        again = duplicates(builder.output, listing, config.prompts)
    calls = []
    for spans in grouped(plan.spans, UNITS_PER_TASK):
        rows_again = {
            unit.name: np.flatnonzero(again[span.shard.listed.path][unit.start : unit.stop])
            for span in spans
            for unit in span.units
            if span.shard.listed.path in again
        }
        calls.append(partial(builder.build_spans, spans, rows_again))
    wanted = [named(span, unit) for span in plan.spans for unit in span.units]
    begin = told_at = time.monotonic()
    rows = dropped = made = 0
    for each in run(config, calls, wanted):
        rows, dropped, made = rows + each["rows"], dropped + each["dropped"], made + each["made"]
        if time.monotonic() - told_at > config.site.log_every_s:
            told_at = time.monotonic()
            report.say(f"built: {rows}/{plan.num_rows} prompts, {dropped} dropped, {made} rows")
    seconds = time.monotonic() - begin
    print(f"built: {plan.num_units} units, {rows} prompts in {seconds:.1f} s ({rows / seconds:.0f} prompts/s)")


def _indexed(builder: Builder, listed: Any, dedup: str) -> Iterator[pa.Table]:
    yield write_index(builder.source, builder.output, listed, dedup)
