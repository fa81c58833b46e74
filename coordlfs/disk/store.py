"""One store: what is in it, and how bytes come to be in it, out of it, and to be proved.

Three files in a directory of its own: `data`, `index` (`coordlfs.disk.index`) and `names`. They grow by pieces that are
allotted by the file system at once (fallocate), so that it is found to be full when a piece is made, and never in the
middle of a block. Bytes are durable before the row that leads to them is written, and a row is gone before its units
are used again, so that a process or a machine may stop at any moment. Whatever is read is checked all the same.

Any thread may find and read, without a lock; one thread does all else. Methods raise OSError for what the disk says.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from coordlfs.disk import layout
from coordlfs.disk.index import Index
from coordlfs.disk.layout import BLOCK, FILES, HEADER, ROW, UNIT, Row, Version
from coordlfs.disk.space import Space
from coordlfs.disk.stock import Stock
from coordlfs.kernel import pages

log = logging.getLogger(__name__)

_PIECES = 64  # that a store of the size that is wanted grows by, unless they would be smaller or larger than this
_LEAST_PIECE, _LARGEST_PIECE = BLOCK, 1 << 30
_SMALL_PIECE = 1 << 16  # bytes, of the other files
_SPARE = 8 * UNIT  # that the file system may need to know which parts of a piece have been written
_EXPECTED = 1 << 16  # bytes of a block, before there are any
_WRITTEN, _AT_ONCE = 8 * layout.UNITS_OF_BLOCK, 1000  # units and blocks that are written by one call, about
_REMEMBERED = 1 << 10  # files whose names were written last
_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_UNKNOWN = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_MAPPED = 256  # bytes of a file for one, at most, in which a file system that cannot allot notes where they are


class Block(NamedTuple):
    """What is to be kept: one block of a file, whose path leads to this version of it."""

    path: bytes
    version: Version
    block: int
    room: memoryview  # page-aligned and whole units: its bytes, and zeros behind them

    @property
    def length(self) -> int:
        """Its bytes."""
        return layout.length_of(self.version.size, self.block)


class Found(NamedTuple):
    """One block that is on the disk; its bytes are yet to be read, and checked."""

    number: int
    row: Row

    @property
    def position(self) -> int:
        """Where its bytes begin in `Store.data`."""
        return self.row.unit * UNIT

    def proved(self, data: memoryview) -> memoryview | None:
        """Those of `data`, which was read from there, that are its bytes; None if they are not what was written."""
        length = self.row.length
        if len(data) >= length and layout.checksum_of(data[:length]) == self.row.checksum:
            return data[:length]
        return None


class Store:
    """The store in an open directory, which is this process's alone, at most `size` bytes of its file system.

    `identity`, 16 bytes, tells the source from others. A store of another one, or of another format, is emptied:
    `emptied` says why. Nothing is added before `take_stock` was called.
    """

    def __init__(self, directory: int, identity: bytes, size: int) -> None:
        self.size = size
        self.emptied: str | None = None
        self.bytes = 0  # of blocks that are here, from `take_stock` on
        beside = [
            os.stat(name, dir_fd=directory, follow_symlinks=False) for name in {*os.listdir(directory)} - {*FILES}
        ]
        self._beside = sum(st.st_blocks for st in [os.fstat(directory), *beside]) * 512
        self.is_read_only = False  # what is here is found, and nothing is changed
        try:
            fds = [os.open(name, _OPEN, 0o600, dir_fd=directory) for name in FILES]
        except OSError as e:
            if e.errno != errno.EROFS:
                raise
            self.is_read_only = True
            fds = [os.open(name, _READ, dir_fd=directory) for name in FILES]
        self._index_fd, self._names_fd, self.data = fds
        self.seed = self._begin(identity)
        self.is_direct = self._go_direct()
        self.allots = True  # the file system can allot room ahead
        self.may_grow = True
        self.index = Index(self._index_fd, self.seed)
        self._space = Space()
        self._end = 0  # units of the data
        self._erased: list[tuple[int, int]] = []  # units of rows that were erased, maybe not durably
        self._names_end, self._names_room = 0, os.fstat(self._names_fd).st_size
        self._promised_names = self._promised_rows = 0  # bytes, and how many, for which room was taken
        self._are_names_new = False
        self._free_names: dict[int, list[int]] = {}  # by length, places of names of files that are here no more
        self._names: OrderedDict[bytes, int] = OrderedDict()

    def _begin(self, identity: bytes) -> int:
        """The seed of the store that is here, or of a new one in its place."""
        try:
            seed, found = layout.parse_header(os.pread(self._index_fd, HEADER, 0))
            if found != identity:
                self.emptied = "it is of another directory, which was at this path before"
            elif sum(map(_extent, self._fds[:2])) > self.size // 2:
                self.emptied = "its index was made for a much larger size"
            else:
                return seed
        except ValueError as e:
            if os.fstat(self._index_fd).st_size:
                self.emptied = str(e)
        if self.is_read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        for fd in self._fds:
            os.ftruncate(fd, 0)
            with suppress(OSError):  # what has no such thing overwrites in place
                pages.overwrite_in_place(fd)
        seed = secrets.randbits(64)
        os.pwrite(self._index_fd, layout.pack_header(seed, identity), 0)
        os.fsync(self._index_fd)
        return seed

    @property
    def _fds(self) -> tuple[int, int, int]:
        return self._index_fd, self._names_fd, self.data

    def _go_direct(self) -> bool:
        try:
            pages.set_direct(self.data, True)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds:
            os.close(fd)

    # -- finding and reading ------------------------------------------------------------------------------------

    def find(self, path: bytes, version: Version, block: int, *, waits: bool = True) -> Found | None:
        """A block of a file of that very version. See `Index.find`."""
        found = self.index.find(path, block, waits=waits)
        return None if found is None or found[1].version != version else Found(*found)

    def read(self, found: Found, into: memoryview) -> memoryview | None:
        """The bytes of a block, read into page-aligned memory of `BLOCK` bytes; None if they are not what was written.

        Then the block is to be handed to `forget`.
        """
        length = found.row.units * UNIT
        n = os.preadv(self.data, [into[:length]], found.position)
        if not self.is_direct:
            os.posix_fadvise(self.data, found.position, length, os.POSIX_FADV_DONTNEED)
        return found.proved(into[:n])

    # -- room: by one thread, as all that follows -----------------------------------------------------------------

    @property
    def taken(self) -> int:
        """Bytes of the file system that the store takes."""
        return self._beside + sum(os.fstat(fd).st_blocks for fd in self._fds) * 512

    @property
    def _claimed(self) -> int:
        """As `taken`, when all of its files will have been written to: of a copy there may be parts that are not."""
        length = sum(map(_extent, self._fds))
        return self._beside + length + (0 if self.allots else length // _MAPPED)

    @property
    def is_removed(self) -> bool:
        """Whether somebody has deleted its files, whose room is taken for as long as they are open."""
        return not all(os.fstat(fd).st_nlink for fd in self._fds)

    def give_up(self) -> None:
        """Give all room back for good: nothing is found any more, and nothing is to be added."""
        self.index.empty()
        self.bytes = 0
        for fd in self._fds:
            os.ftruncate(fd, 0)

    def take(self, block: Block) -> int | None:
        """Take room for a block: its first unit; None if there is none. Raises OSError if the file system has none.

        All that is taken is for the next call of `add`.
        """
        name = 0 if self._has_name(block) else len(layout.pack_name(block.path))
        if not self._grow_names(self._promised_names + name) or not self._grow_index(self._promised_rows + 1):
            return None
        units = layout.units_of(block.length)
        first = self._space.take(units)
        if first is None and self._erased:
            self.settle()
            first = self._space.take(units)
        if first is None and self._grow_data():
            first = self._space.take(units)
        if first is not None:
            self._promised_names, self._promised_rows = self._promised_names + name, self._promised_rows + 1
        return first

    def settle(self) -> None:
        """Have what was erased stay erased, so that its room can be used again."""
        os.fdatasync(self._index_fd)
        for first, units in self._erased:
            self._space.give(first, units)
        self._erased.clear()

    def _has_name(self, block: Block) -> bool:
        """Whether the name of a block's file is there, or can be written to where one is that nobody needs any more."""
        length = len(layout.pack_name(block.path))
        if block.path in self._names or len(self._free_names.get(length, ())) > self._promised_rows:
            return True
        return self.index.find(block.path, block.block) is not None

    def _grow_names(self, length: int) -> bool:
        """See to it that there is room for so many more bytes of names; whether there is."""
        needed = self._names_end + length - self._names_room
        if needed > 0 and self._grow(self._names_fd, -(-needed // _SMALL_PIECE) * _SMALL_PIECE):
            self._names_room = os.fstat(self._names_fd).st_size
        return self._names_end + length <= self._names_room

    def _grow_index(self, rows: int) -> bool:
        """See to it that there is room for as many more rows; whether there is."""
        needed = self.index.missing(rows)
        if needed and self._grow(self._index_fd, -(-needed * ROW // _SMALL_PIECE) * _SMALL_PIECE):
            self.index.room = (os.fstat(self._index_fd).st_size - HEADER) // ROW
        return not self.index.missing(rows)

    def _grow_data(self) -> bool:
        """Have the data grow by a piece, and the index by as many rows as that will take; False if there is no room."""
        piece = min(_LARGEST_PIECE, max(_LEAST_PIECE, self.size // _PIECES // UNIT * UNIT))
        piece = min(piece, max(0, self.size - self._claimed - _SPARE))
        average = max(UNIT, self.bytes // len(self.index)) if len(self.index) else _EXPECTED
        rows = piece // average
        self._grow_index(self._promised_rows + rows)
        if len(self.index):
            self._grow_names(self._promised_names + rows * -(-self._names_end // len(self.index)))
        piece = min(piece, max(0, self.size - self._claimed - _SPARE))
        before = self._end
        if os.fstat(self.data).st_size // UNIT < before:
            raise OSError(errno.EIO, "somebody has cut its data off")
        if not self._grow(self.data, piece):
            return False
        self._end = os.fstat(self.data).st_size // UNIT
        self._space.give(before, self._end - before)
        return True

    def _grow(self, fd: int, wanted: int) -> bool:
        """Have a file grow by so many bytes, or fewer if that would be more than the store may take; False if none."""
        size = os.fstat(fd).st_size
        wanted = min(wanted, self.size - self._claimed - _SPARE) // UNIT * UNIT
        if not self.may_grow or wanted <= 0 or (size + wanted) // UNIT > layout.LAST_UNIT:
            return False
        end = -(-size // UNIT) * UNIT + wanted
        self._allot(fd, size, end)
        excess = self._claimed - self.size  # what the file system needs to know where all of it is
        if excess > 0:
            end = max(size, end - -(-excess // UNIT) * UNIT)
            os.ftruncate(fd, end)
        return end > size

    def _allot(self, fd: int, size: int, end: int) -> None:
        if self.allots:
            try:
                pages.allot(fd, size, end - size)
                return
            except OSError as e:
                os.ftruncate(fd, size)
                if e.errno not in _UNKNOWN:
                    raise
                self.allots = False
        os.ftruncate(fd, end)  # room is found, or not, as it is written to

    # -- adding and removing ------------------------------------------------------------------------------------

    def add(self, blocks: Sequence[tuple[int, Block]]) -> None:
        """Keep blocks, each in the room that was taken for it: first unit and block; durably, when this returns.

        A block of another version of the same file gives way. If OSError is raised none of them may be there, and
        their room is lost until the store is opened again.
        """
        self._promised_names = self._promised_rows = 0
        rows = [(block, _row(block, self._name(block), first)) for first, block in blocks]
        for start, parts in _runs(blocks):
            self._write(start, parts)
        if self._are_names_new:
            os.fdatasync(self._names_fd)
            self._are_names_new = False
        os.fdatasync(self.data)
        for block, row in rows:
            found = self.index.find(block.path, block.block)
            if found is None:
                self.index.put(row)
            else:
                self.index.replace(found[0], row)
                self._released(found[1])
            self.bytes += row.length

    def _write(self, start: int, parts: list[memoryview]) -> None:
        """Write blocks that lie side by side."""
        at, n = start * UNIT, sum(map(len, parts))
        if os.pwritev(self.data, parts, at) != n:
            raise OSError(errno.EIO, "blocks were written in part")
        if not self.is_direct:
            os.posix_fadvise(self.data, at, n, os.POSIX_FADV_DONTNEED)

    def _name(self, block: Block) -> int:
        """Where the name of a block's file is, written just now if it is not there."""
        known = self._names.get(block.path)
        if known is None and (found := self.index.find(block.path, block.block)) is not None:
            known = found[1].name  # of an earlier version
        if known is None:
            raw = layout.pack_name(block.path)
            if free := self._free_names.get(len(raw)):
                known = free.pop()
            elif self._names_end + len(raw) > self._names_room:
                raise OSError(errno.ENOSPC, "no room for a name")
            else:
                known, self._names_end = self._names_end, self._names_end + len(raw)
            os.pwrite(self._names_fd, raw, known)
            self._are_names_new = True
        self._names[block.path] = known
        if len(self._names) > _REMEMBERED:
            self._names.popitem(last=False)
        return known

    def remove(self, path: bytes, block: int, unless: Version | None = None) -> int:
        """Give back the room of a block, of whatever version, `unless` it is of that one; its bytes, or 0."""
        found = self.index.find(path, block)
        if found is None or found[1].version == unless:
            return 0
        self._erase(*found)
        return found[1].length

    def forget(self, found: Found) -> bool:
        """Remove a block that turned out not to be what was written; False if it was removed meanwhile."""
        if self.index.row(found.number) != found.row:
            return False
        self._erase(*found)
        return True

    def clear(self) -> None:
        """Remove everything."""
        for found in self.all():
            self.index.erase(found.number)
            self._released(found.row)
        self._names.clear()
        self._free_names.clear()
        self._names_end = 0

    def _erase(self, number: int, row: Row) -> None:
        self.index.erase(number)
        self._released(row)
        path = self.name(row) if row.version.size <= BLOCK else None  # of larger files others may need it
        if path is not None:
            self._names.pop(path, None)
            self._free_names.setdefault(len(layout.pack_name(path)), []).append(row.name)

    def _released(self, row: Row) -> None:
        self._erased.append((row.unit, row.units))
        self.bytes -= row.length

    # -- all of it ----------------------------------------------------------------------------------------------

    def take_stock(self, pause: Callable[[], None] = lambda: None) -> Stock:
        """See what is here, erase what is none, and find out which room is free; `pause` is called every so often.

        What can be found meanwhile is right as ever.
        """
        end = self._shrunk_end()
        stock = Stock(self.seed, end)
        for first, raw in self.index.pieces():
            stock.see(first, raw)
            pause()
        self.index.settle(stock.used, stock.erased())
        if not self.is_read_only:
            for number in stock.unwanted:
                self.index.erase(number)
            os.ftruncate(self.data, end * UNIT)
        self._space, self._end, self.bytes = Space(stock.free()), end, stock.bytes
        self._names_end = self._end_of_names(stock.last_name) if stock.last_name >= 0 else 0
        return stock

    def _shrunk_end(self) -> int:
        """In units, where the data has to end so that the store takes no more than it may; at its end, mostly."""
        end = os.fstat(self.data).st_size // UNIT
        excess = self._claimed - self.size
        return end if excess <= 0 else max(0, end - layout.units_of(excess + _SPARE))

    def _end_of_names(self, last: int) -> int:
        raw = os.pread(self._names_fd, 2, last)
        return last + 2 + int.from_bytes(raw, "little") if len(raw) == 2 else last

    def name(self, row: Row) -> bytes | None:
        """The path of the file that a row is of; None if it is not to be read."""
        return layout.parse_name(os.pread(self._names_fd, layout.LONGEST_NAME, row.name), row)

    def all(self) -> Iterator[Found]:
        """Every block, in the order of the rows; by any thread."""
        for first, raw in self.index.pieces():
            for at in range(0, len(raw), ROW):
                row = layout.parse_row(raw[at : at + ROW], self.seed)
                if row is not None:
                    yield Found(first + at // ROW, row)


def _extent(fd: int) -> int:
    """Bytes that a file takes, or will when no part of it is left out any more."""
    st = os.fstat(fd)
    return max(st.st_blocks * 512, layout.units_of(st.st_size) * UNIT)


def _row(block: Block, name: int, first: int) -> Row:
    checksum = layout.checksum_of(block.room[: block.length])
    return Row(layout.key_of(block.path, block.block), name, block.version, block.block, first, checksum)


def _runs(blocks: Sequence[tuple[int, Block]]) -> Iterator[tuple[int, list[memoryview]]]:
    """Blocks that lie side by side, as many as are written at once: the first unit, and the room of each."""
    start = end = 0
    parts: list[memoryview] = []
    for first, block in sorted(blocks, key=lambda each: each[0]):
        if parts and (first != end or len(parts) == _AT_ONCE or end - start >= _WRITTEN):
            yield start, parts
            parts = []
        if not parts:
            start = first
        parts.append(block.room)
        end = first + len(block.room) // UNIT
    if parts:
        yield start, parts
