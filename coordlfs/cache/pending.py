"""Items on their way to be pinned, and when each of them is asked for. No I/O, no lock: admission's is held."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class Pending:
    """An item on its way to be pinned."""

    due: float | None = None  # when it is asked for, if it is not with a keeper and not to be asked for now
    keeper: int | None = None  # who is asked
    contended: bool = False  # a job READ it since
    cancelled: bool = False
    missed: bool = False  # a job's READ began it
    same_cgroup: bool = False  # every READ of it came from the keeper's own memory cgroup
    attempts: int = 0
    awaited: int = 0  # how often it was put off, since a READ was at the source
    flags: int = 0


class PendingItems:
    """All of them, by item. Times are seconds of one clock, whichever.

    >>> pending = PendingItems()
    >>> pending.by_item[7] = Pending()
    >>> pending.postpone(7, 2.0), list(pending.due(1.0)), list(pending.due(2.0))
    (True, [], [7])
    """

    def __init__(self) -> None:
        self.by_item: dict[int, Pending] = {}
        self._clock: list[tuple[float, int]] = []  # when items are due; stale where `due` says otherwise
        self._waiting: deque[int] = deque()  # for a keeper with room

    def postpone(self, item: int, due: float) -> bool:
        """Have an item asked for at `due`, and not before; whether that is sooner than all else."""
        self.by_item[item].due = due
        heapq.heappush(self._clock, (due, item))
        return self._clock[0] == (due, item)

    def due(self, now: float) -> Iterator[int]:
        """The items whose time has come, each once; those of them that are postponed meanwhile come again."""
        while self._clock and self._clock[0][0] <= now:
            due, item = heapq.heappop(self._clock)
            pending = self.by_item.get(item)
            if pending is not None and pending.due == due:
                pending.due = None
                yield item

    def next_due(self) -> float | None:
        """When to look for items that are due; None if nothing is."""
        return self._clock[0][0] if self._clock else None

    def wait_for_keeper(self, item: int) -> None:
        """Have an item asked for when there is a keeper that has room."""
        self._waiting.append(item)

    def take_waiting(self) -> Iterator[int]:
        """The items that wait for a keeper and are with none when they come; they wait no longer."""
        waiting, self._waiting = self._waiting, deque()
        for item in waiting:
            pending = self.by_item.get(item)
            if pending is not None and pending.keeper is None:
                yield item

    def lose_keeper(self, index: int) -> None:
        """Have what a keeper that died was asked for wait for another."""
        for item, pending in self.by_item.items():
            if pending.keeper == index:
                pending.keeper = None
                self.wait_for_keeper(item)
