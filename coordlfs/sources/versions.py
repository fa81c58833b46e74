"""What tells two states of a file apart.

No reader may get bytes of two of them. It knows attributes, and reads nothing.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from coordlfs.kernel import paths

_HALF = 1 << 63
YOUNG_NS = 1_000_000_000


class Version(NamedTuple):
    """A state of a file; `inode` only says whether it is the same file of the source."""

    size: int
    mtime_ns: int
    inode: int
    access: int = 0  # who may do what: permissions, and 20 bits of a hash of the owners

    @classmethod
    def of(cls, st: os.stat_result) -> Version:
        """The version that these attributes show."""
        return cls(st.st_size, _signed(st.st_mtime_ns), st.st_ino, access(st.st_mode, st.st_uid, st.st_gid))

    @classmethod
    def of_open(cls, fd: int) -> Version:
        """The version that an open file shows, without letting another thread run meanwhile. Raises OSError."""
        mode, uid, gid, inode, size, mtime_ns = paths.attributes(fd)
        return cls(size, _signed(mtime_ns), inode, access(mode, uid, gid))


def is_young(mtime_ns: int, now_ns: int) -> bool:
    """Whether a file changed so recently that what changed it may not be over.

    A write sets the time before it copies, so that for as long as it takes, the file has bytes of two versions, the
    size and time of the new one, and keeps them.
    """
    return abs(now_ns - mtime_ns) < YOUNG_NS


def _signed(ns: int) -> int:
    """A time as 64 bits hold it, which goes wrong, the same way every time, after the year 2262."""
    return ns if -_HALF <= ns < _HALF else (ns + _HALF) % (2 * _HALF) - _HALF


def access(mode: int, uid: int, gid: int) -> int:
    """See `Version.access`."""
    return (mode & 0xFFF) << 20 | hash((uid, gid)) & 0xFFFFF
