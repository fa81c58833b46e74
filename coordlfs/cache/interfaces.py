"""What the cache asks of others, as they must offer it. They import the cache; it must not import them."""

from __future__ import annotations

from typing import Protocol


class Owners(Protocol):
    """Which items are for this node to cache, where several nodes share their caches."""

    def owns(self, item: int) -> bool:
        """Whether this node caches an item."""

    def displaced(self, npages: int) -> list[int]:
        """Items of other nodes that are pinned here and may be dropped for `npages` pages of this node's own."""


class Announced(Protocol):
    """What readers said they will ask for."""

    def wants(self, record: int) -> bool:
        """Whether a reader announced the file."""

    def missed(self, record: int, nbytes: int) -> None:
        """`nbytes` of a file were read from the source."""

    def go_on(self) -> None:
        """A keeper answered: it may have time for more."""
