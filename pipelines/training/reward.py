"""The train_reward job: from pairs to steps, wherever those are taken, to a model and what is told of it."""

import contextlib
import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.candidates import model_label
from actors.contract import ConfigError
from actors.engines.base import ScoringConfig
from actors.engines.by_url import is_url, on_this_node
from actors.engines.identity import identity, pinned
from actors.training.reward_settings import Pair
from pipelines import report
from pipelines.config import Flags, changes_rows, resolved
from pipelines.corpus.runs import changes
from pipelines.corpus.storage import SCRATCH, Storage
from pipelines.job import DONE
from pipelines.settings import code_version
from pipelines.training.material import digest_of, encoder, gather
from pipelines.training.reward_report import RECORD, card, print_dry_run, print_pairs, print_summary, result
from pipelines.training.reward_settings import TrainRewardConfig

if TYPE_CHECKING:
    from actors.training.bradley_terry import Step
    from actors.training.place import Place
    from pipelines.training.on_ray import Tell

STATE = ".training"
"""Folder below the output root that holds what a run needs to go on; it goes when the model is there."""
BEGUN = "run.json"
CURVE = "losses.jsonl"
FINISHED = "config.json"
RECENT = 50
"""Steps that progress is reckoned from."""


@dataclass(frozen=True)
class Work:
    """What a process that trains is given.

    Attributes:
        base: the model, pinned.
        root: the output root, absolute.
        record: what is known of the run before it begins, for RECORD and the card.
    """

    config: TrainRewardConfig
    base: ScoringConfig
    train: list[Pair]
    held_out: list[Pair]
    root: Path
    record: dict[str, Any]


def run(config: TrainRewardConfig, flags: Flags, command: str) -> int:
    """Do what the config asks for, and print what came of it. Returns the exit code.

    Raises ConfigError for a user's mistake, and where the output root holds another model.
    """
    base = _base(config)
    material = gather(config.input, config.training, config.site, encoder(on_this_node(base)), flags.limit)
    made_of = {
        **changes_rows(config),
        "training.model": f"{model_label(base)} ({identity(base)})",
        "input.train": digest_of(material.train),
        "input.held_out": digest_of(material.held_out),
    }
    root = Path(config.output.root).expanduser().absolute()
    if flags.dry_run:
        print_dry_run(config.training, base, material)
        return DONE
    print_pairs(material)
    with _held(root, made_of) as is_finished:
        if not is_finished:
            record = {
                "command": command,
                "code_version": code_version(),
                "fingerprint": made_of,
                "files": material.files,
                "left_out": dict(material.left_out),
                "config": resolved(config),
            }
            _train(Work(config, base, material.train, material.held_out, root, record))
    print_summary(root, json.loads((root / RECORD).read_text("utf-8")))
    return DONE


def _base(config: TrainRewardConfig) -> ScoringConfig:
    """The base model as what loads and reads it knows it, pinned."""
    model = ScoringConfig(
        model=config.training.model,
        revision=config.training.revision,
        model_storage_options=config.site.storage_options if is_url(config.training.model) else {},
        dtype="float32",
        device="cuda" if config.run.use_gpu else "cpu",
    )
    return pinned(model, "training")


@contextlib.contextmanager
def _held(root: Path, made_of: dict[str, Any]) -> Iterator[bool]:
    """The output root, for this process alone; whether the model of `made_of` is there already.

    Raises ConfigError where another process trains there, or where another model is there or has been begun.
    """
    state = root / STATE
    if _is_finished(root, made_of):
        yield True
        return
    storage = Storage(str(state))
    if not state.exists() and root.is_dir() and any(root.iterdir()):
        raise ConfigError(f"{root} holds something that is none of this job's: take another output.root")
    storage.fs.told("making it", lambda: state.mkdir(parents=True, exist_ok=True))
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process trains in {root}: wait for it, or take another output.root") from None
        if _is_finished(root, made_of):  # by one that had the lock meanwhile
            yield True
            return
        if storage.exists(BEGUN):
            _check(_known(state / BEGUN), made_of, f"{root} holds what another run has begun")
        storage.put(BEGUN, json.dumps({"fingerprint": made_of}).encode())
        yield False
        shutil.rmtree(state)
        shutil.rmtree(root / SCRATCH, ignore_errors=True)


def _is_finished(root: Path, made_of: dict[str, Any]) -> bool:
    """Whether the model of `made_of` is there: then nothing is left of its making. Raises ConfigError where another
    is."""
    if not (root / FINISHED).exists():
        return False
    _check(_known(root / RECORD), made_of, f"{root} holds a model that is there already")
    shutil.rmtree(root / STATE, ignore_errors=True)  # of a run that was killed when all was done
    shutil.rmtree(root / SCRATCH, ignore_errors=True)
    return True


def _known(path: Path) -> dict[str, Any]:
    """The fingerprint that a file tells; {} where there is no such file."""
    with contextlib.suppress(FileNotFoundError):
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))["fingerprint"]
        return found
    return {}


def _check(before: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """Raises ConfigError that names what differs."""
    if not before:
        raise ConfigError(f"{what}, and it is none of this job's: take another output.root")
    if found := changes(before, now):
        raise ConfigError(f"{what}: {'; '.join(found.values())}. Take another output.root, or delete that folder")


# --- where the steps are taken --------------------------------------------------------------------------------------


def _train(work: Work) -> None:
    """Take the steps in this process, or in workers of Ray Train, and put the model into the output root."""
    run = work.config.run
    if run.num_workers == 0:
        on_worker(work)
        return
    from pipelines.training import on_ray  # which takes seconds to import

    said = "no process has begun"

    def state() -> str:
        return said

    for kind, what in on_ray.trained(_on_ray, {"work": work}, run, work.config.site, state):
        if kind == "line":
            said = what
            report.say(what)


def _on_ray(given: dict[str, Any], place: "Place", tell: "Tell") -> None:
    on_worker(given["work"], say=lambda line: tell("line", line), alive=lambda: tell("alive", None))


def on_worker(work: Work, say: Callable[[str], None] = report.say, alive: Callable[[], None] = lambda: None) -> None:
    """One worker's part: train with the others where there are any, score what is held out, and, as the first of them,
    write the model.

    Args:
        say: tells a person a line.
        alive: called after each step.
    """
    import torch  # takes seconds to import, as what needs it does

    from actors.engines.prompts import load_tokenizer
    from actors.training.bradley_terry import State, Step, load_base, margins_of, rank_and_size, train
    from actors.training.place import Place
    from pipelines.training import checkpoints

    training, run = work.config.training, work.config.run
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    base, state = on_this_node(work.base), Storage(str(work.root / STATE))
    model = load_base(base, training.num_layers)
    place = Place(*rank_and_size(), model.device)
    begun, last_step = None, place.agreed(checkpoints.last_step(state))
    if last_step:
        found = checkpoints.load(state, last_step)
        begun = found.state, [Step(**each) for each in found.history]  # type: ignore[arg-type]

    def keep(found: State, steps: Sequence[Step]) -> None:
        checkpoints.save(state, checkpoints.Checkpoint(len(steps), [asdict(each) for each in steps], found))

    progress = _progress(work.config.site.log_every_s, say)

    def tell(steps: Sequence[Step], num_steps: int) -> None:
        progress(steps, num_steps)
        alive()

    steps = train(model, work.train, training, begun, keep, run.checkpoint_s, tell)
    if place.rank == 0:
        say(f"scoring {len(work.held_out)} held-out pairs")
    margins = margins_of(model, work.held_out, training.batch_tokens)
    if place.rank:
        return
    record = {**work.record, "result": result(len(work.train), steps, work.held_out, margins)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder)
        load_tokenizer(base.model, base.revision).save_pretrained(folder)
        (folder / CURVE).write_text("".join(f"{json.dumps(asdict(each))}\n" for each in steps), "utf-8")
        (folder / RECORD).write_text(json.dumps(record, indent=1), "utf-8")
        (folder / "README.md").write_text(card(work.root.name, work.base, record), "utf-8")
        checkpoints.publish(Storage(str(work.root)), folder, last=[FINISHED])


def _progress(every_s: float, say: Callable[[str], None]) -> Callable[[Sequence["Step"], int], None]:
    """What tells a person, every so many seconds, how far the steps are."""
    told_at = time.monotonic()
    is_first = True

    def tell(steps: Sequence["Step"], num_steps: int) -> None:
        nonlocal told_at, is_first
        if is_first and steps:
            say(f"resumed: {len(steps)} of {num_steps} steps are done")
        elif not is_first and time.monotonic() - told_at >= every_s:
            told_at = time.monotonic()
            recent = steps[-RECENT:]
            seconds = sum(each.seconds for each in recent)
            eta = timedelta(seconds=round((num_steps - len(steps)) * seconds / len(recent)))
            say(
                f"step {len(steps)}/{num_steps}: loss {np.mean([each.loss for each in recent]):.4f}, "
                f"{sum(each.num_tokens for each in recent) / seconds:.0f} tokens/s, ETA {eta}"
            )
        is_first = False

    return tell
