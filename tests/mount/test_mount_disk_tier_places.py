"""Where the disk tier lies: file systems of several kinds, an ordinary user's directory, and where it cannot be."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from coordlfs_tools.lab.disks import LEAST, file_system
from coordlfs_tools.lab.mounts import bindfs
from mounts import MIB, NOBODY, MakeMount, coordlfs, eventually, mentions, noise, read, write_files
from tiers import FILES, ROOM, SIZE, epoch, killed, settle


def taken(directory: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "ext2"])
def test_a_store_is_as_good_on_any_file_system(source: Path, place: Path, mount: MakeMount, kind: str) -> None:
    """The sizes are exact, its own copies give way, a kill loses nothing, damage is found; ext2 has no fallocate."""
    names = write_files(source, FILES, SIZE)
    (source / "large").write_bytes(noise(3 * MIB + 5, 9))
    every = [*names, "large"]
    with file_system(place / "disk", kind, LEAST.get(kind, 32 * MIB)) as at:
        options = (str(20 * ROOM), "--disk-cache", at / "cache", "--disk-size", 8 * MIB)
        mounted = mount(source, *options)
        for seed in range(3):
            epoch(mounted, every, seed)
            assert taken(at / "cache") <= 8 * MIB
        figures = settle(mounted)
        assert figures["is_direct"]
        assert figures["bad_blocks"] == 0
        assert figures["held_bytes"] > 6.5 * MIB
        killed(mounted)
        again = mount(source, *options)
        epoch(again, every, 4)
        epoch(again, every, 5)
        after = settle(again)
        assert after["bad_blocks"] == 0
        assert after["held_blocks"] >= figures["held_blocks"] - 1
        assert taken(at / "cache") == after["taken_bytes"] <= 8 * MIB
        [store] = (at / "cache").iterdir()
        (store / "data").write_bytes(bytes((store / "data").stat().st_size))
        epoch(again, every, 6)
        assert settle(again)["bad_blocks"] > 20
        epoch(again, every, 7)
        again.end()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "ext2"])
def test_a_file_system_that_others_fill(source: Path, place: Path, mount: MakeMount, kind: str) -> None:
    """It grows no more, and goes on with what it has, copies that give way included; said once."""
    names = write_files(source, FILES, SIZE)
    with file_system(place / "disk", kind, LEAST.get(kind, 32 * MIB)) as at:
        mounted = mount(source, str(20 * ROOM), "--disk-cache", at / "cache", "--disk-size", "12M")
        epoch(mounted, names[:40], 0)
        fill(at / "others")
        for seed in range(1, 5):
            epoch(mounted, names, seed)
        figures = mounted.stats()["disk"]
        assert figures["held_blocks"] >= 20
        assert figures["bad_blocks"] == 0
        assert figures["stopped"] is None
        said = mounted.log.read_text()
        assert said.count("level=WARNING") == said.count("cannot grow") == 1
        (at / "others").unlink()
        mounted.end()
        again = mount(source, str(20 * ROOM), "--disk-cache", at / "cache", "--disk-size", "12M")
        for seed in (5, 6):
            epoch(again, names, seed)
        assert epoch(again, names, 7) == 0
        again.end()


def fill(file: Path) -> None:
    """Take all the room that its file system has."""
    with open(file, "wb", buffering=0) as f:
        for piece in (MIB, 4096):
            with suppress(OSError):
                while f.write(bytes(piece)):
                    os.fsync(f.fileno())


def test_a_full_file_system_keeps_no_mount_from_its_store(source: Path, place: Path, mount: MakeMount) -> None:
    names = write_files(source, FILES, SIZE)
    with file_system(place / "disk", "ext4", 32 * MIB) as at:
        options = ("0", "--disk-cache", at / "cache", "--disk-size", "12M")
        first = mount(source, *options, mountpoint=place / "a")
        for seed in (0, 1):
            epoch(first, names, seed)
        first.end()
        fill(at / "others")
        second = mount(source, *options, mountpoint=place / "a mountpoint with another name")
        assert epoch(second, names, 2) == 0
        assert "another name" in coordlfs("cache", at / "cache").stdout
        second.end()


def test_a_copy_of_a_store_with_holes_takes_no_more_than_it_may(source: Path, place: Path, mount: MakeMount) -> None:
    """As backups write it, and as one whose parts were punched out."""
    names, cache = write_files(source, FILES, SIZE), place / "cache"
    options = (str(20 * ROOM), "--disk-cache", cache, "--disk-size", 8 * MIB)
    mounted = mount(source, *options)
    for seed in (0, 1):
        epoch(mounted, names, seed)
    mounted.end()
    [store] = cache.iterdir()
    subprocess.run(["fallocate", "-p", "-o", str(MIB), "-l", str(4 * MIB), store / "data"], check=True)
    again = mount(source, *options)
    for seed in (2, 3, 4):
        epoch(again, names, seed)
        assert taken(cache) <= 8 * MIB
    assert again.stats()["disk"]["held_bytes"] > 7 * MIB


def test_a_bind_mount_of_the_source_is_the_source(source: Path, place: Path) -> None:
    write_files(source, 3, SIZE)
    alias = place / "alias"
    alias.mkdir()
    subprocess.run(["mount", "--bind", source, alias], check=True)
    try:
        done = coordlfs("mount", source, place / "mnt", "--disk-cache", alias / "cache", status=1)
    finally:
        subprocess.run(["umount", alias], check=True)
    assert f"lies in {source}" in done.stderr
    assert not (source / "cache").exists()


def test_who_looks_at_a_store_keeps_nobody_from_mounting_it(source: Path, place: Path, mount: MakeMount) -> None:
    write_files(source, 3, SIZE)
    cache = place / "cache"
    options = ("0", "--disk-cache", cache, "--disk-size", "8M")
    mount(source, *options, mountpoint=place / "before").end()
    [store] = cache.iterdir()
    fd = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        done = coordlfs("mount", source, place / "mnt", "--disk-cache", cache, status=1)
        assert "another process uses it" in done.stderr  # and not the mountpoint of then
        assert "in use by another process" in coordlfs("cache", cache).stdout
        ends = threading.Thread(target=look_now_and_then, args=(fd,))
        ends.start()
        mount(source, *options).end()
        ends.join()
    finally:
        os.close(fd)


def look_now_and_then(fd: int) -> None:
    for _ in range(30):
        fcntl.flock(fd, fcntl.LOCK_UN)
        time.sleep(0.02)
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    fcntl.flock(fd, fcntl.LOCK_UN)


def test_a_file_system_without_o_direct_and_fallocate(source: Path, place: Path, mount: MakeMount) -> None:
    """It works, and `doctor` says what that costs. A ramfs does not tell its size, so one is to be given."""
    names, at = write_files(source, FILES, SIZE), place / "memory"
    at.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", at], check=True)
    try:
        mounted = mount(source, str(20 * ROOM), "--disk-cache", at / "cache", "--disk-size", "8M")
        for seed in range(3):
            epoch(mounted, names, seed)
        figures = settle(mounted)
        assert not figures["is_direct"]
        held = figures["held_blocks"]
        assert held > 60
        assert epoch(mounted, names, 3) == (FILES - 20 - held) * SIZE
        assert taken(at / "cache") <= 8 * MIB
        mounted.end()
        said = coordlfs("doctor", "--disk-cache", at, status=None).stdout
        assert "each hit is a blocking call" in said
    finally:
        subprocess.run(["umount", at], check=True)


def test_a_network_file_system_is_warned_of(source: Path, place: Path, mount: MakeMount) -> None:
    """A FUSE file system stands for it: what has no block device."""
    names, beneath = write_files(source, FILES, SIZE), place / "beneath"
    beneath.mkdir()
    with bindfs(beneath, writable=True) as at:
        mounted = place / "mnt"
        options = ("--cache-size", "0", "--disk-cache", at / "cache", "--disk-size", "8M")
        done = coordlfs("mount", source, mounted, *options)
        assert "lies on no local disk" in done.stderr
        coordlfs("umount", mounted)
        eventually(lambda: not mentions(mounted))
        again = mount(source, "0", *options[2:])
        for seed in range(3):
            epoch(again, names, seed)
        figures = settle(again)
        assert figures["held_blocks"] > 60
        assert figures["bad_blocks"] == 0
        assert taken(at / "cache") <= 8 * MIB
        again.end()


def test_a_file_system_that_becomes_read_only(source: Path, place: Path, mount: MakeMount) -> None:
    """As ext4 does after an error of its disk: hits go on, and so does a server that is started meanwhile."""
    names = write_files(source, FILES, SIZE)
    with file_system(place / "disk", "ext4", 32 * MIB, mount="errors=remount-ro") as at:
        mounted = mount(source, "0", "--disk-cache", at / "cache", "--disk-size", "8M")
        for seed in (0, 1):
            epoch(mounted, names, seed)
        held = settle(mounted)["held_blocks"]
        subprocess.run(["mount", "-o", "remount,abort", at], check=False)
        assert epoch(mounted, names, 2) == (FILES - held) * SIZE
        (source / names[0]).write_bytes(noise(SIZE, 7777))
        coordlfs("refresh", mounted.path)
        epoch(mounted, names, 3)
        mounted.expect_errors = True
        os.kill(mounted.stats()["processes"]["server"], signal.SIGKILL)
        epoch(mounted, names, 4)
        assert epoch(mounted, names, 5) == (FILES - held + 1) * SIZE
        assert "Read-only" in str(mounted.stats()["disk"]["stopped"])
        mounted.end()
        done = coordlfs("mount", source, place / "other", "--disk-cache", at / "cache", status=1)
        assert len(done.stderr.splitlines()) == 1


def test_what_another_user_put_there_is_left_alone(source: Path, place: Path, mount: MakeMount) -> None:
    """In a directory that is open to all: a store in one's place, and files that are never read to an end."""
    write_files(source, 3, SIZE)
    cache = place / "cache"
    mount(source, "0", "--disk-cache", cache, "--disk-size", "8M").end()
    cache.chmod(0o1777)
    [mine] = cache.iterdir()
    name = mine.name
    mine.rename(cache / "coordlfs-kept")
    (cache / name).mkdir()
    for file in ("source", "mounted", "index", "names", "data"):
        os.mkfifo(cache / name / file)
        os.chown(cache / name / file, NOBODY, NOBODY)
    (cache / "coordlfs-fifos").mkdir()
    os.mkfifo(cache / "coordlfs-fifos" / "source")
    for file in ("mounted", "index"):
        os.mkfifo(cache / "coordlfs-fifos" / file)
    (cache / "coordlfs-link").symlink_to(source)
    os.chown(cache / name, NOBODY, NOBODY)
    done = coordlfs("mount", source, place / "other", "--disk-cache", cache, status=1, timeout=30)
    assert "another user's" in done.stderr
    listed = coordlfs("cache", cache, timeout=30).stdout.splitlines()
    assert len([line for line in listed if str(source) in line]) == 1
    assert len(listed) == 2
    coordlfs("cache", "verify", cache, status=1, timeout=30)
    coordlfs("cache", "clear", cache, timeout=30)
    assert {path.name for path in cache.iterdir()} == {name, "coordlfs-link"}
    assert len(list(source.iterdir())) == 3


def test_a_size_below_one_item(source: Path, place: Path, mount: MakeMount) -> None:
    """What has no room at all in a cache of the least size, and what has in part."""
    (source / "large").write_bytes(content := noise(20 * MIB, 3))
    mounted = mount(source, "0", "--disk-cache", place / "cache", "--disk-size", "2M")
    for _ in range(3):
        assert read(mounted.path / "large") == content
        held = settle(mounted)["held_blocks"]
        assert held <= 1
        mounted.forget()
    assert taken(place / "cache") <= 2 * MIB
