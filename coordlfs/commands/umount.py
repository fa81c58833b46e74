"""`coordlfs umount`: end a mount, wait for its processes, and name whatever still holds it.

It knows nothing of what is cached, and needs no answer of the mount: one that is dead must end as well.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from coordlfs.commands.mounted import find, stats
from coordlfs.errors import UserError
from coordlfs.kernel import process
from coordlfs.processes import attachment

_END_SOON, _END_TIMEOUT = 1.0, 30.0


def umount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount, and return when every process of the mount has ended. Raises UserError."""
    found = find(mountpoint)
    pids, is_busy = ([], False) if lazy else _processes(mountpoint)
    try:
        if is_busy and not holders(found.device):
            attachment.detach(found.point, lazy=True)  # it is the keepers that hold it
        else:
            attachment.detach(found.point, lazy=lazy)
    except OSError as e:
        if e.errno == errno.EBUSY:
            held = ", ".join(f"{pid} ({name})" for pid, name in holders(found.device)[:5])
            who = f"by process {held}" if held else "by another mount or process"
            raise UserError(f"{mountpoint} is in use {who}: end it, or use --lazy") from None
        if e.errno == errno.EPERM:
            raise UserError(f"unmounting {mountpoint} is not permitted: it is root's or another user's") from None
        raise UserError(f"{mountpoint} cannot be unmounted: {e.strerror}") from None
    if lazy or process.wait_gone(pids, _END_SOON):
        return
    if not (elsewhere := seen_elsewhere(found.device)) and process.wait_gone(pids, _END_TIMEOUT):
        return
    if elsewhere:
        who = ", ".join(f"{pid} ({name})" for pid, name in elsewhere[:5])
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


def holders(device: int) -> list[tuple[int, str]]:
    """Processes with a file, directory or mapping on the file system `device`: pid and name."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid() and _holds(entry, device):
            with suppress(OSError):
                name = _name(entry)
                if not name.startswith("coordlfs-"):
                    found.append((int(entry), name))
    return found


def seen_elsewhere(device: int) -> list[tuple[int, str]]:
    """A process, pid and name, of each other mount namespace in which the file system `device` is mounted.

    Such a namespace, made while it was mounted here, has a mount of its own, which unmounting it here does not end.
    """
    found = []
    known = {os.readlink("/proc/self/ns/mnt")}
    wanted = f" {os.major(device)}:{os.minor(device)} "
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            namespace = os.readlink(f"/proc/{entry}/ns/mnt")
            if namespace not in known:
                known.add(namespace)
                with open(f"/proc/{entry}/mountinfo", errors="replace") as f:
                    if any(wanted in line for line in f):
                        found.append((int(entry), _name(entry)))
    return found


def _name(pid: str) -> str:
    with open(f"/proc/{pid}/comm", errors="replace") as f:
        return f.read().strip()


def _holds(pid: str, device: int) -> bool:
    with suppress(OSError):
        links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root"]
        links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
        for link in links:
            with suppress(OSError):
                if os.stat(link).st_dev == device:
                    return True
        wanted = f" {os.major(device):02x}:{os.minor(device):02x} "
        with open(f"/proc/{pid}/maps", errors="replace") as f:
            return any(wanted in line for line in f)
    return False
