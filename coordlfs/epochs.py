"""Epochs, told from misses alone.

A hit is invisible to the server, a miss is not. Training reads each item once an epoch, so an item that misses a
second time starts a new epoch. A miss may come as many READs (readahead grows from small to large); the page that the
first of them began at stands for it, and only that page missing again is a second miss. No I/O here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

HISTORY = 100


@dataclass(slots=True)
class Epoch:
    """What one epoch read from the source: whole items by number, and bytes."""

    number: int
    misses: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Epochs:
    """The epoch that runs, and those before it. Epochs are counted from 1; 0: nothing was read yet."""

    current: Epoch = field(default_factory=lambda: Epoch(0))
    finished: list[Epoch] = field(default_factory=list)

    def miss(self, last: tuple[int, int], page: int, nbytes: int) -> tuple[int, int] | None:
        """A READ that went to the source, for `nbytes` from `page` on.

        `last` is what this function returned for the item before, or (0, 0). Returns what to remember for
        the item, or None if the READ continues a miss that is known.
        """
        epoch, first_page = last
        if epoch == self.current.number != 0 and page != first_page:
            self.current.bytes += nbytes
            return None
        if epoch == self.current.number:
            self.advance()
        self.current.misses += 1
        self.current.bytes += nbytes
        return self.current.number, page

    def advance(self) -> None:
        """The epoch that runs is over."""
        if self.current.number:
            self.finished.append(self.current)
            del self.finished[:-HISTORY]
        self.current = Epoch(self.current.number + 1)
