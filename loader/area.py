"""The staging area's memory: a memfd, so that nothing can stay behind whoever dies. Its owner is the broker.

It must not know what lies in it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
_GIGABYTE = 1 << 30


def create(name: str) -> int:
    """A new area, without memory yet."""
    return os.memfd_create(name, os.MFD_CLOEXEC)


class TooLarge(RuntimeError):
    """A file may not be as large as it must be."""

    def __init__(self, size: int) -> None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        super().__init__(
            f"coordlfs: the loader's shared memory needs {size:,} bytes, and a file may have {limit:,} at most. "
            "Raise the limit (`ulimit -f unlimited`) in all jobs of the group"
        )


def extend(fd: int, size: int) -> None:
    """Make a file so large. Raises TooLarge where `ulimit -f` forbids it."""
    try:
        os.ftruncate(fd, size)
    except OSError as e:
        raise TooLarge(size) if e.errno == errno.EFBIG else e from None


def discard(fd: int, offset: int, size: int) -> None:
    """Give the memory of a part back."""
    if _libc.fallocate(fd, _PUNCH_HOLE, offset, size):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def copy(fd: int, offset: int, size: int) -> int:
    """A memfd of its own with the bytes of a part."""
    private = os.memfd_create("coordlfs-copy", os.MFD_CLOEXEC)
    try:
        while size:
            done = os.sendfile(private, fd, offset, min(size, _GIGABYTE))
            if not done:
                raise OSError("the staging area is shorter than it should be")
            offset, size = offset + done, size - done
    except BaseException:
        os.close(private)
        raise
    return private
