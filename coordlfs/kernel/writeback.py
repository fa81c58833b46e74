"""Having what was written reach its disk, of one file system: sync(2) waits for all of them, and one may hang."""

from __future__ import annotations

import os

from coordlfs.kernel.libc import check, libc


def write_back(path: str | os.PathLike[str]) -> None:
    """Wait until what was written to the file system that a path lies on is on its disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check(libc.syncfs(fd), "syncfs")
    finally:
        os.close(fd)
