"""Pages of a real file on a disk: mapped, locked, counted, dropped; where it lies there; and who opens it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mounts import eventually, script

from coordlfs.kernel import fiemap, pages
from coordlfs.kernel.inotify import OpenWatch
from coordlfs.kernel.pages import PAGE

COUNT = 12  # pages, few enough for whom the limit of locked memory is low


@pytest.fixture
def fd(source: Path) -> Iterator[int]:
    """A file of `COUNT` pages, of which none is in the page cache."""
    fd = os.open(source / "f", os.O_CREAT | os.O_RDWR)
    os.write(fd, os.urandom(COUNT * PAGE))
    os.fsync(fd)
    pages.drop(fd, 0, 0)
    if pages.resident(fd) is None:
        pytest.skip("cachestat(2) came with Linux 6.5")
    assert pages.resident(fd) == 0
    yield fd
    os.close(fd)


@given(length=st.integers(0, 1 << 50))
def test_count_is_the_fewest_pages_that_hold_it(length: int) -> None:
    assert (pages.count(length) - 1) * PAGE < length <= pages.count(length) * PAGE


def test_locked_pages_stay_until_they_are_unmapped(fd: int) -> None:
    address = pages.map_file(fd, 0, COUNT * PAGE)
    pages.lock(address, COUNT * PAGE)
    assert pages.resident(fd) == COUNT
    pages.drop(fd, 0, 0)
    assert pages.resident(fd) == COUNT, "dropped though they are locked"
    assert ctypes.string_at(address, COUNT * PAGE) == os.pread(fd, COUNT * PAGE, 0)
    pages.unmap(address, COUNT * PAGE)
    pages.drop(fd, 0, 0)
    assert pages.resident(fd) == 0


def test_a_part_is_locked_alone(fd: int) -> None:
    address = pages.map_file(fd, 4 * PAGE, 2 * PAGE + 1)
    pages.lock(address, 2 * PAGE + 1)
    assert pages.resident(fd) == pages.resident(fd, 4 * PAGE, 3 * PAGE) == 3, "the kernel read around it"
    pages.unmap(address, 2 * PAGE + 1)


def test_resident_counts_the_pages_that_the_range_touches(fd: int) -> None:
    address = pages.map_file(fd, 3 * PAGE, 3 * PAGE)
    pages.lock(address, 3 * PAGE)
    for offset, length, expected in [
        (0, 0, 3),
        (0, 3 * PAGE, 0),
        (0, 3 * PAGE + 1, 1),
        (4 * PAGE - 1, 2, 2),
        (5 * PAGE, 0, 1),
        (6 * PAGE, 100 * PAGE, 0),
    ]:
        assert pages.resident(fd, offset, length) == expected, (offset, length)
    pages.unmap(address, 3 * PAGE)


def test_threads_that_ask_at_once_get_their_own_answers(fd: int) -> None:
    os.pread(fd, COUNT * PAGE, 0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(COUNT) as pool:
            answers = pool.map(lambda n: {pages.resident(fd, 0, n * PAGE) for _ in range(1000)}, range(1, COUNT + 1))
            assert list(answers) == [{n} for n in range(1, COUNT + 1)]
    finally:
        sys.setswitchinterval(interval)


def test_locking_behind_the_end_of_a_file_is_an_error(fd: int) -> None:
    address = pages.map_file(fd, 0, COUNT * PAGE)
    os.ftruncate(fd, 5 * PAGE)
    with pytest.raises(OSError) as failed:
        pages.lock(address, COUNT * PAGE)
    assert failed.value.errno == errno.EFAULT
    pages.unmap(address, COUNT * PAGE)


LOCK = """
import os, resource, sys
from coordlfs.kernel import pages
fd = os.open(sys.argv[1], os.O_RDONLY)
address = pages.map_file(fd, 0, 12 * pages.PAGE)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (pages.PAGE, pages.PAGE))
if os.geteuid() == 0:
    os.setuid(65534)
try:
    pages.lock(address, 12 * pages.PAGE)
except OSError as e:
    print(e.errno)
"""


def test_a_limit_of_locked_memory_is_an_error(fd: int, source: Path) -> None:
    assert int(script(LOCK, source / "f")) == errno.ENOMEM


def test_mapping_what_cannot_be_mapped_is_an_error() -> None:
    with pytest.raises(OSError) as failed:
        pages.map_file(-1, 0, PAGE)
    assert failed.value.errno == errno.EBADF
    with pytest.raises(OSError):
        pages.unmap(1, PAGE)


def test_drop_leaves_the_rest(fd: int) -> None:
    os.pread(fd, COUNT * PAGE, 0)
    pages.drop(fd, 2 * PAGE, 5 * PAGE)
    assert pages.resident(fd) == COUNT - 5
    assert pages.resident(fd, 2 * PAGE, 5 * PAGE) == 0


def test_prefetch_reads_everything_in_steps(fd: int) -> None:
    pages.prefetch(fd, PAGE, COUNT * PAGE - PAGE - 1, 2 * PAGE)
    eventually(lambda: pages.resident(fd, PAGE, COUNT * PAGE - PAGE) == COUNT - 1)


def test_a_buffer_begins_at_a_page() -> None:
    buffer = pages.buffer(3 * PAGE + 1)
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE == 0
    assert len(buffer) == 3 * PAGE + 1


# -- extents ------------------------------------------------------------------------------------------------------


def test_the_first_block_is_the_one_that_fibmap_names(fd: int) -> None:
    get_block_size, fibmap = 2, 1
    number = bytearray(4)
    try:
        fcntl.ioctl(fd, fibmap, number)
    except OSError:
        pytest.skip("FIBMAP needs root, and a file system that has blocks")
    size = bytearray(4)
    fcntl.ioctl(fd, get_block_size, size)
    assert fiemap.first_block(fd) == int.from_bytes(number, "little") * int.from_bytes(size, "little") > 0


def test_files_without_extents_have_no_first_block(source: Path) -> None:
    sparse = os.open(source / "sparse", os.O_CREAT | os.O_RDWR)
    os.ftruncate(sparse, 1 << 20)
    empty = os.open(source / "empty", os.O_CREAT | os.O_RDWR)
    memory = os.memfd_create("no disk")
    pipe, _ = pipes = os.pipe()
    for fd in (sparse, empty, memory, pipe):
        assert fiemap.first_block(fd) is None
    for fd in (sparse, empty, memory, *pipes):
        os.close(fd)


# -- opening ------------------------------------------------------------------------------------------------------


def test_every_opening_of_a_watched_file_is_told(source: Path) -> None:
    watch = OpenWatch()
    numbers = {}
    for name in ("a", "b", "c"):
        with open(source / name, "w") as f:
            numbers[name] = watch.add(f.fileno())
    assert list(watch.opened()) == [], "opened before it was watched"
    for name in ("b", "a", "b"):
        open(source / name).close()
    assert list(watch.opened()) == [numbers["b"], numbers["a"], numbers["b"]]
    assert list(watch.opened()) == []
    watch.remove(numbers["b"])
    for name in ("b", "c"):
        open(source / name).close()
    assert list(watch.opened()) == [numbers["c"]]
    os.close(watch.fd)


def test_watching_what_is_no_file_is_an_error() -> None:
    watch = OpenWatch()
    with pytest.raises(OSError):
        watch.add(12345)
    os.close(watch.fd)
