"""An engine that outlives its own deaths: rebuilt in a new process, with the request that kills it found and failed."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from actors.contract import ConfigError, RowError, TransientError
from actors.engines.base import Completion, DraftingConfig, EngineConfig, EngineStats, Request, ScoringConfig
from actors.engines.process import Build, EngineDied, EngineProcess

MAX_ATTEMPTS = 3
"""Times that one request may kill an engine in which it runs alone."""
MAX_STARTS = 3
"""Times that an engine may die while it starts, or of a harmless request, before that is the job's end."""
HARMLESS = Request("Hello", seed=0)
"""What an engine must survive that has not answered anything yet. Raw text, as not every model has a chat template."""
TOLD_WITHIN_S = 0.1
"""After a death, until all that ran have heard of it."""


@dataclass
class Suspect:
    """A request that ran in an engine that died, and the engines that died while it ran alone."""

    request: Request
    cleared: asyncio.Future[Completion]
    num_kills: int


Remember = Callable[[list[Suspect], list[list[Suspect]], list[Suspect]], None]
"""Told by an inquiry before each of its steps: who is going to run, the groups that wait for theirs, and who is guilty.
Called in a thread."""


def forget(running: list[Suspect], waiting: list[list[Suspect]], guilty: list[Suspect]) -> None:
    """For who has no use for it."""


def crash(num_kills: int) -> RowError:
    """What becomes of a request that has killed too often."""
    message = f"the engine died {num_kills} times while it ran this request alone"
    return RowError("engine_crash", message, attempts=num_kills)


class HostedEngine:
    """An `Engine` whose process may die. Not for use from several event loops.

    When the process dies, every request in it is a suspect. A new process runs the suspects again, the others wait. If
    it dies too, the suspects that were in it are halved, each half runs without the other, and so on: bystanders come
    out well on the way, and a request that kills the engine `max_attempts` times while it runs alone, kills of its
    row's lives before among them, fails with RowError `engine_crash`.

    That says something of the request only where the engine itself is sound, and how many died in a row does not tell:
    all that is left of a job may be poison. So after a process that died before it had answered anything, the next one
    must first answer a request that is known to be harmless: the last one that was answered, or else `HARMLESS`. When
    `MAX_STARTS` in a row die of that, it is an outage, and no request is to blame.
    """

    def __init__(
        self,
        build: Build,
        config: EngineConfig,
        num_threads: int,
        max_attempts: int = MAX_ATTEMPTS,
        remember: Remember = forget,
    ) -> None:
        kinds = (DraftingConfig, ScoringConfig, EngineConfig)
        kind = next(kind for kind in kinds if isinstance(config, kind))
        plain = kind(**{field.name: getattr(config, field.name) for field in fields(kind)})
        self._arguments = (build, plain, num_threads)  # of its base class, so that the child imports no pool and no Ray
        self._process = self._new_process()
        self._harmless = HARMLESS
        self._answered = False  # something, by this process
        self._tokens_before = 0  # made by processes that have died
        self._max_attempts, self._remember = max_attempts, remember
        self._suspects: list[Suspect] = []
        self._inquiry: asyncio.Task[None] | None = None

    async def generate(self, request: Request) -> Completion:
        """Make one candidate.

        Raises:
            RowError: `engine_crash` among others.
            ConfigError: not even a new process starts.
            TransientError: the engine is broken; it dies of harmless requests too.
        """
        if self._inquiry is not None:
            await asyncio.wait([self._inquiry])
        try:
            return await self._generate(request)
        except EngineDied:
            cleared: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
            self._suspects.append(Suspect(request, cleared, request.num_kills))
            if self._inquiry is None:
                self._inquiry = asyncio.create_task(self._inquire())
            return await cleared

    async def prove(self) -> None:
        """Answer something harmless; for who must know, before it asks for more, that the engine can.

        Raises ConfigError and TransientError like `generate`.
        """
        with contextlib.suppress(RowError):  # it is refused: the engine has not died of it
            await self.generate(replace(self._harmless, origin=None, num_kills=0))

    def stats(self) -> EngineStats:
        now = self._process.stats()
        return EngineStats(self._tokens_before + now.num_tokens, now.num_running, now.num_waiting + len(self._suspects))

    def close(self) -> None:
        self._process.close()

    @property
    def pid(self) -> int:
        """Of the process that the engine is in now."""
        return self._process.pid

    async def _inquire(self) -> None:
        """Run every suspect to its end, the guilty ones to theirs."""
        groups: deque[list[Suspect]] = deque()
        guilty: list[Suspect] = []
        try:
            await asyncio.sleep(TOLD_WITHIN_S)
            await asyncio.to_thread(self._remember, list(self._suspects), [], [])
            await self._rebuild()
            while self._suspects or groups:
                if self._suspects:
                    groups.append(self._suspects)
                    self._suspects = []
                group = groups.popleft()
                await asyncio.to_thread(self._remember, group, list(groups), guilty)
                results = await asyncio.gather(*map(self._try, group))
                dead = [suspect for suspect, died in zip(group, results, strict=True) if died]
                if not dead:
                    continue
                if len(group) > 1:
                    groups.extend(half for half in (dead[: len(dead) // 2], dead[len(dead) // 2 :]) if half)
                else:
                    (suspect,) = group
                    suspect.num_kills += 1
                    if suspect.num_kills < self._max_attempts:
                        groups.append(group)
                    else:
                        guilty.append(suspect)
                        await asyncio.to_thread(self._remember, [], list(groups), guilty)  # its unit may end with it
                        if not suspect.cleared.done():
                            suspect.cleared.set_exception(crash(suspect.num_kills))
                await self._rebuild()  # last: everyone who still waits is in `groups` should it fail
        except BaseException as error:
            for suspect in [*self._suspects, *(suspect for group in groups for suspect in group)]:
                if not suspect.cleared.done():
                    suspect.cleared.set_exception(error)
            self._suspects = []
            raise
        finally:
            self._inquiry = None

    async def _try(self, suspect: Suspect) -> bool:
        """Run one suspect; True if the engine died with it."""
        cleared = suspect.cleared
        try:
            completion = await self._generate(suspect.request)
        except EngineDied:
            return True
        except (RowError, ConfigError) as error:
            if not cleared.done():
                cleared.set_exception(error)
        else:
            if not cleared.done():
                cleared.set_result(completion)
        return False

    async def _generate(self, request: Request) -> Completion:
        completion = await self._process.generate(request)
        self._harmless, self._answered = request, True
        return completion

    async def _rebuild(self) -> None:
        """A new process for the dead one, proven where that one had answered nothing.

        Raises ConfigError like `_new_process`, and TransientError when MAX_STARTS in a row do not stand the proof.
        """
        for _ in range(MAX_STARTS):
            has_answered, self._answered = self._answered, False
            self._tokens_before += self._process.stats().num_tokens
            self._process = await asyncio.to_thread(self._new_process)
            if has_answered:
                return
            try:
                await self._process.generate(self._harmless)
            except RowError:  # it is refused: the engine has not died of it
                return
            except EngineDied as error:
                last = error
            else:
                return
        config = self._arguments[1]
        raise TransientError(
            f"the {config.engine} engine of {config.model} dies of every request, of harmless ones too: {last}, "
            f"{MAX_STARTS} times over; the log above says why. No row is to blame, and none is quarantined for it"
        ) from last

    def _new_process(self) -> EngineProcess:
        """Raises ConfigError when MAX_STARTS in a row die while they start: it is nearly always a want of memory."""
        for _ in range(MAX_STARTS):
            try:
                return EngineProcess(*self._arguments)
            except EngineDied as error:
                last = error
        config = self._arguments[1]
        raise ConfigError(
            f"the {config.engine} engine of {config.model} does not start: {last}, {MAX_STARTS} times over; the log "
            "above says why. A smaller max_num_seqs, kv_cache_tokens or max_model_len, or more GPUs, need less memory"
        ) from last
