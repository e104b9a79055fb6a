"""What a model takes of memory and how long its sequences may be, from its headers alone: no weights are loaded."""

import functools
import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from actors.contract import ConfigError
from actors.engines.base import EngineConfig
from actors.engines.by_url import described
from actors.engines.identity import base_of, safetensors_header

_CONVERTED = ("F64", "F32", "F16", "BF16")
"""Of safetensors: what is loaded in the configured dtype; others, those of quantized weights, stay as they are."""

_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_PROJECTION = re.compile(r"\.(k|v|qkv)_proj\.weight$")
_TOWER = re.compile("vision|visual|audio|image|speech")


@dataclass(frozen=True)
class Footprint:
    """What each rank of a replica holds. A rank is one of its `tensor_parallel_size` GPUs, or processes on a CPU.

    Attributes:
        weight_bytes: in the configured dtype. `vllm` splits every matrix over the ranks; vectors (norms, biases), which
            are next to nothing, are counted on each. `torch` splits what transformers' plan names: not the embeddings,
            unless the output shares them.
        token_bytes: of one token in the KV cache, at most: with sliding windows `vllm` keeps less. None where the
            model's memory is not a K and a V of every head and layer, or where that cannot be told from its weights.
        max_len: most tokens of prompt and answer together; None where only the engine knows.
    """

    weight_bytes: int
    token_bytes: int | None
    max_len: int | None

    def cache_tokens(self, config: EngineConfig) -> int:
        """Most tokens that the KV cache comes to hold where `kv_cache_tokens` bounds it: not for `vllm` on a GPU."""
        if self.max_len is None:
            return config.kv_cache_tokens
        return max(self.max_len, min(config.kv_cache_tokens, config.max_num_seqs * self.max_len))


def footprint(config: EngineConfig) -> Footprint | None:
    """None where there is no model, or where neither this machine nor the hub tells: no weights are fetched for it."""
    found = _headers(config)
    if found is None:
        return None
    folder, tensors = found
    width = _width(config)
    ranks = config.tensor_parallel_size
    sizes = {name: _size(tensor, width) for name, tensor in tensors.items()}
    whole = sum(size for name, size in sizes.items() if len(tensors[name]["shape"]) < 2)
    if ranks > 1 and config.engine == "torch":
        whole = min(_whole_numel(folder) * width, sum(sizes.values()))
    weight_bytes = whole + -(-(sum(sizes.values()) - whole) // ranks)
    text = _text_config(folder)
    if text is None:
        return Footprint(weight_bytes, None, config.max_model_len)
    heads = _kv_heads(text, tensors)
    token_bytes = heads and 2 * text.num_hidden_layers * max(1, heads // ranks) * _head_dim(text) * width
    return Footprint(weight_bytes, token_bytes, _max_len(config, text))


def refuse_unsplittable(config: EngineConfig, name: str) -> None:
    """Raise ConfigError, naming pool `name`, where the heads of its model cannot be shared out to its ranks: what the
    engines find out only once they start. Nothing is refused of a model that is not known here."""
    ranks = config.tensor_parallel_size
    found = _headers(config) if ranks > 1 else None
    text = _text_config(found[0]) if found else None
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads % ranks:
        raise ConfigError(
            f"{name}.tensor_parallel_size is {ranks}, which does not divide the {heads} attention heads of "
            f"{config.model}"
        )


def weights_on_cpu(config: EngineConfig) -> tuple[int, int]:
    """Least bytes of a model's weights in a machine's memory: (what each replica holds, what all of them share).

    They share what `torch` maps from the file as it is there: tensors that need not be converted to the dtype.
    (0, 0) where `footprint` is None.
    """
    found = _headers(config)
    own = shared = 0
    for tensor in found[1].values() if found else ():
        size = _size(tensor, _width(config))
        if config.engine == "torch" and tensor["dtype"] not in set(_CONVERTED) - {_STORED[config.dtype]}:
            shared += size
        else:
            own += size
    return own, shared


def longest(model_config: Any, max_model_len: int | None) -> int:
    """Most tokens of prompt and answer together that the `torch` engine makes with a model of this config."""
    text = model_config.get_text_config(decoder=True)
    limit: int = text.max_position_embeddings
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond this length every position is rotated differently, which neither a cache nor a shared batch can follow.
        limit = min(limit, rope["original_max_position_embeddings"])
    return limit if max_model_len is None else min(limit, max_model_len)


def _max_len(config: EngineConfig, text: Any) -> int | None:
    if getattr(text, "max_position_embeddings", None) is None:
        return config.max_model_len
    rope = getattr(text, "rope_parameters", None) or {}
    if config.engine == "vllm" and rope.get("rope_type", "default") not in ("default", "llama3"):
        return config.max_model_len  # of scaled positions vllm makes a length of its own
    return longest(text, config.max_model_len)


Headers = tuple[Path, dict[str, dict[str, Any]]]
"""A folder with the model's config.json, and what the headers of its weights tell of each tensor, by name."""


def _headers(config: EngineConfig) -> Headers | None:
    if config.engine in ("stored", "openai", "rules"):
        return None
    config = described(config)
    if base := base_of(config):
        return _headers(base)  # which the adapter is put into
    if Path(config.model).is_absolute():
        tensors = _tensors(Path(config.model))
        return (Path(config.model), tensors) if tensors else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(config.model, revision=config.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return _headers_at_hub(config.model, config.revision)
    if tensors := _tensors(folder):
        return folder, tensors
    return _headers_at_hub(config.model, config.revision)  # the tokenizer alone is cached, perhaps


@functools.cache
def _headers_at_hub(model: str, revision: str | None) -> Headers | None:
    """Asked of the hub: the beginning of each file of weights, and config.json, which stays in its cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: what its client raises without a network
        HTTPError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    hub = HfApi()
    try:
        folder = Path(hub.hf_hub_download(model, "config.json", revision=revision)).parent
        files = hub.get_safetensors_metadata(model, revision=revision).files_metadata.values()
    except (HTTPError, OSError, ValueError, NotASafetensorsRepoError, SafetensorsParsingError):
        return None
    return folder, {name: vars(tensor) for file in files for name, tensor in file.tensors.items()}


def tensor_names(config: EngineConfig) -> list[str] | None:
    """Names of the model's tensors; None where they cannot be told without fetching its weights."""
    found = _headers(config)
    return list(found[1]) if found else None


def _tensors(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Header entries of the model's tensors, by name; None where files of it are missing.

    Some folders hold the weights twice: the index says which files are the model's.
    """
    paths = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        paths = [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    if not all(path.is_file() for path in paths):
        return None
    found = {name: tensor for path in paths for name, tensor in json.loads(safetensors_header(path)).items()}
    return {name: tensor for name, tensor in found.items() if name != "__metadata__"}


def _width(config: EngineConfig) -> int:
    """Bytes of an element in the configured dtype."""
    return 4 if config.dtype == "float32" else 2


def _size(tensor: dict[str, Any], width: int) -> int:
    """Bytes of a tensor once it is loaded, in a dtype of `width` bytes if it is converted."""
    start, end = tensor["data_offsets"]
    return int(prod(tensor["shape"]) * width if tensor["dtype"] in _CONVERTED else end - start)


def _whole_numel(folder: Path) -> int:
    """Elements of the parameters that every rank holds as a whole by transformers' tensor parallel plan."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        whole_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):  # the plan is the model's, not its config's: it depends on what is tied
            model = AutoModelForCausalLM.from_config(whole_config, trust_remote_code=False)
    except (OSError, ValueError):  # the engine will not load it either
        return 0
    plan = model.tp_plan
    found = 0
    for name, parameter in model.named_parameters():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        style = plan.get(pattern) or plan.get(pattern.rpartition(".")[0], "")
        is_split = style == "grouped_gemm" or "colwise" in style or ("rowwise" in style and parameter.ndim > 1)
        found += 0 if is_split else parameter.numel()
    return found


def _text_config(folder: Path) -> Any | None:
    """The config of the model's decoder; None where transformers does not know the kind of model."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config(decoder=True)
    except (OSError, ValueError):
        return None


def _kv_heads(text: Any, tensors: dict[str, dict[str, Any]]) -> int | None:
    """KV heads of a layer; None unless the weights bear out that every layer has as many, of the same size.

    Latent attention, states in place of a cache and layers of several shapes have other projections than the config's
    numbers would give, so that they are told apart without a list of their names.
    """
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or text.is_encoder_decoder:
        return None
    rows = sum(
        tensor["shape"][0] for name, tensor in tensors.items() if _PROJECTION.search(name) and not _TOWER.search(name)
    )
    keys_and_values = 2 * text.num_hidden_layers * kv_heads * _head_dim(text)
    queries = text.num_hidden_layers * heads * _head_dim(text)  # where one matrix makes all three
    return kv_heads if rows in (keys_and_values, keys_and_values + queries) else None


def _head_dim(text: Any) -> int:
    head_dim: int | None = getattr(text, "head_dim", None)
    return head_dim or int(text.hidden_size // text.num_attention_heads)
