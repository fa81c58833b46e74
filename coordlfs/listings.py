"""Directories that are being listed: READDIRPLUS, which asks for the next entries, and of each its attributes.

The kernel keeps a listing, so each directory is listed once. What makes up the reply is `entries.pyx`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from coordlfs.entries import Entries
from coordlfs.namespace import Namespace
from coordlfs.source import Listing, Source

_LISTINGS = 64


class Listings:
    """The names of directories while the kernel asks for them. Thread-safe."""

    def __init__(self, source: Source, namespace: Namespace, entries: Entries) -> None:
        self._source = source
        self._namespace = namespace
        self._entries = entries
        self._listings: OrderedDict[int, Listing] = OrderedDict()  # by node, the last used last
        self._lock = threading.Lock()

    def pack(self, node: int, position: int, into: memoryview) -> int:
        """Write entries of a directory from `position` on; the bytes that they take, 0 at the end. Raises OSError."""
        record = self._namespace.record_of(node)
        listing = self._listing(node, record, position)
        n = self._entries.pack(listing, record, position, into)
        if not n:
            with self._lock:
                self._listings.pop(node, None)
        return n

    def _listing(self, node: int, record: int, position: int) -> Listing:
        with self._lock:
            listing = self._listings.get(node)
            if listing is not None and position:
                self._listings.move_to_end(node)
                return listing
        listing = self._source.listing(self._namespace.directory_path(record))
        with self._lock:
            self._listings[node] = listing
            self._listings.move_to_end(node)
            if len(self._listings) > _LISTINGS:
                self._listings.popitem(last=False)
        return listing
