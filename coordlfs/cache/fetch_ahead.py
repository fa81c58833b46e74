"""Fetching ahead: what readers announce (`coordlfs.cache.hints`) is read before they ask for it, and let go after use.

A keeper does it, an ordinary client of the mount, so that the pages are charged to the mount's memory cgroup and not to
a job's. What MinIO has room for is admitted and stays; of the rest no more than a bound is held, a share of the memory
that is available, half of it ahead of the readers and half behind. Pinned items are never touched. Everything happens
with the lock of `Admission` held.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from typing import Any

import trio
import xxhash

from coordlfs.cache import hints, items
from coordlfs.cache.admission import Admission
from coordlfs.cache.epochs import Epochs
from coordlfs.cache.hints import HintError, Job, Orders
from coordlfs.cache.memory_watch import MemoryWatch
from coordlfs.catalogue.catalog import REGULAR, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import pages, process

log = logging.getLogger(__name__)

_SHARE = 8  # of the memory that can be spared, one part
_ITEMS_AHEAD = 4096  # of one file
_MOST = 8 << 30  # bytes
_INTERVAL = 0.5  # seconds
PROTOCOL = b'{"version": 1, "numbers": %d, "ahead": %d}' % (hints.MOST_NUMBERS, hints.AHEAD)


class FetchAhead:
    """Serves the hints of one mount."""

    def __init__(
        self, catalog: Catalog, admission: Admission, epochs: Epochs, counters: Counters, memory: MemoryWatch
    ) -> None:
        self._catalog = catalog
        self._admission = admission
        self._epochs = epochs
        self._counters = counters
        self._memory = memory
        self.orders = Orders(self._find, self._cost, self._was_missed)
        self._told: Job | None = None  # the job whose epoch is the mount's
        self._processes: dict[int, int] = {}  # of readers: thread that spoke → pidfd
        self._lock = admission.lock

    @property
    def bound(self) -> int:
        """Bytes that may be held for readers, on top of what is pinned."""
        return min(_MOST, self._memory.spare // _SHARE)

    # -- called by the data loop --------------------------------------------------------------------------------

    def take(self, message: bytes | memoryview, uid: int, pid: int, now: float) -> None:
        """A message of user `uid` from thread `pid`. Raises HintError; what was wrong is in the log."""
        try:
            hint = hints.parse(message)
            with self._lock:
                job = self.orders.take(hint, uid, self._known(pid), now)
                self._tell(job)
                self._step()
        except HintError as e:
            log.warning("a hint of process %d, user %d, is refused: %s", pid, uid, e.strerror)
            raise
        self._counters.add("hints")

    def missed(self, record: int, nbytes: int) -> None:
        """So much of a file was read from the source."""
        if self.wants(record):
            self.orders.missed(record, nbytes)
            self._note()

    def wants(self, record: int) -> bool:
        """Whether a reader announced the file."""
        return record in self.orders.wanted

    def go_on(self) -> None:
        """A keeper answered: it may have time for more."""
        if self.orders.readers or self.orders.free:
            self._step()

    # -- a task of the server -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look every so often who is gone, until cancelled."""
        while True:
            await trio.sleep(_INTERVAL)
            with self._lock:
                if not self.orders.readers and not self.orders.free:
                    continue
                self.orders.leave(time.monotonic(), self._has_ended)
                self._forget_processes()
                if self._told is not None and self._told not in self.orders.jobs.values():
                    self._told, self._epochs.told = None, False
                self._step()

    def figures(self) -> dict[str, Any]:
        """For `status`."""
        with self._lock:
            return {
                "messages": self._counters["hints"],
                "ignored_numbers": self.orders.ignored,
                "held_bytes": self.orders.held_bytes,
                "bound_bytes": self.bound,
                "fetched_items": self._counters["fetched_items"],
                "jobs": self.orders.figures(),
            }

    # -- inside; all with the lock held -------------------------------------------------------------------------

    def _find(self, number: int) -> tuple[int, int, int] | None:
        record = self._catalog.find(number) if number >> 63 == 0 else None
        if record is None or not self._catalog.flags(record) & REGULAR:
            return None
        size = self._catalog.size(record)
        return record, size, len(items.items_of(record, size))

    def _cost(self, record: int) -> int:
        size = self._catalog.size(record)
        return max(0, pages.count(size) - self._catalog.pinned_pages(record)) * pages.PAGE

    def _was_missed(self, job: Job, record: int) -> bool:
        current = self._epochs.current.number
        return job is self._told and job.begun and self._catalog.last_miss(record)[0] == current

    def _tell(self, job: Job) -> None:
        """Have the mount's epochs follow the job that leads."""
        if job is not self.orders.leader:
            job.begun = True
            return
        if not job.begun:
            job.begun = True
            self._told = job
            mark = xxhash.xxh3_64_intdigest(f"{job.uid} {job.name} {job.epoch}".encode()) or 1
            # A server that was started anew meanwhile goes on with the epoch that runs.
            goes_on = self._counters["told_epoch"] == mark and not self._epochs.told
            self._epochs.told = True
            if not goes_on:
                self._epochs.advance(self._admission.unpinned())
                self._counters.set("epochs_before", self._epochs.current.number)
            self._counters.set("told_epoch", mark)
        self._note()

    def _note(self) -> None:
        if self._told is not None:
            self._epochs.current.told_items = self._told.items
            self._epochs.current.told_bytes = self._told.bytes

    def _step(self) -> None:
        """Give the keepers what they have time for."""
        bound = self.bound
        while not self._admission.is_busy():
            # Not before a keeper has time for it: what is wanted again by then stays.
            record = next(self.orders.trim(bound), None)
            if record is not None:
                self._release(record)
                continue
            entry = self.orders.next(bound)
            if entry is None:
                self._admission.flush()  # no more comes for which others would wait
                return
            size = self._catalog.size(entry.record)
            for item in items.items_of(entry.record, size)[:_ITEMS_AHEAD]:
                if self._admission.is_absent(item) and not self._admission.admit([item]):
                    self._counters.add("fetched_items")
                    self._admission.fetch(item)

    def _release(self, record: int) -> None:
        for item in items.items_of(record, self._catalog.size(record))[:_ITEMS_AHEAD]:
            if self._admission.is_absent(item):
                self._admission.release(item)

    # -- processes of readers -----------------------------------------------------------------------------------

    def _known(self, pid: int) -> int:
        """`pid` if it will be known when it ends, else 0."""
        if pid and pid not in self._processes and len(self._processes) < hints.READERS:
            with suppress(OSError):
                self._processes[pid] = process.open_of_thread(pid)
        return pid if pid in self._processes else 0

    def _has_ended(self, pid: int) -> bool:
        return process.has_ended(self._processes[pid])

    def _forget_processes(self) -> None:
        live = {reader.pid for reader in self.orders.readers.values()}
        for pid in [pid for pid in self._processes if pid not in live]:
            os.close(self._processes.pop(pid))
