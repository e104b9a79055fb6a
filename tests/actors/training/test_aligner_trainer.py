"""Steps: the same for any micro batch, gone on from a state as if nothing had been, and to an answer in two passes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.contract import ConfigError
from actors.engines.base import EngineConfig
from actors.training import aligner_model as models
from actors.training.aligner_evaluation import Question, aligned
from actors.training.aligner_settings import TrainingConfig
from actors.training.aligner_trainer import Trainer, learning_rate
from actors.training.trajectories import Trajectory, Vocabulary, encoded, vocabulary
from tests.pipelines.training.fabricated import row

NUM_STEPS = 6


@pytest.fixture(scope="module")
def base(llama_folder: Path) -> EngineConfig:
    torch.set_num_threads(1)
    return EngineConfig(model=str(llama_folder), dtype="float32")


@pytest.fixture(scope="module")
def words(base: EngineConfig) -> Vocabulary:
    return vocabulary(base)


def config(**values: Any) -> TrainingConfig:
    usual = {"lora_rank": 4, "batch_size": 4, "omega": 2.0, "learning_rate": 1e-2, "max_tokens": 32}
    return TrainingConfig(**{"model": "m", **usual, **values})


def some(words: Vocabulary, config: TrainingConfig, count: int = 10) -> list[Trajectory]:
    return [each for number in range(count) if (each := encoded(words, row(number), config))]


def steps(trainer: Trainer, first: int, stop: int) -> list[dict[str, float]]:
    made = [trainer.step(number) for number in range(first, stop)]
    return [{name: value for name, value in each.items() if name != "seconds"} for each in made]


@pytest.mark.parametrize("values", [{}, {"lora_rank": 0, "lora_alpha": 32}, {"omega": 0.0}], ids=["lora", "full", "ar"])
def test_a_micro_batch_changes_nothing_but_rounding(
    base: EngineConfig, words: Vocabulary, values: dict[str, Any]
) -> None:
    told = []
    ways: list[dict[str, Any]] = [
        {"micro_batch_size": 4},
        {"micro_batch_size": 1},
        {"micro_batch_size": 3, "gradient_checkpointing": True},
    ]
    for way in ways:
        made = config(**values, **way, learning_rate=1e-3)
        told.append(steps(Trainer(made, base, some(words, made), NUM_STEPS), 0, 3))
    for other in told[1:]:
        for step, (one, another) in enumerate(zip(told[0], other, strict=True)):
            assert another == pytest.approx(one, rel=2e-3), step
    assert told[0][0]["ar"] != told[0][1]["ar"]
    assert (told[0][0]["con"] == 0) == (values.get("omega") == 0)


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_a_training_that_goes_on_from_a_state_is_the_one_that_was_never_interrupted(
    base: EngineConfig, words: Vocabulary, llama_folder: Path, lora_rank: int, tmp_path: Path
) -> None:
    """With dropout, whose draws must come again, too."""
    model = models.AutoModelForCausalLM.from_pretrained(llama_folder)
    model.config.attention_dropout = 0.2
    model.save_pretrained(tmp_path / "dropout")
    base = replace(base, model=str(tmp_path / "dropout"))
    made = replace(config(lora_rank=lora_rank), lora_alpha=32, weight_decay=0.1)
    whole = Trainer(made, base, some(words, made), NUM_STEPS)
    wanted = steps(whole, 0, 2)
    torch.save(whole.state(), tmp_path / "state")
    wanted += steps(whole, 2, NUM_STEPS)

    torch.rand(7)  # elsewhere the generator stands elsewhere
    again = Trainer(made, base, some(words, made), NUM_STEPS)
    again.restore(torch.load(tmp_path / "state", weights_only=True))
    assert steps(again, 2, NUM_STEPS) == wanted[2:]
    ends = [trainer.state()["weights"] for trainer in (whole, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    without = Trainer(made, base, some(words, made), NUM_STEPS)
    state = torch.load(tmp_path / "state", weights_only=True)
    with torch.no_grad():
        models.fill(without.loss.model, state["weights"])
    assert steps(without, 2, NUM_STEPS) != wanted[2:]  # the optimiser's part of it counts


def test_a_training_without_omega_never_sees_worse_answers(base: EngineConfig, words: Vocabulary) -> None:
    made = config(omega=0.0)
    one, other = some(words, made), some(words, made)
    for number, each in enumerate(other):
        worse = tuple(state[::-1].copy() for state in each.states[:-1])
        other[number] = replace(each, states=(*worse, each.states[-1]))
    assert steps(Trainer(made, base, one, NUM_STEPS), 0, 2) == steps(Trainer(made, base, other, NUM_STEPS), 0, 2)


def test_only_adapters_are_trained_and_the_others_stay(base: EngineConfig, words: Vocabulary) -> None:
    made = config()
    trainer = Trainer(made, base, some(words, made), NUM_STEPS)
    before = {name: each.clone() for name, each in trainer.loss.model.named_parameters()}
    steps(trainer, 0, 2)
    changed = {name for name, each in trainer.loss.model.named_parameters() if not torch.equal(each, before[name])}
    assert changed == set(trainer.trained) == {name for name in before if "lora_" in name}
    assert len(changed) == 2 * 7 * 2  # A and B of seven matrices in two layers


def test_the_learning_rate_rises_and_falls() -> None:
    made = config(learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate(made, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert learning_rate(config(learning_rate=1.0, warmup_fraction=0.0), 0, 1) == 1.0


def test_a_loss_that_is_not_finite_ends_it_in_one_line(base: EngineConfig, words: Vocabulary) -> None:
    made = config()
    trainer = Trainer(made, base, some(words, made), NUM_STEPS)
    with torch.no_grad():
        next(iter(trainer.trained.values())).fill_(float("inf"))
    with pytest.raises(ConfigError, match=r"the loss of step 0 is not finite .*: lower training\.learning_rate"):
        trainer.step(0)


def test_a_tiny_model_learns_a_few_trajectories_to_a_fixed_point_in_two_iterations(
    base: EngineConfig, words: Vocabulary
) -> None:
    """From every answer of theirs to the best one: a pass that makes it whole, and one that changes nothing."""
    made = config(lora_rank=0, learning_rate=3e-3, omega=1.0)
    few = []
    for number, best in enumerate(["It is good.", "Two cores.", "Not at all.", "The sky is blue."]):
        worse = ["No.", "The lazy dog does not mind the quick fox in the long report."]
        asked = {"prompt": [{"role": "user", "content": f"And number {number}?"}], "states": [*worse, best]}
        few.append(encoded(words, asked, made))
    trajectories = [each for each in few if each is not None]
    assert all(len(each.states[0]) < len(each.states[-1]) < len(each.states[1]) for each in trajectories)
    trainer = Trainer(made, base, trajectories, 150)
    asked_of = [Question(each, t) for each in trajectories for t in (0, 1)]

    def found() -> list[int]:
        model = models.finished(made, base, trainer.state()["weights"])
        rows = aligned(model, words, asked_of, max_tokens=32, max_num_seqs=4)
        return [row.iterations for each, row in rows if row.text == each.trajectory.texts[-1]]

    assert not found()
    for number in range(150):
        trainer.step(number)
    iterations = found()
    assert len(iterations) == len(asked_of) == 8, "not all answers are the best ones"
    assert max(iterations) <= 2
