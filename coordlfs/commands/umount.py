"""`coordlfs umount`: end a mount, wait for its processes, and name whatever still holds it.

It knows nothing of what is cached, and needs no answer of the mount: one that is dead must end as well.
"""

from __future__ import annotations

import errno
import os
import sys

from coordlfs.commands.mounted import find, stats
from coordlfs.errors import UserError
from coordlfs.kernel import process
from coordlfs.kernel.paths import shown
from coordlfs.processes import attachment, holders

_END_SOON, _END_TIMEOUT = 1.0, 30.0


def umount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount, and return when every process of the mount has ended. Raises UserError.

    Where it is mounted at another place as well (`mount --bind`), it goes on there; that is said.
    """
    found = find(mountpoint)
    pids, is_busy = ([], False) if lazy else _processes(mountpoint)
    try:
        if is_busy and not holders.of_files(found.device):
            attachment.detach(found.point, lazy=True)  # it is the keepers that hold it
        else:
            attachment.detach(found.point, lazy=lazy)
    except OSError as e:
        if e.errno == errno.EBUSY:
            held = holders.text(holders.of_files(found.device))
            who = f"by process {held}" if held else "by another mount or process"
            raise UserError(f"{mountpoint} is in use {who}: end it, or use --lazy") from None
        if e.errno == errno.EPERM:
            raise UserError(f"unmounting {mountpoint} is not permitted: it is root's or another user's") from None
        raise UserError(f"{mountpoint} cannot be unmounted: {e.strerror}") from None
    if places := holders.places(found):
        place = os.fsdecode(places[0].point)
        said = f"{mountpoint} is unmounted; it is still mounted on {place}: `coordlfs umount {place}` ends that"
        print(f"coordlfs: {shown(said)}", file=sys.stderr)
        return
    if lazy or process.wait_gone(pids, _END_SOON):
        return
    if not (elsewhere := holders.of_namespaces(found)) and process.wait_gone(pids, _END_TIMEOUT):
        return
    if elsewhere:
        who = holders.text(elsewhere)
        raise UserError(
            f"{mountpoint} is unmounted here, but the mount namespace of process {who} still has it: the server ends"
            " with that process"
        )
    left = ", ".join(str(pid) for pid in pids if process.exit_status(pid) is None)
    raise UserError(f"{mountpoint} is unmounted, but its processes {left} still run: see its log")


def _processes(mountpoint: str) -> tuple[list[int], bool]:
    """The processes of a mount, none if it does not say, and whether they make its unmounting busy."""
    try:
        figures = stats(mountpoint)
    except UserError:
        return [], False
    processes = figures["processes"]
    return [processes["supervisor"], processes["server"], *processes["keepers"]], figures.get(
        "umount_needs_coordlfs", False
    )
