"""The cache in private memory, for where the page cache may not be locked: bytes by item and offset, in a memfd.

It looks like the stash, but what is whole stays. Behind the bytes lies a table of the items that are whole, from which
a server that takes over learns what is there: of each range of pages the item, a stamp of its version, and where in the
item the range belongs. A row is written when its pages are, and erased before they are given to another item. It does
not know which items are worth their place: `minio` does.

Reading takes no lock: who has read looks again whether the item is still the same, else throws away what it got. All
else is called under the lock of `coordlfs.cache.admission`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from coordlfs.cache import items
from coordlfs.cache.extents import Extent, Extents
from coordlfs.cache.ranges import merged
from coordlfs.catalogue import memfds
from coordlfs.kernel import pages
from coordlfs.kernel.libc import check, libc

_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_WORDS = memfds.SLOT // 8  # of a row: item + 1 (0: none), stamp, first page << 32 | pages, page in the item
_HEADER_WORDS = memfds.TABLE_HEADER // 8
_ROWS = 0  # the word of the header that says how many rows were ever used


@dataclass(slots=True)
class _Held:
    """One item. `ranges`: which bytes of it are there, merged and in order; replaced, never changed."""

    start: int  # of the item, in its file
    length: int
    stamp: int  # of the version that the bytes belong to
    extents: list[Extent]
    ranges: tuple[tuple[int, int], ...] = ()
    rows: list[int] = field(default_factory=list)  # once it is whole

    @property
    def size(self) -> int:
        return sum(end - begin for begin, end in self.ranges)

    def places(self, at: int, size: int) -> Iterator[tuple[int, int]]:
        """Where `size` bytes of the item from `at` on lie in the memfd: position and length."""
        for first, count in self.extents:
            room = count * pages.PAGE
            if at < room:
                n = min(size, room - at)
                yield first * pages.PAGE + at, n
                at, size = room, size - n
                if not size:
                    return
            at -= room


class Store:
    """`npages` pages of cache in the memfd `fd`. `stamp_of` gives an item's version as the kernel was shown it."""

    def __init__(self, fd: int, npages: int, stamp_of: Callable[[int], int]) -> None:
        self._fd = fd
        self._pages = npages
        self._stamp_of = stamp_of
        self._items: dict[int, _Held] = {}
        self._partial: set[int] = set()
        self._space = Extents(npages)
        self._map = mmap.mmap(fd, memfds.TABLE_HEADER + npages * memfds.SLOT, offset=npages * pages.PAGE)
        self._table = memoryview(self._map).cast("Q")
        self._free_rows: list[int] = []

    @property
    def size(self) -> int:
        """Bytes of items that are not whole."""
        return sum(self._items[item].size for item in self._partial)

    def has_room(self, length: int) -> bool:
        """Whether more may be asked for: what is admitted has its place."""
        return True

    def reserve(self, item: int, length: int) -> bool:
        """Take room for an item of `length` bytes, of the version that is shown now; False if there is too little."""
        if item in self._items:
            return False
        extents = self._space.take(pages.count(length))
        if extents is None:
            return False
        self._items[item] = _Held(items.span(item, 0)[0], length, self._stamp_of(item), extents)
        self._partial.add(item)
        return True

    def put(self, item: int, offset: int, data: bytes | memoryview) -> bool:
        """Keep a copy of `data`, found at `offset` of the file; False if the item has no room for it."""
        held = self._items.get(item)
        if held is None:
            return False
        begin = offset - held.start
        end = begin + len(data)
        if begin < 0 or end > held.length or held.stamp != self._stamp_of(item):
            return False
        view, at = memoryview(data), 0
        try:
            for place, n in held.places(begin, len(data)):
                while n:
                    done = os.pwrite(self._fd, view[at : at + n], place)
                    at, place, n = at + done, place + done, n - done
        except OSError:  # the memory cannot be had
            return False
        held.ranges = merged(held.ranges, begin, end)
        if held.ranges == ((0, held.length),) and not held.rows:
            self._record(item, held)
        return True

    def is_whole(self, item: int) -> bool:
        """Whether all of an item is here."""
        return item in self._items and item not in self._partial

    def is_current(self, item: int) -> bool:
        """Whether what is here of an item is of the version that is shown now."""
        held = self._items.get(item)
        return held is not None and held.stamp == self._stamp_of(item)

    def held(self, item: int) -> int:
        """Bytes kept of an item."""
        held = self._items.get(item)
        return held.size if held else 0

    def parts(self, item: int, offset: int, size: int) -> list[memoryview | int]:
        """What makes up `size` bytes at `offset`: copies of what is kept, and between them the lengths of gaps.

        They end where the item ends. Nothing but a gap of `size` bytes if nothing of it is here.
        """
        held = self._items.get(item)
        if held is None or held.stamp != self._stamp_of(item):
            return [size]
        at = offset - held.start
        end = min(at + size, held.length)
        if at >= end:
            return [size]
        found: list[memoryview | int] = []
        for begin, stop in held.ranges:
            if begin >= end:
                break
            if stop <= at:
                continue
            if begin > at:
                found.append(begin - at)
                at = begin
            for place, n in held.places(at, min(stop, end) - at):
                found.append(memoryview(os.pread(self._fd, n, place)))
            at = min(stop, end)
        if at < end:
            found.append(end - at)
        return found if self._items.get(item) is held else [size]

    def remove(self, item: int) -> None:
        """Give an item's memory back."""
        held = self._items.pop(item, None)
        if held is None:
            return
        self._partial.discard(item)
        for row in held.rows:
            self._table[_HEADER_WORDS + row * _WORDS] = 0
        self._free_rows += held.rows
        self._punch(held.extents)
        self._space.give(held.extents)

    def _punch(self, extents: list[Extent]) -> None:
        for first, count in extents:
            where = ctypes.c_long(first * pages.PAGE), ctypes.c_long(count * pages.PAGE)
            check(libc.fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, *where), "fallocate")

    # -- what outlives the server -------------------------------------------------------------------------------

    def _record(self, item: int, held: _Held) -> None:
        """Write an item that is whole into the table."""
        self._partial.discard(item)
        page = 0
        for first, count in held.extents:
            row = self._free_rows.pop() if self._free_rows else self._table[_ROWS]
            self._table[_ROWS] = max(self._table[_ROWS], row + 1)
            at = _HEADER_WORDS + row * _WORDS
            self._table[at + 1] = held.stamp
            self._table[at + 2] = first << 32 | count
            self._table[at + 3] = page
            self._table[at] = item + 1  # only now does the row exist
            held.rows.append(row)
            page += count

    def recover(self, length_of: Callable[[int], int]) -> list[int]:
        """Find what a server before this one kept, and give back all else; the items.

        `length_of` an item is 0 if there is none such. What is of another version than is shown now is given back.
        """
        rows = min(self._table[_ROWS], self._pages)
        found: dict[int, list[tuple[int, int, int, int, int]]] = defaultdict(list)
        for row in range(rows):
            at = _HEADER_WORDS + row * _WORDS
            item, stamp, extent, page = self._table[at : at + _WORDS]
            if item:
                found[item - 1].append((page, extent >> 32, extent & 0xFFFFFFFF, row, stamp))
        kept: list[Extent] = []
        used: set[int] = set()
        for item, parts in found.items():
            parts.sort()
            length = length_of(item)
            extents = [(first, count) for _, first, count, _, _ in parts]
            whole = length > 0 and sum(count for _, count in extents) == pages.count(length)
            if not whole or {stamp for *_, stamp in parts} != {self._stamp_of(item)}:
                continue
            held = _Held(items.span(item, 0)[0], length, parts[0][4], extents, ((0, length),))
            held.rows = [row for _, _, _, row, _ in parts]
            self._items[item] = held
            kept += extents
            used.update(held.rows)
        for row in range(rows):
            if row not in used:
                self._table[_HEADER_WORDS + row * _WORDS] = 0
                self._free_rows.append(row)
        try:
            self._space = Extents(self._pages, kept)
        except ValueError:  # no server wrote this
            self._items.clear()
            self._table[_HEADER_WORDS : _HEADER_WORDS + rows * _WORDS] = memoryview(bytes(rows * memfds.SLOT)).cast("Q")
            self._free_rows = list(range(rows))
        self._punch(self._space.ranges())
        return list(self._items)
