"""Free ranges of pages: taken in one piece where possible, in several where not, and joined again when given back.

What is taken is exact: as long as enough pages are free, no fragmentation makes a request fail. No I/O here.
"""

from __future__ import annotations

from collections.abc import Iterable

Extent = tuple[int, int]  # first page, and how many


class Extents:
    """Pages 0 to `pages` less those `taken`. Not thread-safe.

    >>> space = Extents(10)
    >>> space.take(4), space.take(7), space.free
    ([(0, 4)], None, 6)
    """

    def __init__(self, pages: int, taken: Iterable[Extent] = ()) -> None:
        self.free = 0
        self._length: dict[int, int] = {}  # of free ranges, by their first page
        self._first: dict[int, int] = {}  # of free ranges, by the page behind them
        at = 0
        for first, length in sorted(taken):
            if first < at or length <= 0 or first + length > pages:
                raise ValueError(f"pages {first} to {first + length} overlap others, or are none of {pages}")
            self._add(at, first - at)
            at = first + length
        self._add(at, pages - at)

    def ranges(self) -> list[Extent]:
        """What is free, in order."""
        return sorted(self._length.items())

    def take(self, pages: int) -> list[Extent] | None:
        """Take so many pages; None if there are too few, and then nothing changes."""
        if pages > self.free:
            return None
        found: list[Extent] = []
        while pages:
            first, length = self._length.popitem()
            del self._first[first + length]
            self.free -= length
            used = min(length, pages)
            found.append((first, used))
            pages -= used
            self._add(first + used, length - used)
        return found

    def give(self, extents: Iterable[Extent]) -> None:
        """Give back what was taken."""
        for first, length in extents:
            before = self._first.pop(first, None)
            if before is not None:
                self.free -= first - before
                del self._length[before]
                first, length = before, first - before + length
            after = self._length.pop(first + length, None)
            if after is not None:
                self.free -= after
                del self._first[first + length + after]
                length += after
            self._add(first, length)

    def _add(self, first: int, length: int) -> None:
        if length:
            self._length[first] = length
            self._first[first + length] = first
            self.free += length
