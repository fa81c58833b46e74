"""Watching files for being opened (inotify)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator

from coordlfs.kernel.libc import check, libc

_IN_OPEN = 0x20
_EVENT = struct.Struct("=iIII")  # watch mask cookie name_length


class OpenWatch:
    """Watches inodes; `fd` is readable when one was opened."""

    def __init__(self) -> None:
        self.fd = check(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify")

    def add(self, fd: int) -> int:
        """Watch the file that is open as `fd`; the number of the watch. Raises OSError."""
        path = ctypes.c_char_p(b"/proc/self/fd/%d" % fd)
        return check(libc.inotify_add_watch(self.fd, path, ctypes.c_uint32(_IN_OPEN)), "inotify_add_watch")

    def remove(self, watch: int) -> None:
        """Watch it no more."""
        libc.inotify_rm_watch(self.fd, watch)

    def opened(self) -> Iterator[int]:
        """The watches whose files were opened since the last call."""
        try:
            events = os.read(self.fd, 1 << 14)
        except OSError as e:
            if e.errno == errno.EAGAIN:
                return
            raise
        at = 0
        while at < len(events):
            watch, mask, _, name_length = _EVENT.unpack_from(events, at)
            at += _EVENT.size + name_length
            if mask & _IN_OPEN:
                yield watch
