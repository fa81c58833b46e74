"""A cluster as one cache: each byte is read from the source once, kept in memory or on a disk, and read by any node.

Nodes as in `peers`. What is counted is what the mounts say that they read from their sources, over all nodes: it is
compared with the dataset, of which each node reads its part of a shuffled epoch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from coordlfs_tools.bench import reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.peers import ClusterNode, cluster, epoch, from_source
from coordlfs_tools.bench.report import Bound, Context, Figure
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.machine import drop_caches, drop_pages
from coordlfs_tools.lab.mounts import Mount, command
from coordlfs_tools.lab.relay import relayed

_FILES = 6_000
_ROOM = 1.15  # of the dataset that all nodes together can cache: shares are drawn by chance
_MEMORY, _DISK = 0.30, 0.90  # of the dataset, over all nodes, where both tiers are used
_ROUNDS = 3
_STEADY = 2  # epochs that are measured
_UNTIL_STEADY = 6
_FETCHES = 50_000_000  # bytes per second that each node may read where all caches are filled at once
_QUIET_WITHIN = 60.0  # seconds
_DELAY = 0.005  # seconds each way, of a link
_FAR_FILES, _QUICK_FAR_FILES = 2_000, 500
_PORTS = 7171, 7172, 7173  # of the asker, the owner, and the link to it
_LIMIT = 300.0  # seconds

_READING = """
import json, random, sys, time
from coordlfs_loader import HintedSampler

given = json.load(sys.stdin)
paths = given["paths"]
order = list(range(len(paths)))
random.Random(given["seed"]).shuffle(order)
begun = time.perf_counter()
for index in HintedSampler(order, paths) if given["hints"] else order:
    with open(paths[index], "rb", buffering=0) as f:
        f.read()
print(len(order) / (time.perf_counter() - begun))
"""


def run(context: Context) -> list[Figure]:
    """Cold epochs, two tiers, a node that dies, and caches that are filled at once."""
    images = context.images()
    data = images if context.quick else images.part(_FILES)
    figures = [figure for count in (2, 4) for figure in _cold(context, data, count)]
    figures += _tiers(context, data, 2)
    figures += _killed(context, data)
    figures += _far(context, images.part(_QUICK_FAR_FILES if context.quick else _FAR_FILES))
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


def _far(context: Context, data: Images) -> Iterator[Figure]:
    """What one reader gets of a node that is a slow link away, for each time that a request goes there and back."""
    asker, owner, link = _PORTS
    listening = (["--listen", f"127.0.0.1:{port}"] for port in (asker, owner))
    here, there = ([*listen, "--peers", f"127.0.0.1:{to}"] for listen, to in zip(listening, (link, asker), strict=True))
    with (
        relayed(link, owner, _DELAY),
        mounts.coordlfs(data.root, int(data.allocated * _ROOM), options=there) as far,
        mounts.coordlfs(data.root, 0, options=here) as near,
    ):
        near.wait_for_peers(1)
        reader.read(far.point, data.paths, 8, 0)
        far.settled()
        for hints, files in ((False, data.paths[:200]), (True, data.paths)):
            values = []
            for seed in range(context.rounds(_ROUNDS)):
                drop_pages()
                values.append(_read_in_order(near, files, seed, hints=hints) * 2 * _DELAY)
                context.say(f"  over the link, hints {hints}: {values[-1]:.1f} files a round trip")
            with_hints = "with hints" if hints else "without"
            yield Figure(
                f"a node {2000 * _DELAY:.0f} ms there and back, one reader {with_hints}: files for each round trip",
                values,
                Bound(8, at_least=True) if hints else None,
            )


def _read_in_order(mount: Mount, paths: list[str], seed: int, *, hints: bool) -> float:
    """Read the files one after the other, as a training that announces its order; files a second."""
    given = {"paths": [str(mount.point / path) for path in paths], "seed": seed, "hints": hints}
    argv = [sys.executable, "-c", _READING]
    done = subprocess.run(argv, input=json.dumps(given), capture_output=True, text=True, timeout=_LIMIT, check=True)
    return float(done.stdout)


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
