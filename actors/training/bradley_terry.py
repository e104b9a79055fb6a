"""Bradley-Terry training of a reward model: its loss, the model that is trained, and the steps that lower the loss.

The model reads what the reward pool will have it read (`scored_ids`), and its score is the one that the pool will take
(`batch_logits`); a text is never cut, as the pool cuts none.
"""

import functools
import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as hf_logging

from actors.contract import ConfigError
from actors.engines.base import ScoringConfig
from actors.engines.prompts import load_failure
from actors.engines.torch_model import device_of
from actors.rewards.classifier import batch_logits, score_batch
from actors.training.reward_settings import Pair, RewardTrainingConfig, num_steps_of

HEADS = ("score", "classifier")
"""Names that transformers gives to heads of sequence classification models."""
MAX_GRADIENT_NORM = 1.0
State = dict[str, Any]
"""All that a step changes: `weights` by name, and the optimiser's state."""


@dataclass(frozen=True)
class Step:
    """What a step was.

    Attributes:
        step: its number, from 1.
        loss: mean of its pairs, before the update.
        learning_rate: of the model's own weights.
        num_tokens: that were read, padding not counted.
        seconds: that it took.
    """

    step: int
    loss: float
    learning_rate: float
    num_tokens: int
    seconds: float


# --- the loss -------------------------------------------------------------------------------------------------------


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(r(x, y_c) - r(x, y_r)) of each pair: the negative log-likelihood that Bradley and Terry's model
    gives to the preference (Ouyang et al. 2022, arXiv:2203.02155, equation 1 with K = 2). Floating[n] each.
    """
    return -nn.functional.logsigmoid(chosen - rejected)


# --- the model ------------------------------------------------------------------------------------------------------


def load_base(config: ScoringConfig, num_layers: int | None) -> PreTrainedModel:
    """The model in float32 on its device, with a head of one label; only what is to be trained takes gradients.

    A model without a head gets one that is zero, so that the first loss is log 2 whatever the model. One that is a
    reward model already goes on from the head it has.

    Raises ConfigError in one line.
    """
    hf_logging.disable_progress_bar()
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it would warn of the head that is missing
    loaded: Any
    try:
        loaded, told = AutoModelForSequenceClassification.from_pretrained(
            config.model,
            revision=config.revision,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:  # the last where there is a head of another size
        raise ConfigError(load_failure("model to train", config.model, error)) from error
    finally:
        hf_logging.set_verbosity(verbosity)
    model: PreTrainedModel = loaded
    missing = sorted(told["missing_keys"])
    if lacking := [name for name in missing if name.split(".")[0] not in HEADS]:
        raise ConfigError(f"{config.model!r} is not whole: its files hold no {', '.join(lacking[:3])}")
    with torch.no_grad():
        for name in missing:
            model.get_parameter(name).zero_()
    freeze(model, num_layers)
    return model.to(device_of(config))


def freeze(model: PreTrainedModel, num_layers: int | None) -> None:
    """Leave gradients to the head and the last `num_layers` layers alone; None: to everything.

    Raises ConfigError where the model has fewer.
    """
    if num_layers is None:
        return
    num_there = model.config.get_text_config().num_hidden_layers
    if num_layers > num_there:
        raise ConfigError(f"training.num_layers is {num_layers}, and the model has {num_there} layers")
    layers = next(
        part for part in model.base_model.modules() if isinstance(part, nn.ModuleList) and len(part) == num_there
    )
    model.base_model.requires_grad_(False)
    for layer in layers[num_there - num_layers :]:
        layer.requires_grad_(True)


# --- training -------------------------------------------------------------------------------------------------------


def train(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    config: RewardTrainingConfig,
    begun: tuple[State, Sequence[Step]] | None,
    keep: Callable[[State, Sequence[Step]], None],
    checkpoint_s: float,
    tell: Callable[[Sequence[Step], int], None],
) -> list[Step]:
    """Train the model in place, from a state that was kept on where there is one. Returns every step.

    The steps are a function of the arguments alone: each one's pairs and learning rate follow from its number, so that
    a run that was killed goes on as if nothing had been. With several ranks (an initialised process group) each takes
    its share of a step's pairs, and gradients are summed.

    Args:
        begun: a state of these arguments, and the steps that led to it; the same in each rank.
        keep: called by rank 0 with the state and the steps so far, after the last step, too; what it holds is changed
            by the next step.
        checkpoint_s: seconds between two such calls.
        tell: called by rank 0 with the steps so far and the number of all steps, first before the first step.

    Raises ConfigError where the loss is not finite.
    """
    rank, size = rank_and_size()
    num_steps = num_steps_of(len(pairs), config)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(_groups(trained, config), weight_decay=config.weight_decay)
    steps = []
    if begun is not None:
        model.load_state_dict(begun[0]["weights"], strict=False)  # those that are not trained are the base model's
        optimizer.load_state_dict(begun[0]["optimizer"])
        steps = list(begun[1])
    if rank == 0:
        tell(steps, num_steps)
    saved_at = time.monotonic()
    model.train()
    while len(steps) < num_steps:
        number, begin = len(steps), time.monotonic()
        factor = _schedule(number, num_steps, config.warmup_fraction)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["full_lr"]
        numbers = numbers_of_step(number, len(pairs), config)
        torch.manual_seed(config.seed + number * size + rank)  # of dropout, where the model has any
        loss, num_tokens = _backward(model, [pairs[each] for each in numbers[rank::size]], len(numbers), config)
        if size > 1:
            loss, num_tokens = _summed(trained.values(), loss, num_tokens)
        if not math.isfinite(loss):
            raise ConfigError(f"the loss of step {number + 1} is {loss}: lower training.learning_rate")
        nn.utils.clip_grad_norm_(trained.values(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(Step(number + 1, loss, factor * config.learning_rate, num_tokens, time.monotonic() - begin))
        if rank == 0:
            tell(steps, num_steps)
            if time.monotonic() - saved_at >= checkpoint_s or len(steps) == num_steps:
                weights = {name: weight.detach() for name, weight in trained.items()}
                keep({"weights": weights, "optimizer": optimizer.state_dict()}, steps)
                saved_at = time.monotonic()
    return steps


def margins_of(model: PreTrainedModel, pairs: Sequence[Pair], batch_tokens: int) -> list[float]:
    """The chosen answer's score less the rejected one's of each pair, as the reward pool would score them in the
    model's dtype; with several ranks each scores its share, and all get all."""
    rank, size = rank_and_size()
    model.eval()
    mine = pairs[rank::size]
    found = [0.0] * len(mine)
    for piece in pieces([each.longest for each in mine], batch_tokens):
        scores = score_batch(model, _rows([mine[each] for each in piece]))
        for each, chosen, rejected in zip(piece, scores[: len(piece)], scores[len(piece) :], strict=True):
            found[each] = chosen - rejected
    if size == 1:
        return found
    shares: list[Any] = [None] * size
    dist.all_gather_object(shares, found)
    margins = [0.0] * len(pairs)
    for number, share in enumerate(shares):
        margins[number::size] = share
    return margins


def rank_and_size() -> tuple[int, int]:
    """Of this process among those that train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pieces(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """The pairs' numbers, shorter ones first, cut so that a piece's texts, two a pair and padded to the longest of
    them, have at most `max_tokens` tokens; a pair that has more by itself is a piece of its own."""
    piece: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if piece and 2 * (len(piece) + 1) * lengths[number] > max_tokens:
            yield piece
            piece = []
        piece.append(number)
    if piece:
        yield piece


def _rows(pairs: Sequence[Pair]) -> list["array[int]"]:
    """The chosen texts, then the rejected ones."""
    return [each.chosen for each in pairs] + [each.rejected for each in pairs]


def _backward(
    model: PreTrainedModel, pairs: Sequence[Pair], num_all: int, config: RewardTrainingConfig
) -> tuple[float, int]:
    """Add the gradient of these pairs' part in the mean loss of `num_all` pairs. Returns that part, and tokens read."""
    loss = 0.0
    for piece in pieces([each.longest for each in pairs], config.batch_tokens):
        rows = _rows([pairs[each] for each in piece])
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            scores = batch_logits(model, rows)
        part = bradley_terry(scores[: len(piece)], scores[len(piece) :]).sum() / num_all
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
    return loss, sum(len(each.chosen) + len(each.rejected) for each in pairs)


def _summed(weights: Iterable[nn.Parameter], loss: float, num_tokens: int) -> tuple[float, int]:
    """Sum the gradients of all ranks, in each of them; of a rank that had no pair they are zero."""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        dist.all_reduce(weight.grad)
    sums = torch.tensor([loss, num_tokens], dtype=torch.float64, device=weight.device)
    dist.all_reduce(sums)
    return float(sums[0]), int(sums[1])


def _groups(trained: Mapping[str, nn.Parameter], config: RewardTrainingConfig) -> list[dict[str, Any]]:
    """The head and the rest, each with its learning rate."""
    heads = [weight for name, weight in trained.items() if name.split(".")[0] in HEADS]
    rest = [weight for name, weight in trained.items() if name.split(".")[0] not in HEADS]
    rates = (config.head_learning_rate, config.learning_rate)
    return [{"params": found, "full_lr": rate} for found, rate in zip((heads, rest), rates, strict=True) if found]


def _schedule(number: int, num_steps: int, warmup_fraction: float) -> float:
    """What the learning rates of step `number`, from 0, are multiplied with: up to 1 in a line, and down towards 0."""
    num_warm = max(1, round(warmup_fraction * num_steps))
    return min((number + 1) / num_warm, (num_steps - number) / max(1, num_steps - num_warm))


def numbers_of_step(number: int, num_pairs: int, config: RewardTrainingConfig) -> list[int]:
    """The pairs of step `number`, from 0: each epoch has every pair once, in an order of its own."""
    epoch, place = divmod(number, -(-num_pairs // config.batch_size))
    return _order(config.seed, epoch, num_pairs)[place * config.batch_size : (place + 1) * config.batch_size]


@functools.lru_cache(1)
def _order(seed: int, epoch: int, num_pairs: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(num_pairs).tolist()
    return order
