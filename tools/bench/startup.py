"""Starting: the package and the command, and from `mount` to the first byte of a file in a tree of a million."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from coordlfs_tools.bench import dataset
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.machine import drop_caches

_COMMAND_ROUNDS = 11
_MOUNT_ROUNDS = 5


def run(context: Context) -> list[Figure]:
    """Seconds, and how many times as long as the same without coordlfs."""
    return [*_commands(context), *_first_byte(context)]


def _commands(context: Context) -> list[Figure]:
    seconds = alternate(
        context,
        context.rounds(_COMMAND_ROUNDS),
        {
            "python": _timed([sys.executable, "-c", "pass"]),
            "import coordlfs": _timed([sys.executable, "-c", "import coordlfs"]),
            "coordlfs --help": _timed([mounts.COORDLFS, "--help"]),
        },
    )
    bare = f"python alone: {median(seconds.pop('python')):.3f} s"
    return [Figure(f"startup, {what}: seconds", values, Bound(0.3), bare) for what, values in seconds.items()]


def _timed(argv: list[str]) -> Callable[[int], float]:
    def run_once(_: int) -> float:
        start = time.monotonic()
        subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
        return time.monotonic() - start

    return run_once


def _first_byte(context: Context) -> list[Figure]:
    root, _ = context.names()
    rounds = context.rounds(_MOUNT_ROUNDS)
    figures = []
    for cold, disk in ((False, "warm"), (True, "cold disk")):
        seconds = alternate(
            context,
            rounds,
            {f"mount, {disk}": _mount_and_read(root, cold), f"source, {disk}": _read(root, cold)},
        )
        ours, theirs = seconds.values()
        sides = f"reading it directly: {median(theirs):.4f} s; ratio {median(ratios(ours, theirs)):,.0f}"
        figures.append(Figure(f"startup, {disk}: mount to first byte, seconds", ours, Bound(1), sides))
    return figures


def _mount_and_read(root: Path, cold: bool) -> Callable[[int], float]:
    def run_once(_: int) -> float:
        if cold:
            drop_caches()
        start = time.monotonic()
        with mounts.coordlfs(root, 1 << 30) as mount:
            (mount.point / dataset.FIRST).read_bytes()
            return time.monotonic() - start

    return run_once


def _read(root: Path, cold: bool) -> Callable[[int], float]:
    def run_once(_: int) -> float:
        if cold:
            drop_caches()
        start = time.monotonic()
        (root / dataset.FIRST).read_bytes()
        return time.monotonic() - start

    return run_once
