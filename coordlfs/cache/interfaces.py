"""What the cache asks of others, as they must offer it. They import the cache; it must not import them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol


class Owners(Protocol):
    """Which items are for this node to cache, where several nodes share their caches."""

    def owns(self, item: int) -> bool:
        """Whether this node caches an item."""

    def displaced(self, npages: int) -> list[int]:
        """Items of other nodes that are pinned here and may be dropped for `npages` pages of this node's own."""


class Announced(Protocol):
    """What readers said they will ask for."""

    @property
    def wanted(self) -> Collection[int]:
        """The records of the files that some reader announced."""

    def missed(self, record: int, nbytes: int) -> None:
        """`nbytes` of a file were read from the source."""

    def fetched(self, record: int) -> None:
        """A keeper has read an item of a file into memory, or found it there."""


class Awaited(Protocol):
    """Which READs of jobs are at the source."""

    def is_awaited(self, node: int, offset: int) -> bool:
        """Whether somebody waits for the source's bytes of a chunk of a file, but for a keeper."""


class Disk(Protocol):
    """A second tier, on a local disk."""

    def pinned(self, item: int) -> None:
        """An item is in memory now."""

    def release(self, record: int, size: int) -> None:
        """A file of `size` bytes is another one by now, or gone."""


class Invalidator(Protocol):
    """Has the kernel forget."""

    def drop_pages(self, node: int, offset: int, length: int, then: Callable[[], None]) -> bool:
        """Have a file's pages dropped even where jobs map them, and `then` called, be it much later.

        False if that cannot be done now.
        """
