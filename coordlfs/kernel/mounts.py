"""Mounting, unmounting, detached copies of mounts, and the table of what is mounted."""

from __future__ import annotations

import ctypes
import os
import select
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from coordlfs.kernel.libc import check, libc, syscall

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_SLAVE = 1 << 12, 1 << 14, 1 << 19
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8
SYS_OPEN_TREE = 428
AT_FDCWD, OPEN_TREE_CLONE = -100, 1


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    mount_id: int
    device: int
    root: bytes  # the directory of the file system that is mounted
    point: bytes
    fstype: bytes
    source: bytes

    def shows_same(self, other: Mount) -> bool:
        """Whether both show one file system; the number alone may be another one's, once it is unmounted."""
        return (self.device, self.fstype, self.source) == (other.device, other.fstype, other.source)


def mount(source: str, target: bytes, fstype: str, flags: int, options: str) -> None:
    """mount(2)."""
    result = libc.mount(os.fsencode(source), target, fstype.encode(), ctypes.c_ulong(flags), options.encode())
    check(result, os.fsdecode(target))


def bind(mounted: bytes, target: bytes) -> None:
    """Have the mount at `mounted` seen at `target`, too."""
    check(libc.mount(mounted, target, None, ctypes.c_ulong(MS_BIND), None), os.fsdecode(target))


def make_slave(target: str) -> None:
    """Stop mounts below `target` from propagating to other namespaces; theirs, and their ends, still come here."""
    result = libc.mount(None, target.encode(), None, ctypes.c_ulong(MS_REC | MS_SLAVE), None)
    check(result, target)


def unmount(target: bytes, *, lazy: bool = False, abort: bool = False) -> None:
    """umount2(2); `lazy` detaches at once and lets open files live on. Raises EBUSY, EINVAL.

    `abort` ends the FUSE connection first: whoever waits for an answer gets ECONNABORTED, and later ENOTCONN.
    """
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0) | (MNT_FORCE if abort else 0)
    check(libc.umount2(target, flags), os.fsdecode(target))


def detached_copy(target: bytes) -> int:
    """A descriptor of a copy of the mount at `target` that is in no namespace.

    Files opened beneath it do not make `target` busy, and live until the descriptor is closed.
    """
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC
    return syscall(SYS_OPEN_TREE, "open_tree", AT_FDCWD, ctypes.c_char_p(target), ctypes.c_uint(flags))


def _unescape(field: bytes) -> bytes:
    # The table writes space, tab, newline and backslash as three octal digits.
    parts = field.split(b"\\")
    return parts[0] + b"".join(bytes([int(p[:3], 8)]) + p[3:] for p in parts[1:])


def table(pid: str = "self") -> Iterator[Mount]:
    """What is mounted in a process's namespace, in the order it was mounted."""
    with open(f"/proc/{pid}/mountinfo", "rb") as f:
        for line in f:
            front, _, back = line.rstrip(b"\n").partition(b" - ")
            mount_id, _, device, root, point, *_ = front.split(b" ")
            fstype, source, *_ = back.split(b" ")
            major, _, minor = device.partition(b":")
            yield Mount(
                int(mount_id),
                os.makedev(int(major), int(minor)),
                _unescape(root),
                _unescape(point),
                fstype,
                _unescape(source),
            )


def beneath(path: bytes) -> Iterator[Mount]:
    """What is mounted beneath a path, which is no link."""
    prefix = path.rstrip(b"/") + b"/"
    return (mount for mount in table() if mount.point.startswith(prefix))


def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, which is looked at each time that something is mounted or unmounted."""
    with open("/proc/self/mountinfo", "rb") as changes:
        poll = select.poll()
        poll.register(changes, select.POLLPRI)
        while not condition():
            poll.poll()


def id_of(fd: int, pid: str = "self") -> int:
    """The mount that a descriptor of a process was opened through, see `Mount.mount_id`. Asks no file system."""
    with open(f"/proc/{pid}/fdinfo/{fd}", "rb") as f:
        return next((int(line.split()[1]) for line in f if line.startswith(b"mnt_id:")), -1)


def fstype(fd: int) -> bytes | None:
    """The type of the file system that a file lies on; None if the table does not say.

    By the mount that it was opened through, as files of Btrfs have other device numbers than their mount.
    """
    mount_id, device = id_of(fd), os.fstat(fd).st_dev
    return next((m.fstype for m in table() if m.mount_id == mount_id or m.device == device), None)


def readahead(device: int) -> int | None:
    """How far ahead, in KiB, the kernel reads on the device with this number; None if nobody says."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for place in (f"/sys/class/bdi/{number}", f"/sys/dev/block/{number}/bdi", f"/sys/dev/block/{number}/../bdi"):
        with suppress(OSError), open(f"{place}/read_ahead_kb") as f:
            return int(f.read())
    return None


def set_readahead(device: int, kib: int) -> bool:
    """Set how far ahead the kernel reads on the mount with this device number; False if it may not be set."""
    try:
        with open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", "w") as f:
            f.write(str(kib))
    except OSError:
        return False
    return True
