"""Who reads a large object from one end to the other, and how far ahead of him it is worth to be.

A reader who goes on where he was has the next two blocks fetched, then eight …: as far as his pace needs, who comes to
blocks that are there already, and soon, since each step costs him an answer's delay. One who reads here and there has
nothing fetched. It fetches nothing itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator

from coordlfs.sources.objects.blocks import Block, blocks_of

_FIRST, _GROWS, _MOST = 2, 4, 16  # blocks ahead of a reader
_READERS = 256  # places that are remembered


class Sequences:
    """Where readers are. Thread-safe."""

    def __init__(self) -> None:
        self._places: OrderedDict[tuple[bytes, int], int] = OrderedDict()  # path and next block → blocks ahead of it
        self._lock = threading.Lock()

    def ahead_of(self, block: Block) -> Iterator[Block]:
        """The blocks to fetch, now that somebody reads this one; none of an object that is one block."""
        if block.end - block.first == block.entry.size:
            return iter(())
        step = block.end - block.first
        with self._lock:
            window = self._places.pop((block.path, block.first), None)
            if window is None and (block.path, block.end) in self._places:
                return iter(())  # who reads this one has been seen
            window = 0 if window is None else min(_MOST, max(_FIRST, _GROWS * window))
            self._places[block.path, block.end] = window
            if len(self._places) > _READERS:
                self._places.popitem(last=False)
        return blocks_of(block.path, block.entry, block.end, window * step) if window else iter(())
