"""The disk tier while its disk fails, hangs, fills up or goes away, and its processes are killed: no reader notices."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from coordlfs_tools.lab.disks import IMAGE, faulty_disk
from coordlfs_tools.lab.faulty_fs import Faulty
from mounts import MIB, MakeMount, Mount, coordlfs, eventually, forget, noise, read, write_files
from tiers import FILES, ROOM, SIZE, epoch, settle

from coordlfs.commands import client

_ROUNDS = max(1, int(os.environ.get("COORDLFS_TEST_ROUNDS", 8)))
_BOUND = 20.0  # seconds that a read may take, on a machine that is busy: the disk is waited for 2 to 3


@dataclass
class Readers:
    """Who reads files in random order, and compares every byte, until the end."""

    reads: int = 0
    longest: float = 0.0
    problems: list[str] = field(default_factory=list)


@contextmanager
def reading(mount: Mount, names: list[str], count: int = 3) -> Iterator[Readers]:
    """Threads that read all the while; whatever they got other than right bytes fails the test."""
    contents = {name: read(mount.source / name) for name in names}
    found, ended = Readers(), threading.Event()

    def read_on(seed: int) -> None:
        rng = random.Random(seed)
        while not ended.is_set():
            name, began = rng.choice(names), time.monotonic()
            try:
                if read(mount.path / name) != contents[name]:
                    found.problems.append(f"{name}: wrong bytes")
                with suppress(OSError):
                    forget(mount.path / name)
            except OSError as e:
                found.problems.append(f"{name}: {e}")
            found.longest = max(found.longest, time.monotonic() - began)
            found.reads += 1

    with ThreadPoolExecutor(count) as pool:
        threads = [pool.submit(read_on, seed) for seed in range(count)]
        try:
            yield found
        finally:
            ended.set()
        for thread in threads:
            thread.result()
    assert not found.problems, found.problems[:5]
    assert found.longest < _BOUND


def on_disk(mount: Mount, names: list[str]) -> set[str]:
    return {name for name in names if mount.cached(name) == "disk"}


def gives_all(mount: Mount, names: list[str]) -> None:
    """An epoch is read from the disk alone; sooner or later, as such a disk is slow on a busy machine."""

    def is_given() -> bool:
        eventually(lambda: mount.stats()["disk"]["resting"] is None)
        return epoch(mount, names, 3) == 0

    eventually(is_given)
    assert mount.stats()["disk"]["stopped"] is None


def are_on_disk(mount: Mount, names: set[str]) -> bool:
    """Or in memory, by now."""
    return all(mount.cached(name) != "no" for name in names)


def test_processes_are_killed_while_it_writes(source: Path, mount: MakeMount, place: Path) -> None:
    """Zero wrong bytes, zero errors, and what was durable when a server was killed is there for the next one."""
    names = write_files(source, FILES, SIZE)
    mounted = mount(source, str(20 * ROOM), "--disk-cache", place / "cache", "--disk-size", "24M")
    mounted.expect_errors = True
    rng = random.Random(7)
    with reading(mounted, names) as readers:
        for number in range(_ROUNDS):
            victims = rng.sample(names, 30)
            client.drop(str(mounted.path), [str(mounted.path / name) for name in victims])  # which are read anew
            time.sleep(rng.uniform(0, 0.3))
            before = on_disk(mounted, names)
            processes = mounted.stats()["processes"]
            pids = [processes["server"]] if number % 4 else [processes["server"], *processes["keepers"]]
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            eventually(partial(are_on_disk, mounted, before), what="what was durable is lost")
    assert readers.reads > 10 * _ROUNDS
    figures = settle(mounted)
    assert figures["bad_blocks"] == 0
    assert epoch(mounted, names, 1) <= FILES * SIZE
    assert epoch(mounted, names, 2) == 0


@pytest.fixture
def faulty(place: Path) -> Iterator[tuple[Faulty, Path]]:
    """A disk of 48 MiB that fails when it is told to, and where it is mounted."""
    with faulty_disk(place / "faulty disk", 48 * MIB) as made:
        yield made


def test_a_disk_whose_reads_fail(source: Path, faulty: tuple[Faulty, Path], mount: MakeMount) -> None:
    names, (disk, at) = write_files(source, FILES, SIZE), faulty
    mounted = mount(source, "0", "--disk-cache", at / "cache", "--disk-size", "24M")
    for seed in (0, 1):
        epoch(mounted, names, seed)
    disk.set(f"read {IMAGE}", errno=5)
    with reading(mounted, names) as readers:
        eventually(lambda: readers.reads > 3 * FILES)
    disk.clear()
    figures = mounted.stats()
    assert figures["disk"]["bad_blocks"] > 0
    assert figures["source"]["errors"] == 0
    gives_all(mounted, names)
    mounted.end()


def test_a_disk_whose_writes_fail(source: Path, faulty: tuple[Faulty, Path], mount: MakeMount) -> None:
    names, (disk, at) = write_files(source, FILES, SIZE), faulty
    mounted = mount(source, "0", "--disk-cache", at / "cache", "--disk-size", "24M")
    epoch(mounted, names[:40], 0)
    disk.set(f"write {IMAGE}", errno=5)
    with reading(mounted, names) as readers:
        eventually(lambda: readers.reads > 3 * FILES and mounted.stats()["disk"]["stopped"])
    assert mounted.log.read_text().count("nothing more is kept") == 1
    figures = mounted.stats()
    assert figures["source"]["errors"] == 0
    disk.clear()
    client.drop(str(mounted.path), [str(mounted.path / names[0])])  # an order to who writes no more
    used = cpu_seconds(figures["processes"]["server"])
    time.sleep(1)
    assert cpu_seconds(figures["processes"]["server"]) - used < 0.5
    mounted.end()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("readers", "depth"), [(4, 128), (200, 128), (40, 4)])
def test_a_disk_that_hangs(
    source: Path, faulty: tuple[Faulty, Path], mount: MakeMount, readers: int, depth: int
) -> None:
    """Also when more READs wait for it than it is asked at once, and when it takes no more of them."""
    names, (disk, at) = write_files(source, FILES, SIZE), faulty
    number = os.stat(at).st_dev
    Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue/nr_requests").write_text(str(depth))
    (source / "large").write_bytes(noise(8 * MIB, 9))
    mounted = mount(source, "0", "--disk-cache", at / "cache", "--disk-size", "32M")
    for seed in (0, 1):
        epoch(mounted, [*names, "large"], seed)
    disk.set(f"read {IMAGE}", hangs=True)
    began = time.monotonic()
    mounted.read_all([*names, "large"] * 3, 2, readers)
    mounted.forget()
    assert time.monotonic() - began < 60
    assert "has not answered" in mounted.stats()["disk"]["resting"]
    disk.clear()
    if readers == 4:  # it takes half a minute
        gives_all(mounted, [*names, "large"])
    mounted.end()


def test_a_disk_that_hangs_while_it_is_written_to(source: Path, faulty: tuple[Faulty, Path], mount: MakeMount) -> None:
    """Neither readers, nor commands, nor the end of the mount wait for it."""
    names, (disk, at) = write_files(source, FILES, SIZE), faulty
    mounted = mount(source, str(20 * ROOM), "--disk-cache", at / "cache", "--disk-size", "24M")
    epoch(mounted, names[:40], 0)
    disk.set(f"write {IMAGE}", hangs=True)
    with reading(mounted, names) as readers:
        eventually(lambda: readers.reads > 3 * FILES)
        eventually(lambda: mounted.stats()["disk"]["waiting_blocks"] > 0)
    began = time.monotonic()
    client.drop(str(mounted.path), [str(mounted.path / names[0])])
    client.warm(str(mounted.path), [])
    assert time.monotonic() - began < 60
    figures = mounted.stats()["disk"]
    assert "has not answered" in figures["stopped"]
    eventually(lambda: mounted.log.read_text().count("for now") == 1)
    mounted.end()
    assert time.monotonic() - began < 90


def test_a_server_is_killed_while_the_disk_hangs(source: Path, faulty: tuple[Faulty, Path], mount: MakeMount) -> None:
    """It cannot end, as a thread of it waits for the disk; the next one does not wait for that."""
    names, (disk, at) = write_files(source, FILES, SIZE), faulty
    mounted = mount(source, "0", "--disk-cache", at / "cache", "--disk-size", "24M")
    for seed in (0, 1):
        epoch(mounted, names, seed)
    mounted.expect_errors = True
    disk.set(f"read {IMAGE}", hangs=True)
    mounted.read_all(names, 2)
    server = mounted.stats()["processes"]["server"]
    for name in names:
        forget(mounted.path / name)
    os.kill(server, signal.SIGKILL)
    assert mounted.read_all(names, 3) < 60  # the store is waited for for 20
    assert mounted.stats()["processes"]["server"] != server
    disk.clear()
    mounted.end()


def test_a_server_is_started_while_the_disk_hangs(source: Path, faulty: tuple[Faulty, Path], mount: MakeMount) -> None:
    """It does without the disk tier until the next one is started."""
    names, (disk, at) = write_files(source, FILES, SIZE), faulty
    mounted = mount(source, "0", "--disk-cache", at / "cache", "--disk-size", "24M")
    for seed in (0, 1):
        epoch(mounted, names, seed)
    mounted.expect_errors = True
    disk.set(f"read {IMAGE}", hangs=True)
    [store] = (at / "cache").iterdir()
    forget(store / "index")
    began = time.monotonic()
    os.kill(mounted.stats()["processes"]["server"], signal.SIGKILL)
    mounted.read_all(names, 2)
    assert time.monotonic() - began < 60
    assert mounted.stats()["disk"] is None
    assert mounted.log.read_text().count("there is no disk cache") == 1
    disk.clear()
    coordlfs("restart", mounted.path)
    assert mounted.stats()["disk"] is not None
    mounted.forget()
    gives_all(mounted, names)
    mounted.end()


def test_its_directory_is_removed(source: Path, mount: MakeMount, place: Path) -> None:
    """Whoever removes it has the room back; and a new mount has a new one."""
    names, cache = write_files(source, FILES, SIZE), place / "cache"
    mounted = mount(source, str(20 * ROOM), "--disk-cache", cache, "--disk-size", "24M")
    for seed in (0, 1):
        epoch(mounted, names, seed)
    with reading(mounted, names) as readers:
        shutil.rmtree(cache)
        eventually(lambda: mounted.stats()["disk"]["taken_bytes"] < MIB, what="the room is not given back")
        before = readers.reads
        eventually(lambda: readers.reads > before + FILES)
        figures = mounted.stats()["disk"]
        assert "removed" in figures["stopped"]
        assert figures["held_bytes"] == 0
        assert {mounted.cached(name) for name in names} == {"pinned", "no"}
        assert f"nothing more is kept in the disk cache: {figures['stopped']}" in coordlfs("warm", mounted.path).stdout
        mounted.expect_errors = True
        os.kill(mounted.stats()["processes"]["server"], signal.SIGKILL)
        before = readers.reads
        eventually(lambda: readers.reads > before + FILES)
    assert mounted.log.read_text().count("nothing more is kept") == 1
    other = mount(source, "0", "--disk-cache", cache, "--disk-size", "24M")
    epoch(other, names, 2)
    assert epoch(other, names, 3) == 0


def test_its_directory_is_renamed(source: Path, mount: MakeMount, place: Path) -> None:
    names, cache = write_files(source, FILES, SIZE), place / "cache"
    mounted = mount(source, "0", "--disk-cache", cache, "--disk-size", "24M")
    epoch(mounted, names[:60], 0)
    cache.rename(place / "elsewhere")
    epoch(mounted, names, 1)
    assert epoch(mounted, names, 2) == 0
    mounted.end()
    again = mount(source, "0", "--disk-cache", place / "elsewhere", "--disk-size", "24M")
    assert epoch(again, names, 3) == 0


def test_its_data_are_cut_off_while_it_is_mounted(source: Path, mount: MakeMount, place: Path) -> None:
    names, cache = write_files(source, FILES, SIZE), place / "cache"
    mounted = mount(source, "0", "--disk-cache", cache, "--disk-size", "24M")
    epoch(mounted, names[:60], 0)
    with reading(mounted, names) as readers:
        [store] = cache.iterdir()
        os.truncate(store / "data", 3 * MIB)
        before = readers.reads
        eventually(lambda: readers.reads > before + 3 * FILES)
    assert mounted.log.read_text().count("nothing more is kept") == mounted.log.read_text().count("cut its data off")
    for seed in (1, 2):
        epoch(mounted, names, seed)
    mounted.end()
    again = mount(source, "0", "--disk-cache", cache, "--disk-size", "24M")
    for seed in (3, 4):
        epoch(again, names, seed)
    assert epoch(again, names, 5) == 0
