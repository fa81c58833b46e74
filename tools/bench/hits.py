"""Hits: cached files read through the mount, and the same files read from the source's own warm page cache."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from coordlfs_tools.bench import mounts, reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.machine import BenchError
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios

_ROUNDS = 11


def run(context: Context) -> list[Figure]:
    """Files per second, and the messages that the server receives meanwhile, with 1 and with 2 readers."""
    data = context.images()
    with mounts.coordlfs(data.root, data.allocated * 11 // 10) as mount:
        mount.warm()
        pinned = mount.settled()["pinned_items"]
        if pinned != len(data.paths):
            raise BenchError(f"only {pinned} of {len(data.paths)} files were cached")
        return [figure for threads in (1, 2) for figure in _compare(context, mount, data, threads)]


def _compare(context: Context, mount: mounts.Mount, data: Images, threads: int) -> list[Figure]:
    messages = mounts.MessageCount(mount)
    speeds = alternate(
        context,
        context.rounds(_ROUNDS),
        {
            "mount": lambda n: _warm_speed(mount.point, data, threads, n),
            "source": lambda n: _warm_speed(data.root, data, threads, n),
        },
    )
    received = messages.so_far()
    ours, theirs = speeds["mount"], speeds["source"]
    readers = f"{threads} reader{'s' if threads > 1 else ''}"
    return [
        Figure(
            f"hits, {readers}: mount ÷ warm page cache of the source",
            ratios(ours, theirs),
            Bound(0.95, at_least=True),
            f"{median(ours):,.0f} ÷ {median(theirs):,.0f} files/s",
        ),
        Figure(f"hits, {readers}: messages that the server received", [received], Bound(0)),
    ]


def _warm_speed(root: Path, data: Images, threads: int, seed: int) -> float:
    reader.read(root, data.paths, threads, seed)  # so that nothing is missing, whatever was reclaimed since last time
    return reader.read(root, data.paths, threads, seed + 1).files_per_second
