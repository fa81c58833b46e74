"""A source on a local disk: cold, slow and failing. The disk is an image on a file system that fails on command."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
from coordlfs_tools.lab.faulty_fs import Faulty, served
from mounts import MIB, PAGE, PATIENCE, MakeMount, drop_caches, forget, noise, raises, read, resident

from coordlfs.kernel import pages

Disk = Callable[[], tuple[Faulty, Path]]
SIZES = [1, PAGE - 1, PAGE, PAGE + 1, 50_000, 128 * 1024, MIB - 1, MIB, MIB + 1, 3 * MIB + 17, 17 * MIB]


@pytest.mark.parametrize("cache", ["0", "20M", "100M"])
def test_cold_files_read_by_many_at_once(source: Path, mount: MakeMount, cache: str) -> None:
    names = [f"{size}-{copy}" for size in SIZES for copy in range(3 if size <= MIB else 1)]
    for name in names:
        (source / name).write_bytes(noise(int(name.split("-")[0])))
    subprocess.run(["sync", "-f", source], check=True, timeout=PATIENCE)
    mounted = mount(source, cache)
    for _ in range(2):
        mounted.forget()
        order = random.Random(1).sample(names, len(names))
        with ThreadPoolExecutor(12) as pool:
            for name, data in zip(order, pool.map(lambda name: read(mounted.path / name), order), strict=True):
                assert data == noise(int(name.split("-")[0])), name
        assert not any(resident(source / name) for name in names), "a second copy stays"
        mounted.settle()


def test_files_that_are_warm_and_cold_in_parts(source: Path, mount: MakeMount) -> None:
    data = noise(3 * MIB)
    (source / "f").write_bytes(data)
    subprocess.run(["sync", "-f", source], check=True, timeout=PATIENCE)
    mounted = mount(source, "0")
    for at, length in ((0, 5), (2 * MIB, 1), (MIB, MIB)):
        forget(source / "f")
        with open(source / "f", "rb") as f:
            f.seek(at)
            f.read(length)
        drop_caches_of(mounted.path / "f")
        assert read(mounted.path / "f") == data


def drop_caches_of(path: Path) -> None:
    forget(path)
    assert not resident(path)


@contextmanager
def _warm(path: Path) -> Iterator[None]:
    """A file is in the page cache and stays there, even where the machine reclaims what it thinks is idle (DAMON)."""
    with open(path, "rb") as f:
        length = os.fstat(f.fileno()).st_size
        address = pages.map_file(f.fileno(), 0, length)
    try:
        pages.lock(address, length)
        yield
    finally:
        pages.unmap(address, length)


@contextmanager
def _attached(source: Path, place: Path) -> Iterator[tuple[Faulty, Path]]:
    images = place / "images"
    images.mkdir()
    image, point = images / "disk", place / "disk"
    point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-d", source, image, "64M"], check=True, timeout=PATIENCE)
    with served(images, place) as faulty:
        command = ["losetup", "--show", "-r", "-f", str(faulty.path / "disk")]
        loop = subprocess.run(command, check=True, timeout=PATIENCE, capture_output=True, text=True).stdout.strip()
        try:
            subprocess.run(["mount", "-o", "ro,noload", loop, point], check=True, timeout=PATIENCE)
            try:
                yield faulty, point
            finally:
                faulty.clear()
                subprocess.run(["umount", point], check=True, timeout=PATIENCE)
        finally:
            subprocess.run(["losetup", "-d", loop], check=True, timeout=PATIENCE)


@pytest.fixture
def disk(source: Path, place: Path, _may_mount: None) -> Iterator[Disk]:
    """Puts an ext4 with the files of `source` on an image, reads of which fail or take their time as they are told."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(_attached(source, place))


@pytest.mark.alone  # the disk's names have to be forgotten, which only the kernel can do for all at once
def test_a_slow_disk_holds_up_only_who_waits_for_it(source: Path, disk: Disk, mount: MakeMount) -> None:
    cold = [f"d{number}/cold" for number in range(4)]  # in a directory each: their names have to be read from the disk
    for name in cold:
        (source / name).parent.mkdir()
    for number, name in enumerate(("pinned", "warm", *cold)):
        (source / name).write_bytes(noise(50_000, number))
    faulty, path = disk()
    mounted = mount(path, "200K")
    assert read(mounted.path / "pinned") == noise(50_000, 0)
    mounted.settle()
    drop_caches()
    with _warm(path / "warm"), ThreadPoolExecutor(len(cold)) as pool:
        forget(faulty.path / "disk")
        faulty.set("read disk", delay=1)
        reading = [pool.submit(read, mounted.path / name) for name in cold]
        time.sleep(0.2)
        assert read(mounted.path / "warm") == noise(50_000, 1)
        with mounted.messages() as sent:
            assert read(mounted.path / "pinned") == noise(50_000, 0)
        assert sent["read"] == 0
        assert not any(slow.done() for slow in reading), "they waited for the slow ones"
        for number, data in enumerate(reading):
            assert data.result(PATIENCE) == noise(50_000, 2 + number)
    mounted.settle()


@pytest.mark.alone
def test_a_page_that_is_on_its_way_holds_up_only_who_waits_for_it(source: Path, disk: Disk, mount: MakeMount) -> None:
    for number, name in enumerate(("warm", "awaited")):
        (source / name).write_bytes(noise(100_000, number))
    faulty, path = disk()
    mounted = mount(path, "0")
    for name in ("warm", "awaited"):
        (mounted.path / name).stat()
    drop_caches()
    with _warm(path / "warm"), ThreadPoolExecutor(2) as pool:
        os.stat(path / "awaited")
        forget(faulty.path / "disk")
        faulty.set("read disk", delay=6)
        elsewhere = pool.submit(read, path / "awaited")  # from now on the page cache holds its pages, without the bytes
        time.sleep(0.3)
        reading = pool.submit(read, mounted.path / "awaited")
        time.sleep(0.2)
        assert read(mounted.path / "warm") == noise(100_000, 0)
        assert not reading.done(), "it waited for the page"
        assert reading.result(PATIENCE) == elsewhere.result(PATIENCE) == noise(100_000, 1)


def test_a_disk_that_fails_gives_its_error_and_later_the_bytes(source: Path, disk: Disk, mount: MakeMount) -> None:
    for number in range(3):
        (source / f"f{number}").write_bytes(noise(2 * MIB, number))
    faulty, path = disk()
    mounted = mount(path, "0")
    for number in range(3):
        (mounted.path / f"f{number}").stat()
    forget(faulty.path / "disk")
    faulty.set("read disk", errno=errno.EIO)
    for number in range(3):
        raises(errno.EIO, partial(read, mounted.path / f"f{number}"))
    faulty.clear()
    for number in range(3):
        assert read(mounted.path / f"f{number}") == noise(2 * MIB, number)
    assert mounted.stats()["source"]["errors"] >= 3
    mounted.expect_errors = True
