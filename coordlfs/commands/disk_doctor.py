"""Whether a directory is a good place for a disk cache: tried on a file that has no name, and is gone at the end."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from coordlfs import sizes
from coordlfs.commands.check import Check, State, good, reason
from coordlfs.errors import UserError
from coordlfs.kernel import mounts, pages
from coordlfs.sources.directory import lies_elsewhere

LEAST = 2 << 20  # bytes that a disk cache has at least
_TRIED = 1 << 20  # bytes


def examine(directory: str) -> Iterator[Check]:
    """What is found at a directory, or, if there is none yet, at the one above it, in which it would be made."""
    place = directory if os.path.isdir(directory) else os.path.dirname(os.path.abspath(directory))
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        yield Check("disk cache", State.MISSING, f"{place}: {reason(e)}", "no disk cache there", "make it", True)
        return
    try:
        yield _place(place, fd)
        yield _room(fd)
        yield from _file(place)
    finally:
        os.close(fd)


def _place(place: str, fd: int) -> Check:
    kind = os.fsdecode(mounts.fstype(fd) or b"unknown")
    if lies_elsewhere(fd):
        cost = "it may be no faster than the source, which is then read instead"
        return Check(
            "disk cache: disk", State.WARNING, f"{place}: {kind}, which is no local disk", cost, "give a local one"
        )
    return good("disk cache: disk", f"{place}: {kind}")


def _room(fd: int) -> Check:
    st = os.fstatvfs(fd)
    total, free = st.f_blocks * st.f_frsize, st.f_bavail * st.f_frsize
    try:
        size = sizes.disk_size("auto", total, free, LEAST)
    except UserError:
        found = f"{sizes.text(free)} of {sizes.text(total)} are free"
        return Check(
            "disk cache: room", State.WARNING, found, "--disk-size auto finds none", "make room, or give a size"
        )
    return good("disk cache: room", f"{sizes.text(free)} free: --disk-size auto takes {sizes.text(size)}")


def _file(place: str) -> Iterator[Check]:
    try:
        fd = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as e:
        if e.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            yield Check(
                "disk cache: files", State.WARNING, "cannot be tried here", "not known", "mount, and see `status`"
            )
        else:
            remedy = "give a directory that you may write to"
            yield Check("disk cache: files", State.MISSING, reason(e), "no disk cache there", remedy, True)
        return
    try:
        yield _allotting(fd)
        yield _directly(fd)
    finally:
        os.close(fd)


def _allotting(fd: int) -> Check:
    try:
        pages.allot(fd, 0, _TRIED)
    except OSError as e:
        cost = "a full file system is found in the middle of an item, which is then lost"
        return Check("disk cache: fallocate", State.WARNING, reason(e), cost, "use ext4, XFS or Btrfs")
    return good("disk cache: fallocate", "room can be allotted ahead")


def _directly(fd: int) -> Check:
    room = pages.buffer(_TRIED)
    try:
        pages.set_direct(fd, True)
        os.pwritev(fd, [room], 0)
        os.preadv(fd, [room], 0)
    except OSError as e:
        cost = "each hit is a blocking call, and passes through the page cache"
        return Check("disk cache: O_DIRECT", State.WARNING, reason(e), cost, "use ext4, XFS or Btrfs")
    return good("disk cache: O_DIRECT", "is read around the page cache")
