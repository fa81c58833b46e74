"""Hits: cached files read through the mount, and the same files read from the source's own warm page cache.

And what it costs a hit that the mount looks after itself, against the same pages while every process of the mount is
stopped: as it is mounted by default, watching memory and revalidating; and, harder, with passes at the pace of a
million files in ten minutes and someone who asks for metrics every second.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from coordlfs_tools.bench import reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.machine import drop_caches

_ROUNDS = 12
_PER_PLACEMENT = 2  # rounds with the same pages
_GUARDED_ROUNDS = 41  # short ones, since the speed of the machine drifts
_PASS_FILES, _PASS_SECONDS = 1_000_000, 600.0  # a large dataset, and what --revalidate is by default
_SCRAPE = 1.0  # seconds


def run(context: Context) -> list[Figure]:
    """Files per second, and the requests that the server receives meanwhile, with 1 and with 2 readers.

    Where the machine is a virtual one, the place of a page in memory alone makes copies of it differ by up to 30 %, so
    both sides get other pages every few rounds, and in turn the first ones.
    """
    data = context.images()
    placements = max(1, context.rounds(_ROUNDS) // _PER_PLACEMENT)
    found: dict[int, list[_Hits]] = {1: [], 2: []}
    for number in range(placements):
        drop_caches()
        if number % 2:
            reader.read(data.root, data.paths, 2, number)
        with mounts.coordlfs(data.root, data.allocated * 11 // 10) as mount:
            mount.warm()
            pinned = mount.settled()["pinned_items"]
            if pinned != len(data.paths):
                raise LabError(f"only {pinned} of {len(data.paths)} files were cached")
            for threads, hits in found.items():
                context.say(f" pages {number + 1} of {placements}, {threads} reader{'s' * (threads > 1)}")
                hits.append(_compare(context, mount, data, threads))
    return [figure for threads, hits in found.items() for figure in _figures(threads, hits)]


@dataclass(frozen=True, slots=True)
class _Hits:
    """Files per second of each round, and the requests of all."""

    ours: list[float]
    theirs: list[float]
    requests: int


def _compare(context: Context, mount: mounts.Mount, data: Images, threads: int) -> _Hits:
    requests = mounts.RequestCount(mount)
    speeds = alternate(
        context,
        _PER_PLACEMENT,
        {
            "mount": lambda n: _warm_speed(mount.point, data, threads, n),
            "source": lambda n: _warm_speed(data.root, data, threads, n),
        },
    )
    return _Hits(speeds["mount"], speeds["source"], requests.so_far())


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
        Figure(f"hits, {readers}: requests that the server received", [sum(h.requests for h in hits)], Bound(0)),
    ]


def run_guarded(context: Context) -> list[Figure]:
    """Files per second of a mount that revalidates and is scraped, and of the same mount with its processes stopped.

    One mount, since two mounts of the same files differ by a quarter for where their pages came to lie.
    """
    data = context.images()
    pace = f"{max(1.0, _PASS_SECONDS * len(data.paths) / _PASS_FILES):.1f}s"
    figures = []
    for guards, options in (
        ("as mounted by default", []),
        ("with passes as of a million files, and metrics", ["--revalidate", pace, "--metrics", "0"]),
    ):
        with mounts.coordlfs(data.root, data.allocated * 11 // 10, options=options) as mount:
            reader.read(mount.point, data.paths, 2, 0)
            if (pinned := mount.settled()["pinned_items"]) != len(data.paths):
                raise LabError(f"only {pinned} of {len(data.paths)} files were cached")
            for threads in (1, 2):
                figures.append(_compare_guarded(context, mount, data, threads, guards, is_scraped=bool(options)))
    return figures


def _compare_guarded(
    context: Context, mount: mounts.Mount, data: Images, threads: int, guards: str, *, is_scraped: bool
) -> Figure:
    before = mount.status()["revalidation"]["passes"]

    def guarded(n: int) -> float:
        with mount.scraped(_SCRAPE) if is_scraped else nullcontext():
            reader.read(mount.point, data.paths, threads, n)  # what was due while it was stopped is done meanwhile
            return reader.read(mount.point, data.paths, threads, n).files_per_second

    def stopped(n: int) -> float:
        reader.read(mount.point, data.paths, threads, n)  # so that nothing is missing, for which nobody would answer
        with mount.stopped():
            return reader.read(mount.point, data.paths, threads, n).files_per_second

    speeds = alternate(context, context.rounds(_GUARDED_ROUNDS), {"guarded": guarded, "stopped": stopped})
    passes = mount.status()["revalidation"]["passes"] - before
    readers = f"{threads} reader{'s' if threads > 1 else ''}"
    both = ratios(speeds["guarded"], speeds["stopped"])
    low, _, high = quantiles(both) if len(both) > 1 else both * 3
    return Figure(
        f"hits, {readers}: {guards} ÷ with every process of the mount stopped",
        both,
        Bound(0.98, at_least=True),
        f"{median(speeds['guarded']):,.0f} ÷ {median(speeds['stopped']):,.0f} files/s, {passes} passes;"
        f" half of {len(both)} rounds: {low:.3f} – {high:.3f}",
    )


def _warm_speed(root: Path, data: Images, threads: int, seed: int) -> float:
    reader.read(root, data.paths, threads, seed)  # so that nothing is missing, whatever was reclaimed since last time
    return reader.read(root, data.paths, threads, seed + 1).files_per_second
