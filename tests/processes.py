"""Whether processes that should have ended have, and whether it was a kill that ended them."""

import contextlib
import time

import psutil


def assert_gone(processes: list[psutil.Process]) -> None:
    """Fails when one of them is alive after some seconds."""
    deadline = time.monotonic() + 10
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def killed(process: psutil.Process) -> bool:
    """kill -9. Returns whether it was alive until then and is gone now."""
    if not is_alive(process):
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    assert_gone([process])
    return True


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
