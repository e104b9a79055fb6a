"""What every job on an output root does: plan what is not done, make it, publish it; and how it ends."""

import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from actors.contract import ConfigError, TransientError
from pipelines import report
from pipelines.config import Flags, resolved
from pipelines.corpus.lease import Held, Lease
from pipelines.corpus.plan import Plan, make_plan
from pipelines.corpus.publish import Published
from pipelines.corpus.published import CorpusConfig
from pipelines.corpus.runs import (
    check_fingerprint,
    check_input_root,
    create_run,
    digest,
    making_run,
    refuse_other_kind,
)
from pipelines.corpus.shards import Input, InputConfig
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage
from pipelines.preferences.settings import BuildPreferencesConfig
from pipelines.settings import JobConfig, code_version

Config = TypeVar("Config", bound=JobConfig | BuildPreferencesConfig)

DONE, USER_ERROR, NOT_CLEAN, OUTAGE, INTERRUPTED = 0, 2, 3, 5, 130


def exit_code(work: Callable[[], int]) -> int:
    """The exit code of a job's work, and a line for what ended it.

    0 done, 2 the user's mistake, 3 bad shards or rows that must not be published, 5 an outage, 130 interrupted; 4, a
    stall, ends the process from within `pipelines.progress`.
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


class Job(ABC, Generic[Config]):
    """Rows of an input become rows under an output root: what is special to each of the jobs.

    Args:
        config: the whole of it.
        source: the input's shards.
        columns: how they are read.
        output: the output root.
    """

    retry_quarantined: str | None = None
    """Cause of the published quarantined rows that are made again."""

    def __init__(self, config: Config, source: Input, columns: InputConfig | CorpusConfig, output: Storage) -> None:
        self.config, self.source, self.columns, self.output = config, source, columns, output

    @abstractmethod
    def fingerprint(self, kept_types: Mapping[str, str]) -> dict[str, Any]:
        """Everything that can change a row, by dotted key: what two runs must share to make rows that go together."""

    def fixed(self) -> frozenset[str]:
        """Keys of the fingerprint that all rows under one output root share, whatever changes are accepted."""
        return frozenset()

    @abstractmethod
    def told(self, plan: Plan) -> dict[str, Any]:
        """What the run record keeps besides what every job's does."""

    @abstractmethod
    def despite(self, plan: Plan) -> str | None:
        """What to say when bad shards keep the job from beginning; None where it does the others."""

    @abstractmethod
    def connect(self) -> None:
        """Join the cluster, or start one. Raises ConfigError or TransientError where the job does not fit on it."""

    @abstractmethod
    def make(self, plan: Plan, run: int, made_of: str) -> None:
        """Make and commit every unit of the plan, which has some, as run `run`; `made_of` digests its fingerprint."""

    @abstractmethod
    def publish(self, plan: Plan) -> Published:
        """Publish what is committed."""

    @abstractmethod
    def print_dry_run(self, plan: Plan) -> None:
        """Print what a run would do."""

    @abstractmethod
    def print_summary(self, plan: Plan, published: Published) -> None:
        """Print what a run has done."""

    def planned(self, limit: int | None) -> Plan:
        """What is to be made, of `limit` rows at most.

        Raises ConfigError where the rows would not go together with those that are there.
        """
        state = read_state(self.output)
        before = making_run(self.output, state)
        check_input_root(
            before["input_root"] if before else self.source.root_url,
            self.source.root_url,
            has_rows=bool(state.committed or state.partitions),
            accept_changes=self.config.run.accept_changes,
        )
        plan = make_plan(
            self.source,
            self.columns,
            self.output,
            state,
            unit_rows=self.config.run.unit_rows,
            limit=limit,
            retry_quarantined=self.retry_quarantined,
            kept_types=before["kept_types"] if before else {},
        )
        check_fingerprint(
            before["fingerprint"] if before else {},
            self.fingerprint(plan.kept_types),
            has_unpublished=bool(state.committed or state.unfinished),
            has_published=bool(state.partitions),
            accept_changes=self.config.run.accept_changes,
            fixed=self.fixed(),
        )
        return plan

    def record(self, plan: Plan) -> dict[str, Any]:
        """What runs/<n>.json keeps: enough to make the same rows again, and to tell whether a later run would."""
        made_of = self.fingerprint(plan.kept_types)
        return {
            "started_at": time.time(),
            "code_version": code_version(),
            "fingerprint": made_of,
            "digest": digest(made_of),
            "kept_types": plan.kept_types,
            "input_root": self.source.root_url,
            "num_units": plan.num_units,
            "num_rows": plan.num_rows,
            **self.told(plan),
            "config": resolved(self.config),
        }


def run_job(job: Job[Any], flags: Flags) -> int:
    """Plan what is not done, make it, publish it; again where a unit turned out damaged. Returns the exit code."""
    job.source.refuse_own_output(job.output)
    refuse_other_kind(job.output)
    if flags.dry_run:
        job.print_dry_run(job.planned(flags.limit))
        return DONE
    plan = None if job.output.sizes("leases") else job.planned(flags.limit)  # at a new root a refusal leaves nothing
    with Lease(job.output, job.config.run.lease_ttl_s, announce=report.say) as lease:
        job.output.sweep()
        if plan is None or not lease.is_first:
            plan = job.planned(flags.limit)
        refusal = job.despite(plan) if plan.bad_shards else None
        if refusal:
            report.print_bad_shards(plan, refusal)
            return NOT_CLEAN
        published = make_and_publish(job, plan)
        job.print_summary(plan, published)
        return NOT_CLEAN if plan.bad_shards or published.withheld else DONE


def make_and_publish(job: Job[Any], plan: Plan) -> Published:
    """Make the plan's units, then publish what is committed."""
    partitions: list[int] = []
    while True:
        if plan.num_units:
            job.connect()
            record = job.record(plan)
            job.make(plan, create_run(job.output, record), record["digest"])
        published = job.publish(plan)
        partitions.extend(published.partitions)
        if not published.lost:
            return Published(tuple(partitions), (), published.withheld)
        report.say(f"{len(published.lost)} unit files are damaged or gone and are made again")
        plan = job.planned(limit=sum(unit.num_rows for unit in published.lost))
