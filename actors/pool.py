"""A pool of model actors as a Ray Data stage: packed units in, the same units with one column more out."""

import asyncio
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.board import Reporter, Snapshot, units_before
from actors.contract import ConfigError, TransientError, label, option, refuse_unless, unpack, with_columns
from actors.engines import build_engine
from actors.engines.base import Completion, Engine, EngineConfig, Messages, Request
from actors.engines.hosted import MAX_STARTS, HostedEngine, Remember, Suspect, crash
from actors.suspects import Note, Notes, Rows, Turns

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
        refuse_unless(self, "at least 1", "replicas", "units_in_flight")
        if self.most_replicas < self.replicas:
            raise ConfigError(f"max_replicas must be replicas={self.replicas} or more, got {self.max_replicas}")
        refuse_unless(self, "0 or more", "num_gpus", "num_cpus")
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
        notes: of units that may kill engines.
        max_attempts: times that a row may kill what it runs alone in.
        build: makes the engine; the one that `config` names where it is not given.
    """

    def __init__(
        self,
        name: str,
        config: PoolConfig,
        board: Any,
        sharers: int,
        notes: Notes,
        max_attempts: int,
        build: Callable[[Any, int, int, Remember], Engine] | None = None,
    ) -> None:
        self._name, self._notes, self._max_attempts = name, notes, max_attempts
        self._turns = Turns()
        self._proven = False
        self._suspected: dict[str, Note] = {}  # of the units in flight those under suspicion
        before = units_before(board, name)
        self._died_with = set(before)
        # Until the engine is up it is these units that a death would be laid to.
        self._snapshot = Snapshot(units=before, life=uuid.uuid4().hex)
        self._units: dict[str, int] = {}  # in flight, and their rows
        self._done: Counter[str] = Counter()  # of the units in flight: rows that are done
        self._may_die = config.engine != "stored"  # which does nothing that could kill
        self._started: Engine | None = None
        self._reporter = Reporter(board, name, self._now)
        num_threads = config.num_threads or max(1, (os.cpu_count() or 1) // max(1, sharers))
        self._max_num_seqs = config.max_num_seqs
        self._mistake: ConfigError | None = None
        try:
            self._started = self._engine = (build or build_engine)(config, num_threads, max_attempts, self._remember)
        except ConfigError as error:
            self._mistake = error  # told with the first unit: Ray prints what a constructor raises, again and again

    def _now(self) -> Snapshot:
        if self._started is None:
            return self._snapshot
        stats = self._started.stats()
        return replace(
            self._snapshot,
            num_rows=self._snapshot.num_rows + self._done.total(),
            num_tokens=stats.num_tokens,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            units=tuple(self._units),
            state="running",
        )

    async def columns(self, name: str, unit: pa.Table) -> Columns:
        """The columns that this stage makes of the rows of unit `name`."""
        raise NotImplementedError

    async def each(self, name: str, make: Callable[[Row], Awaitable[Result]], rows: list[Row]) -> list[Result]:
        """make(row) of every row of unit `name`, in order; group by group where the unit is under suspicion."""
        note = self._suspected.get(name)
        kills = note.kills if note else {}
        for number, row in enumerate(rows):
            row.update(origin=(name, number), num_kills=kills.get(number, 0))
        if note is None:
            results = await self._each(name, make, dict(enumerate(rows)))
        else:
            results = {}
            for group in note.groups:
                await self._note(name, self._suspected[name].trying(group))
                results.update(await self._each(name, make, {number: rows[number] for number in group}))
            guilty = {number: row for number, row in enumerate(rows) if number not in results}
            results.update(await self._each(name, make, guilty))
        return [results[number] for number in range(len(rows))]

    async def generate(self, row: Row, prompt: Messages | str, *, seed: int, draft: str | None = None) -> Completion:
        """The engine's answer for `row`. Raises what it raises; for a row that has killed enough, that."""
        if row["num_kills"] >= self._max_attempts:
            raise crash(row["num_kills"])
        return await self._engine.generate(Request(prompt, seed, draft, row["origin"], row["num_kills"]))

    async def _each(
        self, name: str, make: Callable[[Row], Awaitable[Result]], rows: dict[int, Row]
    ) -> dict[int, Result]:
        """make(row) of these rows of a unit: twice what the engine takes at the same time, so that it never waits."""
        results: dict[int, Result] = {}
        numbered = iter(rows.items())

        async def work() -> None:
            for number, row in numbered:
                results[number] = await make(row)
                self._done[name] += 1

        workers = [asyncio.create_task(work()) for _ in range(min(len(rows), 2 * self._max_num_seqs))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:  # after an error the rest would go on asking an endpoint for a unit that is given up
                worker.cancel()
        return results

    async def __call__(self, packed: pa.Table) -> AsyncIterator[pa.Table]:
        if self._mistake is not None:
            raise self._mistake
        unit = unpack(packed)
        name = label(packed, "unit")
        self._units[name] = unit.num_rows
        if self._may_die:
            self._reporter.report()  # what is in flight when this actor dies is what may have killed it
        try:
            note = await self._suspicion(name, unit.num_rows)
            async with self._turns.alone() if note else self._turns.together():
                if note:
                    await self._prove(name, note)
                made = await self.columns(name, unit)
            self._snapshot = replace(
                self._snapshot,
                num_rows=self._snapshot.num_rows + unit.num_rows,
                num_failed=self._snapshot.num_failed + made.num_failed,
            )
        finally:
            del self._units[name], self._done[name]
        await self._clear(name)
        if not self._units:
            await self._reporter.report()  # Ray ends this actor as soon as the last unit has left it
        yield with_columns(packed, made.values)

    # --- units that may kill ----------------------------------------------------------------------------------------

    async def _suspicion(self, name: str, num_rows: int) -> Note | None:
        """What is held against a unit that arrives: something died with it, here or in another job; mostly nothing."""
        if name in self._died_with:
            self._died_with.discard(name)
            found = Note.parse(await asyncio.to_thread(self._notes.read, name, self._name), num_rows)
            return found.after_death(self._max_attempts) if found else Note.of(num_rows)
        found = Note.parse(self._notes.found(name, self._name), num_rows)
        return replace(found.after_death(self._max_attempts), num_proofs=0) if found else None

    async def _prove(self, name: str, note: Note) -> None:
        """Before the first suspects of this life: are they to blame, or does everything die here?

        Raises TransientError when so many lives in a row have ended with a harmless request.
        """
        if note.num_proofs >= MAX_STARTS:
            raise TransientError(
                f"the actor of pool {self._name} dies of harmless requests too, {note.num_proofs} times over; the log "
                "above and its node's say why. No row is to blame, and none is quarantined for it"
            )
        if not self._proven and isinstance(self._engine, HostedEngine):
            await self._note(name, replace(note, num_proofs=note.num_proofs + 1))
            await self._engine.prove()
            self._proven = True
        self._suspected[name] = replace(note, num_proofs=0)

    async def _note(self, name: str, note: Note) -> None:
        self._suspected[name] = note
        await asyncio.to_thread(self._notes.write, name, self._name, note.as_json())

    async def _clear(self, name: str) -> None:
        """The unit has come through. Of what was held against it only verdicts are kept: it may have to be redone."""
        note = self._suspected.pop(name, None)
        if note is None:
            return
        if any(count >= self._max_attempts for count in note.kills.values()):
            await asyncio.to_thread(self._notes.write, name, self._name, replace(note, running=False).as_json())
        else:
            await asyncio.to_thread(self._notes.forget, name, self._name)

    def _remember(self, running: list[Suspect], waiting: list[list[Suspect]], guilty: list[Suspect]) -> None:
        """Note how far the engine's own search has come, of every unit whose rows are in it."""
        kills: dict[str, dict[int, int]] = {}
        for suspect in [*running, *(suspect for group in waiting for suspect in group), *guilty]:
            if suspect.request.origin is not None:
                unit, row = suspect.request.origin
                counts = kills.setdefault(unit, {})
                counts[row] = max(suspect.num_kills, counts.get(row, 0))
        for unit, counts in kills.items():
            if unit in self._units:
                note = self._suspected.get(unit) or Note.of(self._units[unit])
                kept = {row: count for row, count in counts.items() if count}
                groups = [_rows(unit, group) for group in waiting]
                note = note.refined(_rows(unit, running), groups, kept, self._max_attempts)
                self._suspected[unit] = note
                self._notes.write(unit, self._name, note.as_json())


def _rows(unit: str, suspects: list[Suspect]) -> Rows:
    """The rows of a unit that are among them."""
    origins = [suspect.request.origin for suspect in suspects]
    return tuple(sorted({origin[1] for origin in origins if origin is not None and origin[0] == unit}))


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
