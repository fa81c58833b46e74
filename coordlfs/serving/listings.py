"""Directories that are being listed: READDIRPLUS, which asks for the next entries, and of each its attributes.

The kernel keeps a listing, so each directory is listed once. What makes up the reply is `entries.pyx`. Positions mean
the same to all who read a directory at a time, though it may change meanwhile: what was there all along is given once.
It does not know how a request arrives.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from coordlfs.serving.entries import Entries
from coordlfs.serving.namespace import Namespace
from coordlfs.sources.contract import Listing

_LISTINGS = 64  # directories; those that are listed to their end are forgotten sooner
_FEW = 1000  # names that do not matter
_LONGEST = 600.0  # seconds that a reader takes; who has not come to the end by then has given up


@dataclass(slots=True)
class _Listed:
    """A directory that readers are in the middle of."""

    listing: Listing
    since: float  # the last of them began
    readers: int = 1

    def has_grown(self, fresh: Listing) -> bool:
        """Whether it is mostly names that are gone."""
        return len(self.listing.names) > _FEW + 2 * len(fresh.names)


class Listings:
    """The names of directories while the kernel asks for them. Thread-safe."""

    def __init__(self, namespace: Namespace, entries: Entries) -> None:
        self._namespace = namespace
        self._entries = entries
        self._listed: OrderedDict[int, _Listed] = OrderedDict()  # by node, the last used last
        self._lock = threading.Lock()

    def pack(self, node: int, position: int, into: memoryview) -> int:
        """Write entries of a directory from `position` on; the bytes that they take, 0 at the end. Raises OSError."""
        record = self._namespace.record_of(node)
        listing = self._going_on(node) if position else None
        if listing is None:
            listing = self._begin(node, self._namespace.listing(record))
        n = self._entries.pack(listing, record, position, into)
        if not n:
            self._end(node)
        return n

    def _going_on(self, node: int) -> Listing | None:
        with self._lock:
            listed = self._listed.get(node)
            if listed is None:
                return None
            self._listed.move_to_end(node)
            return listed.listing

    def _begin(self, node: int, listing: Listing) -> Listing:
        """Another reader begins. What others are in the middle of keeps its positions: new names come last."""
        forgotten: object = None  # until the lock is free: to close a directory may take its time
        now = time.monotonic()
        with self._lock:
            listed = self._listed.pop(node, None)
            if listed is None or now - listed.since > _LONGEST or listed.has_grown(listing):
                forgotten, listed = listed, _Listed(listing, now)
            else:
                forgotten = listed.listing
                listing.keep_positions(listed.listing)
                listed.listing, listed.since = listing, now
                listed.readers += 1
            self._listed[node] = listed
            if len(self._listed) > _LISTINGS:
                forgotten = forgotten, self._listed.popitem(last=False)
        del forgotten
        return listing

    def _end(self, node: int) -> None:
        """A reader has come to the end; the last one has the listing forgotten."""
        forgotten = None
        with self._lock:
            listed = self._listed.get(node)
            if listed is not None:
                listed.readers -= 1
                if listed.readers <= 0:
                    forgotten = self._listed.pop(node)
        del forgotten
