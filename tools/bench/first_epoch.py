"""The first epoch: what it costs to fill the cache, from a cold disk, slow and as fast as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from coordlfs_tools.bench import dataset, loader_runs, reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.loader_job import PHOTOS, PLAIN, Spec
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.cgroups import cgroup
from coordlfs_tools.lab.machine import drop_caches

_READERS = 8
_ROUNDS = 5
_THROTTLES = 100_000_000, 250_000_000  # bytes per second
_THROTTLED_FILES = 9_000  # ten seconds, and four
_PHOTOS, _BATCH = 3_000, 32  # of a job that decodes what it reads


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
    These jobs do nothing but read. The last one is a DataLoader that decodes, as fast as the machine can.
    """
    data = context.images()
    part = data.part(_THROTTLED_FILES)
    figures = [
        figure
        for throttle in _THROTTLES
        for figure in _compare(context, part, throttle, f"disk of {throttle / 1e6:.0f} MB/s")
    ]
    return [*figures, *_compare(context, data, None, "the disk as it is"), _compare_decoding(context)]


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


def _compare_decoding(context: Context) -> Figure:
    photos = dataset.photographs(context.directory, 10 * _BATCH if context.quick else _PHOTOS)
    files = [path for path in photos.rglob("*") if path.is_file()]
    spec = Spec(PLAIN, PHOTOS, samples=len(files), batch=_BATCH, workers=_READERS)

    def directly(_: int) -> float:
        return decode(photos)

    def filling(_: int) -> float:
        with mounts.coordlfs(photos, 2 * sum(path.stat().st_size for path in files)) as mount:
            return decode(mount.point)

    def decode(root: Path) -> float:
        drop_caches()
        return loader_runs.run([replace(spec, root=str(root))], skip=1).samples_per_second()

    rates = alternate(context, context.rounds(_ROUNDS), {"directly": directly, "cache for all": filling})
    ours, theirs = rates["cache for all"], rates["directly"]
    return Figure(
        "first epoch, the disk as it is, DataLoader that decodes, cache for all: time, mount ÷ directly",
        ratios(theirs, ours),
        Bound(1.1),
        f"{median(ours):,.0f} ÷ {median(theirs):,.0f} samples/s",
    )


def _read_of(epochs: list[_Epoch]) -> str:
    read = [epoch.read for epoch in epochs if epoch.read is not None]
    return f", {median(read):.3f} × D read from the disk" if read else ""
