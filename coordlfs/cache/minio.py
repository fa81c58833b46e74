"""MinIO: the policy of a cache that never evicts (Mohan et al., VLDB 2021, section 4.1).

Training reads every item once an epoch. An item can hit only if it was cached before the epoch began, so no policy
has more hits than its capacity holds, and keeping whatever came first has exactly as many: each epoch reads D − C
bytes. Which items they are makes no difference. No I/O here; amounts are pages.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """How an item stands with the cache."""

    ABSENT = "absent"
    ADMITTED = "admitted"  # its room is taken, its pages are not yet pinned
    PINNED = "pinned"


class MinIO:
    """Which items are in the cache. Not thread-safe.

    >>> cache = MinIO(capacity=3)
    >>> cache.admit(1, 2), cache.admit(2, 2), cache.admit(3, 1)
    (True, False, True)
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0  # pages of items admitted or pinned
        self.pinned_pages = 0
        self.taken: dict[int, int] = {}  # pages of each item that is not absent
        self._holder: dict[int, int] = {}

    def __len__(self) -> int:
        """How many items are pinned."""
        return len(self._holder)

    def state(self, item: int) -> State:
        """How `item` stands."""
        if item in self._holder:
            return State.PINNED
        return State.ADMITTED if item in self.taken else State.ABSENT

    def admit(self, item: int, pages: int, *, is_held: bool = False) -> bool:
        """Take room for an item that is absent; False if there is too little, and then nothing changes.

        `is_held`: it is in memory as it is, be there room or not.
        """
        if pages <= 0 or item in self.taken or (self.used + pages > self.capacity and not is_held):
            return False
        self.taken[item] = pages
        self.used += pages
        return True

    def pin(self, item: int, holder: int) -> None:
        """An admitted item is now held in memory by `holder`."""
        if item not in self.taken or item in self._holder:
            raise ValueError(f"item {item:#x} is {self.state(item).value}, not admitted")
        self._holder[item] = holder
        self.pinned_pages += self.taken[item]

    def unpin(self, item: int) -> int:
        """A pinned item is held no longer, but keeps its room; the pages."""
        del self._holder[item]
        self.pinned_pages -= self.taken[item]
        return self.taken[item]

    def release(self, item: int) -> int:
        """Give the room of an item back, however it stands; the pages of it that were pinned."""
        pages = self.taken.pop(item, 0)
        self.used -= pages
        if self._holder.pop(item, None) is None:
            return 0
        self.pinned_pages -= pages
        return pages

    def holder(self, item: int) -> int | None:
        """Who holds a pinned item."""
        return self._holder.get(item)

    def pages(self, item: int) -> int:
        """The room that an item takes; 0 if it is absent."""
        return self.taken.get(item, 0)

    def held_by(self, holder: int) -> list[int]:
        """The items that `holder` holds."""
        return [item for item, who in self._holder.items() if who == holder]

    def items(self) -> list[int]:
        """Every item that is not absent."""
        return list(self.taken)
