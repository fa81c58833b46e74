"""A source that changes or fails: readers get what reading it directly would give, and never bytes of two versions."""

from __future__ import annotations

import errno
import io
import itertools
import mmap
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from mounts import (
    CHUNK,
    MIB,
    PAGE,
    PATIENCE,
    MakeMount,
    Mount,
    coordlfs,
    eventually,
    forget,
    noise,
    raises,
    read,
    resident,
)

from coordlfs.commands import cli
from coordlfs.commands.client import Client


def _know(mounted: Mount) -> None:
    """Have the kernel learn every name and attribute."""
    for directory, names, files in os.walk(mounted.path):
        for name in names + files:
            os.lstat(os.path.join(directory, name))


def _replace(path: Path, data: bytes) -> None:
    """Put a new file in the place of another, as careful programs do."""
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(data)
    os.rename(beside, path)


def _overwrite(path: Path, data: bytes) -> None:
    """Change a file in place; its time of change is another than before for sure."""
    with open(path, "r+b") as f:
        f.write(data)
        f.truncate(len(data))
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1_000_000))


def _recreate(path: Path, data: bytes) -> None:
    """Delete a file and make a new one: most file systems give it the same inode number."""
    path.unlink()
    path.write_bytes(data)


Change = Callable[[Path, bytes], None]


@contextmanager
def _reading(look: Callable[[random.Random], None]) -> Iterator[None]:
    """Three threads that `look` again and again as long as the body runs."""
    ended = threading.Event()

    def run(seed: int) -> None:
        choice = random.Random(seed)
        while not ended.is_set():
            look(choice)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


_SIZES = [0, 1, 5000, 300_000, 3 * MIB + 1, CHUNK + 5]


T = TypeVar("T")


def _or_error(action: Callable[[], T], *codes: int) -> T | None:
    """What `action` returns, or None if it fails with one of these errors."""
    try:
        return action()
    except OSError as e:
        if e.errno not in codes:
            raise
        return None


def _assert_soon(path: Path, data: bytes) -> None:
    """Whoever opens the file anew gets `data`, if not at once; until then an error, if anything else than `data`."""
    eventually(lambda: _or_error(lambda: read(path), errno.ESTALE, errno.ENOENT) == data, what=f"{path} is new")


# -- known, but not read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [_replace, _overwrite])
@pytest.mark.parametrize("after", _SIZES)
def test_changed_before_it_is_read(source: Path, mount: MakeMount, change: Change, after: int) -> None:
    known = _SIZES[1:]
    for before in known:
        (source / f"{before}").write_bytes(noise(before, 1))
    mounted = mount(source)
    _know(mounted)
    for before in known:
        change(source / f"{before}", noise(after, 2))
    for before in known:
        if after > before:  # once an error: see the next test
            _assert_soon(mounted.path / f"{before}", noise(after, 2))
        assert read(mounted.path / f"{before}") == noise(after, 2), f"{before} → {after}"
    mounted.settle()
    for before in known:  # attributes follow in a moment
        ours, theirs = mounted.path / f"{before}", source / f"{before}"
        assert os.stat(ours).st_size == after
        eventually(lambda a=ours, b=theirs: os.stat(a).st_mtime_ns == os.stat(b).st_mtime_ns)  # type: ignore[misc]
    for before in known:
        assert read(mounted.path / f"{before}") == noise(after, 2), f"{before} → {after}, again"


def _spliced(path: Path) -> bytes:
    """What sendfile gives of a file, called until it gives nothing more."""
    with path.open("rb", buffering=0) as file, tempfile.TemporaryFile() as into:
        while os.sendfile(into.fileno(), file.fileno(), None, 1 << 30):
            pass
        return os.pread(into.fileno(), 1 << 30, 0)


@pytest.mark.parametrize("change", [_replace, _overwrite])
@pytest.mark.parametrize(("before", "after"), [(5000, 6000), (5000, 300_000), (84_000, 146_000), (300_000, 5000)])
def test_changed_before_it_is_sent(source: Path, mount: MakeMount, change: Change, before: int, after: int) -> None:
    """The kernel sends a file up to the end that it knows, and does not ask again, as for read(2)."""
    (source / "f").write_bytes(noise(before, 1))
    mounted = mount(source)
    _know(mounted)
    change(source / "f", noise(after, 2))
    got = _or_error(lambda: _spliced(mounted.path / "f"), errno.ESTALE)
    assert got in (None, noise(after, 2))
    eventually(lambda: _or_error(lambda: _spliced(mounted.path / "f"), errno.ESTALE) == noise(after, 2))


@pytest.mark.parametrize("change", [_replace, _overwrite])
def test_grown_from_nothing(source: Path, mount: MakeMount, change: Change) -> None:
    # A data set that is still being written is full of these.
    for after in _SIZES:
        (source / f"{after}").touch()
    mounted = mount(source)
    _know(mounted)
    for after in _SIZES:
        assert read(mounted.path / f"{after}") == b""
        change(source / f"{after}", noise(after, 2))
    time.sleep(1.1)  # to look every second is often enough
    for after in _SIZES:
        assert read(mounted.path / f"{after}") == noise(after, 2)


def test_read_from_the_middle_after_it_changed(source: Path, mount: MakeMount) -> None:
    # The first READ after the change tells the server; it is not one at the beginning.
    for change in (_replace, _overwrite):
        for before in (5000, 300_000):
            (source / f"{change.__name__}{before}").write_bytes(noise(before, 1))
    mounted = mount(source)
    _know(mounted)
    for change in (_replace, _overwrite):
        for before in (5000, 300_000):
            change(source / f"{change.__name__}{before}", noise(100_000, 2))
    for change in (_replace, _overwrite):
        for before in (5000, 300_000):
            path = mounted.path / f"{change.__name__}{before}"
            fd = os.open(path, os.O_RDONLY)
            got = _or_error(lambda fd=fd: os.pread(fd, 1000, 4096), errno.ESTALE)  # type: ignore[misc]
            os.close(fd)
            # What is behind the end that was known may be missing; no other byte may come.
            assert got is None or (got and noise(100_000, 2)[4096:].startswith(got))
            _assert_soon(path, noise(100_000, 2))


@pytest.mark.parametrize("change", [_replace, _overwrite])
def test_shrunk_and_read_from_everywhere_at_once(source: Path, mount: MakeMount, change: Change) -> None:
    # The answers to READs behind the new end and across it come in any order; none may make the kernel show zeros.
    names = [f"f{number}" for number in range(20)]
    for name in names:
        (source / name).write_bytes(noise(3 * MIB, 1))
    mounted = mount(source, "10M")
    _know(mounted)
    for name in names:
        change(source / name, noise(300_000, 2))

    def read_at(fd: int, offset: int) -> None:
        want, got = noise(300_000, 2)[offset : offset + 200_000], b""
        part: bytes | None = b"more"
        while part:  # what was read before an error comes short, and the error with the next read
            part = _or_error(partial(os.pread, fd, 200_000 - len(got), offset + len(got)), errno.ESTALE)
            got += part or b""
            assert want.startswith(got)
        assert part is None or got == want

    for name in names:
        with open(mounted.path / name, "rb", buffering=0) as f, ThreadPoolExecutor(4) as pool:
            offsets = [250_000, 2_000_000, 1_000_000, 400_000, 131_072, 290_000, 3_000_000, 0]
            list(pool.map(read_at, [f.fileno()] * len(offsets), offsets))
    for name in names:
        _assert_soon(mounted.path / name, noise(300_000, 2))


def test_vanished_before_it_is_read(source: Path, mount: MakeMount) -> None:
    for name in ("read", "mapped", "stays"):
        (source / name).write_bytes(noise(10_000))
    (source / "d").mkdir()
    (source / "d" / "f").write_bytes(noise(10_000))
    mounted = mount(source)
    _know(mounted)
    # It maps the file while that is there, since how soon its name goes as well is another matter.
    program = "import mmap, os, sys\nfd = os.open(sys.argv[1], 0)\nm = mmap.mmap(fd, 0, prot=mmap.PROT_READ)\n"
    program += "print(flush=True)\nsys.stdin.readline()\nm[:]"
    job = subprocess.Popen(
        [sys.executable, "-c", program, mounted.path / "mapped"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert job.stdout is not None
    assert job.stdout.readline()
    for name in ("read", "mapped"):
        (source / name).unlink()
    shutil.rmtree(source / "d")
    raises(errno.ENOENT, lambda: read(mounted.path / "read"))
    raises(errno.ENOENT, lambda: read(mounted.path / "d" / "f"))
    job.communicate(b"\n", timeout=PATIENCE)
    assert job.returncode == -signal.SIGBUS
    eventually(lambda: not any((mounted.path / name).exists() for name in ("read", "mapped", "d/f")))
    eventually(lambda: not (mounted.path / "d").exists() or os.listdir(mounted.path / "d") == [])
    assert read(mounted.path / "stays") == noise(10_000)
    assert mounted.stats()["source"]["errors"] >= 3


def test_what_is_new_is_found(source: Path, mount: MakeMount) -> None:
    mounted = mount(source)
    raises(errno.ENOENT, lambda: os.stat(mounted.path / "f"))
    (source / "f").write_bytes(b"new")
    assert read(mounted.path / "f") == b"new"


def test_a_name_that_becomes_another_kind(source: Path, mount: MakeMount) -> None:
    (source / "file").write_bytes(noise(5000))
    (source / "directory").mkdir()
    (source / "link").symlink_to("file")
    mounted = mount(source)
    _know(mounted)
    (source / "file").unlink()
    (source / "file").mkdir()
    (source / "directory").rmdir()
    (source / "directory").write_bytes(noise(6000))
    (source / "link").unlink()
    (source / "link").write_bytes(noise(7000))
    with pytest.raises(OSError):
        read(mounted.path / "file")
    # Names that the kernel knows may stay what they were for a while; a new mount shows them as they are.
    again = mount(source)
    assert os.listdir(again.path / "file") == []
    assert read(again.path / "directory") == noise(6000)
    assert read(again.path / "link") == noise(7000)


def _becomes(path: Path, kind: str, size: int) -> None:
    """Have a name lead to what is of `kind`, and was not there before."""
    new = path.with_name("new")
    match kind:
        case "file":
            new.write_bytes(noise(size))
        case "directory":
            new.mkdir()
            (new / "in it").write_bytes(noise(size))
        case "link":
            new.symlink_to(f"elsewhere {size}")
        case "fifo":
            os.mkfifo(new)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    new.rename(path)


def _shown(path: Path) -> object:
    kind = stat.S_IFMT(os.lstat(path).st_mode)
    match kind:
        case stat.S_IFREG:
            return kind, read(path)
        case stat.S_IFDIR:
            return kind, [(name, read(path / name)) for name in os.listdir(path)]
        case stat.S_IFLNK:
            return kind, os.readlink(path)
    return kind, None


_KINDS = ("file", "directory", "link", "fifo")


@pytest.mark.parametrize("is_read", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize(("before", "after"), [*itertools.permutations(_KINDS, 2)])
def test_whoever_holds_what_becomes_another_kind(
    source: Path, mount: MakeMount, before: str, after: str, is_read: bool
) -> None:
    name = source / "name"
    _becomes(name, before, 5000)
    mounted = mount(source, "8M", "--immutable")
    shown = mounted.path / "name"
    if is_read:
        _shown(shown)
    mounted.expect_errors = True  # it cannot be read by its name
    held = os.open(shown, os.O_RDONLY if before in ("file", "directory") else os.O_PATH | os.O_NOFOLLOW)
    number = os.fstat(held).st_ino
    for size, kind in ((6000, after), (7000, before), (8000, after), (9000, before)):
        _becomes(name, kind, size)
        coordlfs("refresh", mounted.path)
        assert _shown(shown) == _shown(name), (size, kind)
        if kind == after:
            assert os.lstat(shown).st_ino != number
        # What is held is what it was, or gone: no error of a disk.
        if before == "file":
            assert _or_error(lambda: os.pread(held, 10_000, 0), errno.ESTALE, errno.ENOENT) in (None, noise(5000))
        if before == "directory":
            assert _or_error(lambda: os.listdir(held), errno.ESTALE, errno.ENOENT) in (None, [], ["in it"])
    os.close(held)


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_what_takes_the_place_of_a_small_file_is_not_read(source: Path, mount: MakeMount, kind: str) -> None:
    for name in ("f", "g"):
        (source / name).write_bytes(noise(5000))
    mounted = mount(source, "0")
    _know(mounted)
    subprocess.run(["sync", "-f", source], check=True, timeout=PATIENCE)
    forget(source / "g")
    (source / "f").unlink()
    written = b""
    if kind == "fifo":
        os.mkfifo(source / "f")
        fifo = os.open(source / "f", os.O_RDWR | os.O_NONBLOCK)
        written = b"for somebody else" * 1000
        os.write(fifo, written)
    else:
        (source / "f").mkdir()
    raises(errno.ENOENT, lambda: read(mounted.path / "f"))
    if kind == "fifo":
        assert os.read(fifo, 1 << 20) == written
        os.close(fifo)
    assert read(mounted.path / "g") == noise(5000)
    assert not resident(source / "g")
    mounted.expect_errors = True


def test_a_link_that_leads_elsewhere_when_its_directory_is_listed(source: Path, mount: MakeMount) -> None:
    (source / "link").symlink_to("releases/v10")
    mounted = mount(source, "8M", "--immutable")
    assert os.readlink(mounted.path / "link") == "releases/v10"
    for target in ("v2", "releases/v11"):
        (source / "link.new").symlink_to(target)
        os.rename(source / "link.new", source / "link")
        coordlfs("drop", mounted.path, mounted.path / "link", status=1)  # which looks the name up: it is no file
        assert os.listdir(mounted.path) == ["link"]
        os.lstat(mounted.path / "link")
        assert os.readlink(mounted.path / "link") in ("releases/v10", target)
        coordlfs("refresh", mounted.path)
        eventually(lambda target=target: os.readlink(mounted.path / "link") == target)  # type: ignore[misc]


def test_a_new_file_in_a_directory_that_a_command_has_looked_at(source: Path, mount: MakeMount) -> None:
    (source / "d").mkdir()
    (source / "d" / "old").write_bytes(noise(5000))
    mounted = mount(source, "8M", "--immutable")
    assert os.listdir(mounted.path / "d") == ["old"]
    (source / "d" / "new").write_bytes(noise(6000))
    coordlfs("warm", mounted.path, mounted.path / "d" / "old")
    eventually(lambda: sorted(os.listdir(mounted.path / "d")) == ["new", "old"])


# -- read in part -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize("change", [_replace, _recreate])
@pytest.mark.parametrize("cache", ["0", "200M"])
def test_replaced_while_it_is_open(source: Path, mount: MakeMount, cache: str, change: Change, look: bool) -> None:
    size = 3 * CHUNK
    old, new = noise(size, 1), noise(size, 2)
    (source / "f").write_bytes(old)
    mounted = mount(source, cache)
    with open(mounted.path / "f", "rb", buffering=0) as f:
        got = bytearray(f.read(100_000))
        change(source / "f", new)
        if look:  # another one meets the change first
            coordlfs("refresh", mounted.path)
            assert os.listdir(mounted.path) == ["f"]
            _assert_soon(mounted.path / "f", new)
        while part := _or_error(lambda: f.read(MIB), errno.ESTALE):
            got += part
        assert bytes(got) == old[: len(got)]
        # However often he asks who has the old one open, he gets nothing of the new one.
        for offset in range(0, size, 5 * MIB):
            asked = _or_error(lambda at=offset: os.pread(f.fileno(), 1000, at), errno.ESTALE)  # type: ignore[misc]
            assert asked in (None, old[offset : offset + 1000])


def test_changed_in_place_and_then_replaced(source: Path, mount: MakeMount) -> None:
    versions = [noise(900_000, number) for number in range(3)]
    (source / "f").write_bytes(versions[0])
    mounted = mount(source, "0")
    with open(mounted.path / "f", "rb", buffering=0) as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # every page is asked for by itself
        assert f.read(100) == versions[0][:100]
        for change, version in ((_overwrite, versions[1]), (_replace, versions[2])):
            change(source / "f", version)
            raises(errno.ESTALE, lambda: os.pread(f.fileno(), 100, 400_000))
            if version is versions[2]:  # of the second version all is cached, so that no reader meets the change
                coordlfs("refresh", mounted.path)
            _assert_soon(mounted.path / "f", version)
        assert os.pread(f.fileno(), 100, 0) == versions[0][:100], "what was cached of it"


@pytest.mark.parametrize("aside", [False, True], ids=["replaced", "moved-aside"])
def test_a_replaced_file_is_not_served_on(source: Path, mount: MakeMount, aside: bool) -> None:
    old, new = noise(5 * MIB, 1), noise(5 * MIB, 2)
    (source / "f").write_bytes(old)
    mounted = mount(source, "0")
    assert read(mounted.path / "f") == old
    if aside:
        os.rename(source / "f", source / "old")
    _replace(source / "f", new)
    deadline = time.monotonic() + 10
    while True:
        forget(mounted.path / "f")  # what the kernel has of it, it may keep; this is about what it asks for
        got = _or_error(lambda: read(mounted.path / "f"), errno.ESTALE)
        assert got in (None, old, new)
        if got == new:
            break
        assert time.monotonic() < deadline, "the old file is served on and on"
        time.sleep(0.1)


@pytest.mark.parametrize("size", [CHUNK, 20 * MIB + 1, 60 * MIB], ids=["same", "shorter", "longer"])
def test_changed_in_place_while_it_is_open(source: Path, mount: MakeMount, size: int) -> None:
    before = 40 * MIB if size != CHUNK else CHUNK
    old, new = noise(before, 1), noise(size, 2)
    (source / "f").write_bytes(old)
    mounted = mount(source, "200M")
    with open(mounted.path / "f", "rb", buffering=0) as f:
        assert f.read(5000) == old[:5000]
        _overwrite(source / "f", new)
        at = min(size, before) - 100_000  # far from what may have been read ahead
        asked = _or_error(lambda: os.pread(f.fileno(), 1000, at), errno.ESTALE)
        assert asked in (None, old[at : at + 1000])
    _assert_soon(mounted.path / "f", new)
    mounted.settle()
    assert read(mounted.path / "f") == new
    assert mounted.stats()["source"]["changed_files"] >= 1


_MAPPED = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
first = mapped[:5000]
print("mapped", flush=True)
sys.stdin.readline()
print(mapped[:5000] == first, flush=True)
mapped[-5000:]
"""


def test_a_mapping_keeps_the_version_that_it_began_with(source: Path, mount: MakeMount) -> None:
    new = noise(20 * MIB, 2)
    (source / "f").write_bytes(noise(20 * MIB, 1))
    mounted = mount(source, "0")
    job = subprocess.Popen(
        [sys.executable, "-c", _MAPPED, mounted.path / "f"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "mapped\n"
    _overwrite(source / "f", new)
    coordlfs("refresh", mounted.path)
    assert read(mounted.path / "f") == new
    said, _ = job.communicate("\n", timeout=20)
    assert said == "True\n"
    assert job.returncode == -signal.SIGBUS, "a page that it had not got is of no version that it may see"


def _read_direct(fd: int, step: int) -> bytes:
    """All of a file, by calls that go around the page cache."""
    data = b""
    with mmap.mmap(-1, step) as into:
        while n := os.preadv(fd, [into], len(data)):
            data += into[:n]
    return data


@pytest.mark.parametrize("step", [PAGE, MIB])
@pytest.mark.parametrize("known", ["listed", "cached", "read"])
@pytest.mark.parametrize("cache", ["0", "64M"])
def test_shrunk_and_read_around_the_page_cache(
    source: Path, mount: MakeMount, cache: str, known: str, step: int
) -> None:
    # What such a READ leaves out the kernel would take from the page cache, where the old version is.
    old, new = noise(72_422, 1), noise(36_604, 2)
    (source / "f").write_bytes(old)
    mounted = mount(source, cache)
    os.stat(mounted.path / "f")
    if known != "listed":
        assert read(mounted.path / "f") == old
        mounted.settle()
    fd = os.open(mounted.path / "f", os.O_RDONLY | os.O_DIRECT)
    try:
        if known == "read":
            assert _read_direct(fd, step) == old
        _overwrite(source / "f", new)
        if known == "listed":
            assert _read_direct(fd, step) == new
        else:
            raises(errno.ESTALE, lambda: _read_direct(fd, step))
            _assert_soon(mounted.path / "f", new)
    finally:
        os.close(fd)


def test_readers_of_a_file_that_is_replaced_again_and_again(source: Path, mount: MakeMount) -> None:
    # Every version says on each of its pages which one it is, and how long it is.
    names = [f"f{number}" for number in range(6)]
    sizes = random.Random(3)

    def version(number: int) -> bytes:
        count = sizes.randrange(1, 200)
        return b"".join(f"{number:08} {count:08} {page:08}".encode().ljust(PAGE, b".") for page in range(count))

    for name in names:
        (source / name).write_bytes(version(0))
    mounted = mount(source, "2M")
    failed: list[str] = []
    seen: set[int] = set()

    def look(choice: random.Random) -> None:
        name = choice.choice(names)
        data = _or_error(lambda: read(mounted.path / name), errno.ESTALE, errno.ENOENT)
        if data is None:
            return
        number, count = int(data[:8]), int(data[9:17])
        seen.add(number)
        good = b"".join(f"{number:08} {count:08} {page:08}".encode().ljust(PAGE, b".") for page in range(count))
        if data != good:
            heads = [data[at : at + 27].decode(errors="replace") for at in range(0, len(data), PAGE)]
            failed.append(f"{name}: {len(data)} bytes of {count * PAGE}: {heads[:3]} … {heads[-3:]}")

    with _reading(look):
        until, number = time.monotonic() + 5, 0
        while (now := time.monotonic()) < until or (len(seen) <= 3 and now < until + 30):
            number += 1
            _replace(source / random.choice(names), version(number))
            coordlfs("drop", mounted.path)  # what is pinned is not asked for again
    assert failed == []
    assert len(seen) > 3, "the readers saw nothing change"


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab") as f:
        f.write(data[: len(data) // 2])


def _cut(path: Path, data: bytes) -> None:
    os.truncate(path, os.stat(path).st_size // 2)


def _remove(path: Path, data: bytes) -> None:
    path.unlink()
    if len(data) % 2:
        path.write_bytes(data)


@pytest.mark.parametrize("seed", [1, 2])
def test_after_a_storm_of_changes_all_is_as_in_the_source(source: Path, mount: MakeMount, seed: int) -> None:
    # What is pinned is not asked for again, so it is dropped at the end. No reader may have been given anything then
    # that stays.
    choice = random.Random(seed)
    names = [f"f{number}" for number in range(12)]
    memory = noise(4 * MIB, seed)
    for name in names:
        (source / name).write_bytes(noise(choice.choice(_SIZES[:-1])))
    mounted = mount(source, "3M")
    _know(mounted)

    def look(choice: random.Random) -> None:
        path = mounted.path / choice.choice(names)
        with suppress(OSError):
            read(path)
            if choice.random() < 0.7:
                forget(path)

    with _reading(look):
        until, number = time.monotonic() + 2.5, 0
        while time.monotonic() < until:
            number += 1
            change = choice.choice([_replace, _overwrite, _append, _cut, _remove])
            data = memory[number * 997 :][: choice.choice(_SIZES[:-1]) + number % 2]
            with suppress(FileNotFoundError):
                change(source / choice.choice(names), data)
            time.sleep(choice.choice([0, 0.01, 0.05]))
    assert mounted.stats()["source"]["changed_files"] > 2, "the readers saw nothing change"
    time.sleep(1.1)  # longer than it takes to notice
    coordlfs("drop", mounted.path)
    mounted.forget()
    for name in names:
        if (source / name).exists():
            _assert_soon(mounted.path / name, (source / name).read_bytes())
        else:
            eventually(lambda name=name: not _exists(mounted.path / name))  # type: ignore[misc]
    mounted.settle()
    for name in names:
        if (source / name).exists():
            assert read(mounted.path / name) == (source / name).read_bytes()
            assert os.stat(mounted.path / name).st_mtime_ns == os.stat(source / name).st_mtime_ns


def _exists(path: Path) -> bool:
    """Whether a file can be read, and not only listed: a name may be known for a while after it has gone."""
    return _or_error(lambda: read(path), errno.ENOENT, errno.ESTALE) is not None


# -- what `refresh` promises --------------------------------------------------------------------------------------

_BOUNDS = [1, PAGE - 1, PAGE, PAGE + 1, 50_000, 128 * 1024, MIB - 1, MIB]
_LARGE = [CHUNK - 1, CHUNK, CHUNK + 1, 40 * MIB]  # one in fifty
# Of each kind of change, on each file system. With more of them, and on others, see docs/contributing.md.
_ROUNDS = int(os.environ.get("COORDLFS_TEST_ROUNDS", 30))


def _write_over(path: Path, data: bytes) -> None:
    """The same size and other bytes, by one write: nothing but the time says that it changed."""
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, data, 0)
    os.close(fd)


def _truncate_to(path: Path, data: bytes) -> None:
    os.truncate(path, len(data))


def _append_up_to(path: Path, data: bytes) -> None:
    with open(path, "ab") as f:
        f.write(data[path.stat().st_size :])


def _versions(change: Change, choice: random.Random, old: bytes) -> bytes:
    """What a file that holds `old` is to hold after `change`."""
    size = choice.choice(_LARGE if choice.random() < 0.02 else _BOUNDS)
    if change is _write_over:
        return choice.randbytes(len(old))
    if change is _truncate_to:
        return old[: choice.randrange(1, len(old))] if len(old) > 1 else old
    if change is _append_up_to:
        return old + choice.randbytes(choice.choice([1, 100, PAGE, 30_000]))
    return choice.randbytes(size)


@pytest.mark.parametrize("change", [_write_over, _truncate_to, _append_up_to, _replace, _recreate, _overwrite])
@pytest.mark.parametrize("where", ["source", "in_memory"])
def test_when_refresh_has_answered_a_new_open_gets_the_new_bytes(
    request: pytest.FixtureRequest, mount: MakeMount, where: str, change: Change
) -> None:
    source: Path = request.getfixturevalue(where)
    choice = random.Random(f"{where} {change.__name__}")
    held = choice.randbytes(MIB)
    (source / "f").write_bytes(held)
    mounted = mount(source, "100M", "--immutable")
    for number in range(_ROUNDS):
        path = mounted.path / "f"
        assert read(path) == held
        with open(path, "rb", buffering=0) as still_open, ThreadPoolExecutor(1 if number % 2 else 8) as readers:
            wanted = _versions(change, choice, held)
            change(source / "f", wanted)
            with redirect_stdout(io.StringIO()):
                assert cli.main(["refresh", str(mounted.path)]) == 0
            for got in readers.map(read, [path] * readers._max_workers):
                assert got == wanted, f"round {number}: {len(held)} → {len(wanted)} bytes, got {len(got)}"
            assert os.stat(path).st_size == len(wanted)
            old = _or_error(still_open.read, errno.ESTALE)
            assert old in (None, held), "who has the old version open gets bytes of that one only"
        held = wanted
        if len(held) < 1000 or len(held) > 2 * MIB:
            held = choice.randbytes(MIB)
            _replace(source / "f", held)
            with redirect_stdout(io.StringIO()):
                assert cli.main(["refresh", str(mounted.path)]) == 0


def test_a_write_that_takes_long_is_not_kept_by_half(source: Path, mount: MakeMount) -> None:
    """It sets the time before it copies, so that what is read meanwhile looks like the new version."""
    size = 64 * MIB
    (source / "f").write_bytes(bytes(size))
    mounted = mount(source, "200M", "--immutable")
    over, client = threading.Event(), Client(str(mounted.path))

    def look() -> None:
        while not over.is_set():
            client.ask("refresh", paths=[""])
            with suppress(OSError), open(mounted.path / "f", "rb") as f:
                while f.read(MIB):
                    pass

    with ThreadPoolExecutor() as pool:
        looking = pool.submit(look)
        try:
            for number in range(1, 6):
                _write_over(source / "f", bytes([number]) * size)
                coordlfs("refresh", mounted.path)
                assert {*read(mounted.path / "f")} == {number}
        finally:
            over.set()
        looking.result(PATIENCE)
    client.close()


@pytest.mark.parametrize("change", [_write_over, _replace])
def test_refresh_waits_for_what_a_reader_has_noticed(source: Path, mount: MakeMount, change: Change) -> None:
    """The change is met by a READ, which has the names look elsewhere: it may not be over when `refresh` is asked."""
    held = noise(MIB, 0)
    (source / "f").write_bytes(held)
    mounted = mount(source, "0", "--immutable")
    for number in range(1, 60):
        with open(mounted.path / "f", "rb", buffering=0) as f:
            assert f.read() == held
            wanted = noise(MIB, number)
            change(source / "f", wanted)
            os.posix_fadvise(f.fileno(), 0, PAGE, os.POSIX_FADV_DONTNEED)
            _or_error(partial(os.pread, f.fileno(), 100, 0), errno.ESTALE)
            with redirect_stdout(io.StringIO()):
                assert cli.main(["refresh", str(mounted.path)]) == 0
            assert read(mounted.path / "f") == wanted
        held = wanted


@pytest.mark.parametrize("cache", ["0", "10M"])
def test_a_file_that_changes_for_ever_takes_up_no_more_room(source: Path, mount: MakeMount, cache: str) -> None:
    (source / "f").write_bytes(noise(50_000, 0))
    mounted = mount(source, cache, "--immutable")
    before = mounted.stats()["known_files"]
    with open(mounted.path / "f", "rb", buffering=0) as f:
        assert f.read() == noise(50_000, 0)
        for number in range(1, 100):
            _write_over(source / "f", noise(50_000, number))
            with redirect_stdout(io.StringIO()):
                assert cli.main(["refresh", str(mounted.path)]) == 0
            assert read(mounted.path / "f") == noise(50_000, number)
        # Gone, if the keeper dropped it before the name led elsewhere.
        assert _or_error(lambda: os.pread(f.fileno(), 50_000, 0), errno.ESTALE) in (noise(50_000, 0), b"", None)
    mounted.settle()
    figures = mounted.stats()
    assert figures["known_files"] - before < 8
    assert figures["epoch"]["items"] == 1


@pytest.mark.parametrize("is_restarted", [False, True])
def test_every_name_of_a_file_with_several_leads_to_the_new_version(
    source: Path, mount: MakeMount, is_restarted: bool
) -> None:
    (source / "d").mkdir()
    (source / "a").write_bytes(noise(50_000, 1))
    os.link(source / "a", source / "d" / "b")
    mounted = mount(source)
    mounted.expect_errors = is_restarted
    for name in ("a", "d/b"):
        assert read(mounted.path / name) == noise(50_000, 1)
    if is_restarted:  # the next server knows one of the names
        before = mounted.stats()["processes"]["server"]
        os.kill(before, signal.SIGKILL)
        eventually(lambda: mounted.stats()["processes"]["server"] != before)
    _write_over(source / "a", noise(50_000, 2))
    coordlfs("refresh", mounted.path)
    for name in ("a", "d/b"):
        assert read(mounted.path / name) == noise(50_000, 2)
    assert os.stat(mounted.path / "a").st_ino == os.stat(mounted.path / "d" / "b").st_ino


# -- links planted in the source ----------------------------------------------------------------------------------


def test_a_planted_link_leads_nowhere(source: Path, mount: MakeMount, place: Path) -> None:
    outside = place / "outside"
    outside.mkdir()
    for name in ("f", "g"):
        (outside / name).write_bytes(b"secret")
    (source / "d").mkdir()
    for name in ("d/f", "d/g", "top"):
        (source / name).write_bytes(b"public")
    mounted = mount(source)
    _know(mounted)
    os.rename(source / "d", source / "moved")
    (source / "d").symlink_to(outside)
    (source / "top").unlink()
    (source / "top").symlink_to(outside / "f")
    # The kernel still believes that `d` is a directory and `top` a file: reading through them would be coordlfs.
    for name in ("d/f", "top"):
        with pytest.raises(OSError):
            read(mounted.path / name)
    with pytest.raises(OSError):
        os.stat(mounted.path / "d" / "h")
    assert mounted.stats()["pinned_items"] == 0


def test_links_in_the_source_are_the_readers_to_follow(source: Path, mount: MakeMount, place: Path) -> None:
    (place / "outside").write_bytes(b"by an absolute link")
    (source / "d").mkdir()
    (source / "d" / "f").write_bytes(b"by a relative link")
    (source / "absolute").symlink_to(place / "outside")
    (source / "relative").symlink_to("d/f")
    (source / "up").symlink_to("../d/f")
    (source / "d" / "up").symlink_to("../d/f")
    mounted = mount(source)
    assert read(mounted.path / "absolute") == b"by an absolute link"
    assert read(mounted.path / "relative") == b"by a relative link"
    assert read(mounted.path / "d" / "up") == b"by a relative link"
    raises(errno.ENOENT, lambda: read(mounted.path / "up"))


def test_a_hard_link_outlives_its_other_name(source: Path, mount: MakeMount) -> None:
    (source / "a").write_bytes(noise(50_000))
    os.link(source / "a", source / "b")
    mounted = mount(source)
    _know(mounted)
    assert os.stat(mounted.path / "a").st_ino == os.stat(mounted.path / "b").st_ino
    (source / "a").unlink()
    _assert_soon(mounted.path / "b", noise(50_000))
