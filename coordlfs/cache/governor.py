"""How much the cache may hold now: it gives memory back before the host gets tight, and takes it again later.

Pinned memory is memory that the host cannot take back by itself. So there are two marks of what has to stay available:
above the high one the cache may grow, between the two it stays as it is, below the low one it releases as much as
brings what is available up to the high one. What was released is not taken again for a while. No I/O here.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordlfs.kernel.memory import Memory

_LOW_SHARE, _LOW_LEAST, _LOW_MOST = 0.04, 48 << 20, 2 << 30
_HIGH = 2  # times the low mark
_STALLED = 0.1  # of the time: with so much waiting for memory, the high mark is the low one
_REST = 30.0  # seconds in which what was released is not taken again


@dataclass(frozen=True, slots=True)
class Marks:
    """Bytes that have to stay available."""

    low: int
    high: int

    @classmethod
    def of(cls, total: int) -> Marks:
        """The marks for a machine (or memory cgroup) of `total` bytes."""
        low = min(total // 4, _LOW_MOST, max(_LOW_LEAST, int(total * _LOW_SHARE)))
        return cls(low, low * _HIGH)


class Governor:
    """Decides the limit of one cache. `limit` is in bytes, never above `configured`."""

    def __init__(self, configured: int) -> None:
        self.configured = configured
        self.limit = configured
        self._rest_until = float("-inf")

    def update(self, pinned: int, memory: Memory, stalled: float, now: float) -> int:
        """The limit from now on, with `pinned` bytes in the cache and a `stalled` share of the time (PSI)."""
        marks = Marks.of(memory.total)
        room = pinned + memory.available - marks.high  # the cache at which the high mark stays available
        if memory.available < (marks.high if stalled > _STALLED else marks.low):
            self.limit = max(0, min(self.limit, room))
            self._rest_until = now + _REST
        elif now < self._rest_until:
            self.limit = min(self.limit, max(pinned, room))
        else:
            self.limit = min(self.configured, max(pinned, room))
        return self.limit
