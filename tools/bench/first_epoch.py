"""The first epoch: what it costs to fill the cache, from a cold disk, slow and as fast as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from coordlfs_tools.bench import mounts, reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.machine import cgroup, drop_caches
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios

_READERS = 8
_ROUNDS = 5
_THROTTLES = 100_000_000, 250_000_000  # bytes per second
_THROTTLED_FILES = 9_000  # ten seconds, and four


@dataclass(frozen=True, slots=True)
class _Epoch:
    seconds: float
    read: float | None  # from the disk, in multiples of the dataset

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s" if self.read is None else f"{self.seconds:.2f} s, {self.read:.3f} × D read"


def run(context: Context) -> list[Figure]:
    """Time of the first epoch with admission ÷ the same files read directly.

    A job in another memory cgroup than the mount, as a container has it, costs more: its pages are read in anew to be
    charged to the mount. What any FUSE file system costs beside the raw disk, bindfs shows: it is C and caches nothing.
    """
    data = context.images()
    part = data.part(_THROTTLED_FILES)
    figures = [
        figure
        for throttle in _THROTTLES
        for figure in _compare(context, part, throttle, f"disk of {throttle / 1e6:.0f} MB/s")
    ]
    return [*figures, *_compare(context, data, None, "the disk as it is")]


def _compare(context: Context, data: Images, throttle: int | None, disk: str) -> list[Figure]:
    def directly(seed: int) -> _Epoch:
        with cgroup(context.disk, bytes_per_second=throttle) as group:
            drop_caches()
            seconds = reader.read(data.root, data.paths, _READERS, seed, group).seconds
            return _Epoch(seconds, group.disk_bytes() / data.allocated)

    def filling(cache_size: int, *, is_apart: bool = False) -> Callable[[int], _Epoch]:
        def epoch(seed: int) -> _Epoch:
            with (
                cgroup(context.disk, bytes_per_second=throttle) as group,
                mounts.coordlfs(data.root, cache_size, group) as mount,
            ):
                drop_caches()
                before = group.disk_bytes()
                jobs = None if is_apart else group
                seconds = reader.read(mount.point, data.paths, _READERS, seed, jobs).seconds
                mount.settled()
                return _Epoch(seconds, (group.disk_bytes() - before) / data.allocated)

        return epoch

    def by_bindfs(seed: int) -> _Epoch:
        with mounts.bindfs(data.root) as point:
            drop_caches()
            return _Epoch(reader.read(point, data.paths, _READERS, seed).seconds, None)

    everything = data.allocated * 11 // 10
    sides = {
        "directly": directly,
        "cache for all": filling(everything),
        "cache for all, job in another cgroup": filling(everything, is_apart=True),
        "cache for half": filling(data.allocated // 2),
    }
    if throttle is None:
        sides["bindfs"] = by_bindfs
    epochs = alternate(context, context.rounds(_ROUNDS), sides)
    theirs = [epoch.seconds for epoch in epochs.pop("directly")]
    return [
        Figure(
            f"first epoch, {disk}, {side}: {'bindfs' if side == 'bindfs' else 'mount'} ÷ directly",
            ratios([epoch.seconds for epoch in ours], theirs),
            None if side == "bindfs" else Bound(1.1),
            f"{median(e.seconds for e in ours):.2f} ÷ {median(theirs):.2f} s" + _read_of(ours),
        )
        for side, ours in epochs.items()
    ]


def _read_of(epochs: list[_Epoch]) -> str:
    read = [epoch.read for epoch in epochs if epoch.read is not None]
    return f", {median(read):.3f} × D read from the disk" if read else ""
