"""The account of epochs: which READs were misses, of how large a dataset, and what is read of it in each epoch.

A file counts as part of the dataset from its first read on. Knows nothing of how items come to be pinned.
"""

from __future__ import annotations

from coordlfs.cache import items
from coordlfs.cache.epochs import Epochs
from coordlfs.cache.interfaces import Announced
from coordlfs.cache.minio import MinIO
from coordlfs.catalogue.catalog import Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import pages

_UNKNOWN, _NEVER_MISSED = (0, 0), (0, 0xFFFFFFFF)  # instead of the epoch and page of a last miss


def unpinned(counters: Counters, policy: MinIO) -> int:
    """Bytes that were ever read and are not pinned: what an epoch that begins now will read."""
    return max(0, counters["dataset_bytes"] - policy.pinned_pages * pages.PAGE)


class Accounts:
    """Misses, by epoch. Not thread-safe: the lock of admission is held."""

    def __init__(
        self, catalog: Catalog, policy: MinIO, epochs: Epochs, counters: Counters, announced: Announced
    ) -> None:
        self.epochs = epochs
        self._catalog = catalog
        self._policy = policy
        self._counters = counters
        self._announced = announced
        self._chunk_misses: dict[int, tuple[int, int]] = {}  # of files of several items

    def miss(self, item: int, offset: int, nbytes: int, file_size: int) -> bool:
        """Count a READ at `offset` that had `nbytes` from the source, 0 if another node gave them.

        False if it continues a miss of the item that is known.
        """
        record = items.record_of(item)
        of_file = self.know(record, file_size)
        self._announced.missed(record, nbytes)
        whole = file_size <= items.CHUNK
        last = of_file if whole else self._chunk_misses.get(item, _NEVER_MISSED)
        remember = self.epochs.miss(last, offset // pages.PAGE, nbytes, self.unpinned)
        if remember is None:
            return False
        if nbytes and of_file[0] != remember[0]:
            self._counters.add("source_files")
        if not whole:
            self._chunk_misses[item] = remember
        self._catalog.set_last_miss(record, *remember)  # of a large file: when any of it missed
        return True

    def continue_miss(self, nbytes: int) -> None:
        """A keeper, or the disk tier, had `nbytes` from the source: the rest of what a reader began with."""
        self.epochs.current.bytes += nbytes

    def given_by_peer(self, nbytes: int) -> None:
        """A reader had `nbytes` from another node."""
        self.epochs.current.peer_bytes += nbytes

    def given_by_disk(self, nbytes: int, *, is_new: bool) -> None:
        """A reader had `nbytes` from this node's disk, the first of an item in this epoch if it `is_new`."""
        self.epochs.current.disk_bytes += nbytes
        self.epochs.current.disk_items += is_new

    def know(self, record: int, file_size: int) -> tuple[int, int]:
        """Count a file as part of the dataset, unless it is; epoch and page of its last miss."""
        last = self._catalog.last_miss(record)
        if last != _UNKNOWN:
            return last
        self._catalog.set_last_miss(record, *_NEVER_MISSED)
        self._count_file(record, file_size, 1)
        return _NEVER_MISSED

    def forget(self, record: int, file_size: int) -> None:
        """Count a file no longer as part of the dataset."""
        if self._catalog.last_miss(record) != _UNKNOWN:
            self._catalog.set_last_miss(record, *_UNKNOWN)
            self._count_file(record, file_size, -1)

    def _count_file(self, record: int, file_size: int, sign: int) -> None:
        self._counters.add("dataset_items", sign * len(items.items_of(record, file_size)))
        self._counters.add("dataset_bytes", sign * file_size)

    def unpinned(self) -> int:
        """See the function."""
        return unpinned(self._counters, self._policy)
