"""The job in one process, without Ray: what it trains, resumes and refuses, and that engines take what it leaves."""

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from actors.engines.adapters import on_this_node
from actors.engines.base import DraftingConfig, Request
from actors.engines.identity import pinned
from actors.engines.torch_engine import TorchEngine
from actors.training.place import Place
from pipelines.corpus.storage import Storage
from pipelines.train_aligner import main
from pipelines.training import aligner_worker as worker
from pipelines.training import on_ray
from tests.pipelines.training.fabricated import publish_trajectories, row
from tests.tiny_models import build_tiny_llama

NUM_STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_tiny_llama(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    held_out = [row(number) for number in range(100, 103)]
    return publish_trajectories(
        tmp_path_factory.mktemp("data"), train=[row(number) for number in range(12)], validation=held_out
    )


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fitted(work: Any, given: dict[str, Any], *run: Any) -> Iterator[tuple[str, Any]]:
        told: list[tuple[str, Any]] = []
        worker.Process(given["work"], Place(), lambda kind, what: told.append((kind, what))).run()
        yield from told

    monkeypatch.setattr(on_ray, "fitted", fitted)
    monkeypatch.setattr(on_ray, "join_or_start", lambda *arguments: None)
    monkeypatch.setattr(on_ray, "wait_until_placeable", lambda *arguments, **more: None)
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def command(base: Path, data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def made(*more: str, root: Path = tmp_path / "out") -> list[str]:
        given = [f"input.path={data}", f"output.root={root}", f"training.model={base}", "training.batch_size=4"]
        given += ["training.num_epochs=2", "training.max_tokens=24", "training.learning_rate=0.01", "training.omega=2"]
        return [*given, "evaluation.every=3", "evaluation.num_prompts=2", "run.checkpoint_every=2", *more]

    return made


def metrics(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def promised(root: Path) -> list[dict[str, float]]:
    """All that a training tells of itself but how long it took."""
    return [{name: value for name, value in each.items() if name != "seconds"} for each in metrics(root)]


def answer(model: Path, **values: Any) -> str:
    """What the torch engine makes of an answer, in this process."""
    given = {"dtype": "float32", "device": "cpu", "max_tokens": 24, "block_size": 24, "max_iterations": 24, **values}
    engine = TorchEngine(on_this_node(pinned(DraftingConfig(model=str(model), **given), "aligner")), 1)
    try:
        asked = Request((("user", "Tell me of number 3."),), seed=0, draft="It is bad.")
        return asyncio.run(engine.generate(asked)).text
    finally:
        engine.close()


@pytest.mark.parametrize("more", [[], ["training.lora_rank=0"]], ids=["lora", "full"])
def test_a_training_ends_in_a_folder_that_an_engine_takes_as_it_is(
    more: list[str], command: Callable[..., list[str]], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    assert main(command("reward=rules", *more)) == 0
    out, err = capsys.readouterr()
    use = f"aligner.recipe=diffpo aligner.model={root} aligner.max_tokens=24 aligner.block_size=24"
    assert f"trained: {NUM_STEPS} steps in 0.00 hours\naligner: {root} ({use})" in out
    assert f"training: 12 trajectories, 0 of {NUM_STEPS} steps are done" in err
    assert re.search(r"evaluation after 6 steps: .* iterations to converge, .* reward .* gain .* over 2 prompts", err)

    found = metrics(root)
    assert [each["step"] for each in found if "loss" in each] == [1, 2, 3, 4, 5, 6]
    assert [each["step"] for each in found if "iterations" in each] == [0, 3, 6]
    assert all(each["gain"] == pytest.approx(each["aligned"] - each["response"]) for each in found if "gain" in each)
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == ["step-00000004.pt", "step-00000006.pt"]
    assert (root / "config.json").exists() == bool(more) != (root / "adapter_config.json").exists()
    assert answer(root) != answer(base)
    assert answer(root, decoder="greedy", max_iterations=None) == answer(root)

    card = (root / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == ("transformers" if more else "peft")
    assert "base_model" not in header  # it would have to be a hub id
    assert "python pipelines/train_aligner.py " in card and "training.omega=2" in card
    assert (
        "12 trajectories, 0 more left out for their prompts, 0 best answers cut at max_tokens; 6 steps, seed 0" in card
    )
    assert "The reward is `rules`." in card
    use, made = (
        block.replace("\\\n", " ").strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", card, re.DOTALL)
    )
    assert len(use) == len(made) == 1  # what goes on behind a line's end is of the same command
    assert len(re.findall(r"^\| [036] \| [\d.]+ \| ", card, re.MULTILINE)) == 3

    before = {path: path.stat().st_mtime_ns for path in root.glob("*.*") if path.is_file()}
    assert main(command("reward=rules", *more)) == 0
    assert "aligner: " in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in root.glob("*.*") if path.is_file()}


def test_with_limits_it_stops_and_goes_on_to_the_same_end(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command()) == 0
    capsys.readouterr()
    again = tmp_path / "again"
    for done in (1, 3, 6):
        limit = ["--limit", {1: "3", 3: "8", 6: "1000"}[done]]
        assert main([*command(root=again), *limit]) == 0
        stopped = f"stopped after {done} steps, before there is a model; the same command goes on"
        ended = f"trained: {done} steps" if done == NUM_STEPS else stopped
        assert ended in capsys.readouterr().out
        assert (again / "adapter_config.json").exists() == (done == NUM_STEPS)
    assert promised(again) == promised(tmp_path / "out")
    weights = [(root / "adapter_model.safetensors").read_bytes() for root in (again, tmp_path / "out")]
    assert weights[0] == weights[1]
    assert "--limit" not in (again / "README.md").read_text()  # its command makes the whole model


def test_no_folder_is_a_model_s_before_all_of_it_is_there(
    command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    create_file, names = Storage.create_file, []

    def noted(self: Storage, path: str, write: Callable[[Path], None]) -> bool:
        if "/" not in path:  # of the model
            names.append(path)
        return create_file(self, path, write)

    monkeypatch.setattr(Storage, "create_file", noted)
    assert main(command("evaluation.every=0")) == 0
    assert names[-1] == "adapter_config.json"
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md"} < set(names)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_was_not_finished_is_finished(
    missing: str, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Killed while it wrote the model: what describes it is not there yet."""
    assert main(command("evaluation.every=0")) == 0
    root = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in root.glob("*.*") if path.is_file()}
    (root / "adapter_config.json").unlink()
    (root / missing).unlink(missing_ok=True)
    (root / "metrics.jsonl").unlink()  # killed before that, too
    assert main(command("evaluation.every=0")) == 0
    assert {path.name: path.read_bytes() for path in root.glob("*.*") if path.is_file()} == before


def test_answers_that_are_longer_than_what_is_trained_on_are_told(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command("training.max_tokens=4"), "--dry-run"]) == 0
    assert "12 best answers cut at max_tokens" in capsys.readouterr().out
    assert main([*command("training.max_tokens=4"), "--limit", "4"]) == 0
    assert "12 trajectories, 12 best answers cut at max_tokens, 0 of" in capsys.readouterr().err


def test_it_goes_on_with_the_data_it_began_with(
    command: Callable[..., list[str]], data: Path, base: Path, tmp_path: Path
) -> None:
    grown = shutil.copytree(data, tmp_path / "grown")
    given = [f"input.path={grown}" if each.startswith("input.path=") else each for each in command()]
    assert main([*given, "--limit", "8"]) == 0
    publish_trajectories(grown, number=2, train=[row(number) for number in range(50, 60)])
    assert main(given) == 0
    assert main(command(root=tmp_path / "other")) == 0
    assert promised(tmp_path / "out") == promised(tmp_path / "other")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["training.omega=3"], "output.root holds a training of another config: training.omega was 2.0 and is 3.0"),
        (["training.seed=1"], "training.seed was 0 and is 1. Run it with the old values"),
        (["evaluation.num_prompts=3"], "evaluation.num_prompts was 2 and is 3"),  # its table would mix the two
    ],
)
def test_another_config_on_the_same_root_is_refused(
    more: list[str], told: str, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command("evaluation.every=0"), "--limit", "4"]) == 0
    before = metrics(tmp_path / "out")
    assert main(command("evaluation.every=0", *more)) == 2
    assert told in capsys.readouterr().err
    assert metrics(tmp_path / "out") == before
    assert main([*command("run.checkpoint_every=3", "training.micro_batch_size=2"), "--limit", "4"]) == 0


def test_mistakes_are_told_in_one_line(
    command: Callable[..., list[str]], base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = publish_trajectories(tmp_path / "lone", train=[row(1)])
    for more, told in (
        (["training.model=/nowhere"], "training.model: there is no folder /nowhere"),
        ([f"input.path={base}"], "holds no published partition of a preference dataset"),
        ([f"input.path={lone}"], "has no split `validation`: build it with prompts.validation_fraction=0.05, or set"),
        (
            [f"input.path={lone}", "evaluation.every=0", "training.max_prompt_tokens=1"],
            "no trajectory that can be used",
        ),
        (["reward=rules", "reward.rules={nonsense: 1}"], "reward.rules.nonsense: there is no such rule"),
    ):
        given = [each for each in command(root=tmp_path / "mistaken") if each.split("=")[0] not in str(more)]
        assert main([*given, *more, "--dry-run"]) == 2
        assert told in capsys.readouterr().err
        assert main([*given, *more]) == 2
        (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
        assert told in line
        shutil.rmtree(tmp_path / "mistaken", ignore_errors=True)


def test_a_root_that_holds_something_else_is_refused(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out/runs").mkdir(parents=True)
    (tmp_path / "out/runs/000001.json").write_text(json.dumps({"number": 1, "fingerprint": {}}))
    assert main(command()) == 2
    assert "holds something else than a training: take another folder" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")  # a model's, whoever made it
    assert main(command()) == 2
    assert "holds something else than a training: take another folder" in capsys.readouterr().err


def test_weights_of_another_model_are_not_published_as_its_own(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/adapter_model.safetensors").write_bytes(b"another's")
    assert main(command("evaluation.every=0")) == 2
    assert "adapter_model.safetensors is there already, and it is none of this training's" in capsys.readouterr().err
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_a_dry_run_tells_the_plan_and_what_the_model_reads(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "trajectories: 12 to train on, 0 left out; 3 held out" in told
    assert f"steps: {NUM_STEPS} of 4 trajectories, 0 done" in told
    assert "<|im_start|>user\nTell me of number 0.<|im_end|>\n<|im_start|>assistant\n" in told
    assert re.search(r"--- y\(T\)\n0 is .*\.<\|im_end\|>", told)
    assert not (tmp_path / "out").exists()
    assert main([*command(), "--limit", "8"]) == 0
    capsys.readouterr()
    assert main([*command(), "--dry-run"]) == 0
    assert f"steps: {NUM_STEPS} of 4 trajectories, 2 done" in capsys.readouterr().out
