"""Joining a Ray cluster or starting one, and what an error that came through Ray means to a person."""

import contextlib
import logging
import math
import os
import re
import signal
import socket
import time
import warnings
from collections.abc import Iterator

import ray
import ray.data
from ray._private import ray_constants

from actors.contract import ConfigError, TransientError

ANSWER_S = 10.0
"""Seconds within which something must listen at a cluster's address."""


def named_cluster(address: str | None) -> str | None:
    """The cluster to join: at `address` (site.ray_address), else RAY_ADDRESS; None where the job starts a Ray here."""
    named = address or os.environ.get("RAY_ADDRESS") or "local"
    return None if named == "local" else named


def join_or_start(address: str | None, num_cpus: float) -> None:
    """Join the cluster that `named_cluster` says, else start one here, of `num_cpus` logical CPUs at least; return at
    once where that has been done.

    Raises ConfigError where no cluster there lets this job in, and TransientError where one does not start in time.
    """
    if ray.is_initialized():
        return
    cluster = named_cluster(address)
    if cluster is None:
        # Nobody else is to reach it: Ray would listen on every address of the machine, whatever `_node_ip_address` is.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False  # the same, which was read when Ray was imported
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(num_cpus)),  # logical: pools share the cores that there are
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray's own is no other
            if "timed out during startup" not in str(error):
                raise
            raise TransientError("Ray did not start here in time: this machine has too much else to do") from error
    else:
        try:
            _await_listener(cluster)
            ray.init(address=cluster, logging_level=logging.ERROR)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:  # a wrong token is a ConnectionError too
            raise ConfigError(
                f"no Ray cluster at {cluster} (site.ray_address or RAY_ADDRESS) lets this job in: there is none, or it "
                "wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to what "
                "`ray get-auth-token` prints on its head"
            ) from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own there, which exits with 15


def _await_listener(cluster: str) -> None:
    """Raise ConnectionError where nothing listens at `host:port`: Ray would go on asking for a quarter of an hour."""
    host, _, port = cluster.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # `auto`, which Ray looks up
        return
    given_up_at = time.monotonic() + ANSWER_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
            return
        except (OSError, UnicodeError) as error:  # of a host that can be none
            if time.monotonic() + 0.5 > given_up_at:
                raise ConnectionError(f"nothing listens at {cluster}") from error
        time.sleep(0.5)


def data_context(block_bytes: int) -> ray.data.DataContext:
    """Ray Data's settings for this process, with what all jobs want; blocks are cut at `block_bytes`."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = block_bytes
    context.enable_progress_bars = False  # ours speak of rows and tokens
    context.memory_usage_poll_interval_s = None  # a thread of every stage that reads /proc/self/smaps each second
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised here, too
    warnings.filterwarnings("ignore", module=r"ray\.data")
    return context


@contextlib.contextmanager
def mistakes_told() -> Iterator[None]:
    """Raises what a task or actor raised for a person instead of the error that it came in."""
    try:
        yield
    except ray.exceptions.RayError as error:
        told = told_by(error)
        if told is None:
            raise
        raise told from None


def told_by(error: ray.exceptions.RayError) -> ConfigError | TransientError | None:
    """What a task or actor raised for a person: of an error's causes Ray Data hands on nothing but their text."""
    for kind in (ConfigError, TransientError):
        found = re.search(rf"^{kind.__module__}\.{kind.__name__}: (.+)$", str(error), re.MULTILINE)
        if found:
            return kind(found[1])
    return None
