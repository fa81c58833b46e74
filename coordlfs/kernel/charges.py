"""Which memory cgroup pages are charged to (/proc/kpagecgroup), by the numbers that only a privileged process may see.

A page of a file is charged to the cgroup of whoever had it read first, and stays so whoever maps or locks it later.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import time

from coordlfs.kernel import pages

_WORD = 8  # bytes of an entry of either file
_PRESENT, _FRAME = 1 << 63, (1 << 55) - 1  # of an entry of pagemap
_KNOWN = 1.0  # seconds that this process is believed to stay in its cgroup


class Charges:
    """Tells the pages that are charged where this process is from those of others.

    Raises OSError where the kernel does not say: EPERM without CAP_SYS_ADMIN, ENOENT without memory cgroups.
    """

    def __init__(self) -> None:
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._cgroups = os.open("/proc/kpagecgroup", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._pagemap)
            raise
        self._own, self._until = self._look(), time.monotonic() + _KNOWN

    def are_own(self, address: int, length: int) -> bool:
        """Whether all pages of a mapping that have been faulted in are charged where this process is."""
        now = time.monotonic()
        if now > self._until:
            self._own, self._until = self._look(), now + _KNOWN
        return self._cgroups_of(address, length) <= {self._own}

    def _look(self) -> int:
        """The inode number of this process's memory cgroup: it is where a page that was just touched is charged."""
        fresh = pages.buffer(pages.PAGE)
        fresh[0] = 1
        found = self._cgroups_of(ctypes.addressof(ctypes.c_char.from_buffer(fresh)), pages.PAGE)
        if not found:
            raise OSError(errno.EPERM, "pages have no number for this process")
        return found.pop()

    def _cgroups_of(self, address: int, length: int) -> set[int]:
        count = pages.count(length)
        entries = struct.unpack(
            f"={count}Q",
            os.pread(self._pagemap, count * _WORD, address // pages.PAGE * _WORD).ljust(count * _WORD, b"\0"),
        )
        frames = [entry & _FRAME for entry in entries if entry & _PRESENT]
        if 0 in frames:
            raise OSError(errno.EPERM, "pages have no number for this process")
        found: set[int] = set()
        at = 0
        while at < len(frames):  # large folios are frames in a row
            end = at + 1
            while end < len(frames) and frames[end] == frames[end - 1] + 1:
                end += 1
            answer = os.pread(self._cgroups, (end - at) * _WORD, frames[at] * _WORD)
            found.update(struct.unpack(f"={len(answer) // _WORD}Q", answer))
            at = end
        return found
