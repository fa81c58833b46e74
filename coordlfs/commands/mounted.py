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
from coordlfs.processes import attachment, holders

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


def whole(mountpoint: str) -> mounts.Mount:
    """As `find`, for what only the root of a mount answers. Raises UserError where a directory of it is bound."""
    found = find(mountpoint)
    if found.root != b"/":
        where = next(iter(_places(found)), "which is unmounted")
        raise UserError(f"{mountpoint} shows a directory of the mount on {where}: name that mountpoint")
    return found


def _places(mount: mounts.Mount) -> list[str]:
    return [os.fsdecode(m.point) for m in holders.places(mount) if m.root == b"/"]


def other_places(mountpoint: str) -> list[str]:
    """Where else a mount is seen. Raises UserError."""
    found = find(mountpoint)
    return [place for place in _places(found) if place != os.fsdecode(found.point)]


def all_mounts() -> list[str]:
    """A mountpoint of every coordlfs mount that this process sees: where it was bound elsewhere, the first."""
    first: dict[int, str] = {}
    for m in mounts.table():
        if m.fstype == FSTYPE and m.root == b"/":
            first.setdefault(m.device, os.fsdecode(m.point))
    return list(first.values())


def stats(mountpoint: str) -> dict[str, Any]:
    """The figures of a mount (docs/reference/status.md), under the mountpoint that it has by now. Raises UserError."""
    found = whole(mountpoint)
    try:
        result: dict[str, Any] = json.loads(os.getxattr(mountpoint, "user.coordl.stats"))
    except PermissionError:
        raise UserError(f"{mountpoint} is another user's, who alone may read it") from None
    except OSError as e:
        raise UserError(f"{mountpoint} does not answer: {e.strerror}") from e
    return result | {"mountpoint": os.fsdecode(found.point)}


def clear_dead(mountpoint: str) -> None:
    """Detach a coordlfs mount that all of its processes have left, as when they were killed at once."""
    with suppress(UserError, OSError):
        point = find(mountpoint).point
        try:
            os.getxattr(point, "user.coordl.control")
        except OSError as e:
            if e.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                attachment.detach(point, lazy=True)
