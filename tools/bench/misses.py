"""Misses: a slow disk through the mount and directly, and a warm source through the mount, bindfs and rclone."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import median

from coordlfs_tools.bench import reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.cgroups import cgroup
from coordlfs_tools.lab.machine import drop_caches

_READERS = 8
_ROUNDS = 5
_THROTTLE = 100_000_000  # bytes per second
_THROTTLED_FILES = 9_000  # ten seconds
_WARM_FILES = 6_000


def run(context: Context) -> list[Figure]:
    """Bytes per second from a disk that gives 100 MB/s; files per second from the page cache."""
    data = context.images()
    return [*_throttled(context, data.part(_THROTTLED_FILES)), *_warm(context, data.part(_WARM_FILES))]


# -- a slow disk ----------------------------------------------------------------------------------------------------


def _throttled(context: Context, data: Images) -> list[Figure]:
    def directly(seed: int) -> float:
        with cgroup(context.disk, bytes_per_second=_THROTTLE) as slow:
            drop_caches()
            return reader.read(data.root, data.paths, _READERS, seed, slow).bytes_per_second

    def through_mount(cache_size: int) -> Callable[[int], float]:
        def read(seed: int) -> float:
            with (
                cgroup(context.disk, bytes_per_second=_THROTTLE) as slow,
                mounts.coordlfs(data.root, cache_size, slow) as mount,
            ):
                drop_caches()
                return reader.read(mount.point, data.paths, _READERS, seed).bytes_per_second

        return read

    speeds = alternate(
        context,
        context.rounds(_ROUNDS),
        {
            "slow disk": directly,
            "mount without cache": through_mount(0),
            "mount with cache": through_mount(data.allocated * 11 // 10),
        },
    )
    theirs = speeds.pop("slow disk")
    return [
        Figure(
            f"misses, disk of {_THROTTLE / 1e6:.0f} MB/s, {_READERS} readers: {side} ÷ directly",
            ratios(ours, theirs),
            Bound(0.97, at_least=True),
            f"{median(ours) / 1e6:.1f} ÷ {median(theirs) / 1e6:.1f} MB/s",
        )
        for side, ours in speeds.items()
    ]


# -- a warm source --------------------------------------------------------------------------------------------------


def _warm(context: Context, data: Images) -> list[Figure]:
    def through(mounted: Callable[[], AbstractContextManager[Path]], *, listed: bool) -> Callable[[int], float]:
        def read(seed: int) -> float:
            reader.read(data.root, data.paths, _READERS, seed)  # what is to be warm is so
            with mounted() as point:
                if listed:  # as a loader does that looks for its files
                    collections.deque(os.walk(point), maxlen=0)
                return reader.read(point, data.paths, _READERS, seed).files_per_second

        return read

    figures = []
    for listed, names in ((True, "names listed first"), (False, "names unknown")):
        speeds = alternate(
            context,
            context.rounds(_ROUNDS),
            {
                "mount": through(lambda: _coordlfs_point(data.root), listed=listed),
                "bindfs": through(lambda: mounts.bindfs(data.root), listed=listed),
                "rclone, no cache": through(lambda: mounts.rclone(data.root, "off"), listed=listed),
                "rclone, full cache": through(lambda: mounts.rclone(data.root, "full"), listed=listed),
            },
        )
        ours = speeds.pop("mount")
        figures += [
            Figure(
                f"misses, warm source, {_READERS} readers, {names}: mount without cache ÷ {side}",
                ratios(ours, theirs),
                Bound(1, at_least=True),
                f"{median(ours):,.0f} ÷ {median(theirs):,.0f} files/s",
            )
            for side, theirs in speeds.items()
        ]
    return figures


@contextmanager
def _coordlfs_point(source: Path) -> Iterator[Path]:
    with mounts.coordlfs(source, 0) as mount:
        yield mount.point
