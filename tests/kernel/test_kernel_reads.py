"""Reading by AIO: the bytes are those of the file, each read in its own place."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import noise

from coordlfs.kernel.aio import Reads

SIZE = 1 << 20


@pytest.fixture
def reads() -> Iterator[Reads]:
    made = Reads(4, SIZE)
    yield made
    made.close()


def _ended(reads: Reads, count: int) -> dict[int, int]:
    ended: dict[int, int] = {}
    while len(ended) < count:
        assert select.select([reads.fd], [], [], 20)[0], "a read did not end"
        ended.update(reads.ended())
    return ended


def test_reads_under_way_together_bring_each_their_own_bytes(source: Path, reads: Reads) -> None:
    data = noise(3 * SIZE + 1000)
    (source / "file").write_bytes(data)
    fd = os.open(source / "file", os.O_RDONLY | os.O_DIRECT)
    try:
        places = {}
        for offset in (0, SIZE, 2 * SIZE, 3 * SIZE):
            slot = reads.take()
            assert slot is not None
            places[slot] = offset
            reads.submit(slot, fd, offset, SIZE)
        assert reads.take() is None, "all slots are taken"
        for slot, n in _ended(reads, 4).items():
            offset = places[slot]
            assert n == min(SIZE, len(data) - offset)
            assert reads.buffers[slot][:n] == data[offset : offset + n]
            reads.give(slot)
        assert reads.take() is not None
    finally:
        os.close(fd)


def test_a_read_that_fails_tells_why(source: Path, reads: Reads) -> None:
    fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    slot = reads.take()
    assert slot is not None
    try:
        with pytest.raises(OSError, match="io_submit"):
            reads.submit(slot, fd, 0, SIZE)
        reads.give(slot)
        assert reads.ended() == []
    finally:
        os.close(fd)
