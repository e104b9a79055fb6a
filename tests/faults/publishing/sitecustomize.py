"""Python reads this first where its folder is on PYTHONPATH: the process then stops before a chosen step of publishing.

`STOP_ROOT` is the output root, local, `STOP_AT` the number of the change, from 0 on, and `STOP_BY` the signal that this
process then sends itself. Changes to leases and run records, which publishing does not make, are not counted.
"""

import itertools
import os
from typing import Any

ROOT, STEP, SIGNAL = os.environ["STOP_ROOT"], int(os.environ["STOP_AT"]), int(os.environ["STOP_BY"])
CHANGED = ("corpus", "quarantine", "units", "README.md")
steps = itertools.count()
link, replace, unlink = os.link, os.replace, os.unlink


def step(path: Any) -> None:
    if os.path.relpath(path, ROOT).split(os.sep)[0] in CHANGED and next(steps) == STEP:
        os.kill(os.getpid(), SIGNAL)


def stepping_link(source: Any, target: Any, **arguments: Any) -> None:
    step(target)
    link(source, target, **arguments)


def stepping_replace(source: Any, target: Any, **arguments: Any) -> None:
    step(target)
    replace(source, target, **arguments)


def stepping_unlink(path: Any, **arguments: Any) -> None:
    step(path)
    unlink(path, **arguments)


os.link, os.replace, os.unlink = stepping_link, stepping_replace, stepping_unlink
