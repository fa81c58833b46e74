"""The C library through ctypes, with errors as OSError.

Calls release the GIL, so that a call that blocks stops no other thread, unless they say otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
# Without releasing the GIL, for calls that never block: to get it back would cost more. They do not check their result,
# which `check` does, since to wrap them costs as much as they do.
quick = ctypes.PyDLL(None, use_errno=True)
quick.syscall.restype = ctypes.c_long
quick.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
quick.read.restype = ctypes.c_ssize_t
quick.write.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
quick.write.restype = ctypes.c_ssize_t


def check(result: int, what: str) -> int:
    """`result` of a C call, or the OSError that errno names, with `what` as its subject."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return result


def syscall(number: int, what: str, *arguments: object) -> int:
    """A system call that the C library of older distributions has no wrapper for."""
    return check(libc.syscall(ctypes.c_long(number), *arguments), what)


def quick_reader(fd: int, into: bytearray) -> Callable[[], int | None]:
    """A function that reads a descriptor that does not block, without releasing the GIL; None if nothing is there."""
    memory = (ctypes.c_char * len(into)).from_buffer(into)
    address, size, call = ctypes.c_void_p(ctypes.addressof(memory)), len(into), quick.read

    def read(_keep: object = memory) -> int | None:
        n: int = call(fd, address, size)
        if n >= 0:
            return n
        if ctypes.get_errno() == errno.EAGAIN:
            return None
        return check(n, "read")

    return read


def quick_write(fd: int, data: bytes) -> int:
    """write(2) of a descriptor that does not block, without releasing the GIL."""
    n: int = quick.write(fd, data, len(data))
    return n if n >= 0 else check(n, "write")
