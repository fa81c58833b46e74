"""Free ranges of a store's units: one range is taken each time, the smallest that will do.

A block lies in one piece, so that one read brings it. Ranges that were given back are joined. No I/O here.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordlfs.disk.layout import UNITS_OF_BLOCK

_LARGE = UNITS_OF_BLOCK  # any range of so many units or more will do for whatever is taken


class Space:
    """Units that are free. Not thread-safe.

    >>> space = Space([(0, 10)])
    >>> space.take(4), space.take(7), space.free
    (0, None, 6)
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """`ranges`: first unit and how many; none of them touch."""
        self.free = 0
        self._first: dict[int, int] = {}  # of ranges, by the unit behind them
        self._length: dict[int, int] = {}  # of ranges, by their first unit
        self._of_length: list[dict[int, None]] = [
            {} for _ in range(_LARGE + 1)
        ]  # first units, of `_LARGE` and more in the last
        for first, length in ranges:
            self._add(first, length)

    def ranges(self) -> list[tuple[int, int]]:
        """What is free, in order."""
        return sorted(self._length.items())

    def take(self, units: int) -> int | None:
        """The first of so many units in one range, at most a block's; None if no range is as long."""
        for length in range(units, _LARGE + 1):
            if self._of_length[length]:
                first = next(iter(self._of_length[length]))
                found = self._remove(first)
                self._add(first + units, found - units)
                return first
        return None

    def give(self, first: int, length: int) -> None:
        """Have so many units be free (again)."""
        before = self._first.get(first)
        if before is not None:
            length += self._remove(before)
            first = before
        if first + length in self._length:
            length += self._remove(first + length)
        self._add(first, length)

    def _add(self, first: int, length: int) -> None:
        if length:
            self._length[first] = length
            self._first[first + length] = first
            self._of_length[min(length, _LARGE)][first] = None
            self.free += length

    def _remove(self, first: int) -> int:
        length = self._length.pop(first)
        del self._first[first + length]
        del self._of_length[min(length, _LARGE)][first]
        self.free -= length
        return length
