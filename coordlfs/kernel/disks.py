"""How long readers have waited for a disk: that of a directory where it has one, else any of the machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from coordlfs.kernel import mounts

_READ_TICKS = 3  # among the fields of a disk's stat file: milliseconds that all its reads took, together


def waiting(fd: int) -> Callable[[], float | None]:
    """A function that gives the seconds that readers of the disk below a directory have waited so far, all together.

    Of a file system that has no disk of its own, as NFS: the seconds in which some task of the machine has waited for
    input or output, by pressure stall information. None where the kernel says neither.
    """
    number = _disk_of(fd)
    statistics = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat"
    return partial(_of_disk, statistics) if number and os.path.exists(statistics) else _of_machine


def _disk_of(fd: int) -> int:
    device = os.fstat(fd).st_dev
    if os.major(device):
        return device
    mount_id = mounts.id_of(fd)
    source = next((m.source for m in mounts.table() if m.mount_id == mount_id), b"")
    with suppress(OSError):  # Btrfs: its files have device numbers that are no disk's
        if not source.startswith(b"/dev/"):
            return 0
        st = os.stat(source)
        return st.st_rdev if stat.S_ISBLK(st.st_mode) else 0
    return 0


def _of_disk(statistics: str) -> float | None:
    try:
        with open(statistics) as f:
            return int(f.read().split()[_READ_TICKS]) / 1000
    except (OSError, IndexError):
        return None


def _of_machine() -> float | None:
    try:
        with open("/proc/pressure/io") as f:
            some = next(line for line in f if line.startswith("some"))
    except (OSError, StopIteration):
        return None
    return int(some.partition("total=")[2]) / 1e6
