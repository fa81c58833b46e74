"""Reading by AIO and passing on by a pipe: the bytes are those of the file, and nothing is lost on the way."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mounts import noise

from coordlfs.kernel import pages
from coordlfs.kernel.aio import Reads
from coordlfs.kernel.pipe import Pipe

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


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, SIZE), page=st.integers(0, 20))
def test_what_goes_through_a_pipe_is_the_head_and_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, length: int, page: int
) -> None:
    path = tmp_path_factory.mktemp("pipe") / "file"
    offset = page * pages.PAGE
    data = noise(offset + length)
    path.write_bytes(data)
    pipe, fd = Pipe(), os.open(path, os.O_RDONLY)
    try:
        if not pipe.fill(b"head", fd, offset, length):
            assert length > SIZE - 2 * pages.PAGE, "where a pipe may not be larger"
            return
        with open(path.with_name("out"), "wb+") as out:
            pipe.pour(out.fileno())
            out.seek(0)
            assert out.read() == b"head" + data[offset:]
    finally:
        pipe.empty()
        os.close(fd)


def test_a_pipe_takes_nothing_of_what_is_shorter_than_expected(source: Path) -> None:
    (source / "short").write_bytes(noise(5000))
    pipe, fd = Pipe(), os.open(source / "short", os.O_RDONLY)
    try:
        assert not pipe.fill(b"head", fd, 0, 5001)
        assert pipe.fill(b"head", fd, 0, 5000), "it is of use again"
    finally:
        pipe.empty()
        os.close(fd)
