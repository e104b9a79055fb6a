"""One process's part of a training: the model, the optimiser, a step, and all that a checkpoint must hold."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from actors.contract import ConfigError
from actors.engines.base import EngineConfig
from actors.training import aligner_model as models
from actors.training.aligner_settings import TrainingConfig
from actors.training.diffpo_losses import DiffPOLoss
from actors.training.place import Place
from actors.training.trajectories import Trajectory, batch, drawn

Parallel = Literal["ddp", "fsdp"]
State = dict[str, Any]
"""`weights` by name, and of each of them what the optimiser keeps; tensors whole and on the CPU."""


class Trainer:
    """Steps over trajectories. With several processes each has one, and all must call `step` and `state` alike.

    What a step does is the same for any number of processes and any micro batch, but for rounding.

    Args:
        base: the model that is trained, on this node's disk or at the hub.
        num_steps: of the whole training.
        parallel: how several processes share the model: each has it whole, or a shard of it.

    Raises ConfigError for a model that is not there or cannot be trained.
    """

    def __init__(
        self,
        config: TrainingConfig,
        base: EngineConfig,
        trajectories: Sequence[Trajectory],
        num_steps: int,
        *,
        parallel: Parallel = "ddp",
        place: Place | None = None,
    ) -> None:
        self.config, self.trajectories, self.num_steps = config, trajectories, num_steps
        self.place = place or Place()
        half = getattr(torch, config.dtype)
        shards = parallel == "fsdp" and self.place.num_ranks > 1
        student = models.load(config, base, frozen=torch.float32 if shards else half)
        model = models.causal(student)
        if not shards:  # each process moves its shards alone, of a model that need not fit on one device whole
            model = model.to(self.place.device)
        model.train()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.loss = DiffPOLoss(model)
        self.wrapped: nn.Module = self.loss
        if shards:
            _shard(self.loss, half, self.place)
        elif self.place.num_ranks > 1:
            self.wrapped = DistributedDataParallel(self.loss)
        self._autocast = partial(
            torch.autocast, self.place.device.type, half, enabled=not shards and half != torch.float32
        )
        self.trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), config.learning_rate, weight_decay=config.weight_decay
        )

    def step(self, number: int) -> dict[str, float]:
        """Train on what step `number` (from 0) sees. Returns what there is to tell of it: means over trajectories of
        `ar`, `con` and `loss`, as in the equation; `grad_norm` before clipping; `tokens` of answers y(T).

        Raises ConfigError where the loss or its gradient is not finite.
        """
        config, began = self.config, time.monotonic()
        seed = np.random.SeedSequence([config.seed, number, self.place.rank]).generate_state(1)
        torch.manual_seed(int(seed[0]))  # of dropout, where a model has it
        rate = learning_rate(config, number, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        chosen = drawn(number, self.num_steps, self.trajectories, config)[self.place.rank :: self.place.num_ranks]
        chosen.sort(key=lambda each: self.trajectories[each[0]].length)
        size = config.micro_batch_size
        micro = [chosen[at : at + size] for at in range(0, len(chosen), size)]
        sums = torch.zeros(3, dtype=torch.float64)
        for last, some in ((at == len(micro) - 1, some) for at, some in enumerate(micro)):
            made = batch(
                ((self.trajectories[each], t) for each, t in some),
                consistent=config.omega > 0, device=self.place.device,
            )  # fmt: skip
            with self._synchronised(last):
                with self._autocast():
                    ar, con = self.wrapped(made)
                loss = (ar + config.omega * con) / config.batch_size
                (loss * self.place.num_ranks).backward()  # gradients of processes are averaged
            sums += torch.stack([ar.detach(), con.detach(), ar.new_tensor(len(made.targets))]).double().cpu()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), config.max_grad_norm)
        sums = self._added_up(sums)
        told = {"ar": float(sums[0]) / config.batch_size, "con": float(sums[1]) / config.batch_size}
        told = {"loss": told["ar"] + config.omega * told["con"], **told, "grad_norm": float(whole(norm))}
        if not all(map(math.isfinite, told.values())):
            raise ConfigError(f"the loss of step {number} is not finite ({told}): lower training.learning_rate")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {**told, "learning_rate": rate, "tokens": float(sums[2]), "seconds": time.monotonic() - began}

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Processes exchange gradients once a step, with its last micro batch."""
        if isinstance(self.loss, FSDPModule):
            self.loss.set_requires_gradient_sync(last)
        with contextlib.ExitStack() as held:
            if isinstance(self.wrapped, DistributedDataParallel) and not last:
                held.enter_context(self.wrapped.no_sync())
            yield

    def _added_up(self, sums: Tensor) -> Tensor:
        if self.place.num_ranks > 1:
            sums = sums.to(self.place.device)
            dist.all_reduce(sums)
        return sums.cpu()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Everything that steps change, for the first process; of use to no other, whose part in it this is.

        Learning rate, order of data and seeds follow from a step's number.
        """
        kept = self.place.rank == 0
        return {
            "weights": {name: whole(each, kept) for name, each in self.trained.items()},
            "optimizer": {
                name: {key: whole(value, kept) for key, value in self.optimizer.state[each].items()}
                for name, each in self.trained.items()
            },
        }

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Go on from a state, of however many processes. Raises KeyError where it is not one of this model."""
        for name, each in self.trained.items():
            each.copy_(_as(each, state["weights"][name]))
            self.optimizer.state[each] = {
                key: value.clone() if value.ndim == 0 else _as(each, value)
                for key, value in state["optimizer"][name].items()
            }


def learning_rate(config: TrainingConfig, step: int, num_steps: int) -> float:
    """Of step `step`, counted from 0: rising evenly while warming up, then falling to 0 along half a cosine."""
    warmup = round(config.warmup_fraction * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def whole(value: Tensor, kept: bool = True) -> Tensor:
    """A tensor on the CPU, put together where it is sharded: then every process must ask for it; empty where it is not
    kept."""
    found: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return found.detach().to("cpu", copy=True) if kept else torch.empty(0)


def _as(parameter: Tensor, value: Tensor) -> Tensor:
    """The value on the parameter's device, sharded where that is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _shard(loss: DiffPOLoss, dtype: torch.dtype, place: Place) -> None:
    """FSDP2: every decoder layer a group of its own, the rest with the losses as one."""
    mesh = init_device_mesh(place.device.type, (place.num_ranks,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    names = set(loss.model._no_split_modules or ())
    layers = [module for module in loss.modules() if type(module).__name__ in names]
    for module in (*layers, loss):
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
        sharded.set_force_sum_reduction_for_comms(place.device.type == "cpu")  # gloo knows no averages
