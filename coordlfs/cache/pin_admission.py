"""Admission where a directory is pinned without a mount: nobody says what is read, and no READ waits for an answer.

    absent ── MinIO has room, and its turn has come ──> asked (a keeper has it read) ──> pinned
           ── a job has read it, and it is resident ──> asked (a keeper pins it as it is, or leaves it) ──> pinned

Whose pages are there already is found by the keepers, as `owned_pages` says. The kernel cannot be made to take pages
out of a job's mappings: what a job maps is asked for again a few times, and then left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from coordlfs.cache import items
from coordlfs.cache.admission import Admission
from coordlfs.cache.epochs import Epochs
from coordlfs.cache.interfaces import Announced
from coordlfs.cache.keeper_protocol import How
from coordlfs.cache.minio import MinIO
from coordlfs.cache.pending import Pending
from coordlfs.cache.stash import Stash
from coordlfs.catalogue.catalog import RENUMBERED, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import pages


class _NoReads:
    """There are no READs to be waited for, and nothing that the kernel could be told."""

    def is_awaited(self, node: int, offset: int) -> bool:
        """Nobody waits."""
        return False

    def drop_pages(self, node: int, offset: int, length: int, then: Callable[[], None]) -> bool:
        """It cannot be done."""
        return False


class PinAdmission(Admission):
    """Which items of a directory are pinned, and which are on their way there."""

    _how = How.OWN

    def __init__(
        self,
        catalog: Catalog,
        policy: MinIO,
        epochs: Epochs,
        counters: Counters,
        more_keepers: Callable[[], None],
        *,
        announced: Announced,
        has_inodes: Callable[[int], bool],
    ) -> None:
        """`has_inodes`: whether the inode number of a record's file says which file it is."""
        nobody = _NoReads()
        super().__init__(
            *(catalog, policy, Stash(0), epochs, counters, more_keepers),
            announced=announced,
            awaited=nobody,
            invalidator=nobody,
        )
        self._has_inodes = has_inodes

    def _inode(self, record: int) -> int:
        if self.catalog.flags(record) & RENUMBERED or not self._has_inodes(record):
            return 0
        return self.catalog.version(record).inode

    def ask_for(self, wanted: Iterable[int], how: How | None = None) -> None:
        """Have items pinned for which there is room, in this order; `how`: which of them are left as they are.

        RESIDENT: what is not wholly in memory, or another's; SPARE: what is another's.
        """
        with self.lock:
            for item in wanted:
                size = self.catalog.size(items.record_of(item))
                room = pages.count(items.length(item, size))
                if item not in self.dropping and self._admits(item, room):
                    pending = self._pending.by_item.setdefault(item, Pending(flags=how or 0))
                    self._ask(item, pending)

    def _force(self, item: int, pending: Pending) -> None:
        self._ask_keeper(item, pending, 0)
