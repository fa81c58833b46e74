"""Sources whose inode numbers change though their files do not."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mounts import MakeMount, coordlfs, drop_caches, eventually, noise, read, unmount_lazily, write_files
from renumbering import renumbering

_SIZE = 300_000  # bytes, which take several READs


def _refreshed(path: Path) -> str:
    return coordlfs("refresh", path).stdout


@pytest.mark.parametrize("links", [1, 2])
def test_what_did_not_change_stays(source: Path, place: Path, mount: MakeMount, links: int) -> None:
    names = write_files(source, 5, _SIZE)
    if links > 1:
        os.link(source / names[0], source / "other-name")
    with renumbering(source, place) as numbered:
        mounted = mount(numbered)
        (source / "added").write_bytes(b"")
        for name in names:
            assert read(mounted.path / name) == read(source / name)
        with open(mounted.path / names[1], "rb", buffering=0) as f:
            begun = f.read(1000)
            pinned = mounted.settle()["pinned_items"]
            for _ in range(3):
                changed = _refreshed(mounted.path)
            assert changed.endswith(" 0 had changed\n")
            mounted.forget()
            assert begun + f.read() == read(source / names[1])
        figures = mounted.settle()
        if links == 1:
            assert (figures["pinned_items"], figures["source"]["changed_files"]) == (pinned, 0)
            with mounted.messages() as sent:
                for name in names:
                    assert read(mounted.path / name) == read(source / name)
            assert sent["read"] == 0, "all of it is cached still"
        else:
            assert read(mounted.path / "other-name") == read(mounted.path / names[0]) == read(source / names[0])
        assert mounted.log.read_text().count("new inode numbers") == 1
        mounted.end()


def test_what_changed_is_noticed(source: Path, place: Path, mount: MakeMount) -> None:
    names = write_files(source, 6, _SIZE)
    with renumbering(source, place) as numbered:
        mounted = mount(numbered)
        for name in names:
            read(mounted.path / name)
        mounted.settle()
        _refreshed(mounted.path)
        time.sleep(0.02)  # so that times differ
        (source / names[0]).write_bytes(noise(_SIZE, 1))
        (source / "new").write_bytes(noise(_SIZE + 1, 2))
        os.rename(source / "new", source / names[1])
        with open(source / names[2], "ab") as f:
            f.write(b"more")
        os.truncate(source / names[3], 10)
        (source / names[4]).unlink()
        _refreshed(mounted.path)
        for name in (*names[:4], names[5]):
            eventually(lambda name=name: read(mounted.path / name) == read(source / name), what=name)  # type: ignore[misc]
        assert not (mounted.path / names[4]).exists()
        mounted.end()


@contextmanager
def _overlay(lower: Path, place: Path) -> Iterator[Path]:
    merged = place / "merged"
    for name in ("upper", "work", "merged"):
        (place / name).mkdir()
    layers = f"lowerdir={lower},upperdir={place / 'upper'},workdir={place / 'work'}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], check=True)
    try:
        yield merged
    finally:
        unmount_lazily(merged)


@pytest.mark.alone  # it has the kernel forget all that it may
def test_an_overlay_of_two_file_systems(in_memory: Path, place: Path, mount: MakeMount) -> None:
    """Its directories get new numbers as the kernel forgets them."""
    for name in ("a", "b"):
        (in_memory / name).mkdir()
        write_files(in_memory / name, 3, 10_000)
    files = sorted(path.relative_to(in_memory) for path in in_memory.glob("*/*"))
    with _overlay(in_memory, place) as merged:
        mounted = mount(merged)
        for file in files:
            read(mounted.path / file)
        pinned = mounted.settle()["pinned_items"]
        for _ in range(2):
            drop_caches()
            assert _refreshed(mounted.path).endswith(" 0 had changed\n")
        assert mounted.settle()["pinned_items"] == pinned == len(files)
        for file in files:
            assert read(mounted.path / file) == read(in_memory / file)
        mounted.end()
