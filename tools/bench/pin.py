"""`coordlfs pin`: what it costs readers, what it saves, beside the page cache, `vmtouch -l` and a mount.

The page cache is emptied file by file, so that nothing else on the machine is disturbed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from coordlfs_tools.bench import dataset, loader_runs, reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.loader_job import PHOTOS, PLAIN, Spec
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.cgroups import Cgroup, cgroup
from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.machine import drop_files

from coordlfs.kernel.process import disk_bytes

_READERS = 8
_ROUNDS = 5
_HIT_ROUNDS = 12
_THROTTLE = 100_000_000  # bytes per second
_THROTTLED_FILES = 9_000  # ten seconds
_CAPACITIES = (0.35, 0.50, 0.65, 0.80)  # of the dataset
_JOB_MEMORY = 300_000_000  # bytes
_QUICK_JOB_MEMORY = 24_000_000
_EPOCHS = 2  # that are measured, after the first
_PHOTOS, _BATCH = 3_000, 32  # of a job that decodes what it reads
_SMALL, _SMALL_QUICK, _SMALL_BYTES = 1_000_000, 20_000, 1_000
_SHARE = 0.6  # of them
_IDLE = 60.0  # seconds


def run(context: Context) -> list[Figure]:
    """Hits, first epochs, steady epochs, and a million small files."""
    data = context.images()
    # A directory of its own: what is pinned is all of a directory.
    part = data if context.quick else dataset.images(context.directory, _THROTTLED_FILES)
    figures = _hits(context, data)
    figures += _first_epochs(context, part, _THROTTLE, f"disk of {_THROTTLE / 1e6:.0f} MB/s")
    figures += _first_epochs(context, data, None, "the disk as it is")
    figures.append(_decoding(context))
    for share in _CAPACITIES:
        figures += _steady(context, data, share)
    return [*figures, *_small(context)]


# -- hits ---------------------------------------------------------------------------------------------------------


def _hits(context: Context, data: Images) -> list[Figure]:
    """The same pages, pinned as they are and not: what lies elsewhere in memory is read at another speed."""
    data.forget()
    reader.read(data.root, data.paths, 2, 0)
    speeds: dict[int, dict[str, list[float]]] = {1: {}, 2: {}}
    for readers, found in speeds.items():

        def pinned(number: int, readers: int = readers) -> float:
            with mounts.pinned(data.root, data.allocated * 11 // 10) as pin:
                if (items := pin.settled()["pinned_items"]) != len(data.paths):
                    raise LabError(f"only {items} of {len(data.paths)} files were pinned")
                return speed(number, readers)

        def speed(number: int, readers: int = readers) -> float:
            reader.read(
                data.root, data.paths, readers, number
            )  # what pinning has left in the processor's caches is gone
            return reader.read(data.root, data.paths, readers, number).files_per_second

        found |= alternate(context, context.rounds(_HIT_ROUNDS), {"pinned": pinned, "page cache": speed})
    return [
        Figure(
            f"hits, {readers} reader{'s' * (readers > 1)}: pinned ÷ page cache",
            ratios(found["pinned"], found["page cache"]),
            Bound(0.98, at_least=True),
            f"{median(found['pinned']):,.0f} ÷ {median(found['page cache']):,.0f} files/s",
        )
        for readers, found in speeds.items()
    ]


# -- the first epoch ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Epoch:
    seconds: float
    read: float  # from the disk, in multiples of the dataset
    held: float  # in the end, of the dataset

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.read:.3f} × D read, {self.held:.0%} held"


def _first_epochs(context: Context, data: Images, throttle: int | None, disk: str) -> list[Figure]:
    everything, half = data.allocated * 11 // 10, data.allocated // 2
    files = [data.root / path for path in data.paths]

    def epoch(
        around: Callable[[Cgroup], AbstractContextManager[object]], *, is_apart: bool = False
    ) -> Callable[[int], _Epoch]:
        def once(seed: int) -> _Epoch:
            with cgroup(context.disk, bytes_per_second=throttle) as group:
                data.forget()
                before = group.disk_bytes()
                with around(group) as by:
                    root = by.point if isinstance(by, mounts.Mount) else data.root
                    jobs = _same_disk(group) if is_apart else group
                    seconds = reader.read(root, data.paths, _READERS, seed, jobs).seconds
                    held = by.status()["pinned_bytes"] if isinstance(by, mounts.Mount | mounts.Pinned) else 0
                    return _Epoch(seconds, (group.disk_bytes() - before) / data.allocated, held / data.allocated)

        return once

    sides = {
        "directly": epoch(lambda group: nullcontext()),
        "pin, all": epoch(lambda group: mounts.pinned(data.root, everything, group)),
        "pin, half": epoch(lambda group: mounts.pinned(data.root, half, group)),
        "pin, all, job in another memory cgroup": epoch(
            lambda group: mounts.pinned(data.root, everything, group), is_apart=True
        ),
        "vmtouch -l, half": epoch(lambda group: mounts.vmtouch(files[::2], group)),
        "mount, half": epoch(lambda group: mounts.coordlfs(data.root, half, group)),
    }
    epochs = alternate(context, context.rounds(_ROUNDS), sides)
    theirs = [each.seconds for each in epochs.pop("directly")]
    return [
        Figure(
            f"first epoch, {disk}: {side} ÷ directly",
            ratios([each.seconds for each in ours], theirs),
            Bound(1.05) if side.startswith("pin") else None,
            f"{median(e.seconds for e in ours):.2f} ÷ {median(theirs):.2f} s,"
            f" {median(e.read for e in ours):.3f} × D read"
            + (f", {median(e.held for e in ours):.0%} held at its end" if not side.startswith("vmtouch") else ""),
        )
        for side, ours in epochs.items()
    ]


def _same_disk(group: Cgroup) -> Cgroup:
    """The same limit of the disk, but the memory of this process; with version 2 of cgroups there is no such group."""
    if group.unified:
        raise LabError("jobs of another memory cgroup at the same disk need version 1 of cgroups")
    return Cgroup({"io": group.directories["io"]}, False, group.disk)


def _decoding(context: Context) -> Figure:
    photos = dataset.photographs(context.directory, 10 * _BATCH if context.quick else _PHOTOS)
    files = [path for path in photos.rglob("*") if path.is_file()]
    spec = Spec(PLAIN, PHOTOS, samples=len(files), batch=_BATCH, workers=_READERS, root=str(photos))

    def directly(_: int) -> float:
        drop_files(files)
        return loader_runs.run([spec], skip=1).samples_per_second()

    def pinning(number: int) -> float:
        drop_files(files)
        with mounts.pinned(photos, 2 * sum(path.stat().st_size for path in files)):
            return loader_runs.run([replace(spec)], skip=1).samples_per_second()

    rates = alternate(context, context.rounds(_ROUNDS), {"directly": directly, "pin, all": pinning})
    ours, theirs = rates["pin, all"], rates["directly"]
    return Figure(
        "first epoch, the disk as it is, DataLoader that decodes, pin, all: time, pin ÷ directly",
        ratios(theirs, ours),
        Bound(1.05),
        f"{median(ours):,.0f} ÷ {median(theirs):,.0f} samples/s",
    )


# -- steady epochs ------------------------------------------------------------------------------------------------


def _steady(context: Context, data: Images, share: float) -> Iterator[Figure]:
    """Bytes from the disk ÷ (D − C): 8 readers in a memory cgroup, and what holds the rest in another."""
    capacity = int(data.allocated * share)
    memory = _QUICK_JOB_MEMORY if context.quick else _JOB_MEMORY

    @contextmanager
    def by_pin(group: Cgroup) -> Iterator[tuple[Path, int]]:
        with mounts.pinned(data.root, capacity, group) as pin:
            yield data.root, pin.settled()["pinned_bytes"]

    @contextmanager
    def by_vmtouch(group: Cgroup) -> Iterator[tuple[Path, int]]:
        chosen = data.part(int(len(data.paths) * share))
        with mounts.vmtouch([data.root / path for path in chosen.paths], group) as process:
            _until_locked(process.pid, chosen.allocated)
            yield data.root, chosen.allocated

    @contextmanager
    def by_mount(group: Cgroup) -> Iterator[tuple[Path, int]]:
        with mounts.coordlfs(data.root, capacity, group) as mount:
            mount.warm()
            yield mount.point, mount.settled()["pinned_bytes"]

    for name, around in (("pin", by_pin), ("vmtouch -l", by_vmtouch), ("mount", by_mount)):
        data.forget()
        with cgroup(context.disk) as holder, cgroup(context.disk, memory=memory) as job, around(holder) as (root, held):
            misses = data.allocated - held
            read = []
            for seed in range(context.rounds(_EPOCHS)):
                before = holder.disk_bytes() + job.disk_bytes()
                reader.read(root, data.paths, _READERS, seed, job)
                read.append(holder.disk_bytes() + job.disk_bytes() - before)
                context.say(f"  capacity {share:.0%}, {name}: {read[-1] / 1e6:,.0f} MB read")
        yield Figure(
            f"steady epochs, capacity {share:.0%}: {name}, read ÷ (D − C)",
            [nbytes / misses for nbytes in read],
            Bound(1.02) if name == "pin" else None,
            f"{median(read) / 1e6:,.0f} MB read, D − C = {misses / 1e6:,.0f} MB",
        )


def _until_locked(pid: int, nbytes: int) -> None:
    deadline = time.monotonic() + 600
    while _kib(pid, "VmLck") << 10 < nbytes * 0.999:
        if time.monotonic() > deadline:
            raise LabError("vmtouch has not locked all within 10 minutes")
        time.sleep(0.2)


def _kib(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return 0


# -- a million small files ----------------------------------------------------------------------------------------


def _small(context: Context) -> list[Figure]:
    files = _SMALL_QUICK if context.quick else _SMALL
    root = dataset.small(context.directory, files, _SMALL_BYTES)
    wanted = int(files * _SHARE)
    drop_files(path for path in root.rglob("*") if path.is_file())
    began = time.monotonic()
    with mounts.pinned(root, wanted * 4096, options=["--revalidate", "10m"]) as pin:
        while pin.status()["pinned_items"] < wanted:
            if time.monotonic() > began + 1800:
                raise LabError(f"{pin.status()['pinned_items']} of {wanted} files are pinned after half an hour")
            time.sleep(0.5)
        took = time.monotonic() - began
        processes = pin.settled()["processes"]
        pids = [processes["server"], *processes["keepers"]]
        busy = sum(map(_cpu, pids))
        memory = [_kib(pid, "RssAnon") << 10 for pid in pids]
        time.sleep(1 if context.quick else _IDLE)
        idle = (sum(map(_cpu, pids)) - busy) / (1 if context.quick else _IDLE)
        read = sum(disk_bytes(pid) or 0 for pid in pids)
    what = f"{wanted:,} of {files:,} files of {_SMALL_BYTES} bytes"
    return [
        Figure(
            f"{what}: seconds until they are pinned",
            [took],
            None,
            f"{read / 1e6:,.0f} MB read, {len(pids) - 1} keepers",
        ),
        Figure(f"{what}: CPU of all processes for each pinned file, µs", [busy / wanted * 1e6], None, ""),
        Figure(f"{what}: memory of the pinner for each file of the directory, bytes", [memory[0] / files], None, ""),
        Figure(f"{what}: memory of the keepers for each pinned file, bytes", [sum(memory[1:]) / wanted], None, ""),
        Figure(f"{what}: CPU while nothing happens, % of one processor", [idle * 100], None, "with --revalidate 10m"),
    ]


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
