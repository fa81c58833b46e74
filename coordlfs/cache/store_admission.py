"""Admission where the cache is private memory: an item is cached as soon as all of its bytes have been read.

    absent ── a READ misses, MinIO has room ──> on its way (its bytes go to the memory where they are to stay)
           ── all of it read; or idle a while, and a keeper reads the rest ──> in the cache

A keeper reads through the mount, so that its READs come here like a job's; where pages are resident that did not come
here, as those of a file that had no room then, around the page cache (O_DIRECT). The pages that READs leave in the page
cache are ordinary ones: the kernel may keep or drop them.
"""

from __future__ import annotations

import socket

from coordlfs.cache import items
from coordlfs.cache.admission import IDLE, Admission
from coordlfs.cache.keeper_protocol import How, Outcome, Verb
from coordlfs.cache.keepers import Link
from coordlfs.cache.pending import Pending
from coordlfs.cache.store import Store
from coordlfs.catalogue.catalog import SUPERSEDED
from coordlfs.kernel import pages

_HOLDER = 0  # no keeper: they are counted from 1
_ADDED = 0.5  # seconds in which what was read is surely added
_SENTINELS = 15  # files that a keeper is asked to watch for being opened


class StoreAdmission(Admission):
    """Admission, and the cache itself."""

    served_from = "memory_bytes"
    hits_ask_nobody = False
    stash: Store  # what is cached, and not only on its way there
    _verb = Verb.FILL
    _watched = 0  # files, by a keeper

    def stashed(self, item: int, offset: int, size: int, end: int, pid: int) -> list[memoryview | int]:
        """What of an item need not be read, see `Store.parts`. Takes no lock."""
        return self.stash.parts(item, offset, size)

    def _missed_though_pinned(self, item: int) -> None:
        if not self.stash.is_current(item):
            self.drop([item])  # else it came to be cached while this READ was at the source

    def _take(self, item: int, offset: int, data: memoryview, file_size: int, pid: int, *, for_peer: bool) -> None:
        if item not in self._pending.by_item:
            length = items.length(item, file_size)
            if not length or not self._admits(item, pages.count(length)):
                return
            if not self.stash.reserve(item, length):
                self.policy.release(item)
                self.counters.add("not_admitted")
                return
            self._pending.by_item[item] = Pending(missed=not for_peer)
        self._add(item, offset, data)

    def _add(self, item: int, offset: int, data: memoryview) -> None:
        pending = self._pending.by_item[item]
        pending.awaited = 0
        self.stash.put(item, offset, data)
        if self.stash.is_whole(item):
            del self._pending.by_item[item]
            self._pinned(_HOLDER, item)
            self._watch(item)
        elif pending.keeper is None and not pending.attempts:
            self._later(item, IDLE)

    def _ask(self, item: int, pending: Pending) -> None:
        pending.due = None
        is_announced = items.record_of(item) in self.announced.wanted
        flags = How.FORCE if pending.attempts else How.KEEP if is_announced else 0
        self._ask_keeper(item, pending, flags)

    def add_keeper(self, index: int, pid: int, sock: socket.socket) -> None:
        """A keeper joins, which may have nothing to watch yet."""
        super().add_keeper(index, pid, sock)
        with self.lock:
            self._watched = 0
            for item in self.policy.items()[:_SENTINELS]:
                if self.stash.is_whole(item):
                    self._watch(item)

    def _watch(self, item: int) -> None:
        """Have some of the first files watched, from which epochs are told where nothing misses."""
        link = self._keepers.first()
        record = items.record_of(item)
        if link is not None and self._watched < _SENTINELS and self.catalog.size(record) <= items.CHUNK:
            self._watched += 1
            self._keepers.ask(link, Verb.WATCH, item)

    def _answered(self, link: Link, outcome: Outcome, code: int, item: int) -> None:
        pending = self._pending.by_item.get(item)
        if outcome is Outcome.FILLED and pending is not None and not pending.cancelled and not pending.attempts:
            # What it read last may be about to be added: a thread answers the kernel first.
            pending.keeper = None
            pending.attempts = 1
            self._later(item, _ADDED)
        else:
            super()._answered(link, outcome, code, item)

    def recover(self) -> None:
        """Take over what the last server cached."""
        with self.lock:
            self.catalog.clear_pinned_pages()
            for item in self.stash.recover(self._length):
                is_past = self.catalog.flags(items.record_of(item)) & SUPERSEDED
                if not is_past and self.policy.admit(item, pages.count(self._length(item))):
                    self._pinned(_HOLDER, item)
                else:
                    self.stash.remove(item)
            for link in self._keepers.links.values():
                self._keepers.ask(link, Verb.LIST)  # its threads
            if not self._keepers.links:  # it died with the last server, and is being replaced
                self._keepers.expect()

    def _length(self, item: int) -> int:
        record = items.record_of(item)
        return items.length(item, self.catalog.size(record)) if record < len(self.catalog) else 0
