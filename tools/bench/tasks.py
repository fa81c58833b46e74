"""The stalls of three training tasks as in the paper, with memory for 35 % of the data: page cache and coordlfs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from coordlfs_tools.analyze import runs
from coordlfs_tools.bench.report import Context, Figure
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.cgroups import Cgroup, cgroup, peak_of
from coordlfs_tools.storage.files import drop, listed
from coordlfs_tools.tasks import data

_CACHED = 0.35
_SPARE = 48 << 20  # bytes of memory for the job beyond what it was seen to need
_EPOCHS = 3
_BYTES_PER_SECOND = 15_000_000  # of the disk, about what one of many nodes gets of a storage that they share
_SAMPLES = {"images": 960, "detection": 320, "audio": 200}
_FEW = 4  # times fewer in a quick run


@dataclass(frozen=True, slots=True)
class _Epoch:
    """Seconds of one epoch's loop."""

    wait: float
    compute: float

    @property
    def seconds(self) -> float:
        return self.wait + self.compute


def run(context: Context) -> list[Figure]:
    """What each task waits for."""
    figures: list[Figure] = []
    for task, samples in _SAMPLES.items():
        directory = data.write(task, context.directory, samples // (_FEW if context.quick else 1))
        figures += _task(context, task, directory)
    return figures


def _task(context: Context, task: str, directory: Path) -> list[Figure]:
    size = sum(os.stat(file.path).st_blocks * 512 for file in listed(directory))
    room = int(size * _CACHED)
    with cgroup(context.disk) as job, peak_of(job) as peak:
        warm = _train(task, directory, job)[1:]  # the first reads it all into memory
    need = peak[0] + _SPARE

    def page_cache() -> list[_Epoch]:
        drop(listed(directory))
        with cgroup(context.disk, memory=need + room, bytes_per_second=_BYTES_PER_SECOND) as job:
            return _train(task, directory, job)[1:]

    def coordlfs() -> list[_Epoch]:
        drop(listed(directory))
        with (
            cgroup(context.disk, bytes_per_second=_BYTES_PER_SECOND) as servers,
            cgroup(context.disk, memory=need, bytes_per_second=_BYTES_PER_SECOND) as job,
            mounts.coordlfs(directory, room, servers) as mount,
        ):
            return _train(task, mount.point, job)[1:]

    sides: dict[str, Callable[[], list[_Epoch]]] = {"page cache": page_cache, "coordlfs": coordlfs}
    found = {name: side() for name, side in sides.items()}
    context.say(f"  {task}: {found}")
    figures = [_stalls(f"{task}, {size / 1e6:.0f} MB, all cached", warm, warm)]
    figures += [_stalls(f"{task}, 35 % on {name}", epochs, warm) for name, epochs in found.items()]
    gain = [a.seconds / b.seconds for a, b in zip(found["page cache"], found["coordlfs"], strict=True)]
    return [*figures, Figure(f"{task}: steady epoch, page cache ÷ coordlfs", gain)]


def _train(task: str, directory: Path, job: Cgroup) -> list[_Epoch]:
    """The epochs of a task as it is, observed, in a cgroup."""
    command = [sys.executable, "-m", "coordlfs_tools.tasks.train", task, str(directory), f"--epochs={_EPOCHS}"]
    (result,) = runs.run(command, prepare=job.enter).results
    return [_Epoch(each["wait"], each["compute"]) for each in result["loaders"][0]["passes"]]


def _stalls(name: str, epochs: list[_Epoch], warm: list[_Epoch]) -> Figure:
    """Percents of the epochs that are waiting; what is waited for when all is cached is prep."""
    prep = median(epoch.wait for epoch in warm)
    seconds, wait = median(e.seconds for e in epochs), median(e.wait for e in epochs)
    shares = f"prep stall {min(prep, wait) / seconds:.0%}, fetch stall {max(wait - prep, 0) / seconds:.0%}"
    return Figure(f"{name}: waiting, %", [100 * e.wait / e.seconds for e in epochs], None, f"{seconds:.1f} s: {shares}")
