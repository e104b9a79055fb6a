"""Models that are named by URL: pinned by what their folder holds, and copied to the disk of a node once."""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from actors.cache import cache_folder
from actors.contract import ConfigError, TransientError
from actors.engines.base import EngineConfig

Config = TypeVar("Config", bound=EngineConfig)

FETCHED = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe")
"""Files of a model: weights, configs, tokenizers and templates. Others are not fetched, code and pickles least."""
RETRY_S = 60.0
"""Seconds for which a store that is out is asked again."""
AT_ONCE = 16 << 20
ADAPTER = "adapter_config.json"
"""What an adapter's folder (peft) has in place of config.json."""


def is_url(model: str) -> bool:
    return "://" in model


def pinned_url(config: Config, section: str) -> Config:
    """The config with `revision` set to 16 hex digits over names, sizes and versions of the folder's files.

    Raises ConfigError, naming `section`, where there is no such model, and TransientError where its store is out.
    """
    found = _listing(config)
    if not {"config.json", ADAPTER} & found.keys():
        raise ConfigError(
            f"{section}.model: {config.model} holds no config.json; it is not a Hugging Face model folder"
        )
    if not any(name.endswith(".safetensors") for name in found):
        raise ConfigError(
            f"{section}.model: {config.model} holds no *.safetensors; other weight formats are not loaded"
        )
    revision = _digest(found)
    if config.revision not in (None, revision):
        raise ConfigError(f"{section}.revision is for hub ids; {config.model} is pinned by its contents ({revision})")
    return replace(config, revision=revision)


def on_this_node(config: Config) -> Config:
    """The config with a copy of its model on this node's disk in place of the URL; any other config as it is.

    Raises as `pinned_url`, and ConfigError where the folder holds another version by now.
    """
    return _copied(config, "", _copy)


def described(config: Config) -> Config:
    """`on_this_node`, but of the weights no more than the headers: what a plan needs of a model."""
    return _copied(config, "-headers", _copy_header)


def _copied(config: Config, suffix: str, copy: Callable[[Any, str, Path, int], None]) -> Config:
    if not is_url(config.model):
        return config
    name = f"{config.model.rstrip('/').rpartition('/')[2]}-{config.revision}{suffix}"

    def copied(part: Path) -> None:
        found = _listing(config)
        changed = ConfigError(f"the model at {config.model} has changed since this run began; run again")
        if _digest(found) != config.revision:
            raise changed
        fs, root = _opened(config)
        for name, (size, _) in found.items():
            try:
                _told(config, partial(copy, fs, f"{root}/{name}", part / name, size))
            except FileNotFoundError:
                raise changed from None

    return replace(config, model=str(made_once(name, copied)), revision=None)


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name in this node's cache of models. The first who asks makes it, the others wait for that.

    Args:
        make: fills the empty folder that it is given, which becomes the one of that name when it returns.
    """
    models = cache_folder() / "models"
    folder = models / name
    models.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        part = Path(f"{folder}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        make(part)
        os.rename(part, folder)  # on a local disk: whoever sees the folder sees all of it
    return folder


def _copy(fs: Any, source: str, target: Path, size: int) -> None:
    with fs.open(source, "rb", block_size=AT_ONCE, cache_type="readahead") as remote, target.open("wb") as local:
        shutil.copyfileobj(remote, local, AT_ONCE)
    if target.stat().st_size != size:
        raise OSError(f"{source} came with {target.stat().st_size} bytes instead of {size}")


def _copy_header(fs: Any, source: str, target: Path, size: int) -> None:
    if not source.endswith(".safetensors"):
        return _copy(fs, source, target, size)
    length = int.from_bytes(fs.cat_file(source, start=0, end=8), "little")
    target.write_bytes(fs.cat_file(source, start=0, end=min(size, 8 + length)))


def _listing(config: EngineConfig) -> dict[str, tuple[int, str]]:
    """Name -> (bytes, version) of the files directly in the folder, in name order; {} where there is none."""

    def listed() -> list[dict[str, Any]]:
        fs, root = _opened(config)
        fs.invalidate_cache()
        entries: list[dict[str, Any]] = fs.ls(root, detail=True)
        return entries

    try:
        entries = _told(config, listed)
    except FileNotFoundError:
        return {}
    files = {entry["name"].rpartition("/")[2]: entry for entry in entries if entry["type"] == "file"}
    return {
        name: (int(entry["size"]), str(entry.get("ETag") or entry.get("etag") or entry.get("mtime") or ""))
        for name, entry in sorted(files.items())
        if not name.startswith(".") and (name.endswith(FETCHED) or name.startswith("tokenizer.model"))
    }


def _digest(found: dict[str, tuple[int, str]]) -> str:
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]


def _opened(config: EngineConfig) -> tuple[Any, str]:
    try:
        fs, root = fsspec.core.url_to_fs(config.model, **config.model_storage_options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"model {config.model!r} cannot be opened: {error}") from error
    return fs, root.rstrip("/")


Result = TypeVar("Result")


def _told(config: EngineConfig, call: Callable[[], Result]) -> Result:
    """call(), again while the store is out, its errors told as a mistake or as an outage; FileNotFoundError stays."""
    given_up_at, wait_s = time.monotonic() + RETRY_S, 0.5
    while True:
        try:
            return call()
        except (FileNotFoundError, ConfigError):
            raise
        except Exception as error:  # what clients of stores raise has no common type
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
                raise ConfigError(f"model {config.model}: the store refuses: {reason}") from error
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)  # this node's disk
            if is_full or time.monotonic() + wait_s > given_up_at:
                raise TransientError(f"model {config.model} cannot be fetched: {reason}") from error
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 5.0)
