"""Reading a disk without a thread that waits for it: Linux AIO.

It is asynchronous for O_DIRECT on local file systems. Not io_uring, which the seccomp profiles of containers forbid.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from contextlib import suppress

from coordlfs.kernel import pages
from coordlfs.kernel.libc import check, quick, syscall

_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2), "riscv64": (0, 1, 4, 2)}
_IO_SETUP, _IO_DESTROY, _IO_GETEVENTS, _IO_SUBMIT = _NUMBERS.get(platform.machine(), (-1,) * 4)
_PREAD, _SIGNAL_EVENTFD = 0, 1
_IOCB = struct.Struct("=QIiHhIQQqQII")  # data, key, flags, opcode, priority, fd, address, length, offset, -, flags, fd
_EVENT = struct.Struct("=QQqq")  # data, iocb, result, -


class Reads:
    """At most `most` reads under way, each with a page-aligned buffer of `size` bytes, its slot.

    `take` and `ended` are for one thread at a time. `fd` is readable when a read has ended.
    Raises OSError where the kernel has no AIO or no room for more of it.
    """

    def __init__(self, most: int, size: int) -> None:
        if _IO_SETUP < 0:
            raise OSError(errno.ENOSYS, "AIO's system calls are not known on this machine")
        self._memory = pages.huge_buffer(most * size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._size = size
        self.buffers = [memoryview(self._memory)[slot * size : (slot + 1) * size] for slot in range(most)]
        self._free = list(range(most))
        self._blocks = [ctypes.create_string_buffer(_IOCB.size) for _ in range(most)]
        self._block_lists = [(ctypes.c_void_p * 1)(ctypes.addressof(block)) for block in self._blocks]
        self._events = ctypes.create_string_buffer(_EVENT.size * most)
        self._most = ctypes.c_long(most)
        self._at_once = ctypes.byref((ctypes.c_long * 2)())
        context = ctypes.c_ulong()
        syscall(_IO_SETUP, "io_setup", ctypes.c_long(most), ctypes.byref(context))
        self._context = context
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def take(self) -> int | None:
        """A slot for the next read; None if all are taken."""
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Give a slot back, whose buffer is read from no longer."""
        self._free.append(slot)

    def submit(self, slot: int, fd: int, offset: int, length: int) -> None:
        """Begin to read `length` bytes at `offset` into the slot's buffer; both as O_DIRECT wants them."""
        address = self._address + slot * self._size
        _IOCB.pack_into(
            self._blocks[slot], 0, slot, 0, 0, _PREAD, 0, fd, address, length, offset, 0, _SIGNAL_EVENTFD, self.fd
        )
        syscall(_IO_SUBMIT, "io_submit", self._context, ctypes.c_long(1), self._block_lists[slot])

    def ended(self) -> list[tuple[int, int]]:
        """The slots of reads that ended since the last call, and of each the bytes read or, negative, the errno."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        n = quick.syscall(
            ctypes.c_long(_IO_GETEVENTS), self._context, ctypes.c_long(0), self._most, self._events, self._at_once
        )
        check(n, "io_getevents")
        return [(slot, result) for slot, _, result, _ in _EVENT.iter_unpack(self._events.raw[: n * _EVENT.size])]

    def close(self) -> None:
        """Wait for what is under way, and let go of all."""
        syscall(_IO_DESTROY, "io_destroy", self._context)
        os.close(self.fd)
