"""Looking at a store without changing it: what is in it, and whether its bytes are what was written.

For stores that no mount uses, and, but for the bytes, for those that one does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from coordlfs.disk import layout
from coordlfs.disk.layout import BLOCK, HEADER, ROW, UNIT, Row
from coordlfs.kernel import pages

_AT_ONCE = 1 << 14  # rows
_DIRECTLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # not to wait for who writes to a FIFO


@dataclass(slots=True)
class Survey:
    """What was found."""

    blocks: int = 0
    bytes: int = 0
    bad_rows: int = 0
    bad_blocks: int = 0  # whose bytes are not what was written


def contents(directory: int) -> Survey:
    """What the store in an open directory holds. Raises ValueError if it is none, OSError for what the disk says."""
    survey = Survey()
    for row in _rows(directory):
        if row is None:
            survey.bad_rows += 1
        else:
            survey.blocks += 1
            survey.bytes += row.length
    return survey


def verify(directory: int) -> Survey:
    """Check every byte; see `contents`."""
    survey, room = Survey(), memoryview(pages.buffer(BLOCK))
    data = os.open("data", _DIRECTLY, dir_fd=directory)
    try:
        for row in _rows(directory):
            if row is None:
                survey.bad_rows += 1
                continue
            survey.blocks += 1
            survey.bytes += row.length
            survey.bad_blocks += not _is_good(data, row, room)
    finally:
        os.close(data)
    return survey


def _is_good(data: int, row: Row, room: memoryview) -> bool:
    try:
        n = os.preadv(data, [room[: row.length]], row.unit * UNIT)
    except OSError:
        return False
    os.posix_fadvise(data, row.unit * UNIT, row.units * UNIT, os.POSIX_FADV_DONTNEED)
    return n == row.length and layout.checksum_of(room[:n]) == row.checksum


def _rows(directory: int) -> Iterator[Row | None]:
    """Every row, and None for what is none."""
    fd = os.open("index", _DIRECTLY, dir_fd=directory)
    try:
        seed, _ = layout.parse_header(os.pread(fd, HEADER, 0))
        at = HEADER
        while piece := os.pread(fd, _AT_ONCE * ROW, at):
            for start in range(0, len(piece), ROW):
                raw = piece[start : start + ROW]
                if raw != layout.NO_ROW[: len(raw)]:
                    yield layout.parse_row(raw, seed)
            at += len(piece)
    finally:
        os.close(fd)
