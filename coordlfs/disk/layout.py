"""How a store lies on its disk: a header, rows of 64 bytes, and names. No I/O here.

A file is kept in blocks of `BLOCK` bytes, the last of which is shorter. A row stands for one block: of which file, by
a hash of its path; of which version of it; where its bytes are, and their checksum. It carries a checksum of its
own, seeded with a number that is drawn for each store: what is torn, flipped or another store's is no row.

A block lies in one piece, from the beginning of a unit on. Rows never move, and lie in no two sectors.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

FORMAT = 1
FILES = "index", "names", "data"  # of a store
BLOCK = 1 << 20  # bytes of a file that have one checksum: a READ, and a read of the disk, are no longer
UNIT = 4096  # bytes: what room is counted in, and what reads and writes around the page cache are aligned to
HEADER = 4096  # bytes before the first row
ROW = 64  # bytes
UNITS_OF_BLOCK = BLOCK // UNIT
LAST_UNIT = (1 << 32) - 1

_MAGIC = b"coordlfs"
_HEADER = struct.Struct("=8sIIQ16s")  # magic, format, BLOCK, seed, identity of the source; a checksum follows
_ROW = struct.Struct("=QQQqQII")  # as in Row; checksums of the bytes and of the row follow
_SUM = struct.Struct("=Q")
_UNSUMMED = ROW - _SUM.size
_NAME = struct.Struct("=H")  # its length, before a name
NO_ROW = bytes(ROW)


class Version(NamedTuple):
    """A state of a file, as `coordlfs.sources.versions` tells states apart."""

    size: int
    mtime_ns: int
    inode: int


class Row(NamedTuple):
    """One block that is on the disk."""

    key: int  # by which it is found
    name: int  # where the file's path is, in bytes of the file of names
    version: Version
    block: int  # which one of its file
    unit: int  # the first that it lies in
    checksum: int  # of its bytes

    @property
    def length(self) -> int:
        """Its bytes."""
        return length_of(self.version.size, self.block)

    @property
    def units(self) -> int:
        """The room that it takes."""
        return units_of(self.length)


def key_of(path: bytes, block: int) -> int:
    """What a block of a file is found by: never 0, which stands for no row."""
    return xxhash.xxh3_64_intdigest(path, block) or 1


def length_of(size: int, block: int) -> int:
    """Bytes of a block of a file of `size` bytes; 0 or less if it has no such block."""
    return min(BLOCK, size - block * BLOCK)


def units_of(length: int) -> int:
    """The room that so many bytes take."""
    return -(-length // UNIT)


def checksum_of(data: bytes | memoryview) -> int:
    """What tells whether bytes are those that were written."""
    return xxhash.xxh3_64_intdigest(data)


def pack_row(row: Row, seed: int) -> bytes:
    """A row as it is written."""
    raw = _ROW.pack(row.key, row.name, *row.version, row.block, row.unit) + _SUM.pack(row.checksum)
    return raw + _SUM.pack(xxhash.xxh3_64_intdigest(raw, seed))


def is_row(raw: bytes | memoryview, seed: int) -> bool:
    """Whether 64 bytes are a row of the store with that seed, as it was written."""
    [found] = _SUM.unpack_from(raw, _UNSUMMED)
    return bool(xxhash.xxh3_64_intdigest(raw[:_UNSUMMED], seed) == found)


def parse_row(raw: bytes | memoryview, seed: int) -> Row | None:
    """The row that 64 bytes are, or None if they are none."""
    if len(raw) != ROW or not is_row(raw, seed):
        return None
    key, name, size, mtime_ns, inode, block, unit = _ROW.unpack_from(raw)
    row = Row(key, name, Version(size, mtime_ns, inode), block, unit, *_SUM.unpack_from(raw, _ROW.size))
    return row if key and row.length > 0 else None


def pack_header(seed: int, identity: bytes) -> bytes:
    """The header of a store of the source that has an identity of 16 bytes."""
    raw = _HEADER.pack(_MAGIC, FORMAT, BLOCK, seed, identity)
    return (raw + _SUM.pack(checksum_of(raw))).ljust(HEADER, b"\0")


def parse_header(raw: bytes) -> tuple[int, bytes]:
    """Seed and identity. Raises ValueError, which says what is wrong, for a header that is not this version's."""
    if len(raw) < HEADER:
        raise ValueError("it has no header")
    magic, form, block, seed, identity = _HEADER.unpack_from(raw)
    if magic != _MAGIC:
        raise ValueError("it is no store of coordlfs")
    if form != FORMAT or block != BLOCK:
        raise ValueError(f"it has format {form}, and this version of coordlfs has {FORMAT}")
    if _SUM.unpack_from(raw, _HEADER.size) != (checksum_of(raw[: _HEADER.size]),):
        raise ValueError("its header is damaged")
    return seed, identity


def pack_name(path: bytes) -> bytes:
    """A path as it is written."""
    return _NAME.pack(len(path)) + path


LONGEST_NAME = _NAME.size + (1 << 16) - 1


def parse_name(raw: bytes, row: Row) -> bytes | None:
    """The path of the file that a row is of, at the beginning of `raw`; None if it is not there."""
    if len(raw) < _NAME.size:
        return None
    [length] = _NAME.unpack_from(raw)
    path = raw[_NAME.size : _NAME.size + length]
    return path if len(path) == length and key_of(path, row.block) == row.key else None
