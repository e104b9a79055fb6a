"""Notes at the output root on units that are suspected of killing engines: `attempts/<unit>.json`, by stage."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from actors.contract import ConfigError, TransientError
from pipelines.corpus import units
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage, concurrently
from pipelines.corpus.units import Coverage, Unit

FOLDER = "attempts"
RETRY_S = 10.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Attempts:
    """Reads and writes notes; any node can. The last writer wins, and a store that is away loses some: no harm done.

    Attributes:
        output: the output root.
        at_start: unit -> stage -> note, of all units that had one when the job began.
    """

    output: Storage
    at_start: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of_job(cls, output: Storage) -> "Attempts":
        """For a job that begins now: one listing, and one read for each unit under suspicion."""
        hasty = output.within(RETRY_S)
        notes = cls(hasty)
        found = concurrently(notes._all, notes._names())
        return cls(hasty, {name: stages for name, stages in found if stages})

    def found(self, unit: str, stage: str) -> Any | None:
        return self.at_start.get(unit, {}).get(stage)

    def read(self, unit: str, stage: str) -> Any | None:
        return self._all(unit).get(stage)

    def write(self, unit: str, stage: str, note: Any) -> None:
        data = json.dumps({**self._all(unit), stage: note}).encode()
        _harmless(lambda: self.output.put(_path(unit), data), None)

    def forget(self, unit: str, stage: str) -> None:
        others = {name: note for name, note in self._all(unit).items() if name != stage}
        if others:
            _harmless(lambda: self.output.put(_path(unit), json.dumps(others).encode()), None)
        else:
            _harmless(lambda: self.output.delete([_path(unit)]), None)

    def forget_done(self) -> None:
        """Delete the notes on units whose rows are done."""
        names = self._names()
        if names:
            done = read_state(self.output).done
            over = [name for name in names if _is_over(Unit.parse(name), done)]
            _harmless(lambda: self.output.delete([_path(name) for name in over]), None)

    def _names(self) -> list[str]:
        """Units that have notes."""
        none: dict[str, int] = {}
        return [name.removesuffix(".json") for name in _harmless(lambda: self.output.sizes(FOLDER), none)]

    def _all(self, unit: str) -> dict[str, Any]:
        try:
            found = json.loads(_harmless(lambda: self.output.read(_path(unit)), b"{}"))
        except (FileNotFoundError, ValueError):  # a person may have edited it
            return {}
        return found if isinstance(found, dict) else {}


def _path(unit: str) -> str:
    return f"{FOLDER}/{unit}.json"


def _is_over(unit: Unit | None, done: Coverage) -> bool:
    return unit is not None and not units.missing(unit.start, unit.stop, done.get((unit.shard, unit.retry), []))


def _harmless(call: Callable[[], Result], otherwise: Result) -> Result:
    """call(); `otherwise` where the store is away or refuses: what matters to the rows will raise by itself."""
    try:
        return call()
    except (TransientError, ConfigError) as error:
        logging.getLogger(__name__).warning("a note on a unit that may kill engines is lost: %s", error)
        return otherwise
