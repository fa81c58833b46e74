"""Processes: an end bound to the parent's, what they may do, namespaces of their own, pidfds."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import select
import signal
from contextlib import suppress
from dataclasses import dataclass

from coordlfs.kernel.libc import check, libc

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_CAP_AMBIENT, _AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 47, 2, 4
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
CAP_FOWNER, CAP_IPC_LOCK, CAP_SYS_ADMIN = 3, 14, 21
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # its inode number (PROC_USER_INIT_INO)
_CAPABILITY_VERSION = 0x20080522
_FLAGS, _ARGUMENTS, _EXIT_CODE = 6, 45, 49  # among the fields of /proc/PID/stat that follow the name
_PF_EXITING = 4
_STOPS = signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT
_GOES_ON_AFTER = sum(1 << number - 1 for number in (*_STOPS, 32, 33))  # and the C library's own
_STACK = 8 << 20  # bytes
_UNLIMITED = (resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_CPU)  # root lifts them
_LIMITS = (*_UNLIMITED, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_SIGPENDING)
_NICE = 10
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}.get(platform.machine(), -1)
_BEST_EFFORT = 2  # the class that there is without asking; within it 0 to 7, the last
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


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a process was given by who started it, and does not depend on any more."""

    mask: frozenset[int]  # signals that it blocked
    ignored: frozenset[int]  # signals
    umask: int
    limits: dict[int, tuple[int, int]]

    def restore(self) -> None:
        """Give it to the program that this process is about to become."""
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN if number in self.ignored else signal.SIG_DFL)
        for limit, values in self.limits.items():
            resource.setrlimit(limit, values)
        os.umask(self.umask)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)


def settle(*, is_service: bool = False) -> Inherited:
    """Depend on nothing inherited: signals, umask, limits; a service neither on niceness. What was inherited.

    Soft limits are raised to the hard ones. Who started the command may have it ignore signals, as nohup does.
    """
    mask = frozenset(signal.pthread_sigmask(signal.SIG_SETMASK, ()))
    settable = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    # The interpreter itself ignores these two.
    ours = {signal.SIGPIPE, signal.SIGXFSZ}
    ignored = frozenset(n for n in settable - ours if signal.getsignal(n) is signal.SIG_IGN)
    for number in ignored if is_service else ignored & {signal.SIGCHLD}:
        signal.signal(number, signal.SIG_DFL)
    umask = os.umask(0o077)
    os.umask(umask & 0o077)  # what this process makes it may use
    limits = {limit: resource.getrlimit(limit) for limit in (*_LIMITS, resource.RLIMIT_STACK)}
    for limit in _LIMITS:
        _raise(limit)
    soft, most = limits[resource.RLIMIT_STACK]
    if 0 <= soft < _STACK:  # of the programs that it starts; without a limit, mappings lie in another order
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_STACK, (_STACK if most < 0 else min(_STACK, most), most))
    if is_service:
        with suppress(OSError):
            if os.sched_getscheduler(0) in (os.SCHED_BATCH, os.SCHED_IDLE):
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        with suppress(OSError):  # to be less nice is root's
            if os.getpriority(os.PRIO_PROCESS, 0) > 0:
                os.setpriority(os.PRIO_PROCESS, 0, 0)
    return Inherited(mask, ignored, umask, limits)


def _raise(limit: int) -> None:
    """Raise a soft limit to the hard one, and that as well where this process may."""
    _, most = resource.getrlimit(limit)
    with suppress(OSError, ValueError):
        resource.setrlimit(limit, (most, most))
    if limit in _UNLIMITED and most != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def disguise(name: str) -> None:
    """Have `ps` and `pkill` find a process by this name, and not by the command line that it has of its parent."""
    set_name(name)
    with suppress(OSError, ValueError):
        with open("/proc/self/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
        start, end = int(fields[_ARGUMENTS]), int(fields[_ARGUMENTS + 1])
        if 0 < start < end:
            ctypes.memset(start, 0, end - start)
            ctypes.memmove(start, name.encode(), min(len(name), end - start - 1))


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal; one that is gone is not."""
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as f:
        return f.read().rpartition(b")")[2].split()[0] == b"T"
    return False


def raise_limits() -> None:
    """Allow this process as many open files and as much locked memory as it may have."""
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        _, most = resource.getrlimit(limit)
        resource.setrlimit(limit, (most, most))


def _status(task: int | str = "self") -> dict[str, str]:
    """The fields of /proc/TASK/status. Raises OSError."""
    # The name may be any bytes; a codec that Python has not loaded yet would be imported while the server serves.
    with open(f"/proc/{task}/status", encoding="utf-8", errors="surrogateescape", newline="\n") as f:
        return {field: value.strip() for field, _, value in (line.partition(":") for line in f)}


def is_called_off(tid: int) -> bool:
    """Whether a signal waits for a thread that it neither blocks nor, as one that stops it, goes on after."""
    try:
        status = _status(tid)
    except OSError:  # it is gone
        return False
    pending, shared, blocked = (int(status.get(name, "0"), 16) for name in ("SigPnd", "ShdPnd", "SigBlk"))
    return bool((pending | shared) & ~blocked & ~_GOES_ON_AFTER)


def has_capability(number: int) -> bool:
    """Whether this process has a capability, be it in a user namespace of its own only."""
    return bool(int(_status()["CapEff"], 16) >> number & 1)


def may_gain_capability(number: int) -> bool:
    """Whether a setuid program that this process runs can have a capability (its bounding set)."""
    return bool(int(_status()["CapBnd"], 16) >> number & 1)


def gains_no_privileges() -> bool:
    """Whether setuid programs are without effect for this process (no_new_privs)."""
    return _status()["NoNewPrivs"] == "1"


def in_initial_user_namespace() -> bool:
    """Whether capabilities of this process count for all of the machine."""
    try:
        return os.stat("/proc/self/ns/user").st_ino == _INITIAL_USER_NAMESPACE
    except OSError:  # a kernel without user namespaces
        return True


def knows_one_user() -> bool:
    """Whether this process is in a user namespace in which every other user is nobody."""
    with open("/proc/self/uid_map") as f:
        return sum(int(line.split()[2]) for line in f) == 1


def lockable() -> int | None:
    """Bytes of memory that a process like this one may lock; None if there is no limit."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = has_capability(CAP_IPC_LOCK) and in_initial_user_namespace()
    return None if unlimited or most == resource.RLIM_INFINITY else most


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


def unshare_user() -> None:
    """Give this process, of one thread, a user namespace in which it may mount, and a mount namespace in that.

    It stays who it is, and everybody else is nobody. Its children may mount as well, until `forbid_mounting`. Raises
    OSError: EPERM or ENOSPC where that is forbidden.
    """
    uid, gid = os.geteuid(), os.getegid()
    check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare")
    # Without the first nobody may write the last: a group that is taken off a list might have been a denial.
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same for numbers above 31
    check(libc.capget(header, sets), "capget")
    sets[2], sets[5] = sets[1], sets[4]
    check(libc.capset(header, sets), "capset")
    check(libc.prctl(PR_CAP_AMBIENT, _AMBIENT_RAISE, ctypes.c_ulong(CAP_SYS_ADMIN), 0, 0), "prctl")


def forbid_mounting() -> None:
    """Let no program that this process starts from now on have what `unshare_user` gave it."""
    check(libc.prctl(PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, ctypes.c_ulong(0), 0, 0), "prctl")


def is_readable(fd: int, timeout: float) -> bool:
    """Whether a descriptor, of any number, is readable within so many seconds."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout) * 1000))


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
            while not is_readable(pidfd, min(_HEADLESS, deadline - time.monotonic())):
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
    # One that was the last to leave may be held up on the way out, by a read that the disk has not ended.
    has_ended = fields[0] in (b"Z", b"X") or int(fields[_FLAGS]) & _PF_EXITING
    return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE])) if has_ended else None


def open_of_thread(tid: int) -> int:
    """A pidfd of the process that thread `tid` belongs to. Raises OSError if it is gone."""
    return os.pidfd_open(int(_status(tid)["Tgid"]))


def has_ended(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended."""
    return is_readable(pidfd, 0)


def disk_bytes(pid: int) -> int | None:
    """Bytes that a process has had read from storage; None where the kernel does not say, or it is gone."""
    with suppress(OSError, ValueError), open(f"/proc/{pid}/io") as f:
        fields = dict(line.split(":") for line in f)
        return int(fields.get("read_bytes", ""))
    return None


def give_way() -> None:
    """Have others go first, at the processors and, as far as its scheduler looks at that, at the disk.

    Not idle: somebody may wait for a page that this process has begun to read, behind all who are not idle.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    if _IOPRIO_SET >= 0:
        libc.syscall(ctypes.c_long(_IOPRIO_SET), 1, 0, _BEST_EFFORT << 13 | 7)


def be_killed_first() -> None:
    """Where memory runs out, have the kernel end this process rather than another: it holds what can be had again."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")
