"""What `warm`, `drop`, `verify`, `refresh` and `restart` ask of the server of a mount, over its control socket.

That has a random name, which `user.coordl.control` of the mount's root tells. Paths are relative to the root, bytes
that are not UTF-8 as surrogates. Nothing but names of the catalogue can be asked for.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from coordlfs.cache import items
from coordlfs.cache.admission import Admission
from coordlfs.catalogue.catalog import Catalog
from coordlfs.kernel import paths
from coordlfs.peers.wishes import Wish, parse
from coordlfs.processes.control_socket import ControlSocket, Verb
from coordlfs.processes.fetching import Fetching
from coordlfs.serving.revalidation import Revalidation
from coordlfs.sources.contract import Source

if TYPE_CHECKING:
    from coordlfs.cache.disk_tier import DiskTier
    from coordlfs.peers.sharing import Sharing
    from coordlfs.peers.warming import Warming


class Control:
    """Answers at the socket; `name` is what a client connects to."""

    def __init__(
        self,
        catalog: Catalog,
        source: Source,
        admission: Admission,
        fetching: Fetching,
        revalidation: Revalidation,
        replace: Callable[[int], None],
        sharing: Sharing | None,
        warming: Warming | None,
        tier: DiskTier | None = None,
    ) -> None:
        self._catalog = catalog
        self._source = source
        self._admission = admission
        self._fetching = fetching
        self._warming = warming
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
            "warm": self._warm,
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

    async def _admit(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have files pinned, and kept on disk, and wait until they are or cannot be."""
        done = await self._fetching.fetch([paths.from_text(text) for text in request["paths"]])
        return done._asdict()

    async def _warm(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have the caches of all nodes filled for as long as this is asked again; how far each has come."""
        if self._warming is None:
            return {"nodes": []}
        wish = Wish(str(request["id"]), tuple(request["paths"]))
        if request.get("is_over"):
            self._warming.no_more(wish.id)
            return {"nodes": []}
        parse({"wish": wish, "progress": None})  # raises ValueError for what the others would not hear
        return {"nodes": self._warming.wish(wish)}

    async def _peers(self, request: dict[str, Any]) -> dict[str, Any]:
        """The nodes that share the cache."""
        return {"nodes": self._sharing.table() if self._sharing else []}

    async def _drop(self, request: dict[str, Any]) -> dict[str, int]:
        """Let files go (all of them if no paths are given), and wait until they are gone."""
        policy, records = self._admission.policy, None
        wanted = policy.items()
        if "paths" in request:
            files = await self._fetching.items([paths.from_text(text) for text in request["paths"]])
            records = {items.record_of(of_file[0]) for of_file in files if of_file}
            wanted = [item for of_file in files for item in self._admission.held(of_file)]
        before = policy.used
        dropped = self._admission.drop(wanted)
        while not self._admission.settled(wanted):
            await trio.sleep(0.005)
        freed = await self._drop_from_disk(records)
        return {"dropped": dropped, "freed_pages": before - policy.used, "freed_disk_bytes": freed}

    async def _drop_from_disk(self, records: set[int] | None) -> int:
        """Have the disk let go of some files, or of all, and wait until it has; the bytes that were there.

        A disk that hangs does it later.
        """
        tier = self._tier
        if tier is None:
            return 0
        before, is_done = tier.store.bytes, threading.Event()
        if records is None:
            tier.writer.clear()
        for record in records or ():
            tier.release(record, self._catalog.size(record))
        tier.writer.order(is_done.set)
        while not is_done.is_set() and not tier.writer.hangs:
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
