"""How a mount comes to be and ends: by mount(2) where this process may, else by way of fusermount3.

It may as root, and in a user namespace of its own (`coordlfs run`). What else differs between these is decided here.
It knows nothing of cache and source.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress

from coordlfs.kernel import fuse, fusermount, mounts, process

SUBTYPE = "coordlfs"
FSTYPE = f"fuse.{SUBTYPE}"  # as the table of mounts shows it, whoever mounted


def is_privileged() -> bool:
    """Whether this process may mount by itself."""
    return process.has_capability(process.CAP_SYS_ADMIN)


def kernel_checks_access() -> bool:
    """Whether the kernel can be left to decide who may read a file.

    Not in a user namespace that knows one user: there the kernel takes files of groups that the user belongs to for
    nobody's. All who see such a mount have the rights of the process that serves it: the source decides.
    """
    return not process.knows_one_user()


def attach(source: str, mountpoint: bytes, *, noexec: bool = False) -> int:
    """Mount; the descriptor of /dev/fuse, from which the kernel's first request can be read. Raises OSError.

    `noexec`: no program on the mount may be run.
    """
    options = [f"max_read={fuse.MAX_READ}"]
    if kernel_checks_access():
        options.append("default_permissions")
    if not is_privileged():
        if fusermount.allows_others():
            options.append("allow_other")
        options += ["ro", "nosuid", "nodev", f"fsname={fusermount.escape(source)}", f"subtype={SUBTYPE}"]
        if noexec:
            options.append("noexec")
        return fusermount.mount(mountpoint, options)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options += [f"fd={device}", "rootmode=40000", f"user_id={os.getuid()}", f"group_id={os.getgid()}", "allow_other"]
    flags = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV | (mounts.MS_NOEXEC if noexec else 0)
    try:
        mounts.mount(source, mountpoint, FSTYPE, flags, ",".join(options))
    except BaseException:
        os.close(device)
        raise
    return device


def detach(mountpoint: bytes, *, lazy: bool = False, abort: bool = False, device: int | None = None) -> None:
    """Unmount; `lazy` lets open files live on. Raises OSError: EBUSY, EPERM, EINVAL.

    `device`: only if that is what is mounted there: a mount that was detached must not take the next one with it.
    `abort` ends the connection, so that nobody waits for an answer any more; for an ordinary user, where
    /sys/fs/fuse/connections is not mounted, that happens when the last process that holds /dev/fuse ends.
    """
    if device is not None or (abort and not is_privileged()):
        there = next((m.device for m in reversed(list(mounts.table())) if m.point == mountpoint), 0)
        if device not in (None, there):
            raise OSError(errno.EINVAL, "something else is mounted there")
    if is_privileged():
        mounts.unmount(mountpoint, lazy=lazy, abort=abort)
        return
    if abort:
        with suppress(OSError), open(f"/sys/fs/fuse/connections/{os.minor(there)}/abort", "w") as f:
            f.write("1")
    fusermount.unmount(mountpoint, lazy=lazy)


def detach_all(places: list[mounts.Mount], *, abort: bool = False) -> None:
    """Unmount lazily at several places, as `holders.places` finds them; what is mounted above one of them stays."""
    for place in reversed(places):
        with suppress(OSError):
            detach(place.point, lazy=True, abort=abort, device=place.device)


def copy(mountpoint: bytes) -> tuple[int, bool]:
    """A descriptor of the mount's root for the keepers to work from, and whether `umount` is busy for its sake.

    It is not where the copy is detached, which needs a namespace to be made in: an ordinary user's is made in one that
    a child has just for that. Where such namespaces are forbidden it is the mount itself.
    """
    if is_privileged():
        return mounts.detached_copy(mountpoint), False
    with suppress(OSError):
        return _copy_of_child(mountpoint), False
    # O_PATH, since nobody answers the kernel yet.
    return os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), True


def _copy_of_child(mountpoint: bytes) -> int:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                process.unshare_user()
                socket.send_fds(theirs, [b"x"], [mounts.detached_copy(mountpoint)])
            os._exit(0)
        theirs.close()
        try:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        finally:
            os.waitpid(child, 0)
    if not fds:
        raise OSError(errno.EPERM, "no user namespace can be made")
    os.set_inheritable(fds[0], False)
    return fds[0]
