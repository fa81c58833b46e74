"""Cache policies, pure: each is asked for one item after the other and says whether it had it.

Sizes and capacities are in one unit, whichever; an item is cached whole or not at all.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import isqrt
from typing import Protocol

from coordlfs.cache.minio import MinIO
from coordlfs.cache.tiers import Tiers

Item = int
_NEVER = 1 << 62  # when an item is used next that is not used again


class Policy(Protocol):
    """A cache. `used` never exceeds the capacity it was made with."""

    @property
    def used(self) -> int:
        """The size of what it holds."""

    def access(self, item: Item, size: int) -> bool:
        """Ask for an item; whether it was there."""


class NeverEvict:
    """MinIO (Mohan et al., VLDB 2021): what came first stays. The file system's own implementation."""

    def __init__(self, capacity: int) -> None:
        self._cache = MinIO(capacity)

    @property
    def used(self) -> int:
        """The size of what it holds."""
        return self._cache.used

    def access(self, item: Item, size: int) -> bool:
        """Ask for an item; whether it was there."""
        if self._cache.pages(item):
            return True
        self._cache.admit(item, size)
        return False


class TwoTiers:
    """MinIO over memory and a disk, as the file system has it (`coordlfs.cache.tiers`)."""

    def __init__(self, capacity: int, disk: int) -> None:
        self.disk_bytes = 0  # that were found there
        self._memory = MinIO(capacity)
        self._disk = _Disk(disk)
        self._tiers: Tiers[int] = Tiers(self._memory, self._disk)

    @property
    def used(self) -> int:
        """The size of what memory holds."""
        return self._memory.used

    @property
    def used_on_disk(self) -> int:
        """The size of what the disk holds."""
        return self._disk.used

    def access(self, item: Item, size: int) -> bool:
        """Ask for an item; whether it was there."""
        if self._memory.pages(item):
            return True
        is_on_disk = item in self._disk.sizes
        if self._memory.admit(item, size):
            self._memory.pin(item, 0)
            self._tiers.pinned(item)
        if is_on_disk:
            self.disk_bytes += size
        elif self._tiers.place(item, size) is not None:
            self._disk.sizes[item] = size
            self._disk.used += size
            self._tiers.stored(item)
        return is_on_disk


class _Disk:
    """Room, and what of it each item takes."""

    def __init__(self, capacity: int) -> None:
        self.sizes: dict[Item, int] = {}
        self.used = 0
        self._capacity = capacity

    def take(self, block: int) -> int | None:
        """Whether there is room for an item of that size: 0 or None."""
        return 0 if self.used + block <= self._capacity else None

    def remove_item(self, item: int) -> int:
        """Forget an item; its size."""
        size = self.sizes.pop(item, 0)
        self.used -= size
        return size


class LRU:
    """The least recently used goes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._sizes: OrderedDict[Item, int] = OrderedDict()

    def access(self, item: Item, size: int) -> bool:
        """Ask for an item; whether it was there."""
        if item in self._sizes:
            self._sizes.move_to_end(item)
            return True
        if size <= self.capacity:
            while self.used + size > self.capacity:
                self.used -= self._sizes.popitem(last=False)[1]
            self._sizes[item] = size
            self.used += size
        return False


class TwoLists:
    """Linux's page cache, approximately: mm/workingset.c and mm/vmscan.c, files only, without MGLRU.

    What is read enters the inactive list. Read again there it is marked, and marked already it becomes active. What was
    evicted and comes back becomes active at once if fewer pages than are active were evicted or activated since (its
    refault distance). The active list gives back to the inactive one while it is more than the kernel's ratio larger.
    """

    def __init__(self, capacity: int, unit: int = 4096) -> None:
        self.capacity = capacity
        gigabytes = capacity * unit >> 30
        self._ratio = isqrt(10 * gigabytes) if gigabytes else 1  # active ÷ inactive at most (inactive_is_low)
        self._inactive: OrderedDict[Item, tuple[int, bool]] = OrderedDict()  # size, marked
        self._active: OrderedDict[Item, int] = OrderedDict()
        self._active_size = self._inactive_size = 0
        self._age = 0  # evicted and activated so far, in size
        self._evicted: dict[Item, int] = {}  # item → age at its eviction

    @property
    def used(self) -> int:
        """The size of what it holds."""
        return self._active_size + self._inactive_size

    def access(self, item: Item, size: int) -> bool:
        """Ask for an item; whether it was there."""
        if item in self._active:
            return True  # its order changes only when the list is shrunk, and then hardly: reads leave no trace
        if item in self._inactive:
            held, marked = self._inactive[item]
            if marked:
                del self._inactive[item]
                self._inactive_size -= held
                self._activate(item, held)
            else:
                self._inactive[item] = held, True
            return True
        if size <= self.capacity:
            while self.used + size > self.capacity:
                self._shrink()
            evicted = self._evicted.pop(item, None)
            if evicted is not None and self._age - evicted <= self._active_size:
                self._activate(item, size)
            else:
                self._inactive[item] = size, False
                self._inactive_size += size
        return False

    def _activate(self, item: Item, size: int) -> None:
        self._active[item] = size
        self._active_size += size
        self._age += size

    def _shrink(self) -> None:
        while self._active and self._active_size > self._inactive_size * self._ratio:
            item, size = self._active.popitem(last=False)
            self._active_size -= size
            self._inactive[item] = size, False
            self._inactive_size += size
        item, (size, _) = self._inactive.popitem(last=False)
        self._inactive_size -= size
        self._age += size
        self._evicted[item] = self._age


class Optimal:
    """Knows the future: whatever is used again last goes first, or does not come in (Belady, IBM Systems Journal 1966).

    With items of one size nothing has more hits. With several sizes the best is hard to find, and this is near it.
    """

    def __init__(self, capacity: int, trace: Sequence[Item]) -> None:
        self.capacity = capacity
        self.used = 0
        self._next = [_NEVER] * len(trace)
        last: dict[Item, int] = {}
        for position in range(len(trace) - 1, -1, -1):
            self._next[position] = last.get(trace[position], _NEVER)
            last[trace[position]] = position
        self._now = 0
        self._sizes: dict[Item, int] = {}
        self._uses: dict[Item, int] = {}
        self._latest: list[tuple[int, Item]] = []  # a heap by −next use; stale entries are skipped

    def access(self, item: Item, size: int) -> bool:
        """Ask for the next item of the trace; whether it was there."""
        following = self._next[self._now]
        self._now += 1
        hit = item in self._sizes
        if not hit:
            if size > self.capacity or following == _NEVER:
                return False
            self._sizes[item] = size
            self.used += size
        self._uses[item] = following
        heapq.heappush(self._latest, (-following, item))
        while self.used > self.capacity:
            use, victim = heapq.heappop(self._latest)
            if self._uses.get(victim) == -use:
                self.used -= self._sizes.pop(victim)
                del self._uses[victim]
        return hit


NAMES = ("minio", "lru", "kernel", "optimal")
_SIMPLE: dict[str, Callable[[int], Policy]] = {"minio": NeverEvict, "lru": LRU, "kernel": TwoLists}


def make(name: str, capacity: int, trace: Sequence[Item], disk: int = 0) -> Policy:
    """The policy called `name` (one of NAMES); `trace` is all that it will be asked for.

    `disk`: the size of a second tier, which only minio has.
    """
    if disk:
        return TwoTiers(capacity, disk)
    return Optimal(capacity, trace) if name == "optimal" else _SIMPLE[name](capacity)
