"""The disk tier on real mounts: what an epoch reads, what a reboot keeps, and that no fault of its disk ever shows."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from coordlfs_tools.lab import cgroups
from mounts import (
    MIB,
    MakeMount,
    Mount,
    coordlfs,
    eventually,
    is_mounted,
    noise,
    read,
    write_files,
)
from tiers import FILES, ROOM, SIZE, damage, epoch, killed, settle


@pytest.fixture
def cache(place: Path) -> Path:
    return place / "disk cache"


@pytest.mark.parametrize(("memory", "disk"), [(20, 60), (60, 30), (0, 80), (20, 140)])
def test_a_steady_epoch_reads_what_fits_into_neither(
    source: Path, mount: MakeMount, cache: Path, memory: int, disk: int
) -> None:
    names = write_files(source, FILES, SIZE)
    size = disk * ROOM + MIB // 2
    mounted = mount(source, str(memory * ROOM), "--disk-cache", cache, "--disk-size", size)
    assert epoch(mounted, names, 0) == FILES * SIZE
    epoch(mounted, names, 1)  # what came while its copies were on their way into memory finds room now
    for seed in (2, 3):
        before = mounted.stats()
        read_of_source = epoch(mounted, names, seed)
        figures = mounted.stats()
        held = figures["disk"]["held_blocks"]
        assert held >= min(FILES, disk)
        assert read_of_source == max(0, FILES - memory - held) * SIZE
        assert figures["disk"]["bytes"] - before["disk"]["bytes"] == min(held, FILES - memory) * SIZE
        assert figures["epoch"]["disk_items"] == min(held, FILES - memory)
        assert figures["epoch"]["memory_items"] == memory
        assert (
            figures["epoch"]["disk_bytes"] + figures["epoch"]["memory_bytes"] + figures["epoch"]["bytes"]
            == FILES * SIZE
        )
    disk_figures = mounted.stats()["disk"]
    # Nothing is written twice: a copy may give way once to what memory does not hold.
    assert disk_figures["written_bytes"] <= (disk_figures["held_blocks"] + memory) * SIZE
    taken = sum(f.lstat().st_blocks * 512 for f in cache.rglob("*")) + 0
    assert taken == disk_figures["taken_bytes"] <= size
    kinds = {mounted.cached(name) for name in names}
    assert kinds <= {"pinned", "disk", "no"}
    assert ("no" in kinds) == (memory + disk_figures["held_blocks"] < FILES)
    assert sum(mounted.cached(name) == "pinned" for name in names) == memory


def test_large_files_are_kept_by_the_block(source: Path, mount: MakeMount, cache: Path) -> None:
    content = noise(20 * MIB + 77)
    (source / "large").write_bytes(content)
    mounted = mount(source, "0", "--disk-cache", cache, "--disk-size", "12M")
    for seed in range(3):
        before = mounted.source_bytes()
        assert read(mounted.path / "large") == content
        held = settle(mounted)["held_bytes"]
        if seed:
            assert mounted.source_bytes() - before == len(content) - held
        mounted.forget()
    assert held >= 11 * MIB
    assert mounted.cached("large") == "partial"
    # A part of a block: the rest of it is read, and kept, once nobody reads on.
    fd = os.open(mounted.path / "large", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for at in random.Random(1).sample(range(len(content) - 50), 40):
        assert os.pread(fd, 50, at) == content[at : at + 50]
    os.close(fd)


def test_reads_of_any_part_with_o_direct(source: Path, mount: MakeMount, cache: Path) -> None:
    """In several blocks, and beyond the end of the file."""
    content = noise(3 * MIB + 77)
    (source / "large").write_bytes(content)
    mounted = mount(source, "0", "--disk-cache", cache, "--disk-size", "12M")
    assert read(mounted.path / "large") == content
    eventually(lambda: settle(mounted)["held_blocks"] == 4)
    before, fd, rng = (
        mounted.source_bytes(),
        os.open(mounted.path / "large", os.O_RDONLY | os.O_DIRECT),
        random.Random(3),
    )
    try:
        for _ in range(40):
            at, length = rng.randrange(len(content) + 10), rng.randrange(1, 2 * MIB)
            assert os.pread(fd, length, at) == content[at : at + length]
    finally:
        os.close(fd)
    assert mounted.source_bytes() == before
    assert mounted.stats()["source"]["errors"] == 0


def test_parts_of_blocks_are_completed(source: Path, mount: MakeMount, cache: Path) -> None:
    content = noise(8 * MIB)
    (source / "large").write_bytes(content)
    mounted = mount(source, "0", "--disk-cache", cache, "--disk-size", "16M")
    fd = os.open(mounted.path / "large", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for block in range(8):
        at = block * MIB + 12345
        assert os.pread(fd, 5000, at) == content[at : at + 5000]
    eventually(lambda: mounted.stats()["disk"]["held_blocks"] == 8)
    settle(mounted)
    before = mounted.source_bytes()
    assert mounted.stats()["epoch"]["bytes"] == before > 8 * MIB
    mounted.forget()
    assert read(mounted.path / "large") == content
    assert mounted.source_bytes() == before
    os.close(fd)


@pytest.mark.parametrize("how", ["unmounted", "killed"])
def test_what_was_on_disk_is_there_after_a_restart(source: Path, mount: MakeMount, cache: Path, how: str) -> None:
    names = write_files(source, FILES, SIZE)
    options = (str(20 * ROOM), "--disk-cache", cache, "--disk-size", 60 * ROOM + MIB // 2)
    first = mount(source, *options)
    for seed in (0, 1):
        epoch(first, names, seed)
    held = settle(first)["held_blocks"]
    killed(first) if how == "killed" else first.end()
    second = mount(source, *options)
    assert epoch(second, names, 2) == (FILES - held) * SIZE
    assert second.stats()["disk"]["bad_blocks"] == 0
    second_held = second.stats()["disk"]["held_blocks"]
    assert epoch(second, names, 3) == (FILES - 20 - second_held) * SIZE


def test_a_server_that_is_killed_again_and_again_gives_no_wrong_byte(
    source: Path, mount: MakeMount, cache: Path
) -> None:
    names = write_files(source, FILES, SIZE)
    mounted = mount(source, str(20 * ROOM), "--disk-cache", cache, "--disk-size", 60 * ROOM)
    mounted.expect_errors = True
    for seed in range(6):
        stop = threading.Timer(0.05 * seed, os.kill, (mounted.stats()["processes"]["server"], signal.SIGKILL))
        stop.start()
        epoch(mounted, names, seed)
        stop.join()
    settle(mounted)
    epoch(mounted, names, 99)
    figures = mounted.stats()
    assert figures["disk"]["bad_blocks"] == 0
    assert figures["disk"]["held_blocks"] > 50


def test_memory_is_filled_from_the_disk_when_nobody_reads(source: Path, mount: MakeMount, cache: Path) -> None:
    names = write_files(source, FILES, SIZE)
    (source / "directory").mkdir()
    (source / "directory/large").write_bytes(noise(3 * MIB))
    options = ("--disk-cache", cache, "--disk-size", "24M")
    first = mount(source, "0", *options)
    epoch(first, [*names, "directory/large"], 0)
    first.end()
    second = mount(source, str(30 * MIB), *options)
    eventually(lambda: second.stats()["pinned_items"] == FILES + 1)
    figures = settle(second)
    assert second.source_bytes() == 0
    assert epoch(second, [*names, "directory/large"], 1) == 0
    assert figures["held_blocks"] == FILES + 3


def test_warm_fills_both_and_drop_empties_both(source: Path, mount: MakeMount, cache: Path) -> None:
    names = write_files(source, FILES, SIZE)
    mounted = mount(source, str(20 * ROOM), "--disk-cache", cache, "--disk-size", 60 * ROOM + MIB // 2)
    said = coordlfs("warm", mounted.path).stdout
    held = settle(mounted)["held_blocks"]
    assert held >= 60
    assert f"20 of {FILES} items are cached" in said
    assert f"; {held} more on disk" in said
    assert mounted.stats()["pinned_items"] == 20
    assert epoch(mounted, names, 0) == (FILES - 20 - held) * SIZE
    on_disk = [name for name in names if mounted.cached(name) == "disk"]
    said = coordlfs("drop", mounted.path, *(mounted.path / name for name in on_disk[:7])).stdout
    assert "0 items were dropped" in said
    assert settle(mounted)["held_blocks"] == held - 7
    assert {mounted.cached(name) for name in on_disk[:7]} == {"no"}
    coordlfs("drop", mounted.path)
    assert settle(mounted)["held_bytes"] == 0
    assert {mounted.cached(name) for name in names} == {"no"}
    assert epoch(mounted, names, 1) == FILES * SIZE
    assert epoch(mounted, names, 2) == (FILES - 20 - settle(mounted)["held_blocks"]) * SIZE


def test_all_of_a_dataset_that_fits_is_warmed(source: Path, mount: MakeMount, cache: Path) -> None:
    names = write_files(source, FILES, SIZE)
    (source / "large").write_bytes(noise(20 * MIB + 5))
    mounted = mount(source, str(20 * ROOM), "--disk-cache", cache, "--disk-size", "64M")
    coordlfs("warm", mounted.path)
    assert settle(mounted)["held_bytes"] >= (FILES - 20) * SIZE + 20 * MIB + 5
    assert epoch(mounted, [*names, "large"], 0) == 0


def test_a_change_is_noticed_and_gives_its_room_back(source: Path, mount: MakeMount, cache: Path) -> None:
    names = write_files(source, 20, SIZE)
    options = ("0", "--disk-cache", cache, "--disk-size", "8M")
    mounted = mount(source, *options)
    epoch(mounted, names, 0)
    assert settle(mounted)["held_blocks"] == 20
    (source / names[0]).write_bytes(noise(SIZE, 777))
    (source / names[1]).unlink()
    (source / names[2]).write_bytes(noise(10, 778))
    coordlfs("refresh", mounted.path)
    assert settle(mounted)["held_blocks"] == 17
    names.remove(names[1])
    epoch(mounted, names, 1)
    assert settle(mounted)["held_blocks"] == 19
    assert epoch(mounted, names, 2) == 0
    mounted.end()
    # The same between two mounts.
    (source / names[0]).write_bytes(noise(SIZE, 779))
    (source / names[3]).unlink()
    del names[3]
    again = mount(source, *options)
    assert epoch(again, names, 3) == SIZE
    eventually(lambda: again.stats()["disk"]["held_blocks"] == 18, what="a file that is gone keeps its room")


@pytest.mark.parametrize("tier", [True, False])
def test_a_file_that_grew_before_it_was_read_has_its_new_end(
    source: Path, mount: MakeMount, cache: Path, tier: bool
) -> None:
    """The kernel asks for what it knows of, and takes a short answer for the end: it is stale once, never short."""

    def is_new(path: Path, new: bytes) -> bool:
        try:
            got = read(path)
        except OSError as e:
            if e.errno != errno.ESTALE:
                raise
            return False
        assert got == new
        return True

    for number in range(20):
        (source / f"{number}").write_bytes(noise(84_629, number))
    mounted = mount(source, "0", *(("--disk-cache", cache, "--disk-size", "16M") if tier else ()))
    for number in range(20):
        path = mounted.path / f"{number}"
        assert path.stat().st_size == 84_629
        (source / "new").write_bytes(new := noise(146_207, number))
        (source / "new").rename(source / f"{number}")
        eventually(lambda path=path, new=new: is_new(path, new))  # type: ignore[misc]


def test_damage_between_two_mounts_never_shows(source: Path, mount: MakeMount, cache: Path) -> None:
    names = write_files(source, FILES, SIZE)
    (source / "large").write_bytes(noise(5 * MIB, 5))
    names.append("large")
    options = ("0", "--disk-cache", cache, "--disk-size", "32M")
    rng = random.Random(3)
    for seed in range(4):
        mounted = mount(source, *options)
        before = mounted.stats()["disk"]
        epoch(mounted, names, seed)
        assert settle(mounted)["held_blocks"] == FILES + 5
        assert epoch(mounted, names, seed + 10) == 0
        figures = mounted.stats()
        assert figures["source"]["errors"] == 0
        if seed:
            assert figures["disk"]["bad_blocks"] > 0 or before["held_blocks"] == 0
        mounted.end()
        [store] = cache.iterdir()
        for _ in range(250):
            damage(store / rng.choice(["index", "names", "data", "data"]), rng)


def test_damage_under_a_mount_never_shows(source: Path, mount: MakeMount, cache: Path) -> None:
    """Where READs are answered without the GIL, since nothing is to be decided, and where they are not."""
    names = write_files(source, FILES, SIZE)
    mounted = mount(source, "0", "--disk-cache", cache, "--disk-size", "32M")
    for seed in (0, 1):
        epoch(mounted, names, seed)
    [store] = cache.iterdir()
    rng = random.Random(5)
    for seed in range(2, 6):
        turns, bad = mounted.stats()["requests"]["turns"], mounted.stats()["disk"]["bad_blocks"]
        for _ in range(10):
            with open(store / "data", "r+b") as f:
                f.seek(at := rng.randrange(FILES * SIZE))
                byte = f.read(1)[0]
                f.seek(at)
                f.write(bytes([byte ^ 1 << rng.randrange(8)]))
                os.fsync(f.fileno())
        read_of_source = epoch(mounted, names, seed)
        figures = mounted.stats()
        found = figures["disk"]["bad_blocks"] - bad
        assert 0 < found <= 10
        assert read_of_source == found * SIZE
        assert figures["disk"]["held_blocks"] == FILES
        assert figures["requests"]["turns"] - turns < 12 * FILES


def test_what_is_in_neither_is_read_without_a_decision(source: Path, mount: MakeMount, cache: Path) -> None:
    """All tiers full, a file that changes under it: still its bytes, and its version."""
    names = write_files(source, FILES, SIZE)
    mounted = mount(source, str(20 * ROOM), "--disk-cache", cache, "--disk-size", 40 * ROOM)
    for seed in range(3):
        epoch(mounted, names, seed)
    for seed in range(3, 6):
        changed = random.Random(seed).sample(names, 5)
        for name in changed:
            (source / name).write_bytes(noise(SIZE, seed * 1000 + int(name[-5:])))
        coordlfs("refresh", mounted.path)
        pinned = mounted.settle()["pinned_items"]  # one that was, and has changed, leaves its room to what misses first
        epoch(mounted, names, seed)
    figures = mounted.stats()
    assert figures["source"]["errors"] == 0
    assert figures["epoch"]["misses"] == FILES - pinned


@pytest.fixture
def small_disk(place: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many bytes on a loop device."""
    made: list[Path] = []

    def make(size: int) -> Path:
        image, at = place / f"image{len(made)}", place / f"disk{len(made)}"
        image.write_bytes(b"")
        os.truncate(image, size)
        at.mkdir()
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, at], check=True)
        made.append(at)
        return at

    yield make
    for at in made:
        subprocess.run(["umount", at], check=True)


def test_a_file_system_that_others_fill_stops_the_growth_and_nothing_else(
    source: Path, mount: MakeMount, small_disk: Callable[[int], Path]
) -> None:
    names, disk = write_files(source, FILES, SIZE), small_disk(24 * MIB)
    mounted = mount(source, "0", "--disk-cache", disk / "cache", "--disk-size", "16M")
    epoch(mounted, names[:20], 0)
    with suppress(OSError), open(disk / "others", "wb") as f:
        while True:
            f.write(bytes(MIB))
            f.flush()
            os.fsync(f.fileno())
    for seed in (1, 2):
        read_of_source = epoch(mounted, names, seed)
    figures = mounted.stats()["disk"]
    assert 20 <= figures["held_blocks"] < FILES
    assert read_of_source == (FILES - figures["held_blocks"]) * SIZE
    assert figures["bad_blocks"] == 0
    assert mounted.log.read_text().count("cannot grow") == 1
    mounted.end()
    (disk / "others").unlink()
    again = mount(source, "0", "--disk-cache", disk / "cache", "--disk-size", "16M")
    for seed in (3, 4):
        read_of_source = epoch(again, names, seed)
    assert read_of_source == 0
    again.end()


@contextmanager
def throttled(mounted: Mount, device: int, bytes_per_second: int) -> Iterator[None]:
    """The processes of a mount read so little of a device meanwhile."""
    with cgroups.cgroup(f"{os.major(device)}:{os.minor(device)}", bytes_per_second=bytes_per_second) as group:
        for pid in mounted.pids:
            group.add(pid)
        try:
            yield
        finally:
            parents = [directory.parent for directory in set(group.directories.values())]
            for pid in mounted.pids:
                for directory in parents:
                    (directory / "cgroup.procs").write_text(str(pid))


def test_a_disk_that_hangs_delays_nobody_for_long(
    source: Path, mount: MakeMount, small_disk: Callable[[int], Path]
) -> None:
    names, disk = write_files(source, FILES, SIZE), small_disk(40 * MIB)
    (source / "large").write_bytes(content := noise(3 * MIB, 9))
    mounted = mount(source, "0", "--disk-cache", disk / "cache", "--disk-size", "24M")
    for seed in (0, 1):
        assert read(mounted.path / "large") == content
        epoch(mounted, names, seed)
    with throttled(mounted, os.stat(disk).st_dev, 100):  # so a block takes a quarter of an hour
        began = time.monotonic()
        assert read(mounted.path / "large") == content
        epoch(mounted, names, 2)
        assert time.monotonic() - began < 120
        resting = mounted.stats()["disk"]["resting"]
        assert resting is not None
        assert "has not answered" in resting
    assert mounted.stats()["source"]["errors"] == 0
    assert "left alone" in mounted.log.read_text()
    eventually(lambda: mounted.stats()["disk"]["resting"] is None)
    epoch(mounted, names, 3)
    assert epoch(mounted, names, 4) == 0, "the disk answers again, and is not asked"
    mounted.end()


def test_a_disk_that_is_slower_than_the_source_is_left_alone(
    source: Path, mount: MakeMount, small_disk: Callable[[int], Path]
) -> None:
    names, disk = write_files(source, FILES, SIZE), small_disk(24 * MIB)
    mounted = mount(source, "0", "--disk-cache", disk / "cache", "--disk-size", 60 * ROOM)
    for seed in (0, 1):
        epoch(mounted, names, seed)
    with throttled(mounted, os.stat(disk).st_dev, 1_000_000):
        for seed in (2, 3):
            epoch(mounted, names, seed)
        assert "takes" in mounted.stats()["disk"]["resting"]
        assert "the source" in mounted.log.read_text()
    mounted.end()


def test_a_disk_that_has_less_than_it_says(source: Path, place: Path, mount: MakeMount) -> None:
    """As one that is provisioned thinly: writes to room that was allotted find none. It grows no more, and goes on."""
    names, memory, disk = write_files(source, FILES, SIZE), place / "memory", place / "disk"
    memory.mkdir()
    disk.mkdir()
    with ExitStack() as stack:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9M", "none", memory], check=True)
        stack.callback(lambda: subprocess.run(["umount", memory], check=True))
        (memory / "image").touch()
        os.truncate(memory / "image", 64 * MIB)
        options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-E", options, memory / "image"], check=True)
        subprocess.run(["mount", "-o", "loop", memory / "image", disk], check=True)
        stack.callback(lambda: subprocess.run(["umount", disk], check=True))
        mounted = mount(source, "0", "--disk-cache", disk / "cache", "--disk-size", "40M")
        for seed in range(3):
            epoch(mounted, names, seed)
        figures = mounted.stats()
        assert figures["disk"]["stopped"] is None
        assert 20 < figures["disk"]["held_blocks"] < FILES
        assert figures["source"]["errors"] == 0
        assert mounted.log.read_text().count("cannot grow") == 1
        mounted.end()


def test_a_source_that_may_hang_is_not_asked_for_what_is_on_disk(
    in_memory: Path, mount: MakeMount, cache: Path
) -> None:
    """As one on a network: what has no block device of its own."""
    names = write_files(in_memory, FILES, SIZE)
    mounted = mount(in_memory, "0", "--disk-cache", cache, "--disk-size", "24M")
    for seed in range(2):
        epoch(mounted, names, seed)
    before = mounted.stats()
    assert epoch(mounted, names, 2) == 0
    after = mounted.stats()
    assert after["disk"]["reads"] - before["disk"]["reads"] == FILES
    assert after["epoch"]["disk_items"] == FILES
    mounted.end()


def test_a_file_system_in_memory_works_as_well(source: Path, in_memory: Path, mount: MakeMount) -> None:
    """And one on which rows cannot be asked for without waiting."""
    names = write_files(source, FILES, SIZE)
    mounted = mount(source, "0", "--disk-cache", in_memory / "cache", "--disk-size", 60 * ROOM)
    for seed in range(3):
        read_of_source = epoch(mounted, names, seed)
    held = mounted.stats()["disk"]["held_blocks"]
    assert held >= 55
    assert read_of_source == (FILES - held) * SIZE
    mounted.end()


def test_a_store_is_for_its_owner_only_and_for_one_mount(source: Path, mount: MakeMount, cache: Path) -> None:
    write_files(source, 3, SIZE)
    mounted = mount(source, "0", "--disk-cache", cache, "--disk-size", "8M")
    [store] = cache.iterdir()
    assert {store.stat().st_mode & 0o777, cache.stat().st_mode & 0o777} == {0o700}
    assert {f.stat().st_mode & 0o777 for f in store.iterdir()} == {0o600}
    other = mounted.path.with_name("other")
    done = coordlfs("mount", source, other, "--disk-cache", cache, "--disk-size", "8M", status=1)
    assert str(mounted.path) in done.stderr
    assert not is_mounted(other)
    # Another source has a store of its own beside it.
    beside = source.with_name(source.name + "-beside")
    beside.mkdir()
    try:
        second = mount(beside, "0", "--disk-cache", cache, "--disk-size", "8M")
        assert len(list(cache.iterdir())) == 2
        second.end()
    finally:
        shutil.rmtree(beside)


@pytest.mark.parametrize(
    ("directory", "size", "says"),
    [
        ("{source}/cache", "8M", "lies in"),
        ("{source}", "8M", "lies in"),
        ("{mnt}/cache", "8M", "lies in"),
        ("", "8M", "its path is empty"),
        ("{place}/file", "8M", "not a directory"),
        ("{place}/fifo", "8M", "not a directory"),
        ("{place}/loop", "8M", "symbolic links"),
        ("{place}/link", "8M", "lies in"),
        ("/proc/none", "8M", "does not exist"),
        ("/sys/kernel", "8M", "cannot be used"),
        ("{place}/none/cache", "8M", "does not exist"),
        ("{place}/cache", "0", "too small"),
        ("{place}/cache", "1K", "too small"),
        ("{place}/cache", "1000T", "more than"),
        ("{place}/cache", "101%", "more than"),
        ("{place}/cache", "much", "not a size"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_mounted(
    source: Path, place: Path, directory: str, size: str, says: str
) -> None:
    (place / "file").touch()
    os.mkfifo(place / "fifo")
    (place / "loop").symlink_to("loop")
    (place / "link").symlink_to(source)
    mnt = place / "mnt"
    where = directory.format(source=source, mnt=mnt, place=place)
    done = coordlfs("mount", source, mnt, "--disk-cache", where, "--disk-size", size, status=None)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not is_mounted(mnt)
    assert not mnt.exists()


def test_a_size_without_a_directory_is_no_disk_cache(source: Path, place: Path) -> None:
    done = coordlfs("mount", source, place / "mnt", "--disk-size", "8M", status=2)
    assert "--disk-cache" in done.stderr


def test_the_stores_of_a_directory_are_listed_checked_and_removed(source: Path, mount: MakeMount, cache: Path) -> None:
    names = write_files(source, 10, SIZE)
    mounted = mount(source, "0", "--disk-cache", cache, "--disk-size", "8M")
    epoch(mounted, names, 0)
    listed = coordlfs("cache", cache).stdout
    assert f"{source}: " in listed
    assert "10 blocks" in listed
    assert f"mounted on {mounted.path}" in listed
    for action in ("verify", "clear"):
        done = coordlfs("cache", action, cache, status=1)
        assert str(mounted.path) in done.stderr
    assert epoch(mounted, names, 1) == 0
    mounted.end()
    assert "all good" in coordlfs("cache", "verify", cache).stdout
    [store] = cache.iterdir()
    with open(store / "data", "r+b") as f:
        f.seek(5000)
        byte = f.read(1)[0]
        f.seek(5000)
        f.write(bytes([byte ^ 4]))
    assert "1 damaged" in coordlfs("cache", "verify", cache, status=1).stdout
    done = coordlfs("cache", "clear", cache, "--source", cache, status=1)
    assert "holds no disk cache" in done.stderr
    assert "is removed" in coordlfs("cache", "clear", cache, "--source", source).stdout
    assert list(cache.iterdir()) == []
    assert "holds no disk cache" in coordlfs("cache", cache, status=1).stderr
    assert "cannot be read" in coordlfs("cache", cache / "none", status=1).stderr
