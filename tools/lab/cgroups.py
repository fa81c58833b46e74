"""Cgroups for the length of a `with`, of version 1 or 2: memory that is limited, and disks that are throttled.

Knows nothing of who is put into them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Event, Thread

from coordlfs_tools.lab.errors import LabError

_UNTHROTTLED = 10**12  # bytes per second: a limit nobody meets, for version 1 counts only where there is a limit
_EMPTYING = 120.0  # seconds that the processes of a group are given to end
_names = count(1)


@dataclass(frozen=True, slots=True)
class Cgroup:
    """Processes under limits. With version 1 of cgroups it is one directory for each controller, with 2 one for all."""

    directories: dict[str, Path]  # controller ("memory", "io") → directory
    unified: bool
    disk: str | None  # MAJOR:MINOR

    @property
    def path(self) -> Path:
        """The directory of the memory controller."""
        return self.directories["memory"]

    def enter(self) -> None:
        """Put the calling process into the group; for `preexec_fn`, so that its children are in it as well."""
        self.add(0)

    def add(self, pid: int) -> None:
        """Put a process into the group; 0 is the calling one."""
        for directory in set(self.directories.values()):
            (directory / "cgroup.procs").write_text(str(pid))

    def kill(self) -> None:
        """SIGKILL to whoever is in the group."""
        for pid in (self.path / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def usage(self) -> int:
        """Bytes of memory charged to the group."""
        return int((self.path / ("memory.current" if self.unified else "memory.usage_in_bytes")).read_text())

    def stat(self) -> dict[str, int]:
        """The kernel's table of what they are; its names differ between the versions."""
        lines = (self.path / "memory.stat").read_text().splitlines()
        return {name: int(value) for name, value in map(str.split, lines)}

    def oom_kills(self) -> int:
        """How many processes of the group the kernel has killed for want of memory."""
        events = (self.path / ("memory.events" if self.unified else "memory.oom_control")).read_text()
        return next(int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill "))

    def reclaim(self) -> None:
        """Have the kernel take back whatever memory it can."""
        with suppress(OSError):  # version 2 says EAGAIN if there is less than was asked for
            if self.unified:
                (self.path / "memory.reclaim").write_text("1G")
            else:
                (self.path / "memory.force_empty").write_text("0")

    def disk_bytes(self) -> int:
        """Bytes that the group's processes have read from the disk."""
        if self.unified:
            for line in (self.directories["io"] / "io.stat").read_text().splitlines():
                device, *fields = line.split()
                if device == self.disk:
                    return int(dict(field.split("=") for field in fields)["rbytes"])
            return 0
        for line in (self.directories["io"] / "blkio.throttle.io_service_bytes").read_text().splitlines():
            if line.startswith(f"{self.disk} Read "):
                return int(line.split()[2])
        return 0

    def _limit_memory(self, nbytes: int) -> None:
        (self.path / ("memory.max" if self.unified else "memory.limit_in_bytes")).write_text(str(nbytes))

    def _limit_disk(self, bytes_per_second: int | None) -> None:
        if not self.unified:
            limit = f"{self.disk} {bytes_per_second or _UNTHROTTLED}"
            (self.directories["io"] / "blkio.throttle.read_bps_device").write_text(limit)
        elif bytes_per_second is not None:
            (self.directories["io"] / "io.max").write_text(f"{self.disk} rbps={bytes_per_second}")

    def _limit_writing(self, bytes_per_second: int) -> None:
        if self.unified:
            (self.directories["io"] / "io.max").write_text(f"{self.disk} wbps={bytes_per_second}")
        else:
            limit = self.directories["io"] / "blkio.throttle.write_bps_device"
            limit.write_text(f"{self.disk} {bytes_per_second}")

    def _remove(self) -> None:
        deadline = time.monotonic() + _EMPTYING
        for directory in set(self.directories.values()):
            while directory.exists():
                try:
                    directory.rmdir()
                except OSError:  # a process that was in it has not quite ended
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)


def _hierarchies(controllers: set[str]) -> tuple[dict[str, Path], bool]:
    """Where these controllers ("memory", "io") are mounted, and whether that is version 2."""
    version1: dict[str, Path] = {}
    version2: Path | None = None
    for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines():
        _, point, fstype, options, *_ = line.split()
        if fstype == "cgroup2":
            version2 = Path(point)
        elif fstype == "cgroup":
            for controller in {"memory", "blkio"} & set(options.split(",")):
                version1["io" if controller == "blkio" else controller] = Path(point)
    if version2 and controllers <= set((version2 / "cgroup.controllers").read_text().split()):
        (version2 / "cgroup.subtree_control").write_text(" ".join(f"+{each}" for each in sorted(controllers)))
        return dict.fromkeys(controllers, version2), True
    if controllers <= version1.keys():
        return {each: version1[each] for each in controllers}, False
    raise LabError("the cgroup controllers memory and io (blkio) are needed: mount them")


@contextmanager
def cgroup(
    disk: str | None = None,
    *,
    memory: int | None = None,
    bytes_per_second: int | None = None,
    written_per_second: int | None = None,
) -> Iterator[Cgroup]:
    """A cgroup for processes, limited to `memory` bytes and so many bytes a second from, or to, `disk` (MAJOR:MINOR).

    Without a disk it counts and limits memory only. It is removed at the end, when whoever was put into it must have
    ended. Raises LabError if the machine has no such controllers.
    """
    name = f"coordlfs-lab-{os.getpid()}-{next(_names)}"
    roots, unified = _hierarchies({"memory"} if disk is None else {"memory", "io"})
    group = Cgroup({controller: root / name for controller, root in roots.items()}, unified, disk)
    try:
        for directory in group.directories.values():
            with suppress(FileExistsError):  # version 2: one directory under two names
                directory.mkdir()
        if memory is not None:
            group._limit_memory(memory)
        if disk is not None:
            group._limit_disk(bytes_per_second)
        if written_per_second is not None:
            group._limit_writing(written_per_second)
        yield group
    finally:
        group._remove()


@contextmanager
def peak_of(job: Cgroup) -> Iterator[list[int]]:
    """The most memory that the job holds while the `with` lasts, less its page cache: one number, in bytes."""
    peak, ended = [0], Event()

    def watch() -> None:
        while not ended.wait(0.02):
            held = job.stat()
            peak[0] = max(peak[0], held["anon" if job.unified else "rss"] + held["shmem"])

    thread = Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
