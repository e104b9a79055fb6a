"""The job's data flow on Ray: tasks that read, build and commit units, none of which holds more than one at once."""

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from pipelines import report
from pipelines.cluster import told_by
from pipelines.corpus.plan import Plan
from pipelines.corpus.tasks import Call, Tasks, grouped
from pipelines.preferences.build import Builder
from pipelines.preferences.index import duplicates, missing, write_index
from pipelines.preferences.settings import BuildPreferencesConfig

UNITS_PER_TASK = 8


def run(config: BuildPreferencesConfig, calls: Sequence[Call]) -> Iterator[dict[str, Any]]:
    """Run the calls, `run.num_workers` at the same time. Yields their reports' rows.

    Raises ConfigError for a mistake that only a task could find.
    """
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1  # every report a block of its own: it is told at once
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised here, too
    warnings.filterwarnings("ignore", module=r"ray\.data")
    num_workers = config.run.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    reports = ray.data.read_datasource(
        Tasks(calls), num_cpus=1, concurrency=num_workers, override_num_blocks=len(calls)
    )
    try:
        yield from reports.iter_rows()
    except ray.exceptions.RayError as error:
        told = told_by(error)
        if told is None:
            raise
        raise told from None


def build_all(config: BuildPreferencesConfig, builder: Builder, plan: Plan) -> None:
    """Index the prompts that are new, then build and commit every unit of the plan, telling how it goes."""
    again = {}
    if config.prompts.dedup != "none":
        listing = builder.source.listing()
        new = missing(builder.output, listing, config.prompts.dedup)
        index = [partial(_indexed, builder, listed, config.prompts.dedup) for listed in new]
        num_rows = sum(each["rows"] for each in run(config, index)) if index else 0
        if index:
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
    begin = told_at = time.monotonic()
    rows = dropped = made = 0
    for each in run(config, calls):
        rows, dropped, made = rows + each["rows"], dropped + each["dropped"], made + each["made"]
        if time.monotonic() - told_at > config.site.log_every_s:
            told_at = time.monotonic()
            report.say(f"built: {rows}/{plan.num_rows} prompts, {dropped} dropped, {made} rows")
    seconds = time.monotonic() - begin
    print(f"built: {plan.num_units} units, {rows} prompts in {seconds:.1f} s ({rows / seconds:.0f} prompts/s)")


def _indexed(builder: Builder, listed: Any, dedup: str) -> Iterator[pa.Table]:
    yield write_index(builder.source, builder.output, listed, dedup)
