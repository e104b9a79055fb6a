"""What the driver makes of an actor's error: one line for a person where the actor meant it for one."""

import pytest
from ray.exceptions import RayTaskError, UserCodeException

from actors.contract import ConfigError, TransientError
from pipelines.cluster import told_by

TRACE = """ray::MapWorker(MapBatches(PolicyStage)).submit() (pid=1, ip=127.0.0.1)
  File "actors/pool.py", line 1, in __call__
    raise self._mistake
{raised}

The above exception was the direct cause of the following exception:

ray::MapWorker(MapBatches(PolicyStage)).submit() (pid=1, ip=127.0.0.1)
ray.exceptions.UserCodeException: UDF failed to process a data block."""


@pytest.mark.parametrize("kind", [ConfigError, TransientError])
def test_what_an_actor_raised_for_a_person_is_told_to_it(kind: type[Exception]) -> None:
    error = RayTaskError(
        "submit", TRACE.format(raised=f"actors.contract.{kind.__name__}: set it right"), UserCodeException()
    )
    told = told_by(error)
    assert type(told) is kind
    assert str(told) == "set it right"


def test_a_bug_of_ours_is_not_told_as_a_mistake() -> None:
    assert told_by(RayTaskError("submit", TRACE.format(raised="KeyError: 'ConfigError'"), UserCodeException())) is None
