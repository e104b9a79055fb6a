"""How the `torch` engine gets its model: whole, or one shard of it on every rank."""

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from actors.contract import ConfigError
from actors.decoding.forward import ATTENTION, Forward
from actors.decoding.mirror import obey
from actors.engines.base import EngineConfig
from actors.engines.prompts import load_failure
from actors.engines.ranks import Followers, commands

Load = Callable[[Any], PreTrainedModel]
"""Loads a model as its config says; of a rank, its shard."""

FAILURE_WAIT_S = 10.0
"""How long a rank that cannot load its shard waits for rank 0 to find the same, and to tell it as a user's mistake."""


def load_model(config: EngineConfig) -> PreTrainedModel:
    """Load the model of `config` onto its device, from safetensors alone and without running the model's own code.

    With `tensor_parallel_size` > 1 it is this rank's shard, and every rank must load its own at the same time.

    Raises ConfigError in one line.
    """
    device = device_of(config)
    size = config.tensor_parallel_size
    disable_progress_bar()  # a job's log has a line for every pool already
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            config.model,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            distributed_config=DistributedConfig(tp_size=size, tp_plan="auto") if size > 1 else None,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(load_failure("causal language model", config.model, error)) from error
    moved: PreTrainedModel = model.to(device).eval()
    return moved


def check_shards(config: EngineConfig) -> None:
    """Raises ConfigError in one line for a model that cannot be cut into `tensor_parallel_size` shards, or not here."""
    try:
        whole = AutoConfig.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(load_failure("model config", config.model, error)) from error
    text = whole.get_text_config(decoder=True)
    size = config.tensor_parallel_size
    if not text.base_model_tp_plan:
        raise ConfigError(
            f"tensor_parallel_size is {size}, but transformers has no plan to split a {text.model_type} model:"
            " set it to 1 or choose another model"
        )
    counts = {
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "vocab_size": text.vocab_size,
    }
    for name, count in counts.items():
        if count % size:
            raise ConfigError(f"tensor_parallel_size is {size}, which does not divide the model's {name} of {count}")
    device_of(config)


def load_shard(config: EngineConfig, rank: int, store: int, load: Load = load_model) -> PreTrainedModel:
    """Load a rank's shard of the model; returns when every rank has loaded its own. Raises ConfigError in one line.

    Args:
        store: descriptor of the file where the ranks meet.
        load: loads the shard when the ranks have met.
    """
    join_ranks(rank, config.tensor_parallel_size, store, device_of(config))
    model = load(config)
    dist.barrier()
    return model


def join_ranks(rank: int, size: int, store: int, device: Literal["cpu", "cuda"]) -> None:
    """Make this process a rank of the process group in which the model's shards add up."""
    os.environ["LOCAL_RANK"] = str(rank)  # transformers takes the GPU of this number
    for backend in ("GLOO", "NCCL"):  # all ranks are on this machine, and nobody else is to reach them
        os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
    gpu = torch.device("cuda", rank) if device == "cuda" else None
    backend, meeting = "nccl" if gpu else "gloo", f"file:///proc/self/fd/{store}"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size, device_id=gpu)


def follow(descriptor: int) -> None:
    """The life of a rank above 0 of the `torch` engine."""

    def obedient(model: PreTrainedModel) -> Callable[[tuple[Any, ...]], None]:
        forward = Forward(model)
        return lambda command: obey(forward, command)

    live(descriptor, load_model, obedient)


def live(descriptor: int, load: Load, ready: Callable[[PreTrainedModel], Callable[[tuple[Any, ...]], None]]) -> None:
    """Do with a rank's shard what rank 0 does with its own, until that dismisses it.

    Args:
        descriptor: of the pipe from rank 0.
        load: as of `load_shard`.
        ready: of the shard: what obeys a command of rank 0.
    """
    pipe = Connection(descriptor)
    config, rank, store, num_threads = pipe.recv()
    torch.set_num_threads(num_threads)
    try:
        run = ready(load_shard(config, rank, store, load))
    except ConfigError:
        if pipe.poll(FAILURE_WAIT_S):  # rank 0 is gone
            return
        raise
    for command in commands(pipe):
        run(command)
    dist.destroy_process_group()


def leave(followers: Followers | None) -> None:
    """Rank 0 ends with the others, where there are any. Before it whatever holds the model is to be deleted."""
    if followers is not None:
        followers.dismiss()
        dist.destroy_process_group()  # as they do, now that nobody tells them more
        followers.close()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_of(config: EngineConfig) -> Literal["cpu", "cuda"]:
    """Where the model goes. Raises ConfigError where there are not the GPUs for it."""
    if config.device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        if config.device == "cuda":
            raise ConfigError("device is cuda, but torch finds no GPU here; set device to auto or cpu")
        return "cpu"
    num_gpus, size = torch.cuda.device_count(), config.tensor_parallel_size
    if num_gpus < size:
        raise ConfigError(f"tensor_parallel_size is {size}, but a replica sees {num_gpus} GPUs; set num_gpus to {size}")
    return "cuda"
