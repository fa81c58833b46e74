"""Which node caches an item, and what is pinned here though another one owns it.

Until it is known who the others are, nothing is this node's to cache: for a moment after mounting the source is read.
What is pinned here and owned elsewhere since a node joined stays, since it costs nothing and hits, until an item owned
here needs its room. Knows no socket: who the nodes are is told by `coordlfs.peers.sharing`.
"""

from __future__ import annotations

import itertools
import os
import threading
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from coordlfs.cache import items
from coordlfs.cache.minio import MinIO, State
from coordlfs.catalogue.catalog import Catalog, node_of_path
from coordlfs.peers.ownership import Node, Ownership, key_of, keys_of

_AT_ONCE = 50  # of the cache, what belongs to others and gives way in one go: 2 %
_SLICE = 4096  # items whose owners are found at once: 3 ms among 2 nodes, 13 among 100, and no question is answered
_UNKNOWN = 0xFFFF


@dataclass(frozen=True, slots=True)
class _View:
    """The cluster at one moment."""

    ownership: Ownership
    owners: array[int] = field(default_factory=lambda: array("H"))  # of records' first items, as far as asked for

    def owner(self, item: int, catalog: Catalog) -> Node | None:
        """The owner of an item: a hash of its path, and a draw for each node, unless that was done before."""
        record = items.record_of(item)
        is_first = items.chunk_of(item) == 0
        if is_first and record < len(self.owners) and self.owners[record] != _UNKNOWN:
            return self.ownership.nodes[self.owners[record]]
        # By the path, not by the node id, which is the same but for hard links and files that were replaced.
        key = key_of(node_of_path(catalog.path(record)), items.chunk_of(item))
        index = self.ownership.index(key)
        if index is None:
            return None
        if is_first and index < _UNKNOWN:
            while record >= len(self.owners):
                self.owners.extend([_UNKNOWN] * 4096)
            self.owners[record] = index
        return self.ownership.nodes[index]


class Placement:
    """Where items belong, as one node sees it. Every method may be called from any thread, but for `sort`.

    `fd` is readable when room is lacking for what is owned here, and `sort` is to find what can give way.
    """

    def __init__(self, own: Node, catalog: Catalog, policy: MinIO) -> None:
        self.own = own
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._catalog = catalog
        self._policy = policy
        self._view: _View | None = None
        self._displaceable: deque[int] = deque()  # found so far of what is pinned here and owned elsewhere
        self._lacks_room = False  # whether `displaced` was called since the view changed
        self._unsorted: Iterator[int] | None = None  # what `sort` has still to look at; its thread's alone
        self._lock = threading.Lock()

    @property
    def ownership(self) -> Ownership | None:
        """Who owns what; None as long as nobody has told who the others are."""
        view = self._view
        return None if view is None else view.ownership

    def change(self, ownership: Ownership) -> None:
        """From now on these are the nodes. By the thread that calls `sort`."""
        with self._lock:  # together, or something would give way that is this node's own by now
            self._view = _View(ownership)
            self._displaceable.clear()
            self._lacks_room = False
        self._unsorted = None

    def owner(self, item: int) -> Node | None:
        """The node that is to cache an item; None if that is not known."""
        view = self._view
        return None if view is None else view.owner(item, self._catalog)

    def owns(self, item: int) -> bool:
        """Whether this node is the one that caches an item."""
        return self.owner(item) == self.own

    def displaced(self, npages: int) -> list[int]:
        """Items that are pinned here and owned elsewhere, of `npages` pages or more if there are so many.

        More, since they go while the item that wants their room is being answered, and it is admitted only when it
        misses again: one for one, half of what is owned here would find no room, in every epoch.

        Only what was found by now: the first call after the nodes have changed has `sort` look for them, among what is
        in the cache then. Whatever is admitted later is this node's own. What a server that takes over is told of by
        keepers only later, or is not yet pinned when it should go, stays until the nodes change again.
        """
        npages = max(npages, self._policy.capacity // _AT_ONCE)
        with self._lock:
            if not self._lacks_room:
                self._lacks_room = True
                os.eventfd_write(self.fd, 1)
            chosen: list[int] = []
            while npages > 0 and self._displaceable:
                item = self._displaceable.popleft()
                if self._policy.state(item) is State.PINNED:
                    chosen.append(item)
                    npages -= self._policy.pages(item)
            return chosen

    def sort(self, admission_lock: AbstractContextManager[object]) -> bool:
        """Find what other nodes own of one slice of what is pinned here; whether there is more to do.

        Of a million items that takes seconds, in which READs and the peer server's questions have to be answered.
        """
        ownership = self.ownership
        if ownership is None or len(ownership.nodes) < 2 or not self._lacks_room:
            return False
        if self._unsorted is None:
            with admission_lock:  # whoever admits something meanwhile asks this view
                self._unsorted = iter(self._policy.items())
        part = list(itertools.islice(self._unsorted, _SLICE))
        if part:
            strangers = self._owned_elsewhere(ownership, part)
            with self._lock:
                self._displaceable.extend(strangers)
        return bool(part)

    def _owned_elsewhere(self, ownership: Ownership, wanted: list[int]) -> list[int]:
        ids = [node_of_path(self._catalog.path(items.record_of(item))) for item in wanted]
        chunks = [items.chunk_of(item) for item in wanted]
        owners = ownership.owners(keys_of(np.array(ids, np.uint64), np.array(chunks, np.uint64)))
        own = ownership.nodes.index(self.own)
        return [item for item, owner in zip(wanted, owners.tolist(), strict=True) if owner != own]
