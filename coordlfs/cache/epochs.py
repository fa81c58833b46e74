"""Epochs, told from what little the server sees of them.

A hit is invisible to the server, a miss is not. Training reads each item once an epoch, so an item that misses a
second time starts a new epoch. A miss may come as many READs (readahead grows from small to large); the page that the
first of them began at stands for it, and only that page missing again is a second miss. Where everything is cached
nothing misses: there a few pinned files, the sentinels, are watched for being opened. A loader that sends hints says
when an epoch begins, and which items it has (`coordlfs.cache.fetch_ahead`). No I/O here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median_low

HISTORY = 100
_NEARLY_ALL = 0.95
_SAME_OPENING = 0.05  # seconds: many loaders open a file twice, to look at it and to read it


@dataclass(slots=True)
class Epoch:
    """What one epoch read from the source: items by number, and bytes."""

    number: int
    misses: int = 0
    bytes: int = 0
    expected_bytes: int = 0  # what was known and not pinned when it began: what it will read
    peer_bytes: int = 0  # got from other nodes, on top of `bytes`
    disk_items: int = 0  # of `misses`, those that were on this node's disk
    disk_bytes: int = 0  # got from there, on top of `bytes`
    told_items: int = 0  # that a loader's order named, as far as it got; 0 without one
    told_bytes: int = 0

    @property
    def is_read(self) -> bool:
        """Whether it has read nearly all that it will."""
        return self.bytes + self.disk_bytes >= self.expected_bytes * _NEARLY_ALL


@dataclass(slots=True)
class Epochs:
    """The epoch that runs, and those before it. Epochs are counted from 1; 0: nothing was read yet."""

    current: Epoch = field(default_factory=lambda: Epoch(0))
    finished: list[Epoch] = field(default_factory=list)
    began: Callable[[int], None] = lambda number: None  # told when one begins
    told: bool = False  # a loader says when an epoch begins: nothing else starts one
    _sentinels: dict[int, tuple[int, float]] = field(default_factory=dict)  # epoch, time of the last opening

    def miss(
        self, last: tuple[int, int], page: int, nbytes: int, unpinned: Callable[[], int] = int
    ) -> tuple[int, int] | None:
        """A READ that went to the source, for `nbytes` from `page` on.

        `last` is what this function returned for the item before, or (0, 0). Returns what to remember for the item,
        or None if the READ continues a miss that is known. `unpinned` says how many bytes are known and not pinned.
        """
        epoch, first_page = last
        if epoch == self.current.number != 0 and (self.told or page != first_page):
            self.current.bytes += nbytes
            return None
        if epoch == self.current.number:
            self.advance(unpinned())
        self.current.misses += 1
        self.current.bytes += nbytes
        return self.current.number, page

    def numbered(self, number: int) -> Epoch:
        """The epoch that has this number, if it is the last but one; else the one that runs."""
        if self.finished and self.finished[-1].number == number:
            return self.finished[-1]
        return self.current

    def watch(self, sentinel: int) -> None:
        """A pinned file that was read in the epoch that runs is watched from now on."""
        self._sentinels[sentinel] = (self.current.number, 0.0)

    def unwatch(self, sentinel: int) -> None:
        """It is pinned no longer."""
        self._sentinels.pop(sentinel, None)

    def opened(self, sentinel: int, now: float, unpinned: int = 0) -> None:
        """A sentinel was opened at `now` (seconds): once an epoch, if it is read as training reads.

        Half of them have to agree, so that somebody who looks at a file or two starts no epoch.
        """
        if sentinel not in self._sentinels:  # watched before this server began: the first opening is where it stands
            self._sentinels[sentinel] = (self.current.number, now)
            return
        epoch, before = self._sentinels[sentinel]
        if now - before < _SAME_OPENING:
            return
        self._sentinels[sentinel] = (self.current.number if self.told else epoch + 1, now)
        if median_low(e for e, _ in self._sentinels.values()) > self.current.number:
            self.advance(unpinned)

    def advance(self, unpinned: int = 0) -> None:
        """The epoch that runs is over."""
        if self.current.number:
            self.finished.append(self.current)
            del self.finished[:-HISTORY]
        self.current = Epoch(self.current.number + 1, expected_bytes=unpinned)
        self.began(self.current.number)

    @property
    def latest(self) -> Epoch | None:
        """The last epoch whose figures are whole: the one that runs if it is nearly over, else the one before.

        It is nearly over when it has read nearly all that is not pinned, or opened nearly all sentinels: what is
        not pinned may hit all the same, as long as memory is plentiful.
        """
        if not self.current.number:
            return None
        opened = sum(epoch >= self.current.number for epoch, _ in self._sentinels.values())
        nearly_opened = opened > 0 and opened >= len(self._sentinels) * _NEARLY_ALL
        if self.current.is_read or nearly_opened or not self.finished:
            return self.current
        return self.finished[-1] if self.finished else None
