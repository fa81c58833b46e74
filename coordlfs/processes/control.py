"""What `warm`, `drop`, `verify`, `refresh` and `restart` ask of the server of a mount, over its control socket.

That has a random name, which `user.coordl.control` of the mount's root tells. Paths are relative to the root, bytes
that are not UTF-8 as surrogates. Nothing but names of the catalogue can be asked for.
"""

from __future__ import annotations

import itertools
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import trio

from coordlfs.cache import items
from coordlfs.cache.admission import Admission
from coordlfs.cache.minio import State
from coordlfs.catalogue.catalog import REGULAR, Catalog
from coordlfs.kernel import pages, paths, threads
from coordlfs.processes.control_socket import ControlSocket, Verb
from coordlfs.serving.namespace import Namespace
from coordlfs.serving.revalidation import Revalidation
from coordlfs.sources.contract import Source

if TYPE_CHECKING:
    from coordlfs.cache.disk_tier import DiskTier
    from coordlfs.peers.sharing import Sharing

_AT_ONCE = 1024  # items that are asked for before it is seen what became of them
_PAGES_OF_CHUNK = pages.count(items.CHUNK)


def _some_at_a_time(wanted: list[range]) -> Iterator[list[int]]:
    """Some items after the others: of one file there may be too many to be listed."""
    items_ = itertools.chain.from_iterable(wanted)
    while some := list(itertools.islice(items_, _AT_ONCE)):
        yield some


class Control:
    """Answers at the socket; `name` is what a client connects to."""

    def __init__(
        self,
        catalog: Catalog,
        source: Source,
        namespace: Namespace,
        admission: Admission,
        revalidation: Revalidation,
        replace: Callable[[int], None],
        sharing: Sharing | None,
        tier: DiskTier | None = None,
    ) -> None:
        self._catalog = catalog
        self._source = source
        self._namespace = namespace
        self._admission = admission
        self.name = f"coordlfs-{secrets.token_hex(16)}"
        self._revalidation = revalidation
        self._replace = replace
        self._sharing = sharing
        self._tier = tier
        self._verbs: dict[str, Verb] = {
            "admit": self._admit,
            "drop": self._drop,
            "peers": self._peers,
            "refresh": self._refresh,
            "replace": self._replace_process,
            "source": self._send_source,
        }

    async def run(self) -> None:
        """Answer until cancelled."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(b"\0" + self.name.encode())
        sock.listen(16)
        await ControlSocket(sock, self._verbs).run()

    async def _send_source(self, request: dict[str, Any]) -> int:
        """The descriptor of the mounted directory."""
        return self._source.root

    async def _items(self, named: list[str]) -> list[range]:
        """The items of each of the files named; names that are no regular files are left out.

        From a thread: the source may take its time, or never answer, and all else goes on.
        """
        return await threads.run(lambda: self._look_up(named), abandon_on_cancel=True)

    def _look_up(self, named: list[str]) -> list[range]:
        found: list[range] = []
        directories: dict[bytes, int] = {b"": 0}
        for text in named:
            record = self._namespace.resolve(paths.from_text(text), directories)
            if record is not None and self._catalog.flags(record) & REGULAR:
                found.append(items.items_of(record, self._catalog.size(record)))
        return found

    async def _admit(self, request: dict[str, Any]) -> dict[str, int]:
        """Have files pinned, and kept on disk, and wait until they are or cannot be."""
        wanted = await self._items(request["paths"])
        policy, pinned, npages, on_disk, disk_bytes = self._admission.policy, 0, 0, 0, 0
        for some in _some_at_a_time(wanted):
            found = await self._pin(some)
            pinned += len(found)
            npages += sum(map(policy.pages, found))
            kept = await self._keep_on_disk(some, set(found))
            on_disk += len(kept)
            disk_bytes += sum(self._length(item) for item in kept)
            is_full = not found and policy.capacity - policy.used < _PAGES_OF_CHUNK and self._is_disk_full()
            if is_full and len(some) == _AT_ONCE:
                break  # what follows finds no room either
        return {
            "items": sum(map(len, wanted)),
            "pinned": pinned,
            "pinned_pages": npages,
            "free_pages": policy.capacity - policy.used,
            "on_disk": on_disk,  # and not in memory
            "on_disk_bytes": disk_bytes,
            "is_disk_full": self._is_disk_full(),
        }

    def _length(self, item: int) -> int:
        return items.length(item, self._catalog.size(items.record_of(item)))

    def _is_disk_full(self) -> bool:
        return self._tier is None or self._tier.writer.is_full

    async def _keep_on_disk(self, wanted: list[int], pinned: set[int]) -> list[int]:
        """Have items kept on disk, and wait until they are or cannot be; those that are, but for what is pinned."""
        tier = self._tier
        if tier is None:
            return []
        for item in wanted:
            while not tier.fill(item):
                await trio.sleep(0.01)
        for item in wanted:
            while not tier.is_settled(item) and not tier.writer.stopped:
                await trio.sleep(0.01)
        return [item for item in wanted if item not in pinned and tier.holds(item)]

    async def _pin(self, wanted: list[int]) -> list[int]:
        """Have items pinned, and wait until they are or cannot be; those that are."""
        self._admission.admit(wanted)
        self._admission.flush()
        while not self._admission.settled(wanted):
            await trio.sleep(0.005)
        return [item for item in wanted if self._admission.policy.state(item) is State.PINNED]

    async def _peers(self, request: dict[str, Any]) -> dict[str, Any]:
        """The nodes that share the cache."""
        return {"nodes": self._sharing.table() if self._sharing else []}

    async def _drop(self, request: dict[str, Any]) -> dict[str, int]:
        """Let files go (all of them if no paths are given), and wait until they are gone."""
        policy, records = self._admission.policy, None
        wanted = policy.items()
        if "paths" in request:
            files = await self._items(request["paths"])
            records = {items.record_of(of_file[0]) for of_file in files if of_file}
            wanted = [item for of_file in files for item in self._admission.held(of_file)]
        before = policy.used
        dropped = self._admission.drop(wanted)
        while not self._admission.settled(wanted):
            await trio.sleep(0.005)
        freed = await self._drop_from_disk(records)
        return {"dropped": dropped, "freed_pages": before - policy.used, "freed_disk_bytes": freed}

    async def _drop_from_disk(self, records: set[int] | None) -> int:
        """Have the disk let go of some files, or of all, and wait until it has; the bytes that were there."""
        tier = self._tier
        if tier is None:
            return 0
        before, is_done = tier.store.bytes, threading.Event()
        if records is None:
            tier.writer.clear()
        for record in records or ():
            tier.release(record, self._catalog.size(record))
        tier.writer.order(is_done.set)
        while not is_done.is_set():
            await trio.sleep(0.005)
        return max(0, before - tier.store.bytes)

    async def _refresh(self, request: dict[str, Any]) -> dict[str, int]:
        """Have names compared with the source, with all that is known below them."""
        checked, changed = await self._revalidation.refresh({paths.from_text(path) for path in request["paths"]})
        return {"checked": checked, "changed": changed}

    async def _replace_process(self, request: dict[str, Any]) -> dict[str, int]:
        """Have a process of the mount ended and started anew, of the version that is installed now."""
        self._replace(int(request["pid"]))
        return {}
