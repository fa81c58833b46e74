"""What is pinned is read without a message to the server, whichever way it is read."""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mounts import (
    CHUNK,
    MIB,
    PAGE,
    PATIENCE,
    MakeMount,
    Mount,
    drop_caches,
    noise,
    raises,
    read,
    resident,
)

_NOTHING = {"read": 0, "name": 0, "refused": 0, "ioctl": 0}


def _by_pread(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        offsets = range(0, size, 50_001)
        return b"".join(os.pread(fd, 50_001, offset) for offset in offsets)
    finally:
        os.close(fd)


def _by_sendfile(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    ours, theirs = socket.socketpair()
    received = bytearray()
    try:
        left = os.fstat(fd).st_size
        while left:
            left -= os.sendfile(ours.fileno(), fd, None, min(left, 65536))
            received += theirs.recv(65536, socket.MSG_DONTWAIT)
        ours.close()
        while part := theirs.recv(65536):
            received += part
    finally:
        for sock in (ours, theirs):
            sock.close()
        os.close(fd)
    return bytes(received)


def _by_mmap(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            return mapped[:]
    finally:
        os.close(fd)


def _by_private_mmap(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
            return mapped[:]
    finally:
        os.close(fd)


_WAYS = [read, _by_pread, _by_sendfile, _by_mmap, _by_private_mmap]
_SIZES = [1, 4095, 4096, 4097, 110_000, MIB + 1, CHUNK + 5000]


def _pinned(source: Path, mount: MakeMount) -> tuple[Mount, dict[str, bytes]]:
    """A mount all of whose files are pinned."""
    (source / "d").mkdir()
    contents = {f"d/{size}": noise(size) for size in _SIZES}
    for name, data in contents.items():
        (source / name).write_bytes(data)
    mounted = mount(source, "128M")
    for _ in range(3):  # what finds no room in the stash is left out for a pass
        for name, data in contents.items():
            assert read(mounted.path / name) == data
        mounted.settle()
    assert {mounted.cached(name) for name in contents} == {"pinned"}
    return mounted, contents


@pytest.mark.alone
@pytest.mark.parametrize("way", _WAYS)
def test_a_hit_sends_nothing(source: Path, mount: MakeMount, way: Callable[[Path], bytes]) -> None:
    mounted, contents = _pinned(source, mount)
    for _ in range(2):
        with mounted.messages() as sent:
            for name, data in contents.items():
                assert way(mounted.path / name) == data
                assert os.stat(mounted.path / name).st_size == len(data)
        assert sent == _NOTHING
        drop_caches()


def test_numpy_memmap_sends_nothing(source: Path, mount: MakeMount) -> None:
    mounted, contents = _pinned(source, mount)
    with mounted.messages() as sent:
        for name, data in contents.items():
            # Given a path, numpy uses Python's `open`: see below.
            fd = os.open(mounted.path / name, os.O_RDONLY)
            with os.fdopen(fd, "rb", buffering=0) as f:
                assert np.array_equal(np.memmap(f, np.uint8, "r"), np.frombuffer(data, np.uint8))
    assert (sent["read"], sent["name"]) == (0, 0)


def test_python_open_asks_for_nothing_but_a_terminal(source: Path, mount: MakeMount) -> None:
    # Before 3.14 it asks by ioctl whether every file is a terminal, which the kernel passes on: one message a file.
    mounted, contents = _pinned(source, mount)
    with mounted.messages() as sent:
        for name, data in contents.items():
            with open(mounted.path / name, "rb") as f:
                assert f.read() == data
    assert (sent["read"], sent["name"], sent["refused"]) == (0, 0, 0)
    assert sent["ioctl"] <= len(contents)


def test_programs_read_without_messages(source: Path, mount: MakeMount, place: Path) -> None:
    mounted, contents = _pinned(source, mount)
    for name in contents:  # cat and cp ask where holes are, once for all
        subprocess.run(["cat", mounted.path / name], check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)
        subprocess.run(["cp", mounted.path / name, place / "copy"], check=True, timeout=PATIENCE)
    with mounted.messages() as sent:
        for name, data in contents.items():
            cat = subprocess.run(["cat", mounted.path / name], check=True, stdout=subprocess.PIPE, timeout=PATIENCE)
            assert cat.stdout == data
            subprocess.run(["cp", mounted.path / name, place / "copy"], check=True, timeout=PATIENCE)
            assert read(place / "copy") == data
    assert (sent["read"], sent["name"]) == (0, 0)


def test_tar_reads_what_is_there(source: Path, mount: MakeMount, place: Path) -> None:
    mounted, contents = _pinned(source, mount)
    before = mounted.source_bytes()
    subprocess.run(["tar", "-C", mounted.path, "-cf", place / "a.tar", "."], check=True, timeout=PATIENCE)
    with tarfile.open(place / "a.tar") as archive:
        for name, data in contents.items():
            member = archive.extractfile(f"./{name}")
            assert member is not None
            assert member.read() == data
    assert mounted.source_bytes() == before


def test_another_process_hits_as_well(source: Path, mount: MakeMount) -> None:
    mounted, contents = _pinned(source, mount)
    program = "import os, sys\nfor p in sys.argv[1:]:\n fd = os.open(p, 0)\n while os.read(fd, 1 << 20): pass\n"
    command = [sys.executable, "-c", program, *(str(mounted.path / name) for name in contents)]
    with mounted.messages() as sent:
        jobs = [subprocess.Popen(command) for _ in range(3)]
        assert [job.wait(30) for job in jobs] == [0, 0, 0]
    assert sent == _NOTHING


def test_seeking_behind_the_end(source: Path, mount: MakeMount) -> None:
    mounted, contents = _pinned(source, mount)
    with mounted.messages() as sent:
        for name, data in contents.items():
            fd = os.open(mounted.path / name, os.O_RDONLY)
            assert os.lseek(fd, 0, os.SEEK_END) == len(data)
            assert os.read(fd, 10) == b""
            assert os.pread(fd, 10, len(data) + 100_000) == b""
            assert os.pread(fd, 100, len(data) - 1) == data[-1:]
            os.close(fd)
    assert sent == _NOTHING


# -- O_DIRECT -----------------------------------------------------------------------------------------------------


def test_o_direct_goes_to_the_source(source: Path, mount: MakeMount) -> None:
    mounted, contents = _pinned(source, mount)
    buffer = mmap.mmap(-1, 4 * MIB)
    for name, data in contents.items():
        fd = os.open(mounted.path / name, os.O_RDONLY | os.O_DIRECT)
        try:
            for offset in {0, PAGE, 512, len(data) // 2 // 512 * 512, len(data) // PAGE * PAGE}:
                for size in (512, PAGE, 12_800, 3 * MIB):
                    with mounted.messages() as sent:
                        n = os.preadv(fd, [memoryview(buffer)[:size]], offset)
                    assert buffer[:n] == data[offset : offset + size]
                    assert sent["read"] > 0 or offset >= len(data)
        finally:
            os.close(fd)
    assert {mounted.cached(name) for name in contents} == {"pinned"}
    for name, data in contents.items():
        assert read(mounted.path / name) == data


def test_o_direct_of_what_is_not_cached(source: Path, mount: MakeMount) -> None:
    data = noise(5 * MIB + 77)
    (source / "f").write_bytes(data)
    mounted = mount(source, "0")
    buffer = mmap.mmap(-1, 8 * MIB)
    for _ in range(2):
        fd = os.open(mounted.path / "f", os.O_RDONLY | os.O_DIRECT)
        n = os.readv(fd, [buffer])
        os.close(fd)
        assert buffer[:n] == data
    assert resident(mounted.path / "f") == 0
    assert mounted.source_bytes() == 2 * len(data)


# -- the xattrs ---------------------------------------------------------------------------------------------------


def test_reading_while_pinned_files_are_mapped_elsewhere(source: Path, mount: MakeMount) -> None:
    data = noise(3 * MIB)
    (source / "f").write_bytes(data)
    mounted = mount(source)
    fd = os.open(mounted.path / "f", os.O_RDONLY)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[: MIB // 2] == data[: MIB // 2]  # mapped by a job before it is pinned, and after
        mounted.settle()
        assert mapped[:] == data
    os.close(fd)
    mounted.settle()
    assert read(mounted.path / "f") == data
    assert mounted.source_bytes() == len(data)


def test_copying_a_tree(source: Path, mount: MakeMount, place: Path) -> None:
    mounted, contents = _pinned(source, mount)
    shutil.copytree(mounted.path, place / "copy")
    for name, data in contents.items():
        assert read(place / "copy" / name) == data
    raises(2, lambda: os.stat(mounted.path / "d" / "missing"))
