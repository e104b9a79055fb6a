"""Joining a cluster: a Ray that does not start, and what the driver makes of an error that came through it."""

import socket
import time

import pytest
from ray.exceptions import RayTaskError, UserCodeException

from actors.contract import ConfigError, TransientError
from pipelines import cluster
from pipelines.cluster import join_or_start, told_by

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


def test_a_ray_that_does_not_start_in_time_is_an_outage_and_anything_else_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(message: str) -> None:
        def init(**options: object) -> None:
            raise Exception(message)

        monkeypatch.setattr("ray.init", init)

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
    fails("The current node timed out during startup. This could happen because some of the raylet failed to startup")
    with pytest.raises(TransientError, match="Ray did not start here in time"):
        join_or_start("local", 1)
    fails("something else")
    with pytest.raises(Exception, match="something else"):
        join_or_start("local", 1)


def test_an_address_at_which_nothing_listens_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_S", 1.0)
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(ConfigError, match=f"no Ray cluster at {address} "):
            join_or_start(address, 1)
        assert 0.4 < time.monotonic() - begun < 10  # a head that starts again is given a moment
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        for form in ("127.0.0.1:{}", "ray://127.0.0.1:{}", "[::ffff:127.0.0.1]:{}"):
            cluster._await_listener(form.format(listener.getsockname()[1]))
    cluster._await_listener("auto")
