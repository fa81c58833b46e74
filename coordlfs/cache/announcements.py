"""What readers announce (`coordlfs.cache.hints`), in terms of the catalogue: which files, what they cost, whose epoch.

The mount's epochs follow the job that leads. Reads nothing ahead itself: `coordlfs.cache.fetch_ahead` does.
"""

from __future__ import annotations

from collections.abc import Collection

import xxhash

from coordlfs.cache import items
from coordlfs.cache.accounting import unpinned
from coordlfs.cache.epochs import Epochs
from coordlfs.cache.hints import Hint, Job, Orders, Reader
from coordlfs.cache.minio import MinIO
from coordlfs.catalogue.catalog import REGULAR, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import pages

_LOOKS = 20  # for a leader, before a server that takes over no longer expects the job that led


class Announcements:
    """The orders of all readers of a mount. Not thread-safe: the lock of admission is held."""

    def __init__(self, catalog: Catalog, policy: MinIO, epochs: Epochs, counters: Counters) -> None:
        self._catalog = catalog
        self._policy = policy
        self._epochs = epochs
        self._counters = counters
        self.orders = Orders(self._find, self._cost, self._was_missed)
        self._leader: Job | None = None  # the job whose epoch is the mount's
        # How often to look yet for a job that led before this server began. What is read before it has said so again,
        # as by a keeper, starts no epoch.
        self._expected = _LOOKS if counters["told_epoch"] else 0
        epochs.told = self._expected > 0

    @property
    def wanted(self) -> Collection[int]:
        """The records of the files that some reader announced."""
        return self.orders.wanted

    def take(self, hint: Hint, uid: int, pid: int, now: float) -> Reader:
        """A reader of user `uid`, of process `pid`, or 0 if its end will not be known, announces what it will read.

        Raises HintError.
        """
        reader = self.orders.take(hint, uid, pid, now)
        self._follow(reader.job)
        return reader

    def missed(self, record: int, nbytes: int) -> None:
        """So much of a file was read from the source."""
        if record in self.orders.wanted:
            self.orders.missed(record, nbytes)
            self._note()

    def fetched(self, record: int) -> None:
        """A keeper has read an item of a file into memory, or found it there."""
        self.orders.fetched(record)

    def look_for_leader(self) -> None:
        """Where the job that led is gone, nobody says any more when an epoch begins."""
        if self._leader is not None and self._leader not in self.orders.jobs.values():
            self._leader, self._epochs.told = None, False
        if self._expected:
            self._expected -= 1
            self._epochs.told = self._expected > 0

    def _find(self, number: int) -> tuple[int, int, int] | None:
        record = self._catalog.find(number) if number >> 63 == 0 else None
        if record is None or not self._catalog.flags(record) & REGULAR:
            return None
        size = self._catalog.size(record)
        return record, size, 1 if 0 < size <= items.CHUNK else len(items.items_of(record, size))

    def _cost(self, record: int) -> int:
        unpinned = pages.count(self._catalog.size(record)) - self._catalog.pinned_pages(record)
        return unpinned * pages.PAGE if unpinned > 0 else 0

    def _was_missed(self, job: Job, record: int) -> bool:
        current = self._epochs.current.number
        return job is self._leader and job.begun and self._catalog.last_miss(record)[0] == current

    def _follow(self, job: Job) -> None:
        """Have the mount's epochs follow the job that leads."""
        if job is not self.orders.leader:
            job.begun = True
            return
        if not job.begun:
            job.begun = True
            self._leader = job
            mark = xxhash.xxh3_64_intdigest(f"{job.uid} {job.name} {job.epoch}".encode()) or 1
            # A server that was started anew meanwhile goes on with the epoch that runs.
            goes_on = self._counters["told_epoch"] == mark and (self._expected or not self._epochs.told)
            self._epochs.told, self._expected = True, 0
            if not goes_on:
                self._epochs.advance(unpinned(self._counters, self._policy))
                self._counters.set("epochs_before", self._epochs.current.number)
            self._counters.set("told_epoch", mark)
        self._note()

    def _note(self) -> None:
        if self._leader is not None:
            self._epochs.current.told_items = self._leader.items
            self._epochs.current.told_bytes = self._leader.bytes
