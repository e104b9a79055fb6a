"""The folder of this node that keeps what is fetched, merged or measured once."""

import os
from pathlib import Path

USUAL = "~/.cache/burnish"


def cache_folder() -> Path:
    """$BURNISH_CACHE where it is set and not empty, else ~/.cache/burnish."""
    return Path(os.environ.get("BURNISH_CACHE") or USUAL).expanduser()


def kept(path: str) -> str:
    """The path, where one below ~/.cache/burnish stands for that below the cache of this node, wherever that is."""
    return str(cache_folder() / Path(path).relative_to(USUAL)) if Path(path).is_relative_to(USUAL) else path
