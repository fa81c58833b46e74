"""What `coordlfs pin` does when files of the directory change: old pages are let go, new ones are pinned, at once."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coordlfs_tools.lab import faulty_fs
from mounts import MIB, PAGE, PATIENCE, coordlfs, eventually, locked, noise, page_count, raises, read, write_files
from pins import MakePin, Pinned, drop, held, resident

SIZE = 100_000
PAGES = page_count(SIZE)


@pytest.fixture
def pinned(source: Path, pin: MakePin) -> Pinned:
    """A directory of ten files and one beneath, all of which are pinned, with room for more."""
    (source / "sub").mkdir()
    write_files(source, 10, SIZE)
    write_files(source / "sub", 1, SIZE)
    pinned = pin(source, "16M", options=("--immutable",))  # so that no pass helps
    pinned.full()
    return pinned


def holds(pinned: Pinned) -> dict[str, int]:
    """The pinned files by name, and how many pages of each; what is deleted has another name in the kernel's table."""
    return held(pinned.keepers, pinned.directory)


def until_held(pinned: Pinned, name: str, pages: int | None) -> dict[str, Any]:
    """Wait until so many pages of a file are pinned, none if None is given, and all is in order; the figures then."""
    figures: dict[str, Any] = {}

    def is_in_order() -> bool:
        figures.update(pinned.settle())
        of_all = holds(pinned)
        return (
            of_all.get(name) == pages
            and figures["pinned_bytes"] == sum(of_all.values()) * PAGE == locked(pinned.keepers)
            and figures["dataset"]["items"] == figures["pinned_items"]
            and not any("(deleted)" in path for path in of_all)
        )

    eventually(is_in_order, what=f"{name} has {pages} pages: {holds(pinned)}")
    return figures


def test_a_file_that_is_deleted(pinned: Pinned) -> None:
    (pinned.directory / "item-00003").unlink()
    figures = until_held(pinned, "item-00003", None)
    assert figures["pinned_items"] == 10


def test_a_file_that_is_replaced(pinned: Pinned, place: Path) -> None:
    beside = pinned.directory / "sub" / ".new"
    beside.write_bytes(noise(3 * SIZE))
    old = os.stat(pinned.directory / "item-00003").st_ino
    os.rename(beside, pinned.directory / "item-00003")
    assert os.stat(pinned.directory / "item-00003").st_ino != old
    until_held(pinned, "item-00003", page_count(3 * SIZE))
    assert read(pinned.directory / "item-00003") == noise(3 * SIZE)


def test_a_file_that_is_truncated(pinned: Pinned) -> None:
    os.truncate(pinned.directory / "item-00003", PAGE + 1)
    until_held(pinned, "item-00003", 2)
    os.truncate(pinned.directory / "item-00003", 0)
    eventually(lambda: "item-00003" not in holds(pinned))
    assert pinned.settle(lambda figures: figures["dataset"]["items"] == 10)["pinned_items"] == 10


def test_a_file_that_grows(pinned: Pinned) -> None:
    with (pinned.directory / "item-00003").open("ab") as f:
        f.write(noise(SIZE))
    until_held(pinned, "item-00003", page_count(2 * SIZE))


def test_a_file_that_is_written_to_in_place(pinned: Pinned) -> None:
    before = pinned.stats()
    with (pinned.directory / "item-00003").open("r+b") as f:
        f.write(b"other bytes")
    figures = pinned.settle(lambda figures: figures["source"]["changed_files"] > before["source"]["changed_files"])
    assert figures["pinned_bytes"] == before["pinned_bytes"]
    drop(pinned.directory / "item-00003")
    assert resident(pinned.directory / "item-00003") == PAGES
    assert read(pinned.directory / "item-00003")[:11] == b"other bytes"


def _truncate_and_write(path: Path) -> None:
    path.write_bytes(noise(SIZE, 1))


def _write_around_the_page_cache(path: Path) -> None:
    block = mmap.mmap(-1, 8 * PAGE)
    block[:] = noise(8 * PAGE, 1)
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        assert os.pwrite(fd, block, 0) == len(block)
    finally:
        os.close(fd)


def _make_a_hole_and_fill_it(path: Path) -> None:
    subprocess.run(["fallocate", "-p", "-o", "0", "-l", "40960", path], check=True, timeout=PATIENCE)
    with path.open("r+b") as f:
        f.write(noise(40_960, 1))


@pytest.mark.parametrize("change", [_truncate_and_write, _write_around_the_page_cache, _make_a_hole_and_fill_it])
def test_a_file_that_loses_its_pages_and_keeps_its_size(pinned: Pinned, change: Callable[[Path], None]) -> None:
    paths = [pinned.directory / f"item-{number:05}" for number in range(10)]
    for path in paths:
        change(path)
    wanted = [path.read_bytes() for path in paths]

    def are_locked() -> bool:
        pinned.full()
        drop(*paths)
        return all(resident(path) == PAGES for path in paths)

    eventually(are_locked)
    assert [read(path) for path in paths] == wanted
    until_held(pinned, "item-00003", PAGES)


def test_a_file_that_is_new(pinned: Pinned) -> None:
    (pinned.directory / "new").write_bytes(noise(SIZE))
    (pinned.directory / "tree" / "deep").mkdir(parents=True)
    (pinned.directory / "tree" / "deep" / "leaf").write_bytes(noise(SIZE))
    until_held(pinned, "new", PAGES)
    until_held(pinned, "tree/deep/leaf", PAGES)


def test_a_file_that_is_renamed(pinned: Pinned) -> None:
    os.rename(pinned.directory / "item-00003", pinned.directory / "sub" / "renamed")
    until_held(pinned, "sub/renamed", PAGES)
    assert "item-00003" not in holds(pinned)


def test_a_directory_that_is_moved_away_and_back(pinned: Pinned, source: Path) -> None:
    away = source.with_name(f"{source.name}-away")
    try:
        os.rename(source / "sub", away)
        eventually(lambda: pinned.settle()["pinned_items"] == 10)
        assert len(holds(pinned)) == 10
        os.rename(away, source / "again")
        until_held(pinned, "again/item-00000", PAGES)
        (source / "again" / "more").write_bytes(noise(SIZE))
        until_held(pinned, "again/more", PAGES)
    finally:
        shutil.rmtree(away, ignore_errors=True)


def test_a_directory_that_is_removed(pinned: Pinned, source: Path) -> None:
    shutil.rmtree(source / "sub")
    until_held(pinned, "sub/item-00000", None)


def test_a_file_that_becomes_a_directory_a_link_and_a_file(pinned: Pinned, source: Path) -> None:
    path = source / "item-00003"
    path.unlink()
    path.mkdir()
    (path / "leaf").write_bytes(noise(SIZE))
    until_held(pinned, "item-00003/leaf", PAGES)
    shutil.rmtree(path)
    path.symlink_to(source / "item-00004")
    until_held(pinned, "item-00003/leaf", None)
    path.unlink()
    path.write_bytes(noise(2 * SIZE))
    until_held(pinned, "item-00003", page_count(2 * SIZE))


def test_names_of_one_file(source: Path, pin: MakePin) -> None:
    write_files(source, 3, SIZE)
    os.link(source / "item-00001", source / "other")
    pinned = pin(source, "16M", options=("--immutable",))
    assert pinned.full()["pinned_items"] == 3
    assert locked(pinned.keepers) == 3 * PAGES * PAGE
    (source / "item-00001").unlink()
    (source / "new").write_bytes(noise(SIZE))  # by the time that it is pinned, the other name was seen to
    eventually(lambda: "new" in holds(pinned))
    assert locked(pinned.keepers) == 4 * PAGES * PAGE
    drop(source / "other")
    assert resident(source / "other") == PAGES
    (source / "other").unlink()
    eventually(lambda: locked(pinned.keepers) == 3 * PAGES * PAGE)
    assert pinned.full()["pinned_items"] == 3


def test_the_room_of_a_file_that_is_gone_goes_to_others(source: Path, pin: MakePin) -> None:
    names = write_files(source, 30, SIZE)
    pinned = pin(source, "1M", options=("--immutable",))
    figures = pinned.settle(lambda figures: figures["pinned_items"])
    fits = MIB // (PAGES * PAGE)
    assert figures["pinned_items"] == fits
    first = holds(pinned)
    for name in first:
        (source / name).unlink()
    others = set(names) - set(first)
    eventually(lambda: len(now := holds(pinned)) == fits and set(now) <= others)


def test_nothing_of_it_is_written_or_locked(pinned: Pinned) -> None:
    path = pinned.directory / "item-00003"
    before = os.stat(path), os.stat(pinned.directory)
    coordlfs("refresh", pinned.directory)
    with path.open("r+b") as f:  # nobody holds a lease or a lock
        os.lockf(f.fileno(), os.F_TLOCK, 0)
    after = os.stat(path), os.stat(pinned.directory)
    for b, a in zip(before, after, strict=True):
        assert (b.st_mtime_ns, b.st_ctime_ns, b.st_size, b.st_mode) == (
            a.st_mtime_ns,
            a.st_ctime_ns,
            a.st_size,
            a.st_mode,
        )


def test_changes_that_the_kernel_does_not_tell_are_found_by_a_pass(source: Path, place: Path, pin: MakePin) -> None:
    write_files(source, 5, SIZE)
    with faulty_fs.served(source, place) as faulty:
        shown = faulty.path
        pinned = pin(shown, "16M", options=("--revalidate", "1s"))
        pinned.full()
        beside = source.with_name(f"{source.name}-beside")
        beside.write_bytes(noise(2 * SIZE))
        os.rename(beside, source / "item-00001")
        (source / "item-00002").unlink()
        (source / "new").write_bytes(noise(SIZE))
        wanted = {"item-00000", "item-00001", "item-00003", "item-00004", "new"}
        eventually(lambda: set(held(pinned.keepers, shown)) == wanted)
        eventually(lambda: held(pinned.keepers, shown)["item-00001"] == page_count(2 * SIZE))
        raises(2, lambda: read(shown / "item-00002"))
        coordlfs("unpin", shown)
