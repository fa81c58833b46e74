"""What the benchmarks ask of the machine: cgroups (version 1 and 2), its block devices, its page cache."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Event, Thread

_UNTHROTTLED = 10**12  # bytes per second: a limit nobody meets, for version 1 counts only where there is a limit
_EMPTYING = 20.0  # seconds that the processes of a group are given to end
_names = count(1)


class BenchError(Exception):
    """A benchmark cannot be run; the message says what to do."""


def drop_caches() -> None:
    """Empty the page cache, and the kernel's names and inodes with it, of all that nobody holds."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def drop_pages() -> None:
    """Empty the page cache, but leave the names and inodes that the kernel knows."""
    Path("/proc/sys/vm/drop_caches").write_text("1")


def reclaims_idle_pages() -> bool:
    """Whether DAMON takes pages back that nobody used of late, however much memory is free: clouds set it up so."""
    schemes = Path("/sys/kernel/mm/damon/admin/kdamonds").glob("*/contexts/*/schemes/*/action")
    return any(scheme.read_text().strip() == "pageout" for scheme in schemes)


def disk_of(path: Path) -> str:
    """The disk that `path` lies on, as MAJOR:MINOR; a partition's whole disk. Raises BenchError if it lies on none."""
    number = path.stat().st_dev
    directory = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not directory.exists():
        raise BenchError(f"{path} does not lie on a disk of its own: give another directory with --dir")
    directory = directory.resolve()
    if (directory / "partition").exists():
        directory = directory.parent
    return (directory / "dev").read_text().strip()


# -- cgroups --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Processes under limits. With version 1 of cgroups it is one directory for each controller, with 2 one for all."""

    directories: dict[str, Path]  # controller ("memory", "io") → directory
    unified: bool
    disk: str

    def join(self) -> None:
        """Put the calling process into the group; for `preexec_fn`, so that its children are in it as well."""
        for directory in set(self.directories.values()):
            (directory / "cgroup.procs").write_text("0")

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

    def _limit(self, memory: int | None, bytes_per_second: int | None) -> None:
        if memory is not None:
            file = "memory.max" if self.unified else "memory.limit_in_bytes"
            (self.directories["memory"] / file).write_text(str(memory))
        if not self.unified:
            limit = f"{self.disk} {bytes_per_second or _UNTHROTTLED}"
            (self.directories["io"] / "blkio.throttle.read_bps_device").write_text(limit)
        elif bytes_per_second is not None:
            (self.directories["io"] / "io.max").write_text(f"{self.disk} rbps={bytes_per_second}")

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


def _hierarchies() -> tuple[dict[str, Path], bool]:
    """Where the controllers "memory" and "io" are mounted, and whether that is version 2."""
    version1: dict[str, Path] = {}
    version2: Path | None = None
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, fstype, options, *_ = line.split()
        if fstype == "cgroup2":
            version2 = Path(point)
        elif fstype == "cgroup":
            for controller in {"memory", "blkio"} & set(options.split(",")):
                version1["io" if controller == "blkio" else controller] = Path(point)
    if version2 and {"memory", "io"} <= set((version2 / "cgroup.controllers").read_text().split()):
        (version2 / "cgroup.subtree_control").write_text("+memory +io")
        return {"memory": version2, "io": version2}, True
    if {"memory", "io"} <= version1.keys():
        return version1, False
    raise BenchError("the cgroup controllers memory and io (blkio) are needed: mount them")


@contextmanager
def cgroup(disk: str, *, memory: int | None = None, bytes_per_second: int | None = None) -> Iterator[Group]:
    """A cgroup for processes that read `disk`, limited to `memory` bytes and so many bytes a second from the disk.

    It is removed at the end, when whoever was put into it must have ended.
    """
    name = f"coordlfs-bench-{os.getpid()}-{next(_names)}"
    roots, unified = _hierarchies()
    group = Group({controller: root / name for controller, root in roots.items()}, unified, disk)
    try:
        for directory in group.directories.values():
            with suppress(FileExistsError):  # version 2: one directory under two names
                directory.mkdir()
        group._limit(memory, bytes_per_second)
        yield group
    finally:
        group._remove()


@contextmanager
def peak_of(job: Group) -> Iterator[list[int]]:
    """The most memory that the job holds while the `with` lasts, less its page cache: one number, in bytes."""
    peak, ended = [0], Event()

    def watch() -> None:
        while not ended.wait(0.02):
            lines = (job.directories["memory"] / "memory.stat").read_text().splitlines()
            held = {name: int(value) for name, value in map(str.split, lines)}
            peak[0] = max(peak[0], held["anon" if job.unified else "rss"] + held["shmem"])

    thread = Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
