"""train_aligner through its command line, on Ray: killed at a random step it ends as one that nobody disturbed."""

import contextlib
import json
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.conftest import RayHead
from tests.end_to_end.jobs import CommandLine, CompletedJob, Job, children
from tests.pipelines.training.fabricated import publish_trajectories, row
from tests.processes import killed

SCRIPT = "pipelines/train_aligner.py"
NUM_STEPS = 200
EVERY = 8  # steps between checkpoints


@pytest.fixture(scope="module")
def training(tiny_llama: Path, new_folder: Callable[[], Path]) -> list[str]:
    """A training on one CPU in float32, of a model with dropout, evaluated at both ends."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = new_folder() / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.attention_dropout = 0.1
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
    held_out = [row(number) for number in range(100, 103)]
    data = publish_trajectories(new_folder(), train=[row(number) for number in range(20)], validation=held_out)
    return [
        f"input.path={data}", f"training.model={base}", "training.batch_size=4", "training.lora_rank=4",
        f"training.num_epochs={NUM_STEPS * 4 / 20}", "training.max_tokens=24", "training.omega=1",
        "training.learning_rate=0.003", "evaluation.every=1000", "evaluation.num_prompts=2", "reward=rules",
        f"run.checkpoint_every={EVERY}", "run.num_threads=1", "site.log_every_s=0",
    ]  # fmt: skip


def start(command_line: CommandLine, training: list[str], root: Path, *more: str) -> Job:
    return command_line.start_command([sys.executable, SCRIPT, *training, f"output.root={root}", *more])


def run(command_line: CommandLine, training: list[str], root: Path, *more: str) -> CompletedJob:
    return start(command_line, training, root, *more).wait().expect(0)


def metrics(root: Path) -> list[dict[str, float]]:
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return []


def promised(root: Path) -> list[dict[str, float]]:
    """All that a training tells of itself but how long it took."""
    return [{name: value for name, value in each.items() if name != "seconds"} for each in metrics(root)]


def num_steps(root: Path) -> int:
    return sum("loss" in each for each in metrics(root))


@pytest.fixture(scope="module")
def undisturbed(command_line: CommandLine, training: list[str], new_folder: Callable[[], Path]) -> Path:
    root = new_folder() / "undisturbed"
    run(command_line, training, root)
    assert num_steps(root) == NUM_STEPS
    return root


def start_until_some_step(command_line: CommandLine, training: list[str], root: Path, rng: random.Random) -> Job:
    """A training that has got to a random step, somewhere between two checkpoints."""
    running = start(command_line, training, root)
    least = rng.randrange(EVERY, NUM_STEPS // 3)
    running.until(lambda: num_steps(root) >= least, f"{least} steps were done")
    time.sleep(rng.uniform(0, 0.1))
    return running


def assert_ended_the_same(root: Path, undisturbed: Path) -> None:
    assert promised(root) == promised(undisturbed)
    names = ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"]
    assert [(root / name).read_bytes() for name in names] == [(undisturbed / name).read_bytes() for name in names]


@pytest.mark.long
def test_killed_at_a_random_step_and_run_again_it_has_the_losses_of_an_undisturbed_training(
    command_line: CommandLine, training: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    running = start_until_some_step(command_line, training, root, random.Random(7))
    running.process.kill()
    running.process.wait()
    done = num_steps(root)
    assert 0 < done < NUM_STEPS, "the kill came too late to say anything"
    assert not (root / "adapter_config.json").exists()

    resumed = run(command_line, training, root)
    found = re.search(rf"training: 20 trajectories, (\d+) of {NUM_STEPS} steps are done", resumed.stderr)
    assert found and int(found[1]) >= done
    assert_ended_the_same(root, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_a_process_that_dies_is_started_again(
    seed: int, command_line: CommandLine, ray_head: RayHead, training: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """kill -9 of Ray Train's worker: the job itself goes on, from the checkpoint."""
    root = tmp_path / "out"
    running = start_until_some_step(command_line, training, root, random.Random(seed))
    victims = [each for each in children(psutil.Process(ray_head.raylet)) if "TrainWorker" in title(each)]
    assert len(victims) == 1, victims
    assert killed(victims[0])
    running.wait().expect(0)
    assert_ended_the_same(root, undisturbed)


def title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return "".join(process.cmdline()[:1])
    return ""


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_two_processes_train_what_one_trains(
    parallel: str, lora_rank: int, command_line: CommandLine, training: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    """But for rounding; and a training of two goes on with one. Without dropout, which each draws for itself."""
    more = [f"training.model={tiny_llama}", f"training.lora_rank={lora_rank}", "training.num_epochs=2"]
    given = [each for each in training if each.split("=")[0] not in ("training.lora_rank", "training.num_epochs")]
    run(command_line, given, tmp_path / "one", *more)
    two = [*more, "run.num_workers=2", *(["run.parallel=fsdp"] if parallel == "fsdp" else [])]
    run(command_line, given, tmp_path / "two", *two)
    run(command_line, given, tmp_path / "changed", *two, "--limit", "20")
    assert num_steps(tmp_path / "changed") == 5
    run(command_line, given, tmp_path / "changed", *more)

    def close(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
        assert len(one) == len(other) == 10 + 2
        for each, another in zip(one, other, strict=True):
            assert another == pytest.approx(each, rel=1e-3, nan_ok=True)

    close(promised(tmp_path / "one"), promised(tmp_path / "two"))
    close(promised(tmp_path / "one"), promised(tmp_path / "changed"))
