"""Memory and disk as one cache: what a steady epoch reads, what the first one costs, and what a reset leaves.

The disk tier lies on the disk that the source is on. The mount's own figures tell one from the other; the kernel's, of
what its processes read, are shown beside them. Only pages of the data that is read are dropped, not the machine's.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from coordlfs_tools.bench import dataset, filled_store, reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.cgroups import cgroup
from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.mounts import Mount

from coordlfs.kernel import pages

_SHARES = (0.20, 0.30), (0.35, 0.35), (0.10, 0.90), (0.50, 0.50)  # of the dataset: memory, disk
_READERS = 8
_FILES = 8_000
_UNTIL_STEADY = 10  # epochs, at most
_EPOCHS = 2  # that are measured, after the first
_JOB_MEMORY, _QUICK_JOB_MEMORY = 150_000_000, 24_000_000  # bytes
_ROUNDS = 3
_THROTTLES = 100_000_000, 250_000_000  # bytes per second, of the source
_SLOW_DISK = 10_000_000  # bytes per second that may be written
_OVERHEAD = 1.02  # of the disk's share, for the index and names
_SETTLES_WITHIN = 120.0  # seconds
_SMALL, _SMALL_QUICK, _SMALL_BYTES = 1_000_000, 20_000, 1_000  # files of the store that is mounted, and bytes of each
_MOUNT_ROUNDS = 5
_LARGE, _LARGE_QUICK = 4 << 30, 64 << 20  # bytes of one file
_PIECE, _PIECES = 1 << 20, 2_000  # of it, which are read at random


def run(context: Context) -> list[Figure]:
    """The law over two tiers, the first epoch, and a restart."""
    data = context.images().part(1_000 if context.quick else _FILES)
    figures = [figure for memory, disk in _SHARES for figure in _law(context, data, memory, disk)]
    figures += _hits(context, data)
    figures += _large_file(context)
    figures += [figure for throttle in _THROTTLES for figure in _first_epoch(context, data, throttle)]
    return [*figures, *_restart(context, data), *_large_store(context)]


@contextmanager
def _directory(context: Context) -> Iterator[Path]:
    """An empty directory for a disk tier."""
    directory = context.directory / "disk-tier"
    shutil.rmtree(directory, ignore_errors=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _options(directory: Path, size: float) -> list[str]:
    return ["--disk-cache", str(directory), "--disk-size", str(int(size))]


def _settled(mount: Mount) -> dict[str, Any]:
    """The figures as soon as nothing is on its way into either tier."""
    until = time.monotonic() + _SETTLES_WITHIN
    while (figures := mount.settled())["disk"]["waiting_blocks"]:
        if time.monotonic() > until:
            raise LabError("the disk tier does not come to rest")
        time.sleep(0.1)
    return figures


# -- the law ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Places:
    """Bytes of the dataset, by where they are."""

    memory: int
    disk: int
    nowhere: int


def _places(mount: Mount, data: Images) -> _Places:
    found: Counter[str] = Counter()
    for path in data.paths:
        found[os.getxattr(mount.point / path, "user.coordl.cached").decode()] += os.stat(data.root / path).st_size
    return _Places(found["pinned"], found["disk"], found["no"])


def _fill(mount: Mount, read: Callable[[int], object]) -> dict[str, Any]:
    """Read all of it until an epoch adds nothing to the disk, which may not keep up with a fast source; the figures."""
    figures = _settled(mount)
    for seed in range(_UNTIL_STEADY):
        read(seed)
        before, figures = figures, _settled(mount)
        if seed and figures["disk"]["written_bytes"] == before["disk"]["written_bytes"]:
            break
    return figures


def _law(context: Context, data: Images, memory: float, disk: float) -> Iterator[Figure]:
    of_source: list[float] = []
    of_disk: list[float] = []
    job_memory = _QUICK_JOB_MEMORY if context.quick else _JOB_MEMORY
    with (
        _directory(context) as directory,
        cgroup(context.disk) as servers,
        cgroup(context.disk, memory=job_memory) as job,
        mounts.coordlfs(
            data.root,
            int(data.allocated * memory * (1.005 if memory + disk >= 1 else 1)),
            servers,
            options=_options(directory, data.allocated * disk * _OVERHEAD),
        ) as mount,
    ):
        before = _fill(mount, lambda seed: reader.read(mount.point, data.paths, _READERS, seed, job))
        for seed in range(_UNTIL_STEADY, _UNTIL_STEADY + context.rounds(_EPOCHS)):
            places, counted = _places(mount, data), servers.disk_bytes()
            reader.read(mount.point, data.paths, _READERS, seed, job)
            after = _settled(mount)
            source = after["source"]["bytes"] - before["source"]["bytes"]
            from_disk = after["disk"]["read_bytes"] - before["disk"]["read_bytes"]
            counted = servers.disk_bytes() - counted
            of_source.append(source / places.nowhere if places.nowhere else source)
            of_disk.append(from_disk / max(1, places.disk))
            context.say(
                f"  memory {memory:.0%}, disk {disk:.0%}: source {source / 1e6:,.1f} MB of {places.nowhere / 1e6:,.1f},"
                f" disk {from_disk / 1e6:,.1f} MB of {places.disk / 1e6:,.1f}; the kernel counts {counted / 1e6:,.1f}"
            )
            before = after
    name = f"memory {memory:.0%}, disk {disk:.0%}: steady epoch"
    least = "÷ (D − memory − disk)" if places.nowhere else "which is all cached, bytes"
    yield Figure(f"{name}, read of the source {least}", of_source, Bound(1.02 if places.nowhere else 0))
    yield Figure(f"{name}, read of the disk tier ÷ what is there only", of_disk, Bound(1.05))


# -- hits of the disk tier ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass over the files; of the mount also what its server did."""

    rate: float  # files per second
    microseconds: float = 0.0  # of the server's processors, for each file
    turns: float = 0.0  # times that it took the GIL for 1,000 files

    def __str__(self) -> str:
        return f"{self.rate:,.0f} files/s, {self.microseconds:.0f} µs and {self.turns / 1000:.3f} turns a file"


def _hits(context: Context, data: Images) -> Iterator[Figure]:
    """Files that are on the disk tier only, against the same files on the same disk with O_DIRECT, and by bindfs."""
    with (
        _directory(context) as directory,
        mounts.coordlfs(data.root, 0, options=_options(directory, data.allocated * 1.1)) as mount,
        mounts.bindfs(data.root) as bindfs,
    ):
        reader.read(mount.point, data.paths, _READERS, 0)
        if _settled(mount)["disk"]["held_bytes"] < sum(os.stat(data.root / path).st_size for path in data.paths):
            mount.warm()

        server = mount.status()["processes"]["server"]

        def hits(seed: int) -> _Pass:
            _forget(mount.point, data)
            asked = _turns(mount.status())
            before = mount.status()
            asked, cpu = _turns(before) - asked, _cpu(server)  # what it takes to ask
            rate = reader.read(mount.point, data.paths, _READERS, 1 + seed).files_per_second
            used, after = _cpu(server) - cpu, mount.status()
            reads = after["disk"]["reads"] - before["disk"]["reads"]
            return _Pass(rate, used / reads * 1e6, (_turns(after) - _turns(before) - asked) / reads * 1000)

        def directly(seed: int) -> _Pass:
            return _Pass(reader.read(data.root, data.paths, _READERS, 1 + seed, direct=True).files_per_second)

        def by_bindfs(seed: int) -> _Pass:
            _forget(bindfs, data)
            _forget(data.root, data)
            return _Pass(reader.read(bindfs, data.paths, _READERS, 1 + seed).files_per_second)

        sides = {"disk tier": hits, "directly": directly, "bindfs": by_bindfs}
        passes = alternate(context, context.rounds(_ROUNDS), sides)
    ours = passes["disk tier"]
    rates = {side: [each.rate for each in them] for side, them in passes.items()}
    for side, bound in (("directly", 0.85), ("bindfs", 1.3)):
        yield Figure(
            f"hits of the disk tier, files/s: mount ÷ {'O_DIRECT' if side == 'directly' else 'bindfs'}",
            ratios(rates["disk tier"], rates[side]),
            Bound(bound, at_least=True),
            f"{median(rates['disk tier']):,.0f} ÷ {median(rates[side]):,.0f}",
        )
    yield Figure("hits of the disk tier: µs of the server's processors for each", [each.microseconds for each in ours])
    yield Figure(
        "hits of the disk tier: times that the GIL is taken for 1,000", [each.turns for each in ours], Bound(5)
    )


def _forget(root: Path, data: Images) -> None:
    """Have the kernel drop the pages of the files that nobody holds."""
    for path in data.paths:
        fd = os.open(root / path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _drop(directory: Path) -> None:
    """Have the kernel drop the pages of every file below a directory."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path) as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _turns(figures: dict[str, Any]) -> int:
    return int(figures["requests"]["turns"])


def _cpu(server: int) -> float:
    """Seconds that a process has run so far."""
    with open(f"/proc/{server}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- one large file ------------------------------------------------------------------------------------------------


def _large_file(context: Context) -> Iterator[Figure]:
    """Pieces of one file that is on the disk tier only, against the same pieces with O_DIRECT."""
    size = _LARGE_QUICK if context.quick else _LARGE
    root = dataset.large(context.directory, size)
    with _directory(context) as directory, mounts.coordlfs(root, 0, options=_options(directory, size * 1.1)) as mount:
        mount.warm()
        held = _settled(mount)["disk"]["held_bytes"]
        if held < size:
            raise LabError(f"of {size} bytes {held} are on the disk tier")
        server = mount.status()["processes"]["server"]

        def hits(seed: int) -> float:
            _drop(mount.point)
            cpu, before = _cpu(server), mount.status()["source"]["bytes"]
            seconds = _read_pieces(mount.point / dataset.LARGE, seed, os.O_RDONLY)
            if mount.status()["source"]["bytes"] != before:
                raise LabError("the source was read")
            context.say(f"  {(_cpu(server) - cpu) / min(_PIECES, size // _PIECE) * 1e6:.0f} µs of the server a piece")
            return seconds

        def directly(seed: int) -> float:
            return _read_pieces(root / dataset.LARGE, seed, os.O_RDONLY | os.O_DIRECT)

        seconds = alternate(context, context.rounds(_ROUNDS), {"directly": directly, "disk tier": hits})
    yield Figure(
        f"one file of {size >> 20:,} MiB, pieces of 1 MiB at random, pieces/s: mount ÷ O_DIRECT",
        ratios(seconds["directly"], seconds["disk tier"]),
        Bound(0.85, at_least=True),
        f"{median(seconds['disk tier']):.2f} ÷ {median(seconds['directly']):.2f} s",
    )


def _read_pieces(path: Path, seed: int, flags: int) -> float:
    """Seconds that it takes to read some pieces of a file in a random order, each once."""
    pieces = list(range(path.stat().st_size // _PIECE))
    random.Random(seed).shuffle(pieces)
    fd, local = os.open(path, flags), threading.local()

    def read(piece: int) -> None:
        if not hasattr(local, "room"):
            local.room = pages.buffer(_PIECE)
        if os.preadv(fd, [local.room], piece * _PIECE) != _PIECE:
            raise LabError(f"{path} is shorter than it was")

    try:
        with ThreadPoolExecutor(_READERS) as pool:
            began = time.monotonic()
            list(pool.map(read, pieces[:_PIECES]))
            return time.monotonic() - began
    finally:
        os.close(fd)


# -- the first epoch ----------------------------------------------------------------------------------------------


def _first_epoch(context: Context, data: Images, throttle: int) -> Iterator[Figure]:
    def directly(seed: int) -> float:
        with cgroup(context.disk, bytes_per_second=throttle) as group:
            _forget(data.root, data)
            return reader.read(data.root, data.paths, _READERS, seed, group).seconds

    kept: dict[str, list[float]] = {}

    def filling(side: str, written_per_second: int | None) -> Callable[[int], float]:
        def epoch(seed: int) -> float:
            with (
                _directory(context) as directory,
                cgroup(context.disk, bytes_per_second=throttle, written_per_second=written_per_second) as group,
                mounts.coordlfs(
                    data.root, int(data.allocated * 0.3), group, options=_options(directory, data.allocated * 1.1)
                ) as mount,
            ):
                _forget(data.root, data)
                seconds = reader.read(mount.point, data.paths, _READERS, seed, group).seconds
                kept.setdefault(side, []).append(mount.status()["disk"]["written_bytes"] / data.allocated)
                return seconds

        return epoch

    sides = {
        "directly": directly,
        "disk tier": filling("disk tier", None),
        "disk tier on a disk that writes 10 MB/s": filling("disk tier on a disk that writes 10 MB/s", _SLOW_DISK),
    }
    times = alternate(context, context.rounds(_ROUNDS), sides)
    theirs = times.pop("directly")
    for side, ours in times.items():
        yield Figure(
            f"first epoch, source of {throttle / 1e6:.0f} MB/s, {side}: mount ÷ directly",
            ratios(ours, theirs),
            Bound(1.1),
            f"{median(ours):.2f} ÷ {median(theirs):.2f} s, {median(kept[side]):.0%} of D kept on disk by its end",
        )


# -- a reset ------------------------------------------------------------------------------------------------------


def _restart(context: Context, data: Images) -> Iterator[Figure]:
    """Everything is killed, the page cache emptied, and mounted again: the next epoch reads what is not on the disk."""
    read, seconds = [], []
    total = sum(os.stat(data.root / path).st_size for path in data.paths)
    size = int(data.allocated * 0.2)
    with _directory(context) as directory:
        options = _options(directory, data.allocated * 0.6)
        held, on_disk = _killed(data, size, options)
        for seed in range(context.rounds(_ROUNDS)):
            _forget(data.root, data)
            _drop(directory)
            began = time.monotonic()
            with mounts.coordlfs(data.root, size, options=options) as mount:
                (mount.point / on_disk).read_bytes()
                seconds.append(time.monotonic() - began)
                reader.read(mount.point, data.paths, _READERS, 10 + seed)
                read.append(_settled(mount)["source"]["bytes"] / (total - held))
            held, on_disk = _killed(data, size, options)
    yield Figure("all killed, mounted again: first epoch, read of the source ÷ (D − disk)", read, Bound(1.02))
    files = f"{len(data.paths):,} files"
    yield Figure(f"all killed, mounted again: seconds from mount to first hit, {files}", seconds, Bound(1.0))


def _large_store(context: Context) -> Iterator[Figure]:
    """A store of a million files that nothing of is in memory: from mount to the first hit."""
    files = _SMALL_QUICK if context.quick else _SMALL
    root = dataset.small(context.directory, files, _SMALL_BYTES)
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.bin"))
    size = files * 8192  # a unit for each file, rows and names, and pieces that are not full
    seconds, memory = [], []
    with _directory(context) as directory:
        filled_store.fill(directory, root, paths, size)
        for number in range(context.rounds(_MOUNT_ROUNDS)):
            _drop(directory)
            began = time.monotonic()
            with mounts.coordlfs(root, 0, options=_options(directory, size)) as mount:
                (mount.point / paths[number * 7919 % files]).read_bytes()
                seconds.append(time.monotonic() - began)
                disk = _settled(mount)["disk"]
                if disk["held_blocks"] != files or not disk["reads"]:
                    raise LabError(f"of {files} files {disk['held_blocks']} are there: {disk['reads']} were read")
                memory.append(disk["index_memory_bytes"] / files)
    yield Figure(f"a store of {files:,} files: seconds from mount to first hit", seconds, Bound(1.0))
    yield Figure(
        f"a store of {files:,} files: bytes of memory for each, beside its row of 64 in the page cache",
        memory,
    )


def _killed(data: Images, size: int, options: list[str]) -> tuple[int, str]:
    """A mount that is filled and whose processes are killed then: bytes on its disk, and a file that is there."""
    with mounts.coordlfs(data.root, size, options=options) as mount:
        for seed in range(2):
            reader.read(mount.point, data.paths, _READERS, seed)
        figures = _settled(mount)
        on_disk = next(path for path in data.paths if _cached(mount, path) == "disk")
        processes = figures["processes"]
        for pid in (processes["supervisor"], processes["server"], *processes["keepers"]):
            os.kill(pid, signal.SIGKILL)
        return figures["disk"]["held_bytes"], on_disk


def _cached(mount: Mount, path: str) -> str:
    return os.getxattr(mount.point / path, "user.coordl.cached").decode()
