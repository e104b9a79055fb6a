"""Processes of Ray Train, for every job that trains: placed, started, listened to, and ended with what they came to."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

import ray.train
import ray.train.torch
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.queue import Queue

from actors.contract import ConfigError, TransientError
from actors.training.place import Place
from pipelines import report
from pipelines.cluster import join_or_start
from pipelines.placement import Need, wait_until_placeable
from pipelines.progress import watched
from pipelines.settings import SiteConfig

POLL_S = 0.5

Tell = Callable[[str, Any], None]
"""Tells the driver something of a kind, and what there is to say of it."""
Work = Callable[[dict[str, Any], Place, Tell], None]
"""One process's part: what it is given, where it stands, and how it tells of it. Of the others than the first nothing
is heard but what they fail of."""


class Run(Protocol):
    """What `run` of a job that trains says of its processes."""

    @property
    def num_workers(self) -> int: ...
    @property
    def use_gpu(self) -> bool: ...
    @property
    def max_failures(self) -> int: ...
    @property
    def stall_minutes(self) -> float: ...
    @property
    def wait_for_resources_s(self) -> float: ...


def trained(
    work: Work, given: dict[str, Any], run: Run, site: SiteConfig, state: Callable[[], str]
) -> Iterator[tuple[str, Any]]:
    """What the processes tell, as they do, on the cluster that the site names, from when it has room for them.

    Ends this process with exit code 4 where they tell nothing for `run.stall_minutes`.

    Args:
        state: how far they are, for a person who must find out why they stand still.

    Raises as `fitted`, and TransientError where no room comes.
    """
    need = Need("training", run.num_workers, 1, float(run.use_gpu))
    join_or_start(site.ray_address, need.count * need.cpus)
    wait_until_placeable([need], run.wait_for_resources_s, say_every_s=site.log_every_s, announce=report.say)
    moved_at = time.monotonic()

    def diagnosis() -> Iterator[str]:
        yield f"asked for {need.ask}; {state()}"
        yield "checkpoints are kept; the same command resumes"

    with watched(lambda: time.monotonic() - moved_at, diagnosis, run.stall_minutes * 60):
        for each in fitted(work, given, run.num_workers, run.use_gpu, run.max_failures):
            moved_at = time.monotonic()
            yield each


class _Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]  # Ray has no types
    """Without a detached actor that outlives the job, and that fails where Ray has no dashboard."""

    def _create_default_callbacks(self) -> list[Any]:
        found = super()._create_default_callbacks()
        return [each for each in found if not isinstance(each, PlacementGroupCleanerCallback)]


def fitted(
    work: Work, given: dict[str, Any], num_workers: int, use_gpu: bool, max_failures: int
) -> Iterator[tuple[str, Any]]:
    """What the processes tell, as they do, until all have come to their end.

    Args:
        max_failures: deaths of processes after which all are started again.

    Raises what they raised for a person, or Ray Train's own error.
    """
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths of the config, and PYTHONPATH's, are this folder's
    os.environ.setdefault(
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0"
    )  # it warns at every start, and decides nothing here
    told = Queue(actor_options={"num_cpus": 0})
    with tempfile.TemporaryDirectory() as scratch:  # Ray Train's own notes: the checkpoints are ours
        trainer = _Trainer(
            _process,
            train_loop_config={"work": work, "given": given, "told": told},
            torch_config=ray.train.torch.TorchConfig(timeout_s=24 * 3600),  # one evaluates while others wait for it
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": 1, **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=ray.train.RunConfig(
                name="training",
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        ended: Future[None] = Future()

        def fit() -> None:
            try:
                trainer.fit()
                ended.set_result(None)
            except BaseException as error:
                ended.set_exception(error)

        # Not in the main thread, where Ray Train would take Ctrl-C for itself.
        threading.Thread(target=fit, name="ray-train", daemon=True).start()
        while True:
            has_ended = ended.done()
            if told.empty():  # asked first: of a `get` that finds nothing Ray would tell at a Ctrl-C, with a traceback
                if has_ended:
                    break
                time.sleep(POLL_S)
                continue
            kind, what = told.get()
            if kind == "failed":
                raise what
            yield kind, what
        ended.result()


def _process(arguments: dict[str, Any]) -> None:
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

    def tell(kind: str, what: Any) -> None:
        if place.rank == 0 or kind == "failed":
            arguments["told"].put((kind, what))

    try:
        arguments["work"](arguments["given"], place, tell)
    except (ConfigError, TransientError) as error:
        tell("failed", error)
        raise
