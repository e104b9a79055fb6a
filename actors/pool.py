"""A pool of model actors as a Ray Data stage: packed units in, the same units with one column more out."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.board import Reporter, Snapshot
from actors.contract import ConfigError, label, option, unpack, with_column
from actors.engines import build_engine
from actors.engines.base import Engine, EngineConfig

Row = dict[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class PoolConfig(EngineConfig):
    """How many replicas of a model there are and what each of them takes. None of it changes a row."""

    replicas: int = option(1, "actors of the pool, each with the whole model")
    max_replicas: int | None = option(
        None, "grow to so many while all of them are busy and nodes have room for more; null: `replicas` it is"
    )
    units_in_flight: int = option(2, "units that one replica works on at the same time, to keep its engine full")
    num_gpus: int = option(0, "GPUs of one replica, all on one node: none, or tensor_parallel_size of them")
    num_cpus: float = option(1.0, "CPUs that Ray sets aside for one replica")
    label_selector: dict[str, str] = option(
        {}, "Ray node labels that a replica's node must have, such as {pool: policy}"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("replicas", "units_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.most_replicas < self.replicas:
            raise ConfigError(f"max_replicas must be replicas={self.replicas} or more, got {self.max_replicas}")
        for name in ("num_gpus", "num_cpus"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        shards = self.tensor_parallel_size
        if self.engine in ("torch", "vllm") and self.num_gpus not in (0, shards):
            raise ConfigError(
                f"num_gpus={self.num_gpus} does not go with tensor_parallel_size={shards}: a replica has one GPU per "
                f"shard; set num_gpus={shards} or tensor_parallel_size={self.num_gpus}"
            )

    @property
    def most_replicas(self) -> int:
        """What the pool may grow to."""
        return self.replicas if self.max_replicas is None else self.max_replicas


@dataclass(frozen=True)
class Columns:
    """What a stage adds to a unit of n rows, and how many of its rows it failed or found failed."""

    values: dict[str, pa.Array]
    num_failed: int


class ModelStage:
    """One replica: an engine, and as many units in flight as Ray Data gives it. Subclasses say what is done to a unit.

    Args:
        name: of the pool, on the board.
        config: of the pool.
        board: handle of the job's board.
        sharers: replicas that compute on CPUs; at worst they all share the cores of one node.
        build: makes the engine; the one that `config` names where it is not given.
    """

    def __init__(
        self,
        name: str,
        config: PoolConfig,
        board: Any,
        sharers: int,
        build: Callable[[Any, int], Engine] | None = None,
    ) -> None:
        self._snapshot = Snapshot()
        self._units: dict[str, None] = {}
        self._num_ahead = 0  # rows that are done of units that are not
        self._started: Engine | None = None
        self._reporter = Reporter(board, name, self._now)
        num_threads = config.num_threads or max(1, (os.cpu_count() or 1) // max(1, sharers))
        self._max_num_seqs = config.max_num_seqs
        self._mistake: ConfigError | None = None
        try:
            self._started = self._engine = (build or build_engine)(config, num_threads)
        except ConfigError as error:
            self._mistake = error  # told with the first unit: Ray prints what a constructor raises, again and again

    def _now(self) -> Snapshot:
        if self._started is None:
            return self._snapshot
        stats = self._started.stats()
        return replace(
            self._snapshot,
            num_rows=self._snapshot.num_rows + self._num_ahead,
            num_tokens=stats.num_tokens,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            units=tuple(self._units),
            state="running",
        )

    async def columns(self, unit: pa.Table) -> Columns:
        """The columns that this stage makes of a unit's rows."""
        raise NotImplementedError

    async def each(self, make: Callable[[Row], Awaitable[Result]], rows: list[Row]) -> list[Result]:
        """make(row) of every row, in order: twice what the engine takes at the same time, so that it never waits."""
        results: dict[int, Result] = {}
        numbered = iter(enumerate(rows))

        async def work() -> None:
            for number, row in numbered:
                results[number] = await make(row)
                self._num_ahead += 1

        workers = [asyncio.create_task(work()) for _ in range(min(len(rows), 2 * self._max_num_seqs))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:  # after an error the rest would go on asking an endpoint for a unit that is given up
                worker.cancel()
            self._num_ahead -= len(results)
        return [results[number] for number in range(len(rows))]

    async def __call__(self, packed: pa.Table) -> AsyncIterator[pa.Table]:
        if self._mistake is not None:
            raise self._mistake
        unit = unpack(packed)
        name = label(packed, "unit")
        self._units[name] = None
        try:
            made = await self.columns(unit)
        finally:
            self._units.pop(name, None)
        self._snapshot = replace(
            self._snapshot,
            num_rows=self._snapshot.num_rows + unit.num_rows,
            num_failed=self._snapshot.num_failed + made.num_failed,
        )
        await self._reporter.report()  # Ray ends this actor as soon as the last unit has left it
        for column, values in made.values.items():
            packed = with_column(packed, column, values)
        yield packed


def add_pool(
    dataset: ray.data.Dataset, stage: type[ModelStage], config: PoolConfig, node_ids: Sequence[str], **arguments: Any
) -> ray.data.Dataset:
    """`dataset`, streamed through a pool of `stage` actors. A unit is one row, so `batch_size=1` is one unit a call.

    `node_ids` are the nodes of the first replicas, see `planned`.
    """
    return dataset.map_batches(
        stage,
        fn_constructor_kwargs={"config": config, **arguments},
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=config.replicas,
            max_size=config.most_replicas,
            max_concurrent_calls_per_actor=config.units_in_flight,
            max_tasks_in_flight_per_actor=2 * config.units_in_flight,  # all may end at once; then more is at hand
        ),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus or None,
        label_selector=dict(config.label_selector) or None,
        ray_remote_args_fn=planned(node_ids),
    )


def planned(node_ids: Sequence[str]) -> Callable[[], dict[str, Any]]:
    """What Ray Data calls for each actor that it starts: the first go to these nodes, one each, and wait there.

    Left alone Ray spreads the replicas of a small pool over all nodes, and none is left whole for a large replica. A
    replica whose node is lost starts on another; those that a pool grows by go where there is room.
    """
    left = iter(node_ids)

    def arguments() -> dict[str, Any]:
        node_id = next(left, None)
        return {} if node_id is None else {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=True)}

    return arguments
