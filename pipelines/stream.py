"""A job's data flow on Ray: units are read, answered, aligned, scored and committed, all at the same time."""

import os
import time
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray._common.utils import get_system_memory
from ray.data._internal.execution import backpressure_policy as backpressure
from ray.data.context import AutoscalingConfig

from actors.aligner import AlignerStage
from actors.board import Board
from actors.contract import ConfigError
from actors.engines.footprint import refuse_unsplittable
from actors.policy import PolicyStage
from actors.pool import add_pool, planned
from actors.reward import RewardStage
from pipelines import report
from pipelines.cluster import data_context, join_or_start, mistakes_told, named_cluster
from pipelines.corpus.attempts import Attempts
from pipelines.corpus.commit import Committer
from pipelines.corpus.plan import Plan
from pipelines.corpus.read import read_spans
from pipelines.corpus.runs import write_pace
from pipelines.corpus.shards import Input
from pipelines.corpus.storage import Storage
from pipelines.corpus.tasks import Tasks, grouped
from pipelines.placement import Need, gpu_refusal, memory_refusal, node_ids, num_gpus_here, told, wait_until_placeable
from pipelines.progress import Tally, read_board, shown
from pipelines.settings import AlignCorpusConfig, JobConfig, pools, rewards

READ_CPUS = 0.25
COMMIT_CPUS = 0.25
READERS = 2
UNITS_PER_READ = 64
"""Units of small row groups that share a read task: 100,000 tasks of one unit each would take Ray 100 s to make."""

COMMITS_AT_ONCE = 8
AHEAD = 4


class HeldBack(backpressure.BackpressurePolicy):  # type: ignore[misc]  # Ray has no types
    """A stage waits while the next one has as many tasks waiting as it has running, and AHEAD at least.

    Ray's own rule sets in when half the object store is full, and not before the next stage runs. Prompts are small: a
    fast policy would have answered the whole corpus by then, and a crash would lose it.
    """

    @property
    def name(self) -> str:
        return "HeldBack"

    def can_add_input(self, op: Any) -> bool:
        return all(
            self._topology[next_op].total_enqueued_input_blocks() < max(AHEAD, next_op.num_active_tasks())
            for next_op in op.output_dependencies
        )

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        """Also of a task that makes many blocks, as reading does: Ray holds it back where its outputs are not taken."""
        return None if self.can_add_input(op) else 0


BACKPRESSURE = [
    backpressure.ConcurrencyCapBackpressurePolicy,
    backpressure.ResourceBudgetBackpressurePolicy,
    HeldBack,
]


def stream(config: JobConfig, source: Input, output: Storage, plan: Plan, run: int, made_of: str) -> None:
    """Make and commit every unit of the plan, as run `run`, whose fingerprint has digest `made_of`.

    Raises ConfigError for a mistake that only an actor could find, and TransientError for an outage.
    """
    started = time.monotonic()
    board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board).remote()
    tally = Tally()
    committer = Committer(output, source, tuple(config.input.keep_columns), run, made_of)
    notes = Attempts.of_job(output)
    committed = pipeline(config, source, plan, committer, board, notes)
    asks = {need.name: need.ask for need in replicas(config)}
    stall_s = config.run.stall_minutes * 60
    with (
        shown(board, tally, asks, plan.num_rows, log_every_s=config.site.log_every_s, stall_s=stall_s),
        mistakes_told(),
    ):
        try:
            for row in committed.iter_rows():
                tally.add(row)
        except KeyboardInterrupt:
            done = report.count(tally.num_units, "unit")
            report.say(f"committed until now: at least {done}, {tally.num_rows} of {plan.num_rows} rows")
            raise
    notes.forget_done()
    found, running_s, seconds = read_board(board), ray.get(board.running_s.remote()), time.monotonic() - started
    totals = {name: found[name] for name in asks if name in found}
    startup_s = max(0.0, seconds - running_s) if running_s else 0.0
    is_aligning = isinstance(config, AlignCorpusConfig)
    report.print_throughput(totals, tally, seconds, startup_s=startup_s, is_aligning=is_aligning)
    if running_s and totals.keys() == asks.keys():  # or the board was lost on the way, with what it knew
        each = {
            name: {
                "num_gpus": pool.num_gpus * max(pool.replicas, min(pool.most_replicas, len(totals[name].states))),
                "num_tokens": totals[name].num_tokens,
            }
            for name, pool in pools(config).items()
        }
        took = {"num_rows": tally.num_rows, "seconds": seconds, "startup_s": startup_s}
        write_pace(output, run, {"digest": made_of, **took, "pools": each})


def pipeline(
    config: JobConfig,
    source: Input,
    plan: Plan,
    committer: Committer,
    board: ray.actor.ActorHandle,
    notes: Attempts,
) -> ray.data.Dataset:
    """Units -> responses -> aligned -> rewards -> committed: one row a unit, one task a unit (or several)."""
    context = data_context(max(1, int(config.run.task_mib * 2**20)))  # 1 byte: every unit a block of its own
    context.autoscaling_config = AutoscalingConfig(actor_pool_util_upscaling_threshold=1.0)  # grow when all are busy
    context.set_config(backpressure.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, BACKPRESSURE)
    warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")  # until 2.64, and nothing else does it
    on_cpus = [pool for pool in pools(config).values() if pool.engine in ("torch", "vllm") and not pool.num_gpus]
    sharers = sum(pool.most_replicas for pool in on_cpus)
    shared = {"board": board, "sharers": sharers, "notes": notes, "max_attempts": config.run.max_attempts}
    places = node_ids(needs(config))
    calls = [partial(read_spans, source, config.input, spans) for spans in grouped(plan.spans, UNITS_PER_READ)]
    dataset = ray.data.read_datasource(
        Tasks(calls), num_cpus=READ_CPUS, concurrency=READERS, override_num_blocks=len(calls)
    )
    if isinstance(config, AlignCorpusConfig):
        dataset = _answered_and_aligned(dataset, config, places, shared)
    for name, reward in rewards(config).items():
        dataset = add_pool(dataset, RewardStage, reward, places[name], name=name, **shared)
    return dataset.map_batches(  # actors: Ray ends idle task workers, and a new process a unit costs more than the unit
        Committing, fn_constructor_args=[committer], batch_size=1, batch_format="pyarrow", num_cpus=COMMIT_CPUS,
        compute=ray.data.ActorPoolStrategy(
            size=1, max_concurrent_calls_per_actor=COMMITS_AT_ONCE, max_tasks_in_flight_per_actor=COMMITS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        ray_remote_args_fn=planned(places["committing"]),
    )  # fmt: skip


def _answered_and_aligned(
    dataset: ray.data.Dataset, config: AlignCorpusConfig, places: Mapping[str, list[str]], shared: Mapping[str, Any]
) -> ray.data.Dataset:
    """Prompts -> responses -> aligned."""
    first_candidate = 0
    for number, policy in enumerate([config.policy, *config.policies]):
        name = f"policy_{number + 1}" if number else "policy"
        dataset = add_pool(
            dataset, PolicyStage, policy, places[name], name=name,
            run_seed=config.run.seed, first_candidate=first_candidate, **shared,
        )  # fmt: skip
        first_candidate += policy.num_candidates
    return add_pool(
        dataset, AlignerStage, config.aligner, places["aligner"], name="aligner", run_seed=config.run.seed, **shared
    )


class Committing:
    """The last stage: a committer, as the class that Ray Data wants an actor's work to be."""

    def __init__(self, committer: Committer) -> None:
        self._committer = committer

    def __call__(self, packed: pa.Table) -> pa.Table:
        return self._committer(packed)


def needs(config: JobConfig) -> list[Need]:
    """Everything that must run at the same time for the job to get on: the pools, and Ray Data's own tasks."""
    return [*replicas(config), Need("reading", READERS, READ_CPUS, 0), Need("committing", 1, COMMIT_CPUS, 0)]


def replicas(config: JobConfig) -> list[Need]:
    """What each pool needs to start with."""
    return [
        Need(name, pool.replicas, pool.num_cpus, pool.num_gpus, pool.label_selector)
        for name, pool in pools(config).items()
    ]


def connect(config: JobConfig) -> None:
    """Join the cluster that the config or RAY_ADDRESS names, else start one here; return when the pools fit on it.

    Raises ConfigError where they never will, and TransientError where the nodes for them did not come in time.
    """
    refuse_hopeless(config)
    join_or_start(config.site.ray_address, sum(need.count * need.cpus for need in needs(config)))
    wait_until_placeable(
        needs(config), config.run.wait_for_resources_s, say_every_s=config.site.log_every_s, announce=report.say
    )


def refuse_hopeless(config: JobConfig) -> None:
    """Raise ConfigError for what can be seen from here not to work, before minutes are spent on engines that start.

    Where the job starts Ray itself CPUs are no limit, but memory, GPUs and the keys of endpoints are this machine's.
    """
    for name, pool in pools(config).items():
        refuse_unsplittable(pool, name)
    if named_cluster(config.site.ray_address) is not None:
        return
    error = memory_refusal(pools(config), get_system_memory()) or gpu_refusal(pools(config), num_gpus_here())
    if error is not None:
        raise error
    for name, pool in pools(config).items():
        if pool.engine == "openai" and pool.base_url is None and not os.environ.get(pool.api_key_env, "").strip():
            raise ConfigError(
                f"{name}: the environment variable {pool.api_key_env} is not set; it must hold the API key"
            )


def nodes_told(config: JobConfig) -> list[str]:
    """For a person: what `connect` would find, on the cluster that is named, which is joined; nothing is started.

    Raises ConfigError where that would be refused at once.
    """
    refuse_hopeless(config)
    if named_cluster(config.site.ray_address) is None:
        return ["nodes: not looked at, as no cluster is named (site.ray_address or RAY_ADDRESS)"]
    join_or_start(config.site.ray_address, 0)
    return told(needs(config), config.run.wait_for_resources_s)
