"""Opening files beneath a directory, and nowhere else (openat2, Linux 5.6)."""

from __future__ import annotations

import ctypes
import functools
import os
import struct

from coordlfs.kernel.libc import check, libc

SYS_OPENAT2 = 437
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 0x02, 0x04, 0x08
_LONGEST = 4095
_HOW = struct.Struct("=QQQ")


@functools.cache
def _how(flags: int) -> ctypes.Array[ctypes.c_char]:
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    if not flags & os.O_PATH:
        flags |= os.O_NOCTTY | os.O_NONBLOCK  # what was a file may be a FIFO by now
    resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    return ctypes.create_string_buffer(_HOW.pack(flags, 0, resolve), _HOW.size)


def open_beneath(directory: int, path: bytes, flags: int) -> int:
    """Open `path` relative to `directory` (empty: itself), following no symbolic link at any place of it.

    With O_PATH, a symbolic link at its end is opened itself. The path may be of any length.
    Raises ELOOP for a link, EXDEV for a way out, else what open(2) does.
    """
    if len(path) > _LONGEST:
        cut = path.rindex(b"/", 0, _LONGEST)
        above = open_beneath(directory, path[:cut], os.O_PATH | os.O_DIRECTORY)
        try:
            return open_beneath(above, path[cut + 1 :], flags)
        finally:
            os.close(above)
    fd: int = libc.syscall(SYS_OPENAT2, directory, path or b".", _how(flags), _HOW.size)
    return fd if fd >= 0 else check(-1, os.fsdecode(path))
