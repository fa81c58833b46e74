"""A pipe by which bytes of the page cache reach the FUSE device without passing through this process: splice(2)."""

from __future__ import annotations

import fcntl
import os

from coordlfs.kernel import pages

_NONBLOCK = 2  # SPLICE_F_NONBLOCK
_SIZES = (2 << 20, 1 << 20)  # what is asked for; the first of them may be root's only


class Pipe:
    """For one message at a time. Not thread-safe. The descriptors are made when they are first needed."""

    def __init__(self) -> None:
        self._ends: tuple[int, int] | None = None
        self._room = 0
        self._filled = 0

    def _open(self) -> tuple[int, int]:
        out, _ = ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for size in _SIZES:
            try:
                self._room = fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, size)
                break
            except OSError:
                self._room = fcntl.fcntl(out, fcntl.F_GETPIPE_SZ)
        return ends

    def fill(self, head: bytes, fd: int, offset: int, length: int) -> bool:
        """Take `head`, and references to `length` bytes of a file that the page cache has; False if it has not."""
        try:
            _, into = self._ends = self._ends or self._open()
            if length > self._room - 2 * pages.PAGE:  # a page for `head`, and one more if the bytes begin within one
                return False
            self._filled = os.write(into, head)
            end = offset + length
            while offset < end:
                n = os.splice(fd, into, end - offset, offset_src=offset, flags=_NONBLOCK)
                if not n:
                    break
                offset += n
                self._filled += n
        except OSError:  # it is read in another way, and the error seen there
            self.empty()
            return False
        if offset < end:
            self.empty()
            return False
        return True

    def pour(self, device: int) -> None:
        """Write what is there as one message. Raises OSError, and is empty in any case."""
        assert self._ends is not None
        try:
            os.splice(self._ends[0], device, self._filled)
        except OSError:
            self.empty()
            raise

    def empty(self) -> None:
        """Let go of what is there, and of the pipe."""
        if self._ends is not None:
            for fd in self._ends:
                os.close(fd)
            self._ends = None
