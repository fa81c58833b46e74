"""A tree of a million files: listing it through the mount and directly, and what the server remembers of it."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios
from coordlfs_tools.lab import idle_reclaim, mounts
from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.machine import drop_caches
from coordlfs_tools.lab.processes import memory

_ROUNDS = 3
_LIMIT = 900.0  # seconds that a listing may take
_AGAIN = 3  # listings of which the one with the fewest requests counts: whatever reclaims pages causes some
_STATFS = 1  # requests: find asks once of what kind the file system is, which no kernel remembers


@dataclass(frozen=True, slots=True)
class _Listings:
    """Seconds of both listings; of a mount also bytes of its server for each file, and requests of the second."""

    cold: float
    again: float
    memory: float = 0.0
    catalog: float = 0.0
    requests: int = 0

    def __str__(self) -> str:
        return f"{self.cold:.2f} s cold, {self.again:.2f} s again"


def run(context: Context) -> list[Figure]:
    """`find` once cold and once again; the server's memory for each file; the requests of the second time."""
    root, files = context.names()
    rounds = alternate(
        context,
        context.rounds(_ROUNDS),
        {"mount": lambda _: _list_mount(root, files), "source": lambda _: _list_source(root, files)},
    )
    ours, theirs = rounds["mount"], rounds["source"]

    def times(what: str, mount: list[float], source: list[float]) -> Figure:
        sides = f"{median(mount):.2f} ÷ {median(source):.2f} s"
        return Figure(f"tree, find {what}: mount ÷ directly", ratios(mount, source), None, sides)

    reclaim = "this machine reclaims idle pages (DAMON), of listings too" if idle_reclaim.reclaims_idle_pages() else ""
    catalog = f"of which its catalogue takes {median(r.catalog for r in ours):.0f}"
    return [
        times("cold", [r.cold for r in ours], [r.cold for r in theirs]),
        times("again", [r.again for r in ours], [r.again for r in theirs]),
        Figure(
            "tree, find again: requests that the server received, but for find's own STATFS",
            [r.requests for r in ours],
            Bound(0),
            reclaim,
        ),
        Figure("tree, server memory: bytes for each file", [r.memory for r in ours], Bound(400), catalog),
    ]


def _list_source(root: Path, files: int) -> _Listings:
    drop_caches()
    return _Listings(_find(root, files), _find(root, files))


def _list_mount(root: Path, files: int) -> _Listings:
    with mounts.coordlfs(root, 0) as mount:
        server = mount.status()["processes"]["server"]
        before = _memory(server)
        drop_caches()
        cold = _find(mount.point, files)
        grown = _memory(server) - before
        again = [_find_again(mount, files) for _ in range(_AGAIN)]
        catalog = mount.status()["catalog_bytes"]
        return _Listings(cold, again[0][0], grown / files, catalog / files, min(received for _, received in again))


def _find_again(mount: mounts.Mount, files: int) -> tuple[float, int]:
    requests = mounts.RequestCount(mount)
    return _find(mount.point, files), requests.so_far() - _STATFS


def _find(root: Path, files: int) -> float:
    start = time.monotonic()
    found = subprocess.run(["find", str(root)], stdout=subprocess.PIPE, timeout=_LIMIT, check=True).stdout
    seconds = time.monotonic() - start
    if found.count(b"\n") < files:
        raise LabError(f"find saw only {found.count(bytes([10]))} names of {files} below {root}")
    return seconds


def _memory(pid: int) -> int:
    """Bytes of the process that no file backs: its own, and those of the catalogue, which is shared memory."""
    return memory(pid, "RssAnon", "RssShmem")
