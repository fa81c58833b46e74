"""Files of petabytes: no request about one takes long or much memory, and what is read of one is right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mounts import MIB, MakeMount, coordlfs, eventually, noise, read, write_files

from coordlfs.cache.items import LIMIT

_BYTES = noise(100_000)


@pytest.fixture
def large(in_memory: Path) -> Path:
    """A file of exabytes, with bytes in some places, among small ones."""
    write_files(in_memory, 3, 10_000)
    file = in_memory / "huge"
    with open(file, "wb") as f:
        for place in (0, LIMIT - 50_000, LIMIT + (20 << 20), (1 << 62) - len(_BYTES)):
            os.pwrite(f.fileno(), _BYTES, place)
    return file


def test_a_file_of_exabytes(large: Path, mount: MakeMount) -> None:
    mounted = mount(large.parent, "64M")
    names = [path.name for path in large.parent.iterdir() if path != large]
    with open(mounted.path / large.name, "rb", buffering=0) as f:
        for _ in range(2):
            for place in (0, LIMIT - 50_000, LIMIT + (20 << 20), (1 << 62) - len(_BYTES)):
                assert os.pread(f.fileno(), len(_BYTES), place) == _BYTES
        assert not os.pread(f.fileno(), 10, 1 << 62)
    assert mounted.cached(large.name) in ("no", "partial")
    mounted.settle()
    said = coordlfs("warm", mounted.path, timeout=100).stdout
    assert "the cache is full" in said
    assert mounted.cached(large.name) == "partial"
    coordlfs("drop", mounted.path, mounted.path / large.name, timeout=30)
    eventually(lambda: mounted.cached(large.name) == "no")
    with open(large, "r+b") as f:
        f.write(_BYTES[::-1])
    coordlfs("refresh", mounted.path, timeout=60)
    with open(mounted.path / large.name, "rb") as f:
        assert f.read(len(_BYTES)) == _BYTES[::-1]
    for name in names:
        assert read(mounted.path / name) == read(large.parent / name)
    server = mounted.stats()["processes"]["server"]
    with open(f"/proc/{server}/status") as f:
        peak = next(int(line.split()[1]) << 10 for line in f if line.startswith("VmHWM:"))
    assert peak < 300 * MIB


def test_counts_of_many_such_files_do_not_overflow(in_memory: Path, mount: MakeMount) -> None:
    for number in range(4):
        with open(in_memory / f"huge{number}", "wb") as f:
            os.truncate(f.fileno(), (1 << 63) - 4096)
    mounted = mount(in_memory, "1M")
    for path in sorted(mounted.path.iterdir()):
        with open(path, "rb", buffering=0) as f:
            assert f.read(10) == bytes(10)
    assert mounted.stats()["server_starts"] == 1
