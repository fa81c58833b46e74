"""Memory and disk as one cache that never evicts: what is kept on the disk, and which copies give way there.

A steady epoch reads D − memory − disk bytes of the source, whichever items are where, as long as no item has room in
both tiers that an item without any would need. So what is read from the source is kept on the disk while that has room,
in memory or not: a reboot then costs nothing. When it has none, copies of what memory holds give way to what memory
does not hold. What leaves memory moves nothing on the disk. No I/O here.

Nothing is kept here for an item that is on the disk only: there may be many millions.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

from coordlfs.cache.minio import State

_MOST = 256  # copies that give way for one block: of pages that are scattered, more would not do either

Block = TypeVar("Block", contravariant=True)


class Memory(Protocol):
    """How an item stands with memory: as `MinIO` tells."""

    def state(self, item: int) -> State:
        """Absent, on its way, or pinned."""


class Disk(Protocol[Block]):
    """The store on the disk."""

    def take(self, block: Block) -> int | None:
        """Take room for a block, and say which; None if there is none."""

    def remove_item(self, item: int) -> int:
        """Give back the room of all that is there of an item; its bytes, 0 if there is nothing."""


class Tiers(Generic[Block]):
    """Decides about the disk. For one thread, but for `pinned`."""

    def __init__(self, memory: Memory, disk: Disk[Block]) -> None:
        self._memory = memory
        self._disk = disk
        self._both: deque[int] = deque()  # items that are pinned and on the disk; or were, when they were noted
        self.gave_way = 0  # bytes of copies

    def pinned(self, item: int) -> None:
        """An item is in memory now, and may be on the disk, too."""
        self._both.append(item)

    def stored(self, item: int) -> None:
        """Something of an item is on the disk now, and the item may be in memory, too."""
        if self._memory.state(item) is State.PINNED:
            self._both.append(item)

    @property
    def is_settled(self) -> bool:
        """Whether there is no copy that may give way."""
        return not self._both

    def place(self, item: int, block: Block) -> int | None:
        """Take room for a block of an item that was read from the source; None if it is not to be kept."""
        for _ in range(_MOST):
            if (place := self._disk.take(block)) is not None:
                return place
            if self._memory.state(item) is not State.ABSENT or not self._give_way():
                return None
        return None

    def _give_way(self) -> bool:
        """Give back the room that a copy takes; False if there is none."""
        while self._both:
            item = self._both.popleft()
            if self._memory.state(item) is State.PINNED and (freed := self._disk.remove_item(item)):
                self.gave_way += freed
                return True
        return False
