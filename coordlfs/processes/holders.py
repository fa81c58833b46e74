"""Who else has a mount: places of this mount namespace, other mount namespaces, and processes with files of it open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from coordlfs.kernel import mounts

Process = tuple[int, str]  # pid and name
_SHOWN = 5


def text(processes: list[Process]) -> str:
    """For a message: some of them."""
    return ", ".join(f"{pid} ({name})" for pid, name in processes[:_SHOWN])


def places(mount: mounts.Mount) -> list[mounts.Mount]:
    """Where in this mount namespace the file system of `mount` is seen by now: bound, moved and renamed, too."""
    return [m for m in mounts.table() if m.shows_same(mount)]


def of_files(device: int) -> list[Process]:
    """Processes with a file, directory or mapping on the file system `device`."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid() and _holds(entry, device):
            with suppress(OSError):
                name = _name(entry)
                if not name.startswith("coordlfs-"):
                    found.append((int(entry), name))
    return found


def of_namespaces(mount: mounts.Mount) -> list[Process]:
    """A process of each other mount namespace in which the file system of `mount` is mounted.

    Such a namespace, made while it was mounted here, has a mount of its own, which unmounting it here does not end.
    Never waits for a file system.
    """
    found = []
    known = {os.readlink("/proc/self/ns/mnt")}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            namespace = os.readlink(f"/proc/{entry}/ns/mnt")
            if namespace not in known:
                known.add(namespace)
                if any(m.shows_same(mount) for m in mounts.table(entry)):
                    found.append((int(entry), _name(entry)))
    return found


def _name(pid: str) -> str:
    with open(f"/proc/{pid}/comm", errors="replace") as f:
        return f.read().strip()


def _holds(pid: str, device: int) -> bool:
    """Never waits for a file system, as to ask for attributes may: another mount of the process may hang."""
    with suppress(OSError):
        ids = {mount.mount_id for mount in mounts.table(pid) if mount.device == device}
        if ids and not ids.isdisjoint(_mount_ids(pid)):
            return True
        wanted = f" {os.major(device):02x}:{os.minor(device):02x} "
        with open(f"/proc/{pid}/maps", errors="replace") as f:
            return any(wanted in line for line in f)
    return False


def _mount_ids(pid: str) -> Iterator[int]:
    """The mounts that a process's descriptors, working directory and root lie on."""
    for number in os.listdir(f"/proc/{pid}/fdinfo"):
        with suppress(OSError):
            yield mounts.id_of(int(number), pid)
    for link in ("cwd", "root"):
        with suppress(OSError):
            fd = os.open(f"/proc/{pid}/{link}", os.O_PATH | os.O_CLOEXEC)
            try:
                yield mounts.id_of(fd)
            finally:
                os.close(fd)
