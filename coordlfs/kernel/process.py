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
_EXIT_CODE = 49  # among the fields of /proc/PID/stat that follow the name
_HEADLESS = 1.0  # seconds after which a process without a main thread is held up by another one


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
    """Wait until none of `pids` runs any more; False if one still does after `timeout` seconds.

    A process of which nothing is left but threads that no signal ends (see `exit_status`) does not run any more.
    """
    import time

    deadline = time.monotonic() + timeout
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            headless = False
            while not select.select([pidfd], [], [], min(_HEADLESS, max(0.0, deadline - time.monotonic())))[0]:
                if headless:
                    break
                if time.monotonic() >= deadline:
                    return False
                headless = exit_status(pid) is not None
        finally:
            os.close(pidfd)
    return True


def exit_status(pid: int) -> int | None:
    """With which status, negative for a signal, the main thread of a process has ended; None while it runs.

    Other threads of it may be there still, as one that waits for a disk: no signal ends that. 0 for a process that is
    gone, or of another user.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE])) if fields[0] in (b"Z", b"X") else None


def be_killed_first() -> None:
    """Where memory runs out, have the kernel end this process rather than another: it holds what can be had again."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")
