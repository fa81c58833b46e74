"""Pages of files: map them, lock them, drop them, count those that are resident."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap as _mmap
import os
import threading
from array import array
from contextlib import suppress

from coordlfs.kernel.libc import check, libc, quick

PAGE = _mmap.PAGESIZE
PROT_READ, MAP_SHARED = 1, 1
_MADV_RANDOM, _MADV_POPULATE_READ, _MLOCK_ONFAULT = 1, 22, 1
_GET_FLAGS, _SET_FLAGS, _NO_COPY = 0x80086601, 0x40086602, 0x00800000  # linux/fs.h
_FAILED = ctypes.c_void_p(-1).value

libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


class _CacheStat(threading.local):
    """The arguments of cachestat(2), made once for each thread: making them takes longer than the call."""

    def __init__(self) -> None:
        self.range = (ctypes.c_uint64 * 2)()
        self.result = (ctypes.c_uint64 * 5)()  # pages: cached, dirty, in writeback, evicted, recently evicted
        self.tail = ctypes.byref(self.range), ctypes.byref(self.result), ctypes.c_uint(0)


_cachestat = _CacheStat()
SYS_CACHESTAT = ctypes.c_long(451)


def count(length: int) -> int:
    """How many pages `length` bytes take up."""
    return -(-length // PAGE)


def map_file(fd: int, offset: int, length: int) -> int:
    """mmap(2) shared and read-only; the address. Python's mmap would keep a descriptor for each."""
    address: int | None = libc.mmap(None, length, PROT_READ, MAP_SHARED, fd, offset)
    if address is None or address == _FAILED:
        check(-1, "mmap")
        raise AssertionError("unreachable: check raised")
    return address


def unmap(address: int, length: int) -> None:
    """munmap(2)."""
    check(libc.munmap(address, length), "munmap")


def lock(address: int, length: int) -> None:
    """Fault the pages in and keep them in memory until they are unmapped.

    Raises OSError for a page that could not be read (EFAULT) and for a limit (ENOMEM, EPERM). The mapping is told to be
    RANDOM first, since faulting must not read around what was asked for. Not mlock(2) alone: it tries a page that
    cannot be read again and again, for ever (measured with a source that gives EIO: 700 READs a second).
    """
    check(libc.madvise(address, length, _MADV_RANDOM), "madvise")
    check(libc.mlock2(address, length, _MLOCK_ONFAULT), "mlock2")
    populate(address, length)


def populate(address: int, length: int) -> None:
    """Fault in pages of a mapping, and read those that are not resident. Raises OSError: EFAULT if that fails."""
    check(libc.madvise(address, length, _MADV_POPULATE_READ), "madvise")


def resident_runs(address: int, length: int) -> list[tuple[int, int]]:
    """Which pages of a mapping are resident, mincore(2): first page and how many, of each run in a row.

    All of them where the caller may not write to the file, and so is not told.
    """
    there = ctypes.create_string_buffer(count(length))
    check(libc.mincore(address, length, there), "mincore")
    runs, at = [], 0
    for is_there, group in itertools.groupby(there.raw[: count(length)], lambda byte: byte & 1):
        n = sum(1 for _ in group)
        if is_there:
            runs.append((at, n))
        at += n
    return runs


def resident(fd: int, offset: int = 0, length: int = 0) -> int | None:
    """How many pages of the range are in the page cache (length 0: to the end), cachestat(2).

    None where the kernel (before 6.5), the file system or the caller's rights do not allow to ask.
    """
    call = _cachestat
    call.range[0], call.range[1] = offset, length
    failed = quick.syscall(SYS_CACHESTAT, fd, *call.tail)
    if failed and ctypes.get_errno() in (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL):
        return None
    check(failed, "cachestat")
    return call.result[0]


def set_direct(fd: int, on: bool) -> None:
    """Switch O_DIRECT of an open file. Raises OSError where the file system refuses."""
    check(quick.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT if on else 0), "fcntl")


def allot(fd: int, offset: int, length: int) -> None:
    """fallocate(2): have the file system allot room for a range, which the file has from then on. Raises ENOSPC."""
    check(libc.fallocate(fd, 0, ctypes.c_long(offset), ctypes.c_long(length)), "fallocate")


def overwrite_in_place(fd: int) -> None:
    """Have a copy-on-write file system (Btrfs) write to an empty file's own room again, and not to more of it.

    Raises OSError where it cannot; others do it anyhow.
    """
    flags = array("i", [0])
    fcntl.ioctl(fd, _GET_FLAGS, flags, True)
    flags[0] |= _NO_COPY
    fcntl.ioctl(fd, _SET_FLAGS, flags)


def drop(fd: int, offset: int, length: int) -> None:
    """Let go of clean pages of the range that nobody maps, locks or is using."""
    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def prefetch(fd: int, offset: int, length: int, window: int) -> None:
    """Start reading the range, in steps of `window` bytes: one call fetches no more than the device's readahead."""
    for start in range(offset, offset + length, window):
        os.posix_fadvise(fd, start, min(window, offset + length - start), os.POSIX_FADV_WILLNEED)


def wait_fetched(fd: int, offset: int, length: int, step: int) -> None:
    """Wait until a range that `prefetch` began to read is there, of which one READ brings no more than `step` bytes.

    Raises OSError for what cannot be read.
    """
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # what is missing after all is read by itself
    for start in range(offset, offset + length, step):
        os.pread(fd, 1, min(start + step, offset + length) - 1)


Buffer = _mmap.mmap


def buffer(length: int) -> Buffer:
    """Anonymous memory that begins at a page boundary, as O_DIRECT wants it."""
    return _mmap.mmap(-1, length, flags=_mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS)


def huge_buffer(length: int) -> Buffer:
    """`buffer` in huge pages, where the kernel has any: what a disk reads there costs a tenth less to hand on."""
    memory = buffer(length)
    with suppress(OSError):
        memory.madvise(_mmap.MADV_HUGEPAGE)
    return memory
