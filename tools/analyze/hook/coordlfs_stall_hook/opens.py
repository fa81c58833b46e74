"""Writes down which files the program opens for reading: by itself, and by the processes that it forks."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import lru_cache
from typing import Any

_NO_DATA = (".py", ".pyc", ".so", ".pth", ".pyi", ".typed", ".whl", ".egg")
_INSTALLED = (".dist-info/", ".egg-info/", "/site-packages/", "/dist-packages/", "/__pycache__/", "/.git/")
_SYSTEM = ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/", "/lib/", "/lib64/", "/bin/", "/sbin/")


def could_be_data(path: str) -> bool:
    """Whether a file may be of the dataset: not of Python, of an installed package or of the system."""
    own = tuple(f"{place}/" for place in {sys.prefix, sys.base_prefix}) + _SYSTEM
    return not (
        path.startswith(own)
        or path.endswith(_NO_DATA)
        or ".so." in os.path.basename(path)
        or any(place in path for place in _INSTALLED)
    )


def packages() -> list[str]:
    """The directories of the packages that the program imported: what is in them is theirs, and not the dataset."""
    found = set()
    for module in list(sys.modules.values()):
        with suppress(Exception):
            file = module.__dict__.get("__file__")
            if file and "__path__" in module.__dict__:
                found.add(os.path.realpath(os.path.dirname(file)) + "/")
    return sorted(found)


@lru_cache(maxsize=4096)
def _real_directory(path: str) -> str:
    return os.path.join(os.path.realpath(path), "")


def write_down(log: str, data: str | None) -> None:
    """To the file `log`, each ended by a NUL: those below the directory `data`; None: all that could be data.

    Links on the way to a file are followed, so that it is found below `data` however the program calls that.
    """
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    inside = os.path.join(data, "") if data else None
    ours = os.path.join(os.path.realpath(os.path.dirname(log)), "")

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open":
            return
        path, _, flags = arguments
        if not isinstance(path, (str, bytes)) or flags & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            return
        with suppress(OSError, ValueError):
            directory, name = os.path.split(os.path.abspath(os.fsdecode(path)))
            found = _real_directory(directory) + name
            wanted = found.startswith(inside) if inside else could_be_data(found)
            if wanted and not found.startswith(ours):
                os.write(file, os.fsencode(found) + b"\0")

    sys.addaudithook(audit)
