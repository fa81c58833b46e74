"""The two sides that are compared, directly and on the mount, and what is found out before so that both get the same.

They get the same memory: directly, the job's limit is what it needs plus C; on the mount it is what the job needs, and
C is the cache. The disk is slowed for both, where the cgroups of this machine can do that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordlfs_tools.demo import training
from coordlfs_tools.demo.training import Epoch, Observed
from coordlfs_tools.lab import mounts, photos
from coordlfs_tools.lab.cgroups import cgroup, peak_of
from coordlfs_tools.lab.machine import disk_of
from coordlfs_tools.lab.processes import memory
from coordlfs_tools.storage.files import drop, listed

from coordlfs.kernel.writeback import write_back

CACHE = 0.6  # of the dataset: C
_SLOW = 15_000_000  # bytes per second, about what one of many nodes gets of a storage that they share
_SPARE = 48 << 20  # bytes of memory for the job beyond what it was seen to need
_SAMPLE = 320  # photographs to train on to see that


@dataclass(frozen=True, slots=True)
class Machine:
    """What both sides run on: a disk, slowed if that can be done, and the bytes of memory that the job needs."""

    disk: str
    disk_rate: int | None  # bytes per second
    need: int


@dataclass(frozen=True, slots=True)
class Mounted:
    """What the mount gave: the epochs, and the bytes that coordlfs' processes held beside the cache."""

    epochs: list[Epoch]
    overhead: int


def prepare(directory: Path) -> Machine:
    """Look at the machine; fails now, and not after minutes, where something cannot be mounted or limited.

    `directory`, which is on the disk, is used as scratch. Raises LabError or OSError.
    """
    disk = disk_of(directory)
    empty, sample = directory / "empty", directory / "sample"
    empty.mkdir()
    with mounts.coordlfs(empty, 0), cgroup(disk, memory=1 << 30):
        pass
    list(photos.write(sample, _SAMPLE, seed=1))
    with cgroup(disk) as job, peak_of(job) as peak:
        training.run(sample, job, lambda: Observed(0), epochs=2)
    return Machine(disk, _SLOW if _can_be_slowed(disk) else None, peak[0] + _SPARE)


def _can_be_slowed(disk: str) -> bool:
    try:
        with cgroup(disk, bytes_per_second=_SLOW):
            return True
    except OSError:
        return False


def directly(machine: Machine, data: Path, size: int) -> list[Epoch]:
    """Train on the dataset, of `size` bytes, itself."""
    _forget(data)
    limit = machine.need + int(size * CACHE)
    with cgroup(machine.disk, memory=limit, bytes_per_second=machine.disk_rate) as job:
        return training.run(data, job, lambda: Observed(job.disk_bytes()))


def on_mount(machine: Machine, data: Path, size: int) -> Mounted:
    """Train on a mount of the dataset, of `size` bytes."""
    _forget(data)
    with (
        cgroup(machine.disk, bytes_per_second=machine.disk_rate) as servers,
        cgroup(machine.disk, memory=machine.need, bytes_per_second=machine.disk_rate) as job,
        mounts.coordlfs(data, int(size * CACHE), servers) as mount,
    ):

        def observe() -> Observed:
            read = servers.disk_bytes() + job.disk_bytes()
            return Observed(read, mount.status()["hit_rate"])

        epochs = training.run(mount.point, job, observe)
        processes = mount.status()["processes"]
        pids = [processes["supervisor"], processes["server"], *processes["keepers"]]
        return Mounted(epochs, sum(memory(pid, "RssAnon") for pid in pids))


def _forget(data: Path) -> None:
    """Take the dataset out of the page cache."""
    write_back(data)  # only what is on the disk can be taken out
    drop(listed(data))
