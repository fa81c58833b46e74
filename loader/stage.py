"""The staging area as workers write it and jobs read it.

Workers and jobs map a slot when they first use it and keep the mapping, since slots are reused and faulting in pages
costs as much as copying them. Jobs map privately: a tensor is theirs to write into, and what they write no other job
sees (copy on write). Before a slot is used again, /proc/self/pagemap tells whether the job has written, and only then
the mapping is cleared. It does not know what the bytes mean.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value
_DONTNEED, _POPULATE_READ, _POPULATE_WRITE = 4, 22, 23  # the latter two: Linux 5.14
_MAPPINGS = 1024  # that a process keeps

# In /proc/self/pagemap, of a private mapping of a file: a page that is there but not the file's is a copy.
_PRESENT, _FILE = np.uint64(3 << 62), np.uint64(1 << 61)
_STATE, _CLEAN = np.uint64(7 << 61), np.uint64(5 << 61)  # mostly: it is there, and the file's
_pagemap = -1  # this process's, when it was asked for the first time

Slot = tuple[int, int]  # offset and size


def read(fd: int, into: memoryview) -> None:
    """Fill a buffer from the beginning of a memfd."""
    position = 0
    while position < len(into):
        done = os.preadv(fd, [into[position:]], position)
        if not done:
            raise OSError("a copy is shorter than it should be")
        position += done


def _map(fd: int, slot: Slot, sharing: int, populate: int) -> int:
    offset, size = slot
    address: int | None = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, sharing, fd, offset)
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {size} bytes: {os.strerror(code)}")
    _libc.madvise(address, size, populate)  # where the kernel is too old for it, pages come one by one
    return address


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Of an array's first byte."""
    found: int = array.__array_interface__["data"][0]
    return found


class Writer:
    """A worker's view of the area."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mapped: OrderedDict[Slot, int] = OrderedDict()

    def memory(self, slot: Slot) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a slot, valid until the next slot is written."""
        address = self._mapped.get(slot)
        if address is None:
            address = self._mapped[slot] = _map(self._fd, slot, mmap.MAP_SHARED, _POPULATE_WRITE)
        self._mapped.move_to_end(slot)
        return np.frombuffer(memoryview((ctypes.c_ubyte * slot[1]).from_address(address)), np.uint8)

    def write(self, slot: Slot, buffers: Sequence[memoryview | bytes]) -> None:
        """Write buffers into a slot, one after the other; what lies there already is left alone."""
        into = self.memory(slot)
        position = 0
        for buffer in buffers:
            if len(buffer):
                data = np.frombuffer(buffer, np.uint8)
                target = into[position : position + len(data)]
                if address_of(data) != address_of(target):
                    target[:] = data
                position += len(data)
        if len(self._mapped) > _MAPPINGS:
            (_, size), gone = self._mapped.popitem(last=False)
            _libc.munmap(gone, size)

    def close(self) -> None:
        """Unmap all."""
        while self._mapped:
            (_, size), address = self._mapped.popitem()
            _libc.munmap(address, size)


class Pins(Protocol):
    """How slots are pinned for a device, which copies from them by itself."""

    def register(self, address: int, size: int) -> None:
        """Pin the pages there."""

    def unregister(self, address: int) -> None:
        """Pin them no longer."""

    def fence(self) -> Callable[[], bool]:
        """What tells, when called, whether the copies that were under way have ended."""


class _View(weakref.ref[Any]):
    """Of what was handed out, with what is to be done when it has gone."""

    __slots__ = ("release",)
    release: Callable[[], None]


_views: dict[int, _View] = {}  # by their own ids
atexit.register(_views.clear)


def _gone(view: weakref.ref[Any]) -> None:
    assert isinstance(view, _View)
    _views.pop(id(view), None)
    view.release()


class Reader:
    """A job's view of the area, which it keeps open as long as anything that was viewed lives.

    Pinned memory cannot be private: it would be a copy, that of a batch of long ago. It is shared and read-only.
    """

    def __init__(self, fd: int, pins: Pins | None = None) -> None:
        self._fd = os.dup(fd)
        self._pins = pins
        self._idle: OrderedDict[Slot, int] = OrderedDict()
        self._fenced: list[tuple[Callable[[], bool], Slot, int, Callable[[], None]]] = []
        _readers.add(self)

    def view(self, slot: Slot, released: Callable[[], None]) -> memoryview:
        """A private, writable view of a slot. `released` is called when the last that refers to its bytes has gone.

        That may happen in any thread and at any moment, in the middle of anything.
        """
        address = self._idle.pop(slot, None)
        if address is None:
            address = self._new(slot)
        elif self._pins is None and _written(address, slot[1]):
            _libc.madvise(address, slot[1], _DONTNEED)
            _libc.madvise(address, slot[1], _POPULATE_READ)
        array = (ctypes.c_ubyte * slot[1]).from_address(address)
        # As weakref.finalize does, which takes three times as long, but not at the end of the process: tensors may
        # still be in use then.
        view = _View(array, _gone)
        view.release = partial(self._release, slot, address, os.getpid(), released)
        _views[id(view)] = view
        return memoryview(array).cast("B")

    def _new(self, slot: Slot) -> int:
        if self._pins is None:
            return _map(self._fd, slot, mmap.MAP_PRIVATE, _POPULATE_READ)
        address = _map(self._fd, slot, mmap.MAP_SHARED, _POPULATE_WRITE)
        self._pins.register(address, slot[1])
        # What one job wrote there all would see: rather it ends.
        _libc.mprotect(address, slot[1], mmap.PROT_READ)
        return address

    def _unmap(self, address: int, size: int) -> None:
        if self._pins is not None:
            self._pins.unregister(address)
        _libc.munmap(address, size)

    def _release(self, slot: Slot, address: int, owner: int, released: Callable[[], None]) -> None:
        if os.getpid() != owner:
            return  # a forked child holds nothing of its parent's
        if self._pins is not None:
            self._fenced.append((self._pins.fence(), slot, address, released))
        else:
            self._let_go(slot, address, released)

    def _let_go(self, slot: Slot, address: int, released: Callable[[], None]) -> None:
        if self._idle.setdefault(slot, address) != address:
            self._unmap(address, slot[1])
        released()

    @property
    def fenced(self) -> bool:
        """Whether a device still copies from what was dropped."""
        return bool(self._fenced)

    def trim(self) -> None:
        """Let go what a device has copied by now, and unmap what was not used for longest."""
        fenced, self._fenced = self._fenced, []
        for entry in fenced:
            if entry[0]():
                self._let_go(*entry[1:])
            else:
                self._fenced.append(entry)
        while len(self._idle) > _MAPPINGS:
            (_, size), address = self._idle.popitem(last=False)
            self._unmap(address, size)

    def close_in_child(self) -> None:
        """What nobody refers to, no child may keep: the area would be there as long as it."""
        os.close(self._fd)
        self._fd = -1
        while self._idle:
            (_, size), address = self._idle.popitem()
            _libc.munmap(address, size)

    def __del__(self) -> None:
        if self._fd < 0:
            return
        while self._idle:
            (_, size), address = self._idle.popitem()
            self._unmap(address, size)
        os.close(self._fd)


_readers: weakref.WeakSet[Reader] = weakref.WeakSet()


def _close_in_child() -> None:
    global _pagemap
    if _pagemap >= 0:
        os.close(_pagemap)  # it shows the parent's memory
        _pagemap = -1
    for reader in list(_readers):
        reader.close_in_child()


os.register_at_fork(after_in_child=_close_in_child)


def _written(address: int, size: int) -> bool:
    """Whether pages of a private mapping are copies by now; also if that cannot be known."""
    global _pagemap
    try:
        if _pagemap < 0:
            _pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        entries = os.pread(_pagemap, size // mmap.PAGESIZE * 8, address // mmap.PAGESIZE * 8)
    except OSError:
        return True
    if len(entries) != size // mmap.PAGESIZE * 8:
        return True
    pages = np.frombuffer(entries, np.uint64) & _STATE
    if (pages == _CLEAN).all():
        return False
    return bool(((pages & _PRESENT != 0) & (pages & _FILE == 0)).any())
