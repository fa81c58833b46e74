"""Opening files beneath a directory, and nowhere else (openat2, Linux 5.6)."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
import threading

from coordlfs.kernel.libc import check, libc, quick

SYS_OPENAT2 = 437
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_CACHED = 0x02, 0x04, 0x08, 0x20
_LONGEST = 4095
_AT_EMPTY_PATH, _STATX_ATTRIBUTES = 0x1000, 0x35B
_WANTED = ctypes.c_uint(_STATX_ATTRIBUTES)
_STATX = 256  # bytes
_ATTRIBUTES = struct.Struct("=20xIIH2xQQ64xqI")  # of struct statx: uid gid mode inode size, mtime and its nanoseconds
_HOW = struct.Struct("=QQQ")
HOW_SIZE = _HOW.size
OPENAT2 = ctypes.c_long(SYS_OPENAT2)


@functools.cache
def how(flags: int, resolve: int = 0) -> ctypes.Array[ctypes.c_char]:
    """struct open_how, as openat2(2) takes it, to open what lies beneath a directory and is reached by no link."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    if not flags & os.O_PATH:
        flags |= os.O_NOCTTY | os.O_NONBLOCK  # what was a file may be a FIFO by now
    resolve |= RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    return ctypes.create_string_buffer(_HOW.pack(flags, 0, resolve), HOW_SIZE)


def open_beneath(directory: int, path: bytes, flags: int) -> int:
    """Open `path` relative to `directory` (empty: itself), following no symbolic link at any place of it.

    With O_PATH, a symbolic link at its end is opened itself. The path may be of any length.
    Raises ELOOP for a link, EXDEV for a way out, else what open(2) does.
    """
    if len(path) > _LONGEST:
        cut = path.rfind(b"/", 0, _LONGEST)
        if cut < 0:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        above = open_beneath(directory, path[:cut], os.O_PATH | os.O_DIRECTORY)
        try:
            return open_beneath(above, path[cut + 1 :], flags)
        finally:
            os.close(above)
    fd: int = libc.syscall(SYS_OPENAT2, directory, path or b".", how(flags), HOW_SIZE)
    return fd if fd >= 0 else check(-1, os.fsdecode(path))


def open_if_cached(directory: int, path: bytes, flags: int) -> int | None:
    """As `open_beneath`, if the kernel knows the names and need wait for no disk; else None.

    Raises what `open_beneath` does. Never blocks, unless the file system's own part of opening a file does: that of
    network file systems may. None always on Linux before 5.12.
    """
    if len(path) > _LONGEST:
        return None
    fd: int = quick.syscall(OPENAT2, directory, path or b".", how(flags, RESOLVE_CACHED), HOW_SIZE)
    if fd >= 0:
        return fd
    return None if ctypes.get_errno() in (errno.EAGAIN, errno.EINVAL) else check(fd, os.fsdecode(path))


class _Statx(threading.local):
    """Room for what statx(2) finds, made once for each thread: making it takes longer than the call."""

    def __init__(self) -> None:
        self.room = ctypes.create_string_buffer(_STATX)


_statx = _Statx()


Attributes = tuple[int, int, int, int, int, int]


def attributes(fd: int) -> Attributes:
    """Mode, uid, gid, inode, size and mtime_ns of an open file on a local disk, as quickly as can be (Linux 4.11)."""
    room = _statx.room
    check(quick.statx(fd, b"", _AT_EMPTY_PATH, _WANTED, room), "statx")
    uid, gid, mode, inode, size, seconds, ns = _ATTRIBUTES.unpack_from(room)
    return mode, uid, gid, inode, size, seconds * 10**9 + ns


def join(directory: bytes, name: bytes) -> bytes:
    """The path of a directory's entry, both relative to the root, whose path is empty."""
    return directory + b"/" + name if directory else name


def to_text(path: bytes) -> str:
    """A path for a message in JSON: UTF-8, and what is not as surrogates, whatever this process's locale is."""
    return path.decode("utf-8", "surrogateescape")


def from_text(text: str) -> bytes:
    """The path that `to_text` was given."""
    return text.encode("utf-8", "surrogateescape")


def shown(text: str | bytes) -> str:
    """A text that may hold names, for a terminal or a log: what ends the line or moves the cursor is escaped.

    A byte that is no text is shown as `\\xff`, as in a string of Python.
    """
    text = os.fsdecode(text)
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as `os.fsdecode` has it
        code -= 0xDC00
    return chr(code).encode("unicode_escape").decode()


def close_at_once(fd: int) -> None:
    """Close a descriptor of which nothing is to be waited for: of a local file that was read, or with O_PATH."""
    check(quick.close(fd), "close")
