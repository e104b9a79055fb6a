"""What train_aligner prints: progress lines, evaluations, the dry run's plan and the summary."""

import time
from typing import Any

from actors.contract import ConfigError
from actors.engines.base import EngineConfig
from pipelines import report
from pipelines.corpus.storage import Storage
from pipelines.training.aligner_settings import TrainAlignerConfig
from pipelines.training.checkpoints import Record

SHOWN = 2
CHARACTERS = 400


class Progress:
    """Lines for the person: one every `every_s` seconds, and one for each evaluation."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._shown_at = every_s, time.monotonic()
        self._begun = {"step": 0, "stop": 0}
        self._began_at = time.monotonic()
        self.state = "no process has begun"

    def show(self, kind: str, what: dict[str, float]) -> None:
        if kind == "begun":
            self._begun = {name: int(value) for name, value in what.items()}
            self._began_at = time.monotonic()
            self.state = f"{self._begun['step']} of {self._begun['steps']} steps are done"
            left_out = f" ({self._begun['left_out']} left out)" if self._begun["left_out"] else ""
            cut = f", {self._begun['cut']} best answers cut at max_tokens" if self._begun["cut"] else ""
            report.say(f"training: {self._begun['trajectories']} trajectories{left_out}{cut}, {self.state}")
        elif kind == "evaluation":
            report.say(evaluation_line(what))
        elif kind == "step":
            step, stop = int(what["step"]), self._begun["stop"]
            self.state = f"{step} of {self._begun['steps']} steps are done"
            if step < stop and time.monotonic() - self._shown_at < self._every_s:
                return
            self._shown_at = time.monotonic()
            took = (self._shown_at - self._began_at) / (step - self._begun["step"])
            left = int(took * (stop - step))
            report.say(
                f"training: step {step}/{stop}, L_AR {what['ar']:.4g}, L_Con {what['con']:.4g}, gradient "
                f"{what['grad_norm']:.3g}, {what['tokens'] / what['seconds']:.0f} tokens/s, "
                f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            )


def evaluation_line(found: Record) -> str:
    """What an evaluation came to, in a line."""
    told = (
        f"evaluation after {found['step']:.0f} steps: {found['iterations']:.2f} iterations to converge, "
        f"{found['tokens'] / found['iterations']:.2f} tokens each, {found['changed']:.1%} of answers changed, "
        f"{found['cut']:.1%} cut at max_tokens"
    )
    if "gain" not in found:
        return told
    return (
        f"{told}; reward {found['response']:.4g} -> {found['aligned']:.4g}, gain {gain(found)} over "
        f"{found['scored']:.0f} prompts"
    )


def gain(found: Record) -> str:
    """An evaluation's gain with its 95 % interval, as far as it has them."""
    if "gain" not in found:
        return "-"
    return f"{found['gain']:+.4g}" + (f" ± {found['gain_95']:.2g} (95 %)" if "gain_95" in found else "")


def print_dry_run(
    config: TrainAlignerConfig, base: EngineConfig, dataset: Storage, output: Storage, record: dict[str, Any]
) -> None:
    """What a run would do, and the first trajectories as the model sees them."""
    from actors.engines.adapters import on_this_node
    from actors.engines.by_url import described
    from actors.engines.identity import base_of
    from actors.engines.prompts import render_prompt
    from actors.training.trajectories import vocabulary
    from pipelines.training import checkpoints
    from pipelines.training.aligner_worker import Work, held_out_of, load_split, num_cut, num_steps

    words = vocabulary(described(base) if base_of(base) is None else on_this_node(base))
    work = Work(config, base, dataset, output, record["parts"], record)
    trajectories, left_out = load_split(work, words, "train")
    if not trajectories:
        raise ConfigError(f"split `train` of {dataset.url} holds no trajectory that can be used")
    held_out = held_out_of(work, words)
    steps, done = num_steps(work, trajectories), checkpoints.last_step(output)
    states = [state for each in trajectories for state in each.states]
    tokens = sum(each.length for each in trajectories) * (2 if config.training.omega else 1)
    print(f"trajectories: {len(trajectories)} to train on, {left_out} left out; {len(held_out)} held out")
    print(
        f"answers: {len(states)}, {sum(map(len, states)) / len(states):.1f} tokens each; "
        f"{num_cut(trajectories, words)} best answers cut at max_tokens"
    )
    print(
        f"steps: {steps} of {config.training.batch_size} trajectories, {done} done; about "
        f"{tokens * config.training.num_epochs / 1e6:.3g} million tokens in all"
    )
    for each in trajectories[:SHOWN]:
        print(f"--- prompt\n{render_prompt(words.tokenizer, each.prompt.tolist())}")
        for name, state in (("y(0)", each.states[0]), ("y(T)", each.states[-1])):
            print(f"--- {name}\n{render_prompt(words.tokenizer, state.tolist())[:CHARACTERS]}")


def print_summary(output: Storage, finished: bool, max_tokens: int) -> None:
    """The last evaluation, and where the model is and how it is used, or how to get it where it is not finished."""
    from pipelines.training import checkpoints

    history = checkpoints.metrics(output)
    steps = [each for each in history if "loss" in each]
    if not finished:
        print(f"stopped after {len(steps)} steps, before there is a model; the same command goes on from there")
        return
    evaluations = [each for each in history if "iterations" in each]
    if evaluations:
        print(evaluation_line(evaluations[-1]))
    print(f"trained: {len(steps)} steps in {sum(each['seconds'] for each in steps) / 3600:.2f} hours")
    print(
        f"aligner: {output.url} (aligner.recipe=diffpo aligner.model={output.url} aligner.max_tokens={max_tokens} "
        f"aligner.block_size={max_tokens})"
    )
