"""Items: what is cached and admitted as one.

An item is a whole file up to `CHUNK` bytes and otherwise one chunk of it, so that record files, tar shards and
memory-mapped token files are cached by the part. An item is named by one integer: record number and chunk number.
What lies beyond `LIMIT`, at 4 PiB, is one item more, which is never cached: it has no length. It knows numbers and
sizes, and neither names nor what is cached.
"""

from __future__ import annotations

from collections.abc import Iterator

CHUNK = 16 << 20
_CHUNK_BITS = 28
_REST = (1 << _CHUNK_BITS) - 1  # the number of the chunk that stands for all that lies beyond the limit
LIMIT = _REST * CHUNK  # bytes of a file that may be cached


def item_at(record: int, offset: int) -> int:
    """The item that holds byte `offset` of a file."""
    return record << _CHUNK_BITS | min(offset // CHUNK, _REST)


def record_of(item: int) -> int:
    """The catalogue record of the item's file."""
    return item >> _CHUNK_BITS


def chunk_of(item: int) -> int:
    """Which chunk of its file the item is."""
    return item & (1 << _CHUNK_BITS) - 1


def span(item: int, file_size: int) -> tuple[int, int]:
    """Offset and length, in bytes, of the item in its file."""
    return chunk_of(item) * CHUNK, length(item, file_size)


def length(item: int, file_size: int) -> int:
    """Bytes of the item."""
    chunk = chunk_of(item)
    return 0 if chunk == _REST else max(0, min(CHUNK, file_size - chunk * CHUNK))


def items_of(record: int, file_size: int) -> range:
    """Every item of a file that may be cached; none if it is empty. A file may have millions: see `Admission.held`."""
    first = record << _CHUNK_BITS
    return range(first, first + min(-(-file_size // CHUNK), _REST))


def cut(record: int, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
    """A range of a file, item by item: item, offset in the file, length."""
    end = offset + size
    while offset < end:
        length = min(end - offset, CHUNK - offset % CHUNK)
        yield item_at(record, offset), offset, length
        offset += length
