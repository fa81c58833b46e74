"""Watching files for being opened, and directories for what is done in them (inotify)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from coordlfs.kernel.libc import check, libc

_IN_MODIFY, _IN_ATTRIB, _IN_CLOSE_WRITE, _IN_CLOSE_NOWRITE, _IN_OPEN = 0x2, 0x4, 0x8, 0x10, 0x20
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x40, 0x80, 0x100, 0x200
_IN_Q_OVERFLOW, _IN_IGNORED, _IN_ONLYDIR, _IN_ISDIR = 0x4000, 0x8000, 0x1000000, 0x40000000
CHANGES = (
    _IN_MODIFY | _IN_ATTRIB | _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_ONLYDIR
)
READS = _IN_CLOSE_NOWRITE | _IN_ONLYDIR
_MOST = 1 << 16  # bytes of events that are taken at a time
_EVENT = struct.Struct("=iIII")  # watch mask cookie name_length


def _instance() -> int:
    """An instance of inotify. Raises OSError: EMFILE where fs.inotify.max_user_instances is reached."""
    return check(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify")


class OpenWatch:
    """Watches inodes; `fd` is readable when one was opened. Raises OSError, see `_instance`."""

    def __init__(self) -> None:
        self.fd = _instance()

    def add(self, fd: int) -> int:
        """Watch the file that is open as `fd`; the number of the watch. Raises OSError."""
        path = ctypes.c_char_p(b"/proc/self/fd/%d" % fd)
        return check(libc.inotify_add_watch(self.fd, path, ctypes.c_uint32(_IN_OPEN)), "inotify_add_watch")

    def remove(self, watch: int) -> None:
        """Watch it no more."""
        libc.inotify_rm_watch(self.fd, watch)

    def opened(self) -> Iterator[int]:
        """The watches whose files were opened since the last call."""
        for watch, mask, _ in _events(self.fd, 1 << 14):
            if mask & _IN_OPEN:
                yield watch


class Event(NamedTuple):
    """Something was done to `name` in the directory of `watch`."""

    watch: int
    name: bytes
    is_directory: bool


class DirectoryWatch:
    """Watches directories; `fd` is readable when something was done in one. `mask`: CHANGES or READS of files there.

    Raises OSError, see `_instance`.
    """

    def __init__(self, mask: int) -> None:
        self.fd = _instance()
        self._mask = mask

    def add(self, fd: int) -> int:
        """Watch the directory that is open as `fd`; the number of the watch, the same for the same directory.

        Raises OSError: ENOSPC where the user may have no more watches (fs.inotify.max_user_watches).
        """
        path = ctypes.c_char_p(b"/proc/self/fd/%d" % fd)
        return check(libc.inotify_add_watch(self.fd, path, ctypes.c_uint32(self._mask)), "inotify_add_watch")

    def events(self) -> tuple[list[Event], bool]:
        """What was done since the last call, some of it; and whether more was done than the kernel could keep."""
        found, is_lost = [], False
        for watch, mask, name in _events(self.fd, _MOST):
            is_lost = is_lost or bool(mask & _IN_Q_OVERFLOW)
            if name and not mask & _IN_IGNORED:
                found.append(Event(watch, name, bool(mask & _IN_ISDIR)))
        return found, is_lost

    def close(self) -> None:
        """Watch nothing any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _events(fd: int, most: int) -> Iterator[tuple[int, int, bytes]]:
    """Watch, mask and name of what happened."""
    try:
        events = os.read(fd, most)
    except OSError as e:
        if e.errno == errno.EAGAIN:
            return
        raise
    at = 0
    while at < len(events):
        watch, mask, _, name_length = _EVENT.unpack_from(events, at)
        at += _EVENT.size + name_length
        yield watch, mask, events[at - name_length : at].rstrip(b"\0")
