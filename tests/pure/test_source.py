"""Reading the source: the very bytes at every offset, and nothing of them left behind in its page cache."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordlfs.kernel import fuse, pages
from coordlfs.kernel.pages import PAGE
from coordlfs.sources.contract import Part
from coordlfs.sources.directory import DirectorySource

MIB = 1 << 20
SIZES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE, 37_000, MIB - 1, MIB, MIB + 1, 3 * MIB + 123]
CONTENT = random.Random(1).randbytes(max(SIZES) + MIB)


class Reader:
    """A source, with its files open for asking what of them is in the page cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = DirectorySource(os.open(root, os.O_RDONLY))
        self.into = pages.buffer(fuse.MAX_READ + PAGE)
        self.slow = 0
        self.asking: list[int] = []

    def make(self, name: str, data: bytes) -> int:
        """Write a file and let go of its pages; a descriptor for asking."""
        (self.root / name).write_bytes(data)
        self.asking.append(fd := os.open(self.root / name, os.O_RDONLY))
        os.fsync(fd)
        pages.drop(fd, 0, 0)
        if pages.resident(fd) is None:
            pytest.skip("cachestat(2) came with Linux 6.5")
        assert pages.resident(fd) == 0
        return fd

    def read(self, name: str, offset: int, size: int, record: int = 1) -> bytes:
        """As the data loop does."""
        self.into[:16] = b"left from before"
        n, attributes = self.source.read(Part(record, os.fsencode(name), offset, size), self.into, self._is_slow)
        assert attributes.st_ino == os.stat(self.root / name).st_ino
        return self.into[:n]

    def _is_slow(self) -> None:
        self.slow += 1


@pytest.fixture
def reader(source: Path) -> Iterator[Reader]:
    """Reads a directory on a disk, and keeps no descriptor that it should not."""
    yield (reader := Reader(source))
    for record in range(1000):
        reader.source.forget(record)
    for fd in [*reader.asking, reader.source.root]:
        os.close(fd)
    assert not [path for path in map(leads_to, os.listdir("/proc/self/fd")) if path.startswith(f"{source}/")]


def leads_to(fd: str) -> str:
    """The file that a descriptor of this process is open on."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # it was the one that listed them
        return ""


@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_right_at_every_offset(reader: Reader, size: int) -> None:
    fd, data = reader.make("f", CONTENT[:size]), CONTENT[:size]
    edges = [0, 1, PAGE - 1, PAGE, 3 * PAGE, 128 << 10, MIB - PAGE, MIB, MIB + 1, 2 * MIB]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        offset=st.sampled_from(edges)
        | st.integers(0, size + 2 * PAGE)
        | st.integers(0, size // PAGE + 2).map(PAGE.__mul__),
        length=st.sampled_from([0, 1, PAGE, PAGE + 1, 128 << 10, MIB]) | st.integers(0, MIB),
        cached=st.sampled_from(["all", "none", "some"]),
    )
    def check(offset: int, length: int, cached: str) -> None:
        pages.drop(fd, 0, 0)
        if cached != "none":
            os.pread(fd, size if cached == "all" else size // 3, 0)
        assert reader.read("f", offset, length) == data[offset : offset + length]

    check()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [PAGE, 128 << 10, MIB])
def test_nothing_is_cached_because_it_was_read(reader: Reader, size: int, step: int) -> None:
    fd = reader.make("f", CONTENT[:size])
    for offset in range(0, min(size, 40 * step), step):
        assert reader.read("f", offset, step) == CONTENT[:size][offset : offset + step]
    assert pages.resident(fd) == 0
    assert reader.slow == len(range(0, min(size, 40 * step), step)), "the disk had to be waited for each time"


@pytest.mark.parametrize("size", SIZES[1:])
def test_what_is_cached_is_taken_from_there_and_stays(reader: Reader, size: int) -> None:
    fd = reader.make("f", CONTENT[:size])
    assert os.pread(fd, size, 0) == CONTENT[:size]
    for offset in range(0, size, MIB):
        reader.read("f", offset, MIB)
    assert pages.resident(fd) == pages.count(size)
    assert reader.slow == 0, "nothing had to be waited for"


def test_what_is_cached_in_part_stays_as_it_is(reader: Reader) -> None:
    fd = reader.make("f", CONTENT[: 2 * MIB])
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 10 * PAGE, 20 * PAGE)
    assert pages.resident(fd) == 10
    assert reader.read("f", 0, MIB) == CONTENT[:MIB]
    assert pages.resident(fd) == pages.resident(fd, 20 * PAGE, 10 * PAGE) == 10
    assert reader.slow == 1


def test_nothing_is_cached_because_it_was_read_at_odd_offsets(reader: Reader) -> None:
    fd = reader.make("f", CONTENT[: 3 * MIB])
    for offset in range(100, 3 * MIB, MIB):
        assert reader.read("f", offset, MIB) == CONTENT[: 3 * MIB][offset : offset + MIB]
    assert pages.resident(fd) == 0


def test_bytes_of_two_pages_are_not_cached_if_one_is(reader: Reader) -> None:
    fd = reader.make("f", CONTENT[: 8 * PAGE])
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, PAGE, 0)
    assert pages.resident(fd) == 1
    reader.read("f", PAGE - 1, 2)
    assert reader.slow == 1


def test_many_threads_read_large_files_at_once(reader: Reader) -> None:
    names = [f"f{number}" for number in range(3)]
    for number, name in enumerate(names):
        reader.make(name, CONTENT[number : number + 3 * MIB])
    wrong: list[object] = []

    def read(seed: int) -> None:
        rng, into = random.Random(seed), pages.buffer(fuse.MAX_READ + PAGE)
        for _ in range(40):
            number, offset, size = rng.randrange(3), rng.randrange(3 * MIB), rng.choice([1, PAGE, 50_000, MIB])
            offset -= offset % PAGE if rng.random() < 0.7 else 0
            n, _ = reader.source.read(Part(number, names[number].encode(), offset, size), into, lambda: None)
            expected = CONTENT[number : number + 3 * MIB][offset : offset + size]
            if into[:n] != expected:
                wrong.append((number, offset, size, n))
            if rng.random() < 0.05:
                reader.source.forget(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_descriptors_of_large_files_are_kept_within_a_bound(reader: Reader) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for record in range(400):
        with open(reader.root / str(record), "wb") as f:
            f.truncate(MIB)
        assert reader.read(str(record), 0, PAGE, record) == bytes(PAGE)
    assert 100 < len(os.listdir("/proc/self/fd")) - before <= 256
    for record in range(400):
        reader.source.forget(record)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_was_replaced_is_read_once_it_is_forgotten(reader: Reader) -> None:
    reader.make("f", CONTENT[:MIB])
    assert reader.read("f", 0, PAGE) == CONTENT[:PAGE]
    (reader.root / "new").write_bytes(bytes(2 * MIB))
    os.rename(reader.root / "new", reader.root / "f")
    reader.source.forget(1)
    assert reader.read("f", 0, PAGE) == bytes(PAGE)


def test_a_file_that_shrank_ends_where_it_ends(reader: Reader) -> None:
    reader.make("f", CONTENT[: 2 * MIB])
    reader.read("f", 0, MIB)
    os.truncate(reader.root / "f", MIB + 10)
    assert reader.read("f", MIB, MIB) == CONTENT[MIB : MIB + 10]
    os.truncate(reader.root / "f", 10)
    assert reader.read("f", 0, MIB) == CONTENT[:10]
    assert reader.read("f", MIB, MIB) == b""


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("missing", errno.ENOENT),
        ("d/missing", errno.ENOENT),
        ("d", errno.ENOENT),
        ("fifo", errno.ENOENT),
        ("link", errno.ELOOP),
        ("d/up/f", errno.ELOOP),
        ("f/f", errno.ENOTDIR),
        ("../etc", errno.EXDEV),
    ],
)
def test_what_is_no_file_is_an_error(reader: Reader, name: str, code: int) -> None:
    (reader.root / "d").mkdir()
    (reader.root / "f").write_text("f")
    os.mkfifo(reader.root / "fifo")
    (reader.root / "link").symlink_to("f")
    (reader.root / "d" / "up").symlink_to("..")
    with pytest.raises(OSError) as failed:
        reader.source.read(Part(1, os.fsencode(name), 0, PAGE), reader.into, lambda: None)
    assert failed.value.errno == code


# -- names --------------------------------------------------------------------------------------------------------


def test_listings_are_sorted_and_hold_every_kind_of_name(reader: Reader) -> None:
    names = [b"a", b"B", b"\xff", b" ", b"\n", "ü".encode(), b".hidden", b"x" * 255]
    for name in names:
        os.mkdir(os.path.join(os.fsencode(reader.root), name))
    os.symlink("nowhere", reader.root / "link")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(reader.root / "socket"))
        listing = reader.source.listing(b"")
        assert listing.names == sorted([*names, b"link", b"socket"])
        for name in listing.names:
            assert listing.lstat(name) == os.lstat(os.path.join(os.fsencode(reader.root), name))
        listing.close()


def test_listing_what_is_no_directory_is_an_error(reader: Reader) -> None:
    (reader.root / "f").write_text("f")
    for name, code in [(b"f", errno.ENOTDIR), (b"missing", errno.ENOENT)]:
        with pytest.raises(OSError) as failed:
            reader.source.listing(name)
        assert failed.value.errno == code


def test_symbolic_links_are_seen_themselves(reader: Reader) -> None:
    target = b"/\xff" + b"t" * 4000
    os.symlink(target, os.path.join(os.fsencode(reader.root), b"link"))
    (reader.root / "f").write_text("f")
    assert reader.source.readlink(b"link") == target
    assert reader.source.lstat(b"link") == os.lstat(reader.root / "link")
    assert reader.source.lstat(b"") == os.lstat(reader.root)
    reader.source.lstat(b"f", lambda: pytest.fail("the kernel knows it: there is no disk to wait for"))
    with pytest.raises(OSError):
        reader.source.readlink(b"f")


def test_extended_attributes_are_those_of_the_name_itself(reader: Reader) -> None:
    (reader.root / "f").write_text("f")
    os.symlink("f", reader.root / "link")
    try:
        os.setxattr(reader.root / "f", "user.\udcff", b"\0\1")
    except OSError as e:
        pytest.skip(f"no extended attributes here: {e}")
    assert reader.source.xattrs(b"f") == [b"user.\xff"]
    assert reader.source.xattr(b"f", b"user.\xff") == b"\0\1"
    assert reader.source.xattrs(b"link") == []
    if os.geteuid() == 0:  # who alone may give a symbolic link any
        os.setxattr(reader.root / "link", "trusted.own", b"link", follow_symlinks=False)
        assert reader.source.xattrs(b"link") == [b"trusted.own"]
        assert reader.source.xattr(b"link", b"trusted.own") == b"link"
    with pytest.raises(OSError) as failed:
        reader.source.xattr(b"f", b"user.none")
    assert failed.value.errno == errno.ENODATA


def test_figures_of_the_file_system_are_the_sources(reader: Reader) -> None:
    assert reader.source.statvfs().f_blocks == os.statvfs(reader.root).f_blocks


@pytest.mark.parametrize("size", [8192, 3 * MIB])
def test_a_file_is_read_first_when_nobody_writes_to_it(source: Path, reader: Reader, size: int) -> None:
    """A write sets the time before it copies: until it is over, the file has bytes of two versions and the new time."""
    path, into = source / "f", memoryview(pages.buffer(size))
    path.write_bytes(b"old." * (size // 4))
    half, begun, over = b"new." * (size // 8), threading.Event(), threading.Event()

    def write() -> None:
        with open(path, "rb+", buffering=0) as f:
            f.write(half)
            time = os.fstat(f.fileno()).st_mtime_ns
            begun.set()
            over.wait(240)
            f.write(half)
            os.utime(f.fileno(), ns=(time, time))

    writer = threading.Thread(target=write)
    writer.start()
    begun.wait(240)
    # Called before it waits for the writer, who goes on only then.
    n, _ = reader.source.read(Part(1, b"f", 0, size, is_first=True), into, over.set)
    writer.join()
    assert n == size
    assert bytes(into) == half + half
    path.write_bytes(b"gone")
    with open(path, "ab"):  # by somebody who never ends: not for ever
        n, _ = reader.source.read(Part(1, b"f", 0, size, is_first=True), into, lambda: None)
    assert bytes(into[:n]) == b"gone"
