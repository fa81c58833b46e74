"""A source that changes or fails: readers get what reading it directly would give, and never bytes of two versions."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from mounts import (
    CHUNK,
    MIB,
    PAGE,
    MakeMount,
    Mount,
    coordlfs,
    drop_caches,
    eventually,
    forget,
    is_mounted,
    noise,
    raises,
    read,
    script,
    unmount_lazily,
)


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


def _read_by_mmap(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        if not size:
            return b""
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
            return mapped[:]
    finally:
        os.close(fd)


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


def _or_error(action: Callable[[], bytes], *codes: int) -> bytes | None:
    """What `action` returns, or None if it fails with one of these errors."""
    try:
        return action()
    except OSError as e:
        if e.errno not in codes:
            raise
        return None


def _assert_soon(path: Path, data: bytes) -> None:
    """Whoever opens the file anew gets `data`, if not at once; until then an error, if anything else than `data`."""
    eventually(lambda: _or_error(lambda: read(path), errno.ESTALE, errno.ENOENT) == data, 10, f"{path} is new")


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
        assert read(mounted.path / f"{before}") == noise(after, 2), f"{before} → {after}"
    mounted.settle()
    for before in known:  # attributes follow in a moment
        ours, theirs = mounted.path / f"{before}", source / f"{before}"
        assert os.stat(ours).st_size == after
        eventually(lambda a=ours, b=theirs: os.stat(a).st_mtime_ns == os.stat(b).st_mtime_ns, 3)  # type: ignore[misc]
    for before in known:
        assert read(mounted.path / f"{before}") == noise(after, 2), f"{before} → {after}, again"


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
        got = _or_error(lambda: os.pread(fd, 200_000, offset), errno.ESTALE)
        assert got in (None, noise(300_000, 2)[offset : offset + 200_000])

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
    for name in ("read", "mapped"):
        (source / name).unlink()
    shutil.rmtree(source / "d")
    raises(errno.ENOENT, lambda: read(mounted.path / "read"))
    raises(errno.ENOENT, lambda: read(mounted.path / "d" / "f"))
    program = "import mmap, os, sys\nfd = os.open(sys.argv[1], 0)\nmmap.mmap(fd, 0, prot=mmap.PROT_READ)[:]"
    job = subprocess.run([sys.executable, "-c", program, mounted.path / "mapped"], timeout=20)
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


# -- read in part -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["0", "200M"])
def test_replaced_while_it_is_open(source: Path, mount: MakeMount, cache: str) -> None:
    size = 3 * CHUNK
    old, new = noise(size, 1), noise(size, 2)
    (source / "f").write_bytes(old)
    mounted = mount(source, cache)
    with open(mounted.path / "f", "rb", buffering=0) as f:
        got = bytearray(f.read(100_000))
        _replace(source / "f", new)
        while part := _or_error(lambda: f.read(MIB), errno.ESTALE):
            got += part
        assert bytes(got) == old[: len(got)]
        # However often he asks who has the old one open, he gets nothing of the new one.
        for offset in range(0, size, 5 * MIB):
            asked = _or_error(lambda at=offset: os.pread(f.fileno(), 1000, at), errno.ESTALE)  # type: ignore[misc]
            assert asked in (None, old[offset : offset + 1000])


def test_replaced_after_it_was_changed_in_place(source: Path, mount: MakeMount) -> None:
    versions = [noise(900_000, number) for number in range(3)]
    (source / "f").write_bytes(versions[0])
    mounted = mount(source, "0")
    with open(mounted.path / "f", "rb", buffering=0) as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # every page is asked for by itself
        assert f.read(100) == versions[0][:100]
        _overwrite(source / "f", versions[1])
        assert os.pread(f.fileno(), 100, 400_000) == versions[1][400_000:400_100]
        _replace(source / "f", versions[2])
        asked = _or_error(lambda: os.pread(f.fileno(), 100, 800_000), errno.ESTALE)
        assert asked in (None, versions[1][800_000:800_100])


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
        assert asked in (None, new[at : at + 1000])
    _assert_soon(mounted.path / "f", new)
    mounted.settle()
    assert read(mounted.path / "f") == new
    assert mounted.stats()["source"]["changed_files"] >= 1


def test_a_mapping_follows_a_change_in_place(source: Path, mount: MakeMount) -> None:
    # Nothing asks for attributes here, which would have the kernel look again: the server must tell it.
    old, new = noise(20 * MIB, 1), noise(20 * MIB, 2)
    (source / "f").write_bytes(old)
    mounted = mount(source, "0")
    fd = os.open(mounted.path / "f", os.O_RDONLY)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:5000] == old[:5000]
        _overwrite(source / "f", new)
        assert mapped[-5000:] == new[-5000:]  # here the server learns of it
        eventually(lambda: mapped[:5000] == new[:5000], 5)
        assert mapped[:] == new
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
        while time.monotonic() < until:
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
    drop_caches()
    for name in names:
        if (source / name).exists():
            _assert_soon(mounted.path / name, (source / name).read_bytes())
        else:
            eventually(lambda name=name: not _exists(mounted.path / name), 3)  # type: ignore[misc]
    mounted.settle()
    for name in names:
        if (source / name).exists():
            assert read(mounted.path / name) == (source / name).read_bytes()
            assert os.stat(mounted.path / name).st_mtime_ns == os.stat(source / name).st_mtime_ns


def _exists(path: Path) -> bool:
    """Whether a file can be read, and not only listed: a name may be known for a while after it has gone."""
    return _or_error(lambda: read(path), errno.ENOENT, errno.ESTALE) is not None


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


# -- errors -------------------------------------------------------------------------------------------------------


class Faults:
    """A mounted file system that fails on demand; see `faulty_fs`."""

    def __init__(self, directory: Path, place: Path) -> None:
        self.path = place / "faulty"
        self.path.mkdir()
        self._file = place / "faults"
        self.clear()
        program = Path(__file__).with_name("faulty_fs.py")
        self._command = [sys.executable, *map(str, (program, directory, self.path, self._file))]
        self._controls = place / "controls"
        self._controls.mkdir()

    def start(self) -> None:
        """Mount it."""
        self._process = subprocess.Popen(self._command)
        eventually(lambda: is_mounted(self.path))
        # By default the kernel itself stops after 12 requests that are not answered.
        subprocess.run(["mount", "-t", "fusectl", "fusectl", self._controls], check=True)
        try:
            connection = os.minor(os.stat(self.path).st_dev)
            (self._controls / str(connection) / "max_background").write_text("1000")
        finally:
            unmount_lazily(self._controls)

    def set(self, what: str, **fault: float) -> None:
        """From now on this fails, and nothing else."""
        self._write({what: fault})

    def set_all(self, faults: dict[str, Any]) -> None:
        """From now on all these fail, and nothing else."""
        self._write(faults)

    def kill(self) -> None:
        """End the process, and nothing else: the file system answers ENOTCONN."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Unmount what is dead, and mount it again."""
        unmount_lazily(self.path)
        self.start()

    def clear(self) -> None:
        """From now on nothing fails."""
        self._write({})

    def _write(self, faults: dict[str, Any]) -> None:
        beside = self._file.with_name("faults.new")
        beside.write_text(json.dumps(faults))
        os.rename(beside, self._file)

    def end(self) -> None:
        """Unmount, and see that the process has ended."""
        unmount_lazily(self.path)
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def faults(source: Path, place: Path, _may_mount: None) -> Iterator[Callable[[], Faults]]:
    """Mounts `source` on the faulty file system, once its files are there."""
    made: list[Faults] = []

    def make() -> Faults:
        made.append(Faults(source, place))
        made[0].start()
        return made[0]

    yield make
    for faulty in made:
        faulty.end()


@pytest.mark.parametrize("cache", ["0", "64M"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EREMOTEIO])
def test_an_error_of_reading(
    source: Path, faults: Callable[[], Faults], mount: MakeMount, cache: str, code: int
) -> None:
    (source / "f").write_bytes(noise(300_000))
    (source / "g").write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path, cache)
    faulty.set("read f", errno=code)
    for _ in range(2):
        raises(code, lambda: read(mounted.path / "f"))
    assert mounted.stats()["source"]["errors"] >= 2
    assert mounted.stats()["pinned_items"] == 0
    assert read(mounted.path / "g") == noise(50_000)
    faulty.clear()
    errors = mounted.stats()["source"]["errors"]
    for _ in range(2):
        assert read(mounted.path / "f") == noise(300_000)
        mounted.settle()
    assert mounted.stats()["source"]["errors"] == errors
    assert mounted.cached("f") == ("no" if cache == "0" else "pinned")


def test_an_error_in_the_middle_of_a_file(source: Path, faults: Callable[[], Faults], mount: MakeMount) -> None:
    data = noise(5 * MIB)
    (source / "f").write_bytes(data)
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set("read f", errno=errno.EIO, **{"from": 3 * MIB})
    fd = os.open(mounted.path / "f", os.O_RDONLY)
    assert os.pread(fd, 100_000, MIB) == data[MIB : MIB + 100_000]
    raises(errno.EIO, lambda: os.pread(fd, 100, 4 * MIB))
    time.sleep(0.3)  # the keeper tries and fails as well
    assert os.pread(fd, 100_000, 0) == data[:100_000]
    faulty.clear()
    assert read(mounted.path / "f") == data
    os.close(fd)
    mounted.settle()
    assert read(mounted.path / "f") == data
    mounted.settle()
    assert mounted.cached("f") == "pinned"


def test_modes_are_enforced_where_the_source_has_no_acls(
    source: Path, faults: Callable[[], Faults], mount: MakeMount
) -> None:
    for name, mode in (("open", 0o644), ("closed", 0o600)):
        (source / name).write_text(name)
        (source / name).chmod(mode)
    mounted = mount(faults().path)
    program = (
        "import os, sys\n"
        "os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        print(os.read(os.open(path, 0), 10).decode())\n"
        "    except OSError as e:\n"
        "        print(e.errno)\n"
    )
    seen = script(program, mounted.path / "open", mounted.path / "closed")
    assert seen.split() == ["open", str(errno.EACCES)]


def test_a_mapping_of_what_cannot_be_read(source: Path, faults: Callable[[], Faults], mount: MakeMount) -> None:
    (source / "f").write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set("read f", errno=errno.EIO)
    program = "import mmap, os, sys\nfd = os.open(sys.argv[1], 0)\nmmap.mmap(fd, 0, prot=mmap.PROT_READ)[:]"
    job = subprocess.run([sys.executable, "-c", program, mounted.path / "f"], timeout=20)
    assert job.returncode == -signal.SIGBUS
    faulty.clear()
    assert _read_by_mmap(mounted.path / "f") == noise(50_000)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_errors_of_names(source: Path, faults: Callable[[], Faults], mount: MakeMount, code: int) -> None:
    for name in ("f", "g"):
        (source / name).write_bytes(noise(5000))
    faulty = faults()
    mounted = mount(faulty.path)
    for what, action in (
        ("lookup f", lambda: os.stat(mounted.path / "f")),
        ("readdir ", lambda: os.listdir(mounted.path)),
        ("open g", lambda: read(mounted.path / "g")),
        ("getxattr f", lambda: os.getxattr(mounted.path / "f", "user.any")),
    ):
        faulty.set(what, errno=code)
        raises(code, action)
        faulty.clear()
        if what.startswith("getxattr"):
            raises(errno.ENODATA, action)
        else:
            action()
    assert sorted(os.listdir(mounted.path)) == ["f", "g"]
    assert read(mounted.path / "f") == read(mounted.path / "g") == noise(5000)


def test_warming_what_cannot_be_read(source: Path, faults: Callable[[], Faults], mount: MakeMount) -> None:
    for name in ("f", "g"):
        (source / name).write_bytes(noise(300_000))
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set("read f", errno=errno.EIO)
    assert "1 of 2 items" in coordlfs("warm", mounted.path, timeout=30, status=None).stdout
    assert (mounted.cached("f"), mounted.cached("g")) == ("no", "pinned")
    assert "cannot be read" in coordlfs("verify", mounted.path, status=1).stdout
    faulty.clear()
    assert "2 of 2 items" in coordlfs("warm", mounted.path, timeout=30).stdout
    assert "all equal" in coordlfs("verify", mounted.path).stdout


def test_a_source_that_takes_its_time_holds_up_nobody_else(
    source: Path, faults: Callable[[], Faults], mount: MakeMount
) -> None:
    for name in ("slow", "pinned", "other"):
        (source / name).write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    read(mounted.path / "pinned")
    mounted.settle()
    faulty.set("read slow", delay=5)
    got: list[bytes] = []
    readers = [threading.Thread(target=lambda: got.append(read(mounted.path / "slow"))) for _ in range(4)]
    started = time.monotonic()
    for thread in readers:
        thread.start()
    time.sleep(0.3)
    with mounted.messages() as sent:
        assert read(mounted.path / "pinned") == noise(50_000)
    assert sent["read"] == 0
    assert read(mounted.path / "other") == noise(50_000)
    assert time.monotonic() - started < 4, "they waited for the slow one"
    for thread in readers:
        thread.join()
    assert got == [noise(50_000)] * 4


def test_unmounting_while_the_source_takes_its_time(
    source: Path, faults: Callable[[], Faults], mount: MakeMount
) -> None:
    (source / "slow").write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set("read slow", delay=3)
    program = "import os, sys\nos.read(os.open(sys.argv[1], 0), 100)"
    job = subprocess.Popen([sys.executable, "-c", program, mounted.path / "slow"])
    try:
        time.sleep(0.5)
        pids = mounted.pids
        coordlfs("umount", "--lazy", mounted.path)
        assert job.wait(20) == 0
    finally:
        job.kill()
        job.wait()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@contextmanager
def _waiting(commands: list[list[str]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that wait for what never comes; they are killed in the end, and must end then."""
    processes = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands]
    try:
        time.sleep(1)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait(20)


def test_what_never_answers_holds_up_nobody_else(source: Path, faults: Callable[[], Faults], mount: MakeMount) -> None:
    """More readers of files that never come than any small pool of threads would have room for."""
    hung = [f"hung{number}" for number in range(160)]
    for name in ("pinned", "other", *hung):
        (source / name).write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    read(mounted.path / "pinned")
    mounted.settle()
    faulty.set_all({f"read {name}": {"delay": 3600} for name in hung})
    with _waiting([["cat", str(mounted.path / name)] for name in hung]) as readers:
        with mounted.messages() as sent:
            assert read(mounted.path / "pinned") == noise(50_000)
        assert sent["read"] == 0
        assert read(mounted.path / "other") == noise(50_000)
        assert mounted.cached("pinned") == "pinned"
        coordlfs("drop", mounted.path, mounted.path / "pinned")
        assert all(reader.poll() is None for reader in readers)
    faulty.kill()  # a thread that waits for it could not end


def test_who_waits_for_a_name_can_be_interrupted(source: Path, faults: Callable[[], Faults], mount: MakeMount) -> None:
    for name in ("hung", "pinned"):
        (source / name).write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    read(mounted.path / "pinned")
    mounted.settle()
    faulty.set("lookup hung", delay=3600)
    with _waiting([["cat", str(mounted.path / "hung")]]) as [reader]:
        assert read(mounted.path / "pinned") == noise(50_000)
        reader.send_signal(signal.SIGINT)
        assert reader.wait(10) == -signal.SIGINT
        assert mounted.stats()["requests"]["interrupted"] == 1
    faulty.kill()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("what", ["read f", "lookup f"])
def test_what_passes_is_not_noticed(
    source: Path, faults: Callable[[], Faults], mount: MakeMount, what: str, code: int
) -> None:
    (source / "f").write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set(what, errno=code, times=2)
    assert read(mounted.path / "f") == noise(50_000)
    assert mounted.stats()["source"]["retries"] >= 1


def test_a_source_that_is_unmounted_and_mounted_again(
    source: Path, faults: Callable[[], Faults], mount: MakeMount
) -> None:
    for name in ("pinned", "other", "third"):
        (source / name).write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    assert read(mounted.path / "pinned") == noise(50_000)
    mounted.settle()
    assert read(mounted.path / "other") == noise(50_000)
    faulty.kill()
    with mounted.messages() as sent:
        assert read(mounted.path / "pinned") == noise(50_000)
    assert sent["read"] == 0
    raises(errno.ENOTCONN, lambda: read(mounted.path / "third"))
    faulty.restart()
    assert read(mounted.path / "third") == noise(50_000)
    assert read(mounted.path / "other") == noise(50_000)
