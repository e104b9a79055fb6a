"""Build a preference dataset: stream a published corpus, rank each prompt's candidates, and publish what trainers read.

    python pipelines/build_preferences.py input.path=CORPUS output.root=DATASET build=pairs build.reward=NAME export=trl

The same command resumes after a crash, and builds only from new partitions when it is run again, every night. Without a
reward (no build.reward) what was aligned is preferred to its response. On a cluster:

    ray job submit --working-dir . -- python pipelines/build_preferences.py key=value ...
"""

import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root instead of this folder: each module has one name

from actors.contract import ConfigError, TransientError
from pipelines.config import Flags, compose
from pipelines.corpus.lease import Held, Lease
from pipelines.corpus.plan import Plan, make_plan
from pipelines.corpus.publish import Published, publish
from pipelines.corpus.runs import check_fingerprint, check_input_root, create_run, digest, making_run
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage
from pipelines.preferences import report
from pipelines.preferences.build import Builder
from pipelines.preferences.dataset import FOLDER, preferences
from pipelines.preferences.exporters import EXPORTERS
from pipelines.preferences.filters import benchmarks_of
from pipelines.preferences.record import fingerprint, pin_encoder, run_record
from pipelines.preferences.settings import BuildPreferencesConfig
from pipelines.preferences.source import PublishedCorpus, shard_config
from pipelines.preferences.stream import build_all

DONE, USER_ERROR, NOT_CLEAN, OUTAGE, INTERRUPTED = 0, 2, 3, 5, 130


def main(argv: list[str]) -> int:
    """Run the job. Returns the exit code: 0 done, 2 the user's mistake, 3 a checked fact does not hold or a part of the
    corpus cannot be read, 5 an outage, 130 interrupted."""
    try:
        config, flags = compose(
            BuildPreferencesConfig,
            argv,
            prog="python pipelines/build_preferences.py",
            description="Build a preference dataset from the published partitions of a corpus.",
            groups=("build", "site"),
        )
        return build_preferences(pin_encoder(config), flags)
    except (ConfigError, Held) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except TransientError as error:
        print(f"error: {error}; what is committed is kept, and the same command goes on from there", file=sys.stderr)
        return OUTAGE
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        report.say("interrupted; what is committed is kept, and the same command goes on from there")
        return INTERRUPTED


def build_preferences(config: BuildPreferencesConfig, flags: Flags) -> int:
    """Plan what is not done, build it, publish it; again where a unit turned out damaged. Returns the exit code."""
    site = config.site
    source = PublishedCorpus(config.input.path, site.storage_options, site.storage_retry_s)
    output = Storage(config.output.root, site.storage_options, site.storage_retry_s, partitions=FOLDER)
    source.refuse_own_output(output)
    found = benchmarks_of(config.prompts, config.site.storage_options)
    benchmarks = found.digest if found else None
    if flags.dry_run:
        report.print_dry_run(config, planned(config, source, output, benchmarks, flags.limit))
        return DONE
    with Lease(output, config.run.lease_ttl_s, announce=report.say):
        output.sweep()
        plan = planned(config, source, output, benchmarks, flags.limit)
        if plan.bad_shards:
            report.print_bad_shards(plan)
            return NOT_CLEAN
        published = build_and_publish(config, source, output, benchmarks, plan)
        report.print_summary(output, published)
        return NOT_CLEAN if published.withheld else DONE


def planned(
    config: BuildPreferencesConfig,
    source: PublishedCorpus,
    output: Storage,
    benchmarks: str | None,
    limit: int | None,
) -> Plan:
    """What is to be built. Raises ConfigError where the rows would not go together with those that are there."""
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
        shard_config(config.input.path, config.input.keep_columns),
        output,
        state,
        unit_rows=config.run.unit_rows,
        limit=limit,
        kept_types=before["kept_types"] if before else {},
    )
    check_fingerprint(
        before["fingerprint"] if before else {},
        fingerprint(config, plan.kept_types, benchmarks),
        has_unpublished=bool(state.committed or state.unfinished),
        has_published=bool(state.partitions),
        accept_changes=config.run.accept_changes,
    )
    return plan


def build_and_publish(
    config: BuildPreferencesConfig,
    source: PublishedCorpus,
    output: Storage,
    benchmarks: str | None,
    plan: Plan,
) -> Published:
    """Build the plan's units, then publish what is committed."""
    partitions: list[int] = []
    files = EXPORTERS[config.export].files(config.build.strategy) if config.export else {}
    kind = preferences(jsonl=config.output.jsonl, files=files)
    while True:
        if plan.num_units:
            made_of = fingerprint(config, plan.kept_types, benchmarks)
            run = create_run(output, run_record(config, source, plan, made_of))
            build_all(config, Builder(config, source, output, benchmarks, run, digest(made_of)), plan)
        published = publish(output, config.output, kind)
        partitions.extend(published.partitions)
        if not published.lost:
            return Published(tuple(partitions), (), published.withheld)
        report.say(f"{len(published.lost)} unit files are damaged or gone and are built again")
        plan = planned(config, source, output, benchmarks, limit=sum(unit.num_rows for unit in published.lost))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` and schedulers end a job like Ctrl-C
    sys.exit(main(sys.argv[1:]))
