"""Hits: cached files read through the mount, and the same files read from the source's own warm page cache.

And what it costs a hit that the mount looks after itself: sweeps of the source without a pause, and someone who asks
for metrics all the time, against a mount that does neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from coordlfs_tools.bench import mounts, reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.machine import BenchError, drop_caches
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios

_ROUNDS = 12
_PER_PLACEMENT = 2  # rounds with the same pages
_GUARDED_FILES = 6_000  # of each of two mounts
_SCRAPE = 1.0  # seconds


def run(context: Context) -> list[Figure]:
    """Files per second, and the messages that the server receives meanwhile, with 1 and with 2 readers.

    Where the machine is a virtual one, the place of a page in memory alone makes copies of it differ by up to 30 %, so
    both sides get other pages every few rounds.
    """
    data = context.images()
    placements = max(1, context.rounds(_ROUNDS) // _PER_PLACEMENT)
    found: dict[int, list[_Hits]] = {1: [], 2: []}
    for number in range(placements):
        drop_caches()
        with mounts.coordlfs(data.root, data.allocated * 11 // 10) as mount:
            mount.warm()
            pinned = mount.settled()["pinned_items"]
            if pinned != len(data.paths):
                raise BenchError(f"only {pinned} of {len(data.paths)} files were cached")
            for threads, hits in found.items():
                context.say(f" pages {number + 1} of {placements}, {threads} reader{'s' * (threads > 1)}")
                hits.append(_compare(context, mount, data, threads))
    return [figure for threads, hits in found.items() for figure in _figures(threads, hits)]


@dataclass(frozen=True, slots=True)
class _Hits:
    """Files per second of each round, and the messages of all."""

    ours: list[float]
    theirs: list[float]
    messages: int


def _compare(context: Context, mount: mounts.Mount, data: Images, threads: int) -> _Hits:
    messages = mounts.MessageCount(mount)
    speeds = alternate(
        context,
        _PER_PLACEMENT,
        {
            "mount": lambda n: _warm_speed(mount.point, data, threads, n),
            "source": lambda n: _warm_speed(data.root, data, threads, n),
        },
    )
    return _Hits(speeds["mount"], speeds["source"], messages.so_far())


def _figures(threads: int, hits: list[_Hits]) -> list[Figure]:
    ours, theirs = [x for h in hits for x in h.ours], [x for h in hits for x in h.theirs]
    readers = f"{threads} reader{'s' if threads > 1 else ''}"
    return [
        Figure(
            f"hits, {readers}: mount ÷ warm page cache of the source",
            ratios(ours, theirs),
            Bound(0.95, at_least=True),
            f"{median(ours):,.0f} ÷ {median(theirs):,.0f} files/s",
        ),
        Figure(f"hits, {readers}: messages that the server received", [sum(h.messages for h in hits)], Bound(0)),
    ]


def run_guarded(context: Context) -> list[Figure]:
    """Files per second on a mount that sweeps and is scraped, and on one that is told to do neither."""
    images = context.images()
    data = images.part(min(_GUARDED_FILES, len(images.paths)))
    size = data.allocated * 11 // 10
    with (
        mounts.coordlfs(images.root, size, options=["--revalidate", "2s", "--metrics", "0"]) as guarded,
        mounts.coordlfs(images.root, size, options=["--immutable"]) as bare,
    ):
        for mount in (guarded, bare):
            reader.read(mount.point, data.paths, 2, 0)
            if (pinned := mount.settled()["pinned_items"]) != len(data.paths):
                raise BenchError(f"only {pinned} of {len(data.paths)} files were cached")
        return [figure for threads in (1, 2) for figure in _compare_guarded(context, guarded, bare, data, threads)]


def _compare_guarded(
    context: Context, guarded: mounts.Mount, bare: mounts.Mount, data: Images, threads: int
) -> list[Figure]:
    before = guarded.status()["revalidation"]["sweeps"]

    def with_guard(n: int) -> float:
        with bare.stopped(), guarded.scraped(_SCRAPE):
            return _warm_speed(guarded.point, data, threads, n)

    def without(n: int) -> float:
        with guarded.stopped():
            return _warm_speed(bare.point, data, threads, n)

    speeds = alternate(context, context.rounds(_ROUNDS), {"guarded": with_guard, "bare": without})
    sweeps = guarded.status()["revalidation"]["sweeps"] - before
    readers = f"{threads} reader{'s' if threads > 1 else ''}"
    return [
        Figure(
            f"hits, {readers}: with sweeps and metrics ÷ without",
            ratios(speeds["guarded"], speeds["bare"]),
            Bound(0.98, at_least=True),
            f"{median(speeds['guarded']):,.0f} ÷ {median(speeds['bare']):,.0f} files/s, {sweeps} sweeps",
        )
    ]


def _warm_speed(root: Path, data: Images, threads: int, seed: int) -> float:
    reader.read(root, data.paths, threads, seed)  # so that nothing is missing, whatever was reclaimed since last time
    return reader.read(root, data.paths, threads, seed + 1).files_per_second
