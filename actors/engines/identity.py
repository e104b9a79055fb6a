"""Which model it is, exactly: a folder's contents or a hub id's commit, found out without loading any weights."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from actors.cache import kept
from actors.contract import ConfigError
from actors.engines.base import OPENAI, EngineConfig
from actors.engines.by_url import ADAPTER, is_url, pinned_url

Config = TypeVar("Config", bound=EngineConfig)

_DESCRIBING = (
    "config.json", "generation_config.json", "chat_template.jinja", "tokenizer*", "special_tokens_map.json", ADAPTER,
)  # fmt: skip


def pinned(config: Config, section: str) -> Config:
    """The config with its model pinned: a folder by its absolute path, a hub id by the commit of its revision, a URL by
    the versions of the files below it.

    Raises ConfigError, naming `section`, where there is no such model.
    """
    if config.engine in ("stored", "openai", "rules"):
        return config
    if is_url(config.model):
        return pinned_url(config, section)
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", ADAPTER)):
            raise ConfigError(f"{section}.model: {folder} holds no config.json; it is not a Hugging Face model folder")
        if not list(folder.glob("*.safetensors")):
            raise ConfigError(f"{section}.model: {folder} holds no *.safetensors; other weight formats are not loaded")
        config = replace(config, model=str(folder.resolve()))
        base_of(config, section)
        return config
    if config.model.startswith(("/", ".", "~")) or config.model.count("/") != 1:
        raise ConfigError(
            f"{section}.model: there is no folder {config.model}, and it is not a hub id (owner/name), nor a URL"
        )
    return replace(config, revision=_commit(config.model, config.revision, section))


def hub_id(config: EngineConfig) -> str | None:
    """The hub id of a pinned model; None where it is a folder or a URL."""
    return None if is_url(config.model) or Path(config.model).is_absolute() else config.model


def base_of(config: Config, section: str = "base") -> Config | None:
    """The config of the model that an adapter (a peft folder) is for, pinned; None where the model is a whole one.

    Raises ConfigError, naming `section`, where the adapter's folder does not lead to a model.
    """
    described = Path(config.model) / ADAPTER
    if is_url(config.model) or not described.is_file():
        return None
    told = json.loads(described.read_text("utf-8"))
    base, revision = told.get("base_model_name_or_path"), told.get("revision")
    if not base:
        raise ConfigError(f"{section}.model: {described} names no base_model_name_or_path")
    try:
        return pinned(replace(config, model=kept(base), revision=revision), section)
    except ConfigError as error:
        raise ConfigError(f"{error}; it is the base of the adapter {config.model}, by its {ADAPTER}") from error


def identity(config: EngineConfig) -> str:
    """16 hex digits over config, tokenizer and safetensors headers with sizes and mtimes; a revision; or `stored`.
    Of an adapter over those of its base, too.

    Of an endpoint it is the host's name, all that can be known: two hosts may serve different models by one name, while
    the ports and paths of one host are taken for replicas.

    Raises ValueError for a model that has not been `pinned`.
    """
    if config.engine == "stored":
        return "stored"
    if config.engine == "openai":
        return f"at {urlsplit(config.base_url or OPENAI).hostname}"
    folder = Path(config.model)
    if not folder.is_absolute():
        if config.revision is None:  # a folder by a relative path, of which nothing has been read yet
            raise ValueError(f"{config.model!r} is not pinned")
        return config.revision
    found = hashlib.sha256()
    for path in sorted({path for pattern in _DESCRIBING for path in folder.glob(pattern) if path.is_file()}):
        found.update(f"{path.name}\n".encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        found.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode() + safetensors_header(path))
    if base := base_of(config):
        found.update(identity(base).encode())
    return found.hexdigest()[:16]


def safetensors_header(path: Path) -> bytes:
    """The JSON header of a safetensors file: names, dtypes and shapes of its tensors."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _commit(model: str, revision: str | None, section: str) -> str:
    """The commit that a revision of a hub id stands for: asked of the hub, or else the cached one."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: what its client raises without a network
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    try:
        return str(HfApi().model_info(model, revision=revision, timeout=10).sha)
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    try:
        cached = snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=["config.json"])
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise ConfigError(f"{section}.model: {model} is neither a folder nor to be had from a hub ({reason})") from None
    return Path(cached).name
