"""A cluster as one cache: each byte is read from the source once, kept in memory or on a disk, and read by any node.

Nodes as in `peers`. What is counted is what the mounts say that they read from their sources, over all nodes: it is
compared with the dataset, of which each node reads its part of a shuffled epoch.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.peers import ClusterNode, cluster, epoch, from_source
from coordlfs_tools.bench.report import Bound, Context, Figure
from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.machine import drop_caches
from coordlfs_tools.lab.mounts import Mount, command

_FILES = 6_000
_ROOM = 1.15  # of the dataset that all nodes together can cache: shares are drawn by chance
_MEMORY, _DISK = 0.30, 0.90  # of the dataset, over all nodes, where both tiers are used
_ROUNDS = 3
_STEADY = 2  # epochs that are measured
_UNTIL_STEADY = 6
_FETCHES = 50_000_000  # bytes per second that each node may read where all caches are filled at once
_QUIET_WITHIN = 60.0  # seconds


def run(context: Context) -> list[Figure]:
    """Cold epochs, two tiers, a node that dies, and caches that are filled at once."""
    images = context.images()
    data = images if context.quick else images.part(_FILES)
    figures = [figure for count in (2, 4) for figure in _cold(context, data, count)]
    figures += _tiers(context, data, 2)
    figures += _killed(context, data)
    return [*figures, *_warmed(context, images)]


def _size(data: Images) -> int:
    return sum(os.stat(data.root / path).st_size for path in data.paths)


def _shares(data: Images, count: int, share: float = _ROOM) -> list[int]:
    return [int(data.allocated * share / count)] * count


def _cold(context: Context, data: Images, count: int) -> Iterator[Figure]:
    """Number 1: a cold epoch of which each node reads its part."""
    values, seconds = [], []
    for seed in range(context.rounds(_ROUNDS)):
        drop_caches()
        with cluster(context, data, _shares(data, count)) as nodes:
            took, _ = epoch(nodes, data, seed)
            seconds.append(took)
            values.append(sum(from_source(nodes)) / _size(data))
            context.say(f"  {count} nodes, cold: {took:.1f} s, {values[-1]:.3f} x the dataset, {_troubles(nodes)}")
    yield Figure(f"{count} nodes, cold epoch: bytes of all sources ÷ D", values, Bound(1.02), f"{min(seconds):.1f} s")


def _troubles(nodes: list[ClusterNode]) -> str:
    figures = [node.mount.status()["peers"] for node in nodes]
    return ", ".join(f"{sum(f[kind] for f in figures)} {kind}" for kind in ("refusals", "failures", "skipped"))


@contextmanager
def _disks(context: Context, count: int) -> Iterator[list[Path]]:
    directories = [context.directory / f"disk-tier-{number}" for number in range(count)]
    try:
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
        yield directories
    finally:
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)


def _tiers(context: Context, data: Images, count: int) -> Iterator[Figure]:
    """Number 2: steady epochs, where memory alone is too small, and memory and disks are not."""
    disk = int(data.allocated * _DISK / count)
    with _disks(context, count) as directories:

        def options(number: int) -> list[str]:
            return ["--disk-cache", str(directories[number]), "--disk-size", str(disk)]

        drop_caches()
        with cluster(context, data, _shares(data, count, _MEMORY), None, options) as nodes:
            before, seed = [-1], 0
            while (now := from_source(nodes)) != before and seed < _UNTIL_STEADY:
                before = now
                epoch(nodes, data, 100 + seed)
                seed += 1
                for node in nodes:
                    _at_rest(node.mount)
            values = []
            for seed in range(_STEADY):
                before = from_source(nodes)
                took, _ = epoch(nodes, data, seed)
                values.append((sum(from_source(nodes)) - sum(before)) / 1e6)
                context.say(
                    f"  {count} nodes with disks, steady: {took:.1f} s, {values[-1]:.3f} MB, {_troubles(nodes)}"
                )
    yield Figure(
        f"{count} nodes, {_MEMORY:.0%} of D in memory and {_DISK:.0%} on disks: MB from sources in a steady epoch",
        values,
        Bound(0),
    )


def _at_rest(mount: Mount) -> None:
    until = time.monotonic() + _QUIET_WITHIN
    while mount.settled()["disk"]["waiting_blocks"]:
        if time.monotonic() > until:
            raise LabError("the disk tier does not come to rest")
        time.sleep(0.1)


def _killed(context: Context, data: Images) -> Iterator[Figure]:
    """Number 5: of three nodes one dies in the middle of a cold epoch; what the others read again of its share."""
    values = []
    for seed in range(context.rounds(_ROUNDS)):
        drop_caches()
        # Two of them have room for everything.
        with cluster(context, data, _shares(data, 3, _ROOM * 1.5)) as nodes:
            with ThreadPoolExecutor(1) as pool:
                reading = pool.submit(epoch, nodes[:2], data, seed)  # the third reads nothing, and serves
                while sum(from_source(nodes)) < _size(data) / 2:
                    time.sleep(0.05)
                lost = from_source(nodes)[2]
                _kill(nodes[2])
                reading.result()
            epoch(nodes[:2], data, 1000 + seed)
            again = sum(from_source(nodes[:2])) + lost - _size(data)
            values.append(again / (_size(data) / 3))
            context.say(f"  a node dies: {again / 1e6:.1f} MB beyond the dataset")
    yield Figure("3 nodes, one dies in a cold epoch: bytes read twice ÷ its share", values, Bound(1.05))


def _kill(node: ClusterNode) -> None:
    processes = node.mount.status()["processes"]
    for pid in (processes["supervisor"], processes["peer_server"], processes["server"], *processes["keepers"]):
        os.kill(pid, signal.SIGKILL)


def _warmed(context: Context, data: Images) -> Iterator[Figure]:
    """Number 4: `warm --cluster`, each node as fast as its source."""
    values = []
    for _ in range(context.rounds(_ROUNDS)):
        drop_caches()
        with cluster(context, data, _shares(data, 4), _FETCHES) as nodes:
            began = time.monotonic()
            command("warm", nodes[0].mount.point, "--cluster", host=nodes[0].host)
            took = time.monotonic() - began
            read = sum(from_source(nodes))
            ideal = read / (_FETCHES * len(nodes))
            values.append(took / ideal)
            context.say(f"  warm --cluster: {took:.1f} s, {read / 1e6:.0f} MB read")
    yield Figure("warm --cluster, 4 nodes of 50 MB/s: time ÷ bytes ÷ 200 MB/s", values, Bound(1.1))
