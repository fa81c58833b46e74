"""Which part of the staging area holds what: an allocator of slots. Pure.

The area is a sparse file. A slot that is released keeps its memory and is reused for what is about as large, so that
steady batches cost neither new pages nor zeroing; where memory is wanted for another size, idle slots are discarded
(their owner punches holes). New slots get addresses that were never used before, which a sparse file has enough of,
so no fragmentation can refuse what fits by size.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from mmap import PAGESIZE

UNIT = PAGESIZE  # bytes: slots are mapped one by one
_SPARE = 16 * UNIT  # a slot this much larger than needed is always good enough


class Slots:
    """Slots of at most `capacity` bytes together, by their offset."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0  # bytes of slots that are in use
        self.idle = 0  # bytes of slots that are not, and have memory nevertheless
        self._sizes: dict[int, int] = {}
        self._free: list[tuple[int, int]] = []  # size and offset, sorted
        self._end = 0

    @property
    def room(self) -> int:
        """Bytes that can still be allocated."""
        return self.capacity - self.used

    def size(self, offset: int) -> int:
        """Bytes of the slot there."""
        return self._sizes[offset]

    def allocate(self, nbytes: int) -> tuple[int, list[tuple[int, int]]] | None:
        """The offset of a slot for so many bytes, and (offset, size) of the slots to be discarded first; or None."""
        size = max(UNIT, -(-nbytes // UNIT) * UNIT)
        i = bisect_left(self._free, (size, 0))
        if i < len(self._free) and self._free[i][0] <= max(2 * size, size + _SPARE):
            found, offset = self._free[i]
            if self.used + found <= self.capacity:
                del self._free[i]
                self.idle -= found
                self.used += found
                return offset, []
        if size > self.room:
            return None
        discarded = []
        while self.used + self.idle + size > self.capacity:
            freed, offset = self._free.pop()
            self.idle -= freed
            del self._sizes[offset]
            discarded.append((offset, freed))
        offset, self._end = self._end, self._end + size
        self._sizes[offset] = size
        self.used += size
        return offset, discarded

    def release(self, offset: int) -> None:
        """Nobody uses the slot any more."""
        size = self._sizes[offset]
        self.used -= size
        self.idle += size
        insort(self._free, (size, offset))
