"""Files that the kernel knows, and whether it holds them in the page cache, asked in as few instructions as can be."""

from __future__ import annotations

import ctypes
import os

from coordlfs.kernel import paths
from coordlfs.kernel.libc import quick
from coordlfs.kernel.pages import PAGE, SYS_CACHESTAT, count

_HOW = paths.how(os.O_RDONLY, paths.RESOLVE_CACHED)


class CachedFiles:
    """Files beneath a directory, for one thread."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._range = (ctypes.c_uint64 * 2)()
        self._counts = (ctypes.c_uint64 * 5)()
        self._asks = ctypes.byref(self._range), ctypes.byref(self._counts), ctypes.c_uint(0)

    def open(self, path: bytes) -> int:
        """A descriptor for reading; -1 if that cannot be had without waiting, whatever the reason."""
        fd: int = quick.syscall(paths.OPENAT2, self._directory, path, _HOW, paths.HOW_SIZE)
        return fd

    def holds(self, fd: int, length: int) -> bool:
        """Whether the first `length` bytes of a file are in the page cache; False as well where that is not told."""
        npages = count(length)
        self._range[1] = npages * PAGE
        return not quick.syscall(SYS_CACHESTAT, fd, *self._asks) and self._counts[0] == npages
