"""Processes: an end bound to the parent's, private mount namespaces, pidfds."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
from contextlib import suppress

from coordlfs.kernel.libc import check, libc

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
CLONE_NEWNS = 0x20000
_CAP_IPC_LOCK = 14


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends; `parent` is the pid expected.

    A parent that ended before the call is noticed by comparing, since no signal comes for it.
    """
    check(libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def set_name(name: str) -> None:
    """The name that `ps -o comm` and `top` show, at most 15 bytes."""
    libc.prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]), 0, 0, 0)


def raise_limits() -> None:
    """Allow this process as many open files and as much locked memory as it may have."""
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        _, most = resource.getrlimit(limit)
        resource.setrlimit(limit, (most, most))


def lockable() -> int | None:
    """Bytes of memory that a process like this one may lock; None if there is no limit."""
    with open("/proc/self/status") as f:
        capabilities = next(int(line.split()[1], 16) for line in f if line.startswith("CapEff:"))
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = capabilities >> _CAP_IPC_LOCK & 1 or most == resource.RLIM_INFINITY
    return None if unlimited else most


def keep_freed_memory(limit: int) -> None:
    """Have the C library keep up to `limit` freed bytes for what is allocated next, large blocks as well.

    Otherwise each block of 128 KiB and more is mapped, faulted in page by page and unmapped again.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    for parameter, value in ((m_arena_max, 1), (m_mmap_threshold, 32 << 20), (m_trim_threshold, limit)):
        libc.mallopt(parameter, value)


def unshare_mounts() -> None:
    """Give this process a mount namespace of its own, from which nothing propagates back."""
    from coordlfs.kernel import mounts

    check(libc.unshare(CLONE_NEWNS), "unshare")
    mounts.make_slave("/")


def wait_gone(pids: list[int], timeout: float) -> bool:
    """Wait until none of `pids` runs any more; False if one still does after `timeout` seconds."""
    import time

    deadline = time.monotonic() + timeout
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([pidfd], [], [], left)[0]:
                return False
        finally:
            os.close(pidfd)
    return True


def open_of_thread(tid: int) -> int:
    """A pidfd of the process that thread `tid` belongs to. Raises OSError if it is gone."""
    with open(f"/proc/{tid}/status") as f:
        return os.pidfd_open(next(int(line.split()[1]) for line in f if line.startswith("Tgid:")))


def has_ended(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended."""
    return bool(select.select([pidfd], [], [], 0)[0])


def be_killed_first() -> None:
    """Where memory runs out, have the kernel end this process rather than another: it holds what can be had again."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")
