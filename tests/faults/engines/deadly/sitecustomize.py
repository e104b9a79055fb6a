"""Python reads this first where its folder is on PYTHONPATH: the torch engine is then the deadly one beside it.

And a folder in which there is a file `.full` or `.readonly` takes no more unit files, as a disk that is so would not.
"""

import errno
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


class Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "actors.engines.torch_engine":
            return None
        return importlib.util.spec_from_file_location(name, Path(__file__).with_name("deadly_engine.py"))


sys.meta_path.insert(0, Finder())
link = os.link


def failing_link(source: Any, target: Any, **arguments: Any) -> None:
    folder = Path(target).parent
    for name, number in ((".full", errno.ENOSPC), (".readonly", errno.EROFS)):
        if folder.name == "units" and (folder.parent / name).exists():
            raise OSError(number, os.strerror(number), str(target))
    link(source, target, **arguments)


os.link = failing_link
