"""train_reward through its command line: what it learns, how it goes on when it is killed, and who takes its model."""

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.train_reward import main
from pipelines.training.pairs import is_held_out, prompt_key
from tests.end_to_end.jobs import CommandLine, CompletedJob, corpus, files, write_shard
from tests.pipelines.preferences import examples
from tests.pipelines.preferences.fabricate import publish_corpus, row, table

SCRIPT = "pipelines/train_reward.py"
NUM_PROMPTS = 96
HELD_OUT = re.compile(r"accuracy ([0-9.]+)% \(95%: ([0-9.]+)% to ([0-9.]+)%\)")


def prompt(number: int) -> str:
    return f"What do you say to guest {number}?"


def chosen(number: int) -> str:
    return "Well, " * (number % 3) + f"welcome, guest {number}, please come in."


def rejected(number: int) -> str:
    return "Well, " * (number * 7 % 5 % 3) + f"go away, guest {number}, we are closed."


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@dataclass(frozen=True)
class Trained:
    """A run that nobody disturbed: its arguments but for output.root, how it ended, and the model's folder."""

    arguments: list[str]
    completed: CompletedJob
    root: Path

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / "training.json").read_text())
        return found


@pytest.fixture(scope="module")
def arguments(tiny_llama: Path, new_folder: Callable[[], Path]) -> list[str]:
    """Of a job that learns to prefer the polite answer, which is as often the shorter one, in a hundred steps."""
    numbers = range(NUM_PROMPTS)
    columns = {
        "prompt": [*map(prompt, numbers)],
        "chosen": [*map(chosen, numbers)],
        "rejected": [*map(rejected, numbers)],
    }
    pairs = write_shard(new_folder() / "pairs.parquet", columns)
    return [
        f"input.path={pairs}", "input.test_fraction=0.3", f"training.model={tiny_llama}", "run.num_threads=1",
        "training.num_epochs=6", "training.batch_size=4", "training.learning_rate=1e-3",
    ]  # fmt: skip


def train(command_line: CommandLine, *arguments: str) -> CompletedJob:
    return command_line.start_command([sys.executable, SCRIPT, *arguments]).wait()


@pytest.fixture(scope="module")
def trained(lone_command_line: CommandLine, arguments: list[str], new_folder: Callable[[], Path]) -> Trained:
    root = new_folder() / "polite"
    return Trained(arguments, train(lone_command_line, *arguments, f"output.root={root}").expect(0), root)


def curve(root: Path) -> list[tuple[int, float, float, int]]:
    """Each step without the seconds that it took."""
    lines = [json.loads(line) for line in (root / "losses.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["learning_rate"], line["num_tokens"]) for line in lines]


def plain_scorer(folder: Path) -> Callable[[Any, str], float | None]:
    """Scores a chat's answer as a model card would have it: template, then the model. None where it is too long."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def score(chat: Any, answer: str) -> float | None:
        messages = [*chat, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        if ids.shape[1] > model.config.max_position_embeddings:
            return None
        return float(model(ids).logits[0, 0])

    return score


def test_it_learns_what_can_be_learned(trained: Trained) -> None:
    held_out = [number for number in range(NUM_PROMPTS) if is_held_out(prompt_key((("user", prompt(number)),)), 0.3)]
    num = len(held_out)
    assert 15 < num < 45
    out = trained.completed.stdout
    assert f"pairs: {NUM_PROMPTS - num} to train on, {num} held out; left out: none" in out
    assert f"held out: {num} pairs of {num} prompts: accuracy 100.0% (95%: " in out
    result = trained.record["result"]
    assert result["held_out"] | {"low": 0} == {
        "num_pairs": num, "num_prompts": num, "accuracy": 1.0, "low": 0, "high": 1.0,
    }  # fmt: skip
    assert result["held_out"]["low"] == pytest.approx(num / (num + 1.959964**2))  # Wilson's, where all are right
    assert 0.2 < result["longer"]["accuracy"] < 0.8
    score = plain_scorer(trained.root)
    margins = [
        (score(user(prompt(number)), chosen(number)) or 0) - (score(user(prompt(number)), rejected(number)) or 0)
        for number in held_out
    ]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / num
    assert result["held_out_loss"] == pytest.approx(expected, rel=1e-3), "it was told what plain transformers finds"
    losses = [loss for _, loss, _, _ in curve(trained.root)]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6), "the head begins at zero"
    assert max(losses[-10:]) < 0.1
    assert result["num_steps"] == len(losses) == 6 * -(-(NUM_PROMPTS - num) // 4)


def test_the_folder_is_a_model_with_its_card(trained: Trained) -> None:
    names = {path.name for path in trained.root.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert not [name for name in names if name.startswith(".")], "nothing of the training is left"
    card = (trained.root / "README.md").read_text()
    assert f"python {SCRIPT} {' '.join(trained.arguments)} output.root={trained.root}" in card
    assert "accuracy 100.0% (95%: " in card and "seed 0" in card and "`pairs.parquet`" in card
    assert "library_name: transformers" in card.split("---")[1]
    assert "base_model" not in card.split("---")[1], "that would have to be a hub id, and it is a folder here"


def test_the_reward_pool_scores_as_plain_transformers_does(
    trained: Trained, command_line: CommandLine, new_folder: Callable[[], Path]
) -> None:
    numbers = range(200, 212)
    rows = [row(prompt(number), [chosen(number), rejected(number)], ["Go in.", "Come."]) for number in numbers]
    folder = new_folder()
    publish_corpus(folder / "corpus", table(rows))
    pool = f"{{engine: torch, model: {trained.root}, dtype: float32, device: cpu, num_threads: 1}}"
    scored = [f"input.path={folder / 'corpus'}", f"output.root={folder / 'scored'}", f"reward={pool}"]
    command_line.start_command([sys.executable, "pipelines/score_corpus.py", *scored]).wait().expect(0)
    found = corpus(folder / "scored")
    rewards = [each["rewards"][0] for each in found]
    assert {each["name"] for each in rewards} == {"polite"}
    score = plain_scorer(trained.root)
    expected = [score(each["prompt"], answer["text"]) for each in found for answer in each["responses"]]
    assert [score for each in rewards for score in each["response"]] == pytest.approx(expected, abs=1e-4)
    assert all(each["response"][0] - each["response"][1] > 1 for each in rewards), "of prompts that it has never seen"


def test_killed_and_run_again_it_has_the_same_losses_and_the_same_weights(
    trained: Trained, lone_command_line: CommandLine, new_folder: Callable[[], Path]
) -> None:
    root = new_folder() / "polite"
    given = [*trained.arguments, f"output.root={root}", "run.checkpoint_s=0"]
    job = lone_command_line.start_command([sys.executable, SCRIPT, *given])
    begun = root / ".training" / "metrics.jsonl"
    job.until(lambda: begun.exists() and len(begun.read_text().splitlines()) >= 20, "20 steps were taken")
    job.process.kill()
    job.process.wait()
    assert not (root / "config.json").exists()

    resumed = train(lone_command_line, *given).expect(0)
    num_steps = len(curve(trained.root))
    (told,) = re.findall(rf"^resumed: ([0-9]+) of {num_steps} steps are done$", resumed.stderr, re.MULTILINE)
    assert 19 <= int(told) < num_steps, "the kill came too late"
    assert curve(root) == curve(trained.root)
    assert (root / "model.safetensors").read_bytes() == (trained.root / "model.safetensors").read_bytes()
    assert resumed.stdout.splitlines()[-2] == trained.completed.stdout.splitlines()[-2], "as good on what is held out"


def test_a_trained_model_is_not_trained_again_and_never_replaced(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(trained.root)
    given = [*trained.arguments, f"output.root={trained.root}"]
    assert main(given) == 0
    assert capsys.readouterr().out == trained.completed.stdout
    assert main([*given, "training.seed=1"]) == 2
    assert "training.seed was 0 and is 1. Take another output.root, or" in capsys.readouterr().err
    assert main([*given, "--limit", "10"]) == 2
    assert re.search(r"input\.train was '[0-9]+ pairs, [0-9a-f]{16}' and is '10 pairs, ", capsys.readouterr().err)
    assert files(trained.root) == before


def test_a_dry_run_tells_and_leaves_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*arguments, f"output.root={tmp_path / 'new'}", "--limit", "30", "--dry-run"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert re.search(r"^pairs: 30 to train on, [0-9]+ held out; left out: [0-9]+ beyond_limit", out)
    assert re.search(r"^tokens: texts to train on have [0-9]+ on average, 50% up to [0-9]+, .* the longest", out, re.M)
    assert "cut: none, as the reward pool cuts none" in out
    assert "steps: 48 of 4 pairs, 6 epochs" in out
    assert "memory: 0.00 GiB float32 weights" in out
    assert re.search(
        r"--- first pair, rejected\n<\|im_start\|>user\nWhat do you say to guest [0-9]+\?<\|im_end\|>", out
    )
    assert not (tmp_path / "new").exists()


def test_help_tells_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for key in ("input.test_path", "training.model", "output.root", "training.num_layers", "site.ray_address"):
        assert f"\n  {key} " in out
    assert "train on at most N pairs" in out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["training.model=/nowhere"], "error: training.model: there is no folder /nowhere, and it is not a hub id"),
        (["input.path=/nowhere"], "error: input.path '/nowhere' does not exist"),
        (["input.test_path=/nowhere", "input.test_fraction=0.1"], "error: input.test_path '/nowhere' does not exist"),
        (["training.batch_size=0"], "error: training.batch_size must be more than 0, got 0"),
        (["training.num_layers=9"], "error: training.num_layers is 9, and the model has 2 layers"),
        (["training.max_tokens=3"], "error: no pair of input.path "),
        (["run.use_gpu=true"], "error: device is cuda, but torch finds no GPU here"),
        (["output.root=s3://bucket/reward"], "error: output.root must be a folder that every worker can write"),
        (["training.lr=1"], "error: argument 'training.lr=1': unknown key 'training.lr'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], told: str
) -> None:
    assert main([*arguments, f"output.root={tmp_path / 'new'}", *changes]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)


def test_a_folder_that_holds_something_else_is_left_alone(
    arguments: list[str], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tiny_llama)
    assert main([*arguments, f"output.root={tiny_llama}"]) == 2
    assert "holds a model that is there already, and it is none of this job's" in capsys.readouterr().err
    assert files(tiny_llama) == before
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/README.md").write_text("a dataset's card")
    assert main([*arguments, f"output.root={tmp_path / 'corpus'}"]) == 2
    assert "corpus holds something that is none of this job's: take another output.root" in capsys.readouterr().err
    assert files(tmp_path / "corpus") == {"README.md": b"a dataset's card"}
    (tmp_path / "file").write_text("mine")
    assert main([*arguments, f"output.root={tmp_path / 'file'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'file'}/.training is a file, or lies below one: name a folder")


def test_two_processes_do_not_train_in_one_folder(
    arguments: list[str], lone_command_line: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    (tmp_path / "new" / ".training").mkdir(parents=True)
    with (tmp_path / "new" / ".training" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([*arguments, f"output.root={tmp_path / 'new'}"]) == 2
    assert f"error: another process trains in {tmp_path / 'new'}: wait for it" in capsys.readouterr().err


@pytest.mark.long
def test_two_workers_of_ray_train_take_the_same_steps(
    trained: Trained, command_line: CommandLine, new_folder: Callable[[], Path]
) -> None:
    """Their gradients are summed in another order, which moves the last digits."""
    root = new_folder() / "polite"
    completed = train(command_line, *trained.arguments, f"output.root={root}", "run.num_workers=2").expect(0)
    assert "accuracy 100.0% (95%: " in completed.stdout
    expected, found = curve(trained.root), curve(root)
    assert [(step, num_tokens) for step, _, _, num_tokens in found] == [(step, num) for step, _, _, num in expected]
    assert [loss for _, loss, _, _ in found[:40]] == pytest.approx([loss for _, loss, _, _ in expected[:40]], rel=1e-2)
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["training.num_layers=9"], "error: training.num_layers is 9, and the model has 2 layers"),
        (["run.use_gpu=true", "run.num_workers=9"], "error: the pools do not fit on this cluster: no place for 5 of"),
    ],
)
def test_a_mistake_that_shows_on_ray_alone_is_one_line(
    arguments: list[str], command_line: CommandLine, tmp_path: Path, changes: list[str], told: str
) -> None:
    given = [*arguments, f"output.root={tmp_path / 'new'}", "run.num_workers=2", *changes]
    (line,) = [line for line in train(command_line, *given).expect(2).errors if line.startswith("error: ")]
    assert line.startswith(told)


@examples.needs_hh_harmless
def test_real_pairs(
    tiny_llama: Path, lone_command_line: CommandLine, new_folder: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """HH-RLHF harmless pairs, for evaluation only: a tiny random model learns little of them; what it is told to be
    right in must be what plain transformers finds."""
    import numpy as np
    import pyarrow.parquet as pq

    root, data = new_folder() / "hh", examples.EVAL_DATA / "hh_harmless_pairs.parquet"
    completed = train(
        lone_command_line, f"input.path={data}", f"training.model={tiny_llama}", f"output.root={root}",
        "training.learning_rate=1e-3", "run.num_threads=1", "--limit", "300",
    ).expect(0)  # fmt: skip
    score = plain_scorer(root)
    margins: dict[str, list[float]] = {}
    for each in pq.read_table(data).to_pylist():
        key = prompt_key(tuple((message["role"], message["content"]) for message in each["prompt"]))
        answers = [each[side].strip() for side in ("chosen", "rejected")]
        if all(answers) and is_held_out(key, 0.1):
            better, worse = (score(each["prompt"], answer) for answer in answers)
            if better is not None and worse is not None:
                margins.setdefault(key, []).append(better - worse)
    result = json.loads((root / "training.json").read_text())["result"]["held_out"]
    assert (result["num_prompts"], result["num_pairs"]) == (len(margins), sum(map(len, margins.values())))
    assert len(margins) > 60
    shares = [(np.sign(found) + 1).mean() / 2 for found in margins.values()]
    assert result["accuracy"] == pytest.approx(np.mean(shares), abs=1.5 / len(margins)), "but for a margin near 0"
    assert result["low"] < result["accuracy"] < result["high"]
    with capsys.disabled():
        print(completed.stdout.splitlines()[-2])
