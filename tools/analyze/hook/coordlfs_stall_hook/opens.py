"""Writes down which files the program opens for reading: by itself, and by the processes that it forks."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

_NO_DATA = (".py", ".pyc", ".so", ".pth", ".pyi", ".typed")
_SYSTEM = ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/", "/lib/", "/lib64/", "/bin/")


def write_down(log: str, data: str | None) -> None:
    """To the file `log`, one a line: those below the directory `data`; None: all that could be data."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    inside = os.path.join(data, "") if data else None
    own = tuple(f"{place}/" for place in {sys.prefix, sys.base_prefix, os.path.dirname(log)}) + _SYSTEM

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open":
            return
        path, _, flags = arguments
        if not isinstance(path, (str, bytes)) or flags & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            return
        path = os.path.abspath(os.fsdecode(path))
        wanted = path.startswith(inside) if inside else not path.startswith(own) and not path.endswith(_NO_DATA)
        if wanted and "\n" not in path:
            with suppress(OSError):
                os.write(file, os.fsencode(path + "\n"))

    sys.addaudithook(audit)
