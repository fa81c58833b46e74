"""The staging area's memory: a memfd, so that nothing can stay behind whoever dies.

Workers write with pwritev(2), which reuses pages without faulting them in. Jobs map a slot when they take its batch,
privately: a tensor is theirs to write into, and what they write is seen by no other job (copy on write).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_MAP_FAILED = ctypes.c_void_p(-1).value
_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
_POPULATE_READ = 22  # Linux 5.14
_IOV_MAX = 1024
_GIGABYTE = 1 << 30


def create(name: str) -> int:
    """A new area, without memory yet."""
    return os.memfd_create(name, os.MFD_CLOEXEC)


def discard(fd: int, offset: int, size: int) -> None:
    """Give the memory of a part back."""
    if _libc.fallocate(fd, _PUNCH_HOLE, offset, size):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def write(fd: int, buffers: Sequence[memoryview | bytes], offset: int) -> None:
    """Write buffers there, one after the other."""
    left = [memoryview(b).cast("B") for b in buffers if len(memoryview(b).cast("B"))]
    left.reverse()
    while left:
        done = os.pwritev(fd, left[: -_IOV_MAX - 1 : -1], offset)
        offset += done
        while done:
            first = left.pop()
            if len(first) > done:
                left.append(first[done:])
                break
            done -= len(first)


def read(fd: int, into: memoryview) -> None:
    """Fill a buffer from the beginning of a memfd."""
    position = 0
    while position < len(into):
        done = os.preadv(fd, [into[position:]], position)
        if not done:
            raise OSError("a copy is shorter than it should be")
        position += done


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


def view(fd: int, offset: int, size: int, released: Callable[[], None] | None = None) -> memoryview:
    """A private, writable view of a part. `released` is called when the last that refers to its bytes has gone.

    That may happen in any thread and at any moment, in the middle of anything.
    """
    if not size:
        raise ValueError("nothing to view")
    prot, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
    address = _libc.mmap(None, size, prot, flags, fd, offset)
    if address in (None, _MAP_FAILED):
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {size} bytes: {os.strerror(code)}")
    # Fault it in at once: page by page costs more. Where the kernel is too old for it, faults do.
    _libc.madvise(address, size, _POPULATE_READ)
    array = (ctypes.c_ubyte * size).from_address(address)
    finalizer = weakref.finalize(array, _unmap, address, size, os.getpid(), released)
    finalizer.atexit = False  # at the end of the process tensors may still be in use
    return memoryview(array).cast("B")


def _unmap(address: int, size: int, owner: int, released: Callable[[], None] | None) -> None:
    _libc.munmap(address, size)
    if released is not None and os.getpid() == owner:  # a forked child holds nothing of its parent's
        released()
