"""The loss is the formula, a step is what plain PyTorch would do, and neither depends on how pairs are batched."""

import io
import math
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from actors.contract import ConfigError
from actors.engines.base import ScoringConfig
from actors.training import bradley_terry as module
from actors.training.bradley_terry import (
    State,
    Step,
    bradley_terry,
    load_base,
    margins_of,
    numbers_of_step,
    pieces,
    train,
)  # fmt: skip
from actors.training.reward_settings import Pair, RewardTrainingConfig
from tests.tiny_models import build_tiny_llama, build_tiny_reward

CONFIG = RewardTrainingConfig(
    num_epochs=3, batch_size=7, learning_rate=1e-3, head_learning_rate=1e-2, warmup_fraction=0.0, weight_decay=0.1
)  # fmt: skip


def silent(steps: Sequence[Step], num_steps: int) -> None:
    pass


def forget(state: State, steps: Sequence[Step]) -> None:
    pass


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take twenty times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ScoringConfig:
    folder = build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    return ScoringConfig(model=str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Of many lengths; none ends with the padding token, 0."""
    rng = np.random.default_rng(0)

    def text() -> "array[int]":
        return array("i", rng.integers(3, 500, rng.integers(2, 40)).tolist())

    return [Pair(str(number), text(), text()) for number in range(7)]


# --- the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_formula_in_float64() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 5, (2, 1000))
    expected = -np.log(1 / (1 + np.exp(-(chosen - rejected))))
    found = bradley_terry(torch.tensor(chosen), torch.tensor(rejected))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    single = bradley_terry(torch.tensor(chosen).float(), torch.tensor(rejected).float())
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_the_loss_of_margins_that_overflow_an_exponential() -> None:
    found = bradley_terry(torch.tensor([-1e4, 1e4, 0.0]), torch.zeros(3))
    assert found.tolist() == pytest.approx([1e4, 0.0, math.log(2)])


def test_its_gradient_is_that_of_finite_differences() -> None:
    chosen, rejected = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(bradley_terry, (chosen.requires_grad_(), rejected.requires_grad_()))


# --- steps ----------------------------------------------------------------------------------------------------------


def test_steps_are_those_of_plain_pytorch(base: ScoringConfig, pairs: list[Pair]) -> None:
    """All pairs in each step, text by text through the model as Hugging Face has it, learning rates written out."""
    model = load_base(base, None)
    steps = train(model, pairs, replace(CONFIG, batch_tokens=100), None, forget, 1e9, silent)

    plain = AutoModelForSequenceClassification.from_pretrained(base.model, num_labels=1, dtype=torch.float32)
    plain.score.weight.data.zero_()
    rest = [weight for name, weight in plain.named_parameters() if name != "score.weight"]
    groups = [{"params": [plain.score.weight], "lr": 1e-2}, {"params": rest, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    losses = []
    for factor in (1.0, 1.0, 0.5):
        for group, rate in zip(optimizer.param_groups, (1e-2, 1e-3), strict=True):
            group["lr"] = factor * rate
        margins = [score(plain, pair.chosen) - score(plain, pair.rejected) for pair in pairs]
        loss = torch.stack([torch.log1p(torch.exp(-margin)) for margin in margins]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2)) and losses[2] < losses[1] < losses[0]
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-4)
    for name, weight in plain.named_parameters():
        assert torch.allclose(model.get_parameter(name), weight, atol=2e-4), name
    expected = [(score(plain, pair.chosen) - score(plain, pair.rejected)).item() for pair in pairs]
    assert margins_of(model, pairs, batch_tokens=100) == pytest.approx(expected, abs=1e-2)


def score(model: Any, text: Sequence[int]) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([list(text)])).logits[0, 0]
    return found


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_margins_and_losses_do_not_depend_on_how_pairs_are_batched(
    base: ScoringConfig, pairs: list[Pair], batch_tokens: int
) -> None:
    found = []
    for tokens in (batch_tokens, 60):
        model = load_base(base, None)
        config = replace(CONFIG, batch_tokens=tokens, batch_size=3, num_epochs=1)
        steps = train(model, pairs, config, None, forget, 1e9, silent)
        found.append([*(step.loss for step in steps), *margins_of(model, pairs, tokens)])
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4)
    assert max(found[0]) - min(found[0]) > 0.05


def test_pieces_hold_every_pair_once_and_no_more_tokens_than_they_may() -> None:
    lengths = [5, 300, 7, 5, 80, 2, 40, 41]
    found = list(pieces(lengths, 200))
    assert sorted(number for piece in found for number in piece) == list(range(len(lengths)))
    assert [piece for piece in found if 2 * len(piece) * max(lengths[number] for number in piece) > 200] == [[1]]
    assert len(found) < len(lengths)


def test_every_epoch_has_every_pair_once_in_an_order_of_its_own() -> None:
    config = replace(CONFIG, batch_size=3)
    steps = [numbers_of_step(number, 10, config) for number in range(8)]
    assert [len(step) for step in steps] == [3, 3, 3, 1] * 2
    first, second = list(chain(*steps[:4])), list(chain(*steps[4:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert numbers_of_step(0, 10, replace(config, seed=1)) != steps[0]


class Ranks:
    """Two ranks as threads of this process, with what training asks of `torch.distributed`."""

    def __init__(self) -> None:
        self._here, self._meeting = threading.local(), threading.Barrier(2, timeout=60)
        self._brought: list[Any] = [None, None]

    def rank_and_size(self) -> tuple[int, int]:
        return self._here.rank, 2

    def all_gather_object(self, shares: list[Any], share: Any) -> None:
        self._brought[self._here.rank] = share
        self._meeting.wait()
        shares[:] = self._brought
        self._meeting.wait()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        brought: list[torch.Tensor] = [tensor, tensor]
        self.all_gather_object(brought, tensor.clone())
        tensor.copy_(brought[0] + brought[1])

    def barrier(self) -> None:
        self._meeting.wait()

    def run(self, work: Callable[[PreTrainedModel], Any], models: Sequence[PreTrainedModel]) -> list[Any]:
        """What each of the ranks comes to, with a model of its own."""

        def as_rank(rank: int) -> Any:
            self._here.rank = rank
            torch.set_num_threads(1)
            return work(models[rank])

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(as_rank, range(2)))


def test_two_ranks_take_the_steps_of_one(
    base: ScoringConfig, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps of three pairs: one rank has more of them than the other, which in the last step has none."""
    config = replace(CONFIG, batch_size=3, num_epochs=2)
    told: list[int] = []

    def work(model: PreTrainedModel) -> tuple[list[Step], list[float]]:
        steps = train(model, pairs, config, None, forget, 1e9, lambda steps, num_steps: told.append(len(steps)))
        return steps, margins_of(model, pairs, 100)

    expected, expected_margins = work(load_base(base, None))
    ranks = Ranks()
    monkeypatch.setattr(module, "rank_and_size", ranks.rank_and_size)
    monkeypatch.setattr(module, "dist", ranks)
    for steps, margins in ranks.run(work, [load_base(base, None), load_base(base, None)]):
        assert [step.num_tokens for step in steps] == [step.num_tokens for step in expected]
        assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], rel=1e-3)
        assert margins == pytest.approx(expected_margins, abs=2e-2)
    assert max(expected_margins) - min(expected_margins) > 0.5
    assert told == [*range(7), *range(7)], "the first rank alone tells"


# --- what is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_layers", "expected"), [(0, ()), (1, ("model.layers.1.",)), (None, ("model.",))])
def test_only_the_last_layers_and_the_head_are_trained(
    base: ScoringConfig, pairs: list[Pair], num_layers: int | None, expected: tuple[str, ...]
) -> None:
    model = load_base(base, num_layers)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train(model, pairs, replace(CONFIG, weight_decay=0.0), None, forget, 1e9, silent)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.startswith(("score.", *expected))}


def test_more_layers_than_there_are_is_a_mistake(base: ScoringConfig) -> None:
    with pytest.raises(ConfigError, match=r"^training\.num_layers is 3, and the model has 2 layers$"):
        load_base(base, 3)


def test_a_reward_model_goes_on_from_its_head(tmp_path: Path) -> None:
    folder = build_tiny_reward(tmp_path)
    model = load_base(ScoringConfig(model=str(folder), dtype="float32", device="cpu"), None)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(model.get_parameter("score.weight"), plain.score.weight)
    assert plain.score.weight.abs().max() > 0


def test_a_loss_that_is_not_finite_ends_the_run(base: ScoringConfig, pairs: list[Pair]) -> None:
    config = replace(CONFIG, learning_rate=1e30, head_learning_rate=1e30, num_epochs=9)
    with pytest.raises(ConfigError, match=r"^the loss of step [2-9] is (nan|inf): lower training\.learning_rate$"):
        train(load_base(base, None), pairs, config, None, forget, 1e9, silent)


# --- going on -------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(base: ScoringConfig, pairs: list[Pair]) -> None:
    config = replace(CONFIG, batch_size=2)
    whole = load_base(base, None)
    expected = train(whole, pairs, config, None, forget, 1e9, silent)
    kept: list[bytes] = []

    def keep(state: State, steps: Sequence[Step]) -> None:
        file = io.BytesIO()  # the state as it is now: the next step changes it
        torch.save((state, list(map(asdict, steps))), file)
        kept.append(file.getvalue())

    def stop(steps: Sequence[Step], num_steps: int) -> None:
        if len(steps) == 7:  # between two checkpoints
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(load_base(base, None), pairs, config, None, keep, 0, stop)
    state, steps = torch.load(io.BytesIO(kept[-1]), weights_only=True)
    told: list[int] = []
    model = load_base(base, None)
    begun = state, [Step(**each) for each in steps]
    found = train(model, pairs, config, begun, forget, 0, lambda steps, num_steps: told.append(len(steps)))
    assert told == [6, *range(7, 13)], "one step is taken again"
    assert [replace(step, seconds=0) for step in found] == [replace(step, seconds=0) for step in expected]
    assert all(torch.equal(weight, whole.get_parameter(name)) for name, weight in model.named_parameters())
