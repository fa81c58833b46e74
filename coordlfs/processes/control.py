"""The control socket: what `warm`, `drop`, `verify`, `refresh` and `restart` ask of a running server.

An abstract Unix socket with a random name, which `user.coordl.control` of the mount's root tells; only root and the
user who mounted may talk. Requests and replies are JSON, one line each; paths are relative to the root, bytes that
are not UTF-8 as surrogates. Nothing but names of the catalogue can be asked for.
"""

from __future__ import annotations

import array
import itertools
import json
import logging
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import trio

from coordlfs.cache import items
from coordlfs.cache.admission import Admission
from coordlfs.cache.minio import State
from coordlfs.catalogue.catalog import REGULAR, Catalog
from coordlfs.kernel import pages, paths, threads
from coordlfs.serving.namespace import Namespace
from coordlfs.serving.revalidation import Revalidation
from coordlfs.sources.directory import Source

if TYPE_CHECKING:
    from coordlfs.peers.sharing import Sharing

log = logging.getLogger(__name__)

MAX_LINE = 1 << 22
_AT_ONCE = 1024  # items that are asked for before it is seen what became of them
_PAGES_OF_CHUNK = pages.count(items.CHUNK)
_PEER = struct.Struct("3i")


def _some_at_a_time(wanted: list[range]) -> Iterator[list[int]]:
    """Some items after the others: of one file there may be too many to be listed."""
    items_ = itertools.chain.from_iterable(wanted)
    while some := list(itertools.islice(items_, _AT_ONCE)):
        yield some


class Control:
    """Serves the socket; `name` is what a client connects to."""

    def __init__(
        self,
        catalog: Catalog,
        source: Source,
        namespace: Namespace,
        admission: Admission,
        revalidation: Revalidation,
        replace: Callable[[int], None],
        sharing: Sharing | None,
    ) -> None:
        self._catalog = catalog
        self._source = source
        self._namespace = namespace
        self._admission = admission
        self.name = f"coordlfs-{secrets.token_hex(16)}"
        self._revalidation = revalidation
        self._replace = replace
        self._sharing = sharing
        self._verbs: dict[str, Callable[[dict[str, Any]], Any]] = {
            "admit": self._admit,
            "drop": self._drop,
            "peers": self._peers,
            "refresh": self._refresh,
            "replace": self._replace_process,
        }

    async def run(self) -> None:
        """Accept connections until cancelled."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.bind(b"\0" + self.name.encode())
        sock.listen(16)
        await trio.serve_listeners(self._serve, [trio.SocketListener(sock)])

    async def _serve(self, stream: trio.SocketStream) -> None:
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        _, uid, _ = _PEER.unpack(credentials)
        if uid not in (0, os.geteuid()):
            log.warning("user %d was refused at the control socket", uid)
            return
        try:
            pending = b""
            async for data in stream:
                pending += data
                *lines, pending = pending.split(b"\n")
                if len(pending) > MAX_LINE:
                    raise ValueError("a request is too long")
                for line in lines:
                    await self._answer(stream, line)
        except Exception as e:  # whatever a client sends, it ends its own connection only
            log.warning("control connection closed: %r", e)

    async def _answer(self, stream: trio.SocketStream, line: bytes) -> None:
        request = json.loads(line)
        verb = request.get("verb") if isinstance(request, dict) else None
        if verb == "source":
            await self._send_source(stream)
            return
        if verb not in self._verbs:
            raise ValueError(f"unknown request {verb!r}")
        reply = await self._verbs[verb](request)
        await stream.send_all(json.dumps(reply).encode() + b"\n")

    async def _send_source(self, stream: trio.SocketStream) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self._source.root]))]
        await stream.socket.sendmsg([b"\n"], rights)

    async def _items(self, named: list[str]) -> list[range]:
        """The items of each of the files named; names that are no regular files are left out.

        From a thread: the source may take its time, or never answer, and all else goes on.
        """
        return await threads.run(lambda: self._look_up(named), abandon_on_cancel=True)

    def _look_up(self, named: list[str]) -> list[range]:
        found: list[range] = []
        directories: dict[bytes, int] = {b"": 0}
        for text in named:
            record = self._resolve(paths.from_text(text), directories)
            if record is not None and self._catalog.flags(record) & REGULAR:
                found.append(items.items_of(record, self._catalog.size(record)))
        return found

    def _resolve(self, path: bytes, directories: dict[bytes, int]) -> int | None:
        parent_path, _, name = path.rpartition(b"/")
        if not name:
            return 0 if not path else None
        if parent_path not in directories:
            parent = self._resolve(parent_path, directories)
            if parent is None:
                return None
            directories[parent_path] = parent
        try:
            return self._namespace.lookup(directories[parent_path], name, announce=True)[0]
        except OSError:
            return None

    async def _admit(self, request: dict[str, Any]) -> dict[str, int]:
        """Have files pinned, and wait until they are or cannot be."""
        wanted = await self._items(request["paths"])
        policy, pinned, npages = self._admission.policy, 0, 0
        for some in _some_at_a_time(wanted):
            found = await self._pin(some)
            pinned += len(found)
            npages += sum(map(policy.pages, found))
            if not found and policy.capacity - policy.used < _PAGES_OF_CHUNK and len(some) == _AT_ONCE:
                break  # what follows finds no room either
        return {
            "items": sum(map(len, wanted)),
            "pinned": pinned,
            "pinned_pages": npages,
            "free_pages": policy.capacity - policy.used,
        }

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
        policy = self._admission.policy
        wanted = policy.items()
        if "paths" in request:
            wanted = [item for of_file in await self._items(request["paths"]) for item in self._admission.held(of_file)]
        before = policy.used
        dropped = self._admission.drop(wanted)
        while not self._admission.settled(wanted):
            await trio.sleep(0.005)
        return {"dropped": dropped, "freed_pages": before - policy.used}

    async def _refresh(self, request: dict[str, Any]) -> dict[str, int]:
        """Have names compared with the source, with all that is known below them."""
        checked, changed = await self._revalidation.refresh({paths.from_text(path) for path in request["paths"]})
        return {"checked": checked, "changed": changed}

    async def _replace_process(self, request: dict[str, Any]) -> dict[str, int]:
        """Have a process of the mount ended and started anew, of the version that is installed now."""
        self._replace(int(request["pid"]))
        return {}
