"""The rows of a store: in a file, 64 bytes each, and found by a hash index in flat memory, 4 bytes a slot.

No Python object stands for a row. Rows are read and written by calls, and never mapped: a disk that fails would end the
process, and a full one, too. Whoever looks for a row takes no lock; one thread at a time changes any.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator

from coordlfs.disk.layout import HEADER, NO_ROW, ROW, Row, key_of, pack_row, parse_row
from coordlfs.disk.slots import enter

_AT_ONCE = 1 << 14  # rows that are read in one piece
_FEWEST_SLOTS = 1 << 12


class Index:
    """The rows of an open file, whose header is there. Raises OSError if they cannot be read.

    `slots`: the hash index, and the mask of a key for its first slot; another pair takes its place when it grows.
    `room` is how many rows the file has room for without growing.
    """

    def __init__(self, fd: int, seed: int) -> None:
        self.fd = fd
        self._seed = seed
        self._tells = True  # the file system tells whether a disk would have to be waited for
        self.count = self.room = max(0, (os.fstat(fd).st_size - HEADER) // ROW)  # rows ever used, be they erased
        self._free = array("I")  # numbers of rows that were erased
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        self.slots: tuple[memoryview, int] = (memoryview(array("I")), 0)
        self._entered = 0
        self._build()

    def __len__(self) -> int:
        """How many rows there are, at most: some may turn out to be none."""
        return self.count - len(self._free)

    @property
    def memory(self) -> int:
        """Bytes of the hash index."""
        return self.slots[0].nbytes

    # -- finding: any thread ------------------------------------------------------------------------------------

    def find(self, path: bytes, block: int, *, waits: bool = True) -> tuple[int, Row] | None:
        """Number and row of a block of a file, of whatever version. Raises OSError if the index cannot be read.

        Unless it `waits`, BlockingIOError if a disk would have to be waited for.
        """
        key = key_of(path, block)
        slots, mask = self.slots
        at = key & mask
        while number := slots[at]:
            row = self.row(number - 1, waits=waits)
            if row is not None and row.key == key and row.block == block:
                return number - 1, row
            at = (at + 1) & mask
        return None

    def row(self, number: int, *, waits: bool = True) -> Row | None:
        """A row by its number; None if it was erased, or is none. See `find`."""
        if waits or not self._tells:
            return parse_row(os.pread(self.fd, ROW, HEADER + number * ROW), self._seed)
        raw = bytearray(ROW)
        try:
            os.preadv(self.fd, [raw], HEADER + number * ROW, os.RWF_NOWAIT)
        except BlockingIOError:
            raise
        except OSError:  # the file system does not know the question
            self._tells = False
            return self.row(number)
        return parse_row(memoryview(raw), self._seed)

    # -- changing: one thread at a time -------------------------------------------------------------------------

    def missing(self, rows: int) -> int:
        """For how many of so many more rows the file has no room."""
        return max(0, rows - len(self._free) - (self.room - self.count))

    def replace(self, number: int, row: Row) -> None:
        """Put a row in the place of one with its key, at once. Raises OSError, and then either may be there."""
        self._write(number, pack_row(row, self._seed))

    def put(self, row: Row) -> int:
        """Add a row, of which there is none yet; its number. Raises OSError, and then it was not added."""
        number = self._free[-1] if self._free else self.count
        self._write(number, pack_row(row, self._seed))
        if self._free:
            self._free.pop()
        else:
            self.count += 1
        slots, mask = self.slots
        if (self._entered + 1) * 2 > mask + 1:
            self._build()
        else:
            at = row.key & mask
            while slots[at]:
                at = (at + 1) & mask
            slots[at] = number + 1
            self._entered += 1
        return number

    def erase(self, number: int) -> None:
        """Remove a row. Raises OSError, and then it may be there or not."""
        self._write(number, NO_ROW)
        self._free.append(number)  # its slot leads to what has another key, until the slots are built anew

    def _write(self, number: int, raw: bytes) -> None:
        if os.pwrite(self.fd, raw, HEADER + number * ROW) != ROW:
            raise OSError("a row was written in part")

    # -- all of them --------------------------------------------------------------------------------------------

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """All rows as they are in the file, some at a time: the number of the first, and their bytes."""
        number = 0
        while number < self.count:
            wanted = min(_AT_ONCE, self.count - number) * ROW
            raw = os.pread(self.fd, wanted, HEADER + number * ROW)
            whole = len(raw) // ROW * ROW
            if not whole:
                return  # somebody cut the file off
            yield number, memoryview(raw)[:whole]
            number += whole // ROW

    def _build(self) -> None:
        """Make the slots anew, at most half full now and after as many more."""
        size = _FEWEST_SLOTS
        while size < 3 * (len(self) + 1):
            size *= 2
        slots, entered = array("I", bytes(4 * size)), 0
        for first, raw in self.pieces():
            entered += enter(slots, raw.cast("Q"), first)
        self.slots, self._entered = (memoryview(slots), size - 1), entered

    def empty(self) -> None:
        """Find nothing any more."""
        self.slots, self._entered = (memoryview(array("I", bytes(4 * _FEWEST_SLOTS))), _FEWEST_SLOTS - 1), 0
        self.settle(0, ())

    def settle(self, used: int, free: Iterable[int]) -> None:
        """Say that only the first `used` rows were ever used, and which of them were erased: before any is put."""
        self.count = used
        self._free = array("I", free)
