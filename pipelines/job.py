"""What every job on an output root does: plan what is not done, make it, publish it; and how it ends."""

import signal
import sys
from collections.abc import Callable

from actors.contract import ConfigError, TransientError
from pipelines import report
from pipelines.config import Flags
from pipelines.corpus.lease import Held, Lease
from pipelines.corpus.plan import Plan, make_plan
from pipelines.corpus.publish import Published, publish
from pipelines.corpus.runs import check_fingerprint, check_input_root, create_run, digest, latest_pace, making_run
from pipelines.corpus.shards import Input
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage
from pipelines.settings import JobConfig, fingerprint, run_record
from pipelines.stream import connect, stream

DONE, USER_ERROR, NOT_CLEAN, OUTAGE, INTERRUPTED = 0, 2, 3, 5, 130


def exit_code(work: Callable[[], int]) -> int:
    """The exit code of a job's work, and a line for what ended it.

    0 done, 2 the user's mistake, 3 bad shards or too much quarantined, 5 an outage, 130 interrupted; 4, a stall, ends
    the process from within `pipelines.progress`.
    """
    try:
        return work()
    except (ConfigError, Held) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except TransientError as error:
        print(f"error: {error}; what is committed is kept, and the same command goes on from there", file=sys.stderr)
        return OUTAGE
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left to do is to end; impatience would only add a trace
        report.say("interrupted; what is committed is kept, and the same command goes on from there")
        return INTERRUPTED


def run_job(config: JobConfig, source: Input, flags: Flags) -> int:
    """Plan what is not done, make it, publish it; again where a unit turned out damaged. Returns the exit code."""
    output = Storage(config.output.root, config.site.storage_options, config.site.storage_retry_s)
    source.refuse_own_output(output)
    if flags.dry_run:
        plan = planned(config, source, output, flags.limit)
        made_of = digest(fingerprint(config, plan.kept_types))
        report.print_dry_run(config, source, plan, made_of, latest_pace(output))
        return DONE
    with Lease(output, config.run.lease_ttl_s, announce=report.say):
        output.sweep()
        plan = planned(config, source, output, flags.limit)
        if plan.bad_shards and config.input.on_bad_shard == "fail":
            report.print_bad_shards(plan)
            return NOT_CLEAN
        published = make_and_publish(config, source, output, plan)
        report.print_summary(config, output, plan, published)
        return NOT_CLEAN if plan.bad_shards or published.withheld else DONE


def planned(config: JobConfig, source: Input, output: Storage, limit: int | None) -> Plan:
    """What is to be made. Raises ConfigError where the rows would not go together with those that are there."""
    state = read_state(output)
    before = making_run(output, state)
    check_input_root(
        before["input_root"] if before else source.root_url,
        source.root_url,
        has_rows=bool(state.committed or state.partitions),
        accept_changes=config.run.accept_changes,
    )
    plan = make_plan(
        source,
        config.input,
        output,
        state,
        unit_rows=config.run.unit_rows,
        limit=limit,
        retry_quarantined=config.run.retry_quarantined,
        kept_types=before["kept_types"] if before else {},
    )
    check_fingerprint(
        before["fingerprint"] if before else {},
        fingerprint(config, plan.kept_types),
        has_unpublished=bool(state.committed or state.unfinished),
        has_published=bool(state.partitions),
        accept_changes=config.run.accept_changes,
    )
    return plan


def make_and_publish(config: JobConfig, source: Input, output: Storage, plan: Plan) -> Published:
    """Stream the plan's units through the pools, then publish what is committed."""
    partitions: list[int] = []
    while True:
        if plan.num_units:
            connect(config)
            run = create_run(output, run_record(config, source, plan))
            stream(config, source, output, plan, run)
        published = publish(
            output,
            config.output,
            max_quarantined_fraction=config.run.max_quarantined_fraction,
            accept_quarantined=config.run.accept_quarantined,
            bad_shards=plan.bad_shards,
        )
        partitions.extend(published.partitions)
        if not published.lost:
            return Published(tuple(partitions), (), published.withheld)
        report.say(f"{len(published.lost)} unit files are damaged or gone and are made again")
        plan = planned(config, source, output, limit=sum(unit.num_rows for unit in published.lost))
