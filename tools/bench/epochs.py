"""Steady epochs: what is read from the disk when the cache holds a part of the dataset, and by the page cache alone.

The readers are in a small memory cgroup, as a training job in a container is; coordlfs' processes are outside of it.
The page cache alone is given the same memory in all: the readers' and what coordlfs pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from coordlfs_tools.bench import reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.report import Bound, Context, Figure
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.cgroups import Cgroup, cgroup
from coordlfs_tools.lab.machine import drop_caches

_CAPACITIES = (0.35, 0.50, 0.65, 0.80)  # of the dataset
_READERS = 8
_JOB_MEMORY = 300_000_000  # bytes
_QUICK_JOB_MEMORY = 24_000_000
_EPOCHS = 2  # that are measured, after the first


def run(context: Context) -> list[Figure]:
    """Bytes read from the block device in an epoch ÷ (D − C), at each capacity."""
    data = context.images()
    return [figure for share in _CAPACITIES for figure in _compare(context, data, share)]


def _compare(context: Context, data: Images, share: float) -> Iterator[Figure]:
    epochs = context.rounds(_EPOCHS)
    memory = _QUICK_JOB_MEMORY if context.quick else _JOB_MEMORY
    ours, rates, pinned = _through_mount(context, data, int(data.allocated * share), memory, epochs)
    theirs = _page_cache_alone(context, data, pinned + memory, epochs)
    misses = data.allocated - pinned
    sides = f"{{:,.0f}} MB read, D − C = {misses / 1e6:,.0f} MB"
    yield Figure(
        f"steady epochs, capacity {share:.0%}: mount, read ÷ (D − C)",
        [nbytes / misses for nbytes in ours],
        Bound(1.02),
        sides.format(median(ours) / 1e6) + f", hit rate {median(rates):.1%}",
    )
    yield Figure(
        f"steady epochs, capacity {share:.0%}: page cache alone, read ÷ (D − C)",
        [nbytes / misses for nbytes in theirs],
        None,
        sides.format(median(theirs) / 1e6),
    )


def _through_mount(
    context: Context, data: Images, capacity: int, memory: int, epochs: int
) -> tuple[list[int], list[float], int]:
    """Bytes read from the disk in each epoch, the hit rates that the status gives, and the bytes that are pinned."""
    drop_caches()
    with (
        cgroup(context.disk) as servers,
        cgroup(context.disk, memory=memory) as job,
        mounts.coordlfs(data.root, capacity, servers) as mount,
    ):
        _epoch(mount.point, data, 0, [servers, job])
        pinned = mount.settled()["pinned_bytes"]
        read, rates = [], []
        for seed in range(1, epochs + 1):
            read.append(_epoch(mount.point, data, seed, [servers, job]))
            figures = mount.settled()
            rates.append(figures["epoch"]["hit_rate"])
            context.say(f"  capacity {capacity / 1e6:,.0f} MB, epoch {seed + 1}: {read[-1] / 1e6:,.0f} MB read")
        return read, rates, pinned


def _page_cache_alone(context: Context, data: Images, memory: int, epochs: int) -> list[int]:
    drop_caches()
    with cgroup(context.disk, memory=memory) as job:
        _epoch(data.root, data, 0, [job])
        return [_epoch(data.root, data, seed, [job]) for seed in range(1, epochs + 1)]


def _epoch(root: Path, data: Images, seed: int, groups: list[Cgroup]) -> int:
    """Read everything once, from the last of the groups; bytes that all of them read from the disk."""
    before = sum(group.disk_bytes() for group in groups)
    reader.read(root, data.paths, _READERS, seed, groups[-1])
    return sum(group.disk_bytes() for group in groups) - before
