"""Fetching ahead: what readers announce (`coordlfs.cache.hints`) is read before they ask for it, and let go after use.

A keeper does it, an ordinary client of the mount, so that the pages are charged to the mount's memory cgroup and not to
a job's. What MinIO has room for is admitted and stays; of the rest no more than a bound is held, a share of the memory
that is available, half of it ahead of the readers and half behind. Pinned items are never touched. Everything happens
with the lock of `Admission` held. It does not know how hints arrive: `take` is given them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import trio

from coordlfs.cache import hints, items
from coordlfs.cache.admission import Admission
from coordlfs.cache.announcements import Announcements
from coordlfs.cache.hints import Hint, HintError
from coordlfs.cache.memory_watch import MemoryWatch
from coordlfs.catalogue.catalog import Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import pages, process

log = logging.getLogger(__name__)
M = TypeVar("M")

_SHARE = 8  # of the memory that can be spared, one part
_ITEMS_AHEAD = 4096  # of one file
_MOST = 8 << 30  # bytes
_INTERVAL = 0.5  # seconds
PROTOCOL = b'{"version": %d, "numbers": %d, "ahead": %d, "numbers_in_name": %d}' % (
    *(hints.VERSION, hints.MOST_NUMBERS, hints.AHEAD, hints.MOST_IN_NAME),
)


class FetchAhead:
    """Serves the hints of one mount.

    `expect` is told of files that will be read soon, before a keeper has time for them.
    """

    def __init__(
        self,
        catalog: Catalog,
        admission: Admission,
        announcements: Announcements,
        counters: Counters,
        memory: MemoryWatch,
        expect: Callable[[int], None] | None = None,
    ) -> None:
        self._catalog = catalog
        self._admission = admission
        self._announcements = announcements
        self._orders = announcements.orders
        self._counters = counters
        self._memory = memory
        self._processes: dict[int, int] = {}  # of readers: thread that spoke → pidfd
        self._expect = expect
        self._lock = admission.lock

    @property
    def bound(self) -> int:
        """Bytes that may be held for readers, on top of what is pinned."""
        return min(_MOST, self._memory.spare // _SHARE)

    # -- called by the data loop --------------------------------------------------------------------------------

    def take(self, parse: Callable[[M], Hint], message: M, uid: int, pid: int, now: float) -> bytes:
        """A hint of user `uid` from thread `pid`. Raises HintError; what was wrong is in the log.

        What the reader is told: how many files it asked for, how many it announced beyond them, and may beyond those.
        """
        try:
            hint = parse(message)
            with self._lock:
                reader = self._announcements.take(hint, uid, self._known(pid), now)
                self._step()
        except HintError as e:
            log.warning("a hint of process %d, user %d, is refused: %s", pid, uid, e.strerror)
            raise
        self._counters.add("hints")
        return b"%d %d %d" % (reader.position, reader.announced, hints.AHEAD - reader.announced)

    def ask(self, record: int, uid: int, now: float) -> bytes:
        """User `uid` will read one file soon; how it stands with it."""
        with self._lock:
            if self._is_pinned(record):
                return b"pinned"
            entry = self._orders.ask(self._catalog.node(record), uid, now, self.bound)
            if entry is None:
                return b"no room"
            self._step()
            wanted = items.items_of(record, entry.size)[:_ITEMS_AHEAD]
            absent = sum(map(self._admission.is_absent, wanted))
            is_read = entry.fetched >= absent or (entry.held and entry.read >= entry.size)
            is_here = is_read and not any(map(self._admission.is_pending, wanted))
        self._counters.add("hints")
        return b"cached" if is_here else b"on its way"

    def _is_pinned(self, record: int) -> bool:
        return self._catalog.pinned_pages(record) >= pages.count(self._catalog.size(record))

    def receive(self) -> None:
        """Take what the keepers have said, as `Admission.receive`: they may have time for more."""
        if self._admission.receive() and (self._orders.readers or self._orders.free):
            with self._lock:
                self._step()

    # -- a task of the server -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look every so often who is gone, until cancelled."""
        while True:
            await trio.sleep(_INTERVAL)
            with self._lock:
                is_of_use = bool(self._orders.readers or self._orders.free)
                if is_of_use:
                    self._orders.leave(time.monotonic(), self._has_ended)
                    self._forget_processes()
                self._announcements.look_for_leader()
                if is_of_use:
                    self._step()

    def figures(self) -> dict[str, Any]:
        """For `status`."""
        with self._lock:
            return {
                "messages": self._counters["hints"],
                "ignored_numbers": self._orders.ignored,
                "held_bytes": self._orders.held_bytes,
                "bound_bytes": self.bound,
                "fetched_items": self._counters["fetched_items"],
                "jobs": self._orders.figures(),
            }

    # -- inside; all with the lock held -------------------------------------------------------------------------

    def _step(self) -> None:
        """Give the keepers what they have time for, and tell a source that takes its time what follows."""
        self._feed_keepers()
        if self._expect is not None:
            for entry in self._orders.upcoming():
                if self._admission.is_absent(items.item_at(entry.record, 0)):
                    self._expect(entry.record)

    def _feed_keepers(self) -> None:
        bound = self.bound
        while not self._admission.is_busy():
            # Not before a keeper has time for it: what is wanted again by then stays.
            record = next(self._orders.trim(bound), None)
            if record is not None:
                self._release(record)
                continue
            entry = self._orders.next(bound)
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
        live = {reader.pid for reader in self._orders.readers.values()}
        for pid in [pid for pid in self._processes if pid not in live]:
            os.close(self._processes.pop(pid))
