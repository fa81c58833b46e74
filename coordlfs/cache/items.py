"""Items: what is cached and admitted as one.

An item is a whole file up to `CHUNK` bytes and otherwise one chunk of it, so that record files, tar shards and
memory-mapped token files are cached by the part. An item is named by one integer: record number and chunk number.
"""

from __future__ import annotations

from collections.abc import Iterator

CHUNK = 16 << 20
_CHUNK_BITS = 28  # 4 PiB a file


def item_at(record: int, offset: int) -> int:
    """The item that holds byte `offset` of a file."""
    return record << _CHUNK_BITS | offset // CHUNK


def record_of(item: int) -> int:
    """The catalogue record of the item's file."""
    return item >> _CHUNK_BITS


def chunk_of(item: int) -> int:
    """Which chunk of its file the item is."""
    return item & (1 << _CHUNK_BITS) - 1


def span(item: int, file_size: int) -> tuple[int, int]:
    """Offset and length, in bytes, of the item in its file."""
    offset = chunk_of(item) * CHUNK
    return offset, max(0, min(CHUNK, file_size - offset))


def length(item: int, file_size: int) -> int:
    """Bytes of the item."""
    return max(0, min(CHUNK, file_size - chunk_of(item) * CHUNK))


def items_of(record: int, file_size: int) -> range:
    """Every item of a file; none if it is empty."""
    first = record << _CHUNK_BITS
    return range(first, first + -(-file_size // CHUNK))


def cut(record: int, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
    """A range of a file, item by item: item, offset in the file, length."""
    end = offset + size
    while offset < end:
        length = min(end - offset, CHUNK - offset % CHUNK)
        yield item_at(record, offset), offset, length
        offset += length
