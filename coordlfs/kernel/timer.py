"""A timer that whoever waits for descriptors can wait for as well: timerfd (Python has it from 3.13 on)."""

from __future__ import annotations

import os
import struct
import time

from coordlfs.kernel.libc import check, libc, quick

_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
_ONCE = struct.Struct("=qqqq")  # struct itimerspec: every, and in, each in seconds and nanoseconds


class Timer:
    """`fd` is readable from the moment on that `start` set until the next call of it. Raises OSError."""

    def __init__(self) -> None:
        self.fd = check(libc.timerfd_create(time.CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC), "timerfd_create")

    def start(self, seconds: float) -> None:
        """Have it end once, so many seconds from now and no longer when it was to before."""
        whole, ns = divmod(max(1, int(seconds * 1e9)), 10**9)
        check(quick.timerfd_settime(self.fd, 0, _ONCE.pack(0, 0, whole, ns), None), "timerfd_settime")
