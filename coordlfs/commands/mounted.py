"""What is mounted: finding a mount of coordlfs in the mount table, and asking it for its figures.

Every other command begins here. It must not know how a mount is made or ended.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from typing import Any

from coordlfs.errors import UserError
from coordlfs.kernel import mounts
from coordlfs.processes import attachment

FSTYPE = attachment.FSTYPE.encode()


def find(mountpoint: str) -> mounts.Mount:
    """The coordlfs mount at a mountpoint. Raises UserError if there is none."""
    path = os.fsencode(os.path.realpath(mountpoint))
    found = [m for m in mounts.table() if m.point == path]
    if not found:
        raise UserError(f"{mountpoint} is not mounted: `coordlfs status` lists what is")
    if found[-1].fstype != FSTYPE:
        raise UserError(f"{mountpoint} is mounted, but not by coordlfs (it is {os.fsdecode(found[-1].fstype)})")
    return found[-1]


def all_mounts() -> list[str]:
    """The mountpoints of every coordlfs mount that this process sees."""
    return list(dict.fromkeys(os.fsdecode(m.point) for m in mounts.table() if m.fstype == FSTYPE and m.root == b"/"))


def stats(mountpoint: str) -> dict[str, Any]:
    """The figures of a mount (docs/reference/status.md). Raises UserError."""
    find(mountpoint)
    try:
        result: dict[str, Any] = json.loads(os.getxattr(mountpoint, "user.coordl.stats"))
    except PermissionError:
        raise UserError(f"{mountpoint} is another user's, who alone may read it") from None
    except OSError as e:
        raise UserError(f"{mountpoint} does not answer: {e.strerror}") from e
    return result


def clear_dead(mountpoint: str) -> None:
    """Detach a coordlfs mount that all of its processes have left, as when they were killed at once."""
    with suppress(UserError, OSError):
        point = find(mountpoint).point
        try:
            os.getxattr(point, "user.coordl.control")
        except OSError as e:
            if e.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                attachment.detach(point, lazy=True)
