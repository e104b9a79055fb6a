"""What each process of a training does: steps, evaluations, checkpoints, and at the end the model's folder."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch

from actors.contract import ConfigError
from actors.engines.adapters import on_this_node
from actors.engines.base import EngineConfig
from actors.engines.by_url import ADAPTER
from actors.rewards import build_reward
from actors.training import aligner_model as models
from actors.training.aligner_evaluation import aligned, evaluate, questions
from actors.training.aligner_trainer import State, Trainer
from actors.training.place import Place
from actors.training.trajectories import Trajectory, Vocabulary, encoded, vocabulary
from pipelines.corpus.storage import Storage
from pipelines.training import checkpoints
from pipelines.training.aligner_card import model_card
from pipelines.training.aligner_settings import TrainAlignerConfig
from pipelines.training.checkpoints import Checkpoint, Record
from pipelines.training.on_ray import Tell
from pipelines.training.trajectories import Part, of_split, read_rows

DESCRIBING = ("config.json", ADAPTER)
"""What an engine looks for first in a model's folder: no folder is a model's until it is there."""


@dataclass(frozen=True)
class Work:
    """A training, whole. Safe to pickle.

    Attributes:
        base: the model that is trained, pinned.
        parts: of the dataset, of all splits.
        record: the run's, for the card.
        stop: step after which it stops at a checkpoint, to be continued; None: at the end.
    """

    config: TrainAlignerConfig
    base: EngineConfig
    dataset: Storage
    output: Storage
    parts: list[Part]
    record: dict[str, Any]
    stop: int | None = None


def train(given: dict[str, Any], place: Place, tell: Tell) -> None:
    """One process, started by `on_ray`."""
    work: Work = given["work"]
    num_local = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, work.config.run.num_threads or (os.cpu_count() or 1) // num_local))
    Process(work, place, tell).run()


def load_split(work: Work, words: Vocabulary, split: str) -> tuple[list[Trajectory], int]:
    """The trajectories of a split, and how many were left out for their prompts. Raises ConfigError as `read_rows`."""
    rows = list(read_rows(work.dataset, of_split(work.parts, split)))
    found = [each for row in rows if (each := encoded(words, row, work.config.training))]
    return found, len(rows) - len(found)


def num_cut(trajectories: list[Trajectory], words: Vocabulary) -> int:
    """Of how many the best answer is longer than `max_tokens`: they teach no end."""
    return sum(int(each.states[-1][-1]) not in words.end for each in trajectories)


def held_out_of(work: Work, words: Vocabulary) -> list[Trajectory]:
    """What evaluations ask; [] where there are none. Raises ConfigError where there is nothing to ask."""
    if not work.config.evaluation.every:
        return []
    found = load_split(work, words, "validation")[0]
    if not found:
        raise ConfigError(
            f"{work.dataset.url} has no split `validation`: build it with prompts.validation_fraction=0.05, or set "
            "evaluation.every=0"
        )
    return found


def num_steps(work: Work, trajectories: list[Trajectory]) -> int:
    """Steps of the whole training."""
    training = work.config.training
    return max(1, round(training.num_epochs * len(trajectories) / training.batch_size))


class Process:
    """One process's life.

    Raises ConfigError for a dataset without trajectories, and as `Trainer`.
    """

    def __init__(self, work: Work, place: Place, tell: Tell) -> None:
        self.work, self.place, self.tell = work, place, tell
        self.config = work.config
        self.base = on_this_node(work.base)
        self.words = vocabulary(self.base)
        trajectories, num_left_out = load_split(work, self.words, "train")
        if not trajectories:
            raise ConfigError(f"split `train` of {work.dataset.url} holds no trajectory that can be used")
        self.asked = questions(
            held_out_of(work, self.words), self.config.evaluation.num_prompts, self.config.training.seed
        )
        self.num_steps = num_steps(work, trajectories)
        self.trainer = Trainer(
            self.config.training, self.base, trajectories, self.num_steps,
            parallel=self.config.run.parallel, place=place,
        )  # fmt: skip
        self.history: list[Record] = []
        self.counts = {
            "trajectories": len(trajectories),
            "left_out": num_left_out,
            "cut": num_cut(trajectories, self.words),
            "steps": self.num_steps,
        }

    def run(self) -> None:
        """From the last checkpoint to the end, or as far as `stop`."""
        config, step = self.config, self._resumed()
        stop = self.num_steps if self.work.stop is None else min(self.num_steps, self.work.stop)
        self.tell("begun", {**self.counts, "step": step, "stop": stop})
        state: State | None = None  # after the last step, where that was asked for
        if step == 0 and config.evaluation.every:
            self._evaluate(step, self.trainer.state())
        while step < stop:
            record = self.trainer.step(step)
            step += 1
            self.history.append({"step": step, **record})
            self.tell("step", self.history[-1])
            every = config.evaluation.every
            evaluates = every and (step % every == 0 or step == self.num_steps)
            if evaluates or step % config.run.checkpoint_every == 0 or step == stop:
                state = self.trainer.state()  # of all processes, each at the same steps
                if evaluates:
                    self._evaluate(step, state)
                if self.place.rank == 0:
                    checkpoints.save(self.work.output, Checkpoint(step, self.history, state))
        if step == self.num_steps:
            state = self.trainer.state() if state is None else state
            if self.place.rank == 0:
                self._publish(state)

    def _resumed(self) -> int:
        """Go on from the last checkpoint that the first process sees. Returns its steps; 0 where there is none."""
        output = self.work.output
        step = self.place.agreed(checkpoints.last_step(output))
        if step:
            found = checkpoints.load(output, step)
            self.trainer.restore(found.state)
            self.history = list(found.history)
            if self.place.rank == 0:
                checkpoints.tell(output, self.history)  # killed, it may have left that out
        return step

    def _evaluate(self, step: int, state: State) -> None:
        """Add an evaluation to the history. Only the first process does; the others wait in their next step."""
        if self.place.rank:
            return
        config = self.config
        model = models.finished(config.training, self.base, state["weights"]).to(self.place.device)
        answered = []
        for each in aligned(
            model, self.words, self.asked,
            max_tokens=config.training.max_tokens, max_num_seqs=config.evaluation.max_num_seqs,
        ):  # fmt: skip
            answered.append(each)
            self.tell("alive", None)
        del model
        self.place.free()  # a reward model has a process of its own
        reward = None if config.reward is None else build_reward(config.reward, torch.get_num_threads())
        try:
            found = evaluate(answered, reward, lambda: self.tell("alive", None))
        finally:
            if reward is not None:
                reward.close()
                self.place.free()
        self.history.append({"step": step, **found})
        self.tell("evaluation", self.history[-1])

    def _publish(self, state: State) -> None:
        """Create the model's files in the output root. What makes a folder a model's comes last.

        Raises as `checkpoints.publish`.
        """
        training, base = self.config.training, self.work.base
        name = training.model if training.model.startswith("~") else base.model
        card = model_card(self.config, base, self.work.record, self.counts, self.history)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            models.write(training, self.base, state["weights"], folder, adapts=(name, base.revision))
            self.words.tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(card, "utf-8")
            checkpoints.publish(self.work.output, folder, last=DESCRIBING)
