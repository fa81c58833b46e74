"""The mount's server's side of the partitioned cache: who owns an item, asking that node, and what to admit.

Until the peer server has told who the others are, nobody is asked and nothing admitted: for a moment after mounting
the source is read. A member that died is left out of ownership after a while, and its items are admitted by others on
their next misses. What is pinned here and owned elsewhere since a node joined stays, since it costs nothing and hits,
until an item owned here needs its room.
"""

from __future__ import annotations

import itertools
import logging
import os
import select
import socket
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from coordlfs.cache import items
from coordlfs.cache.admission import Admission
from coordlfs.cache.minio import State
from coordlfs.catalogue.catalog import Catalog, node_of_path
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import pages, process
from coordlfs.peers import client, link, protocol, settings
from coordlfs.peers.client import Outcome, Peer, Receiver
from coordlfs.peers.ownership import Node, Ownership, key_of, keys_of

log = logging.getLogger(__name__)

_AT_ONCE = 50  # of the cache, what belongs to others and gives way in one go: 2 %
_SLICE = 4096  # items whose owners are found at once: 3 ms among 2 nodes, 13 among 100, and no question is answered
_COUNTED = {
    Outcome.NO: "peer_refusals",
    Outcome.WRONG_VERSION: "peer_wrong_versions",
    Outcome.ERROR: "peer_failures",
    Outcome.FAILED: "peer_failures",
    Outcome.BAD: "peer_bad_payloads",
    Outcome.SKIPPED: "peer_skipped",
}


_UNKNOWN = 0xFFFF


@dataclass(frozen=True, slots=True)
class _View:
    """The cluster at one moment."""

    ownership: Ownership
    peers: dict[str, Peer]  # by name; without this node
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


class Sharing:
    """What the server of one mount knows of the others. Every method may be called from any thread."""

    def __init__(self, config: dict[str, Any], catalog: Catalog, admission: Admission, counters: Counters) -> None:
        mine = config["peers"]
        self._own = Node(mine["name"], config["capacity"])
        self._catalog = catalog
        self._admission = admission
        self._counters = counters
        # Whether the peer server's READs are always marked (O_NOATIME), which takes the rights of a file's owner.
        self.marks = process.has_capability(process.CAP_FOWNER) and process.in_initial_user_namespace()
        self._credentials = settings.credentials(mine)
        self._tls = self._credentials.context(server=False)
        self.receiver = Receiver()
        self._openers = client.openers()
        self._view: _View | None = None
        self._members: list[link.Member] = []
        self._arriving: list[link.Member] = []
        self._peers: dict[tuple[str, str, int], Peer] = {}
        self._displaceable: deque[int] = deque()  # found so far of what is pinned here and owned elsewhere
        self._lacks_room = False  # whether `displaced` was called since the view changed
        self._unsorted: Iterator[int] | None = None  # what `_sort` has still to look at; its thread's alone
        self.pid = 0
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False

    # -- on the way of a miss -----------------------------------------------------------------------------------

    def is_peer_server(self, tid: int) -> bool:
        """Whether a thread belongs to this mount's peer server, whose READs are answered from the source alone."""
        return os.path.exists(f"/proc/{self.pid}/task/{tid}")

    def owns(self, item: int) -> bool:
        """Whether this node is the one that caches an item."""
        view = self._view
        return view is not None and view.owner(item, self._catalog) == self._own

    def ask(
        self,
        item: int,
        offset: int,
        length: int,
        done: Callable[[memoryview | None], None],
        before_wait: Callable[[], None],
    ) -> bool:
        """Ask the owner of an item for `length` bytes at `offset` of its file; False if there is nobody to be asked.

        `done` is called once, within seconds and by whatever thread: with the bytes, which are good until it returns,
        or with None if they have to come from the source.
        """
        view = self._view
        if view is None or not view.peers:
            return False
        owner = view.owner(item, self._catalog)
        if owner is None or owner is self._own:
            return False
        record = items.record_of(item)
        version = self._catalog.size_and_mtime(record)
        path = self._catalog.path(record)
        if not 0 < length <= protocol.MOST_PAYLOAD or len(path) > protocol.LONGEST_PATH:
            return False

        def answered(outcome: Outcome, data: memoryview | None) -> None:
            if outcome is not Outcome.OK:
                self._counters.add(_COUNTED[outcome])
                done(None)
            elif not self._catalog.serves_if(record, lambda: self._catalog.size_and_mtime(record) == version):
                done(None)  # somebody has seen another one meanwhile
            else:
                self._counters.count_peer_read(length)
                done(data)

        said = view.peers[owner.name].ask(path, version, offset, length, answered, before_wait)
        if said is not None:
            self._counters.add(_COUNTED[said])
        return said is None

    def fetch(self, item: int, offset: int, into: memoryview, before_wait: Callable[[], None]) -> int:
        """`ask`, and wait: the bytes are in `into` then. How many came; 0 if they have to come from the source."""
        came, length = threading.Event(), 0

        def done(data: memoryview | None) -> None:
            nonlocal length
            if data is not None:
                length = len(data)
                into[:length] = data
            came.set()

        size = self._catalog.size(items.record_of(item))
        if self.ask(item, offset, min(len(into), size - offset), done, before_wait):
            before_wait()
            came.wait()
        return length

    # -- admission ----------------------------------------------------------------------------------------------

    def displaced(self, wanted: int) -> list[int]:
        """Items that are pinned here and owned elsewhere, of `wanted` pages or more if there are so many.

        More, since they go while the item that wants their room is being answered, and it is admitted only when it
        misses again: one for one, half of what is owned here would find no room, in every epoch.

        Only what was found by now: the first call after the nodes have changed has `run` look for them, among what is
        in the cache then. Whatever is admitted later is this node's own. What a server that takes over is told of by
        keepers only later, or is not yet pinned when it should go, stays until the nodes change again.
        """
        policy = self._admission.policy
        wanted = max(wanted, policy.capacity // _AT_ONCE)
        with self._lock:
            if not self._lacks_room:
                self._lacks_room = True
                os.eventfd_write(self._wake, 1)
            chosen: list[int] = []
            while wanted > 0 and self._displaceable:
                item = self._displaceable.popleft()
                if policy.state(item) is State.PINNED:
                    chosen.append(item)
                    wanted -= policy.pages(item)
            return chosen

    def _sort(self) -> bool:
        """Find what other nodes own of one slice of what is pinned here; whether there is more to do.

        Of a million items that takes seconds, in which READs and the peer server's questions have to be answered.
        """
        view = self._view
        if view is None or not view.peers or not self._lacks_room:
            return False
        if self._unsorted is None:
            with self._admission.lock:  # whoever admits something meanwhile asks this view
                self._unsorted = iter(self._admission.policy.items())
        part = list(itertools.islice(self._unsorted, _SLICE))
        if part:
            strangers = self._owned_elsewhere(view, part)
            with self._lock:
                self._displaceable.extend(strangers)
        return bool(part)

    def _owned_elsewhere(self, view: _View, wanted: list[int]) -> list[int]:
        import numpy as np  # here, since it takes longer to import than a mount to come up

        ids = [node_of_path(self._catalog.path(items.record_of(item))) for item in wanted]
        chunks = [items.chunk_of(item) for item in wanted]
        owners = view.ownership.owners(keys_of(np.array(ids, np.uint64), np.array(chunks, np.uint64)))
        own = view.ownership.nodes.index(self._own)
        return [item for item, owner in zip(wanted, owners.tolist(), strict=True) if owner != own]

    def _may_serve(self, node: int, offset: int) -> bool:
        record = self._catalog.find(node)
        if record is None:
            return False
        item = items.item_at(record, offset)
        if self._admission.policy.state(item) is not State.ABSENT:
            return True
        if not self.owns(item):
            return False
        return self._admission.has_room(pages.count(items.length(item, self._catalog.size(record))))

    # -- the peer server ----------------------------------------------------------------------------------------

    def attach(self, pid: int, sock: socket.socket) -> None:
        """There is a peer server, the first or one that takes another's place."""
        sock.setblocking(False)
        with self._lock:
            self.pid, self._sock = pid, sock
            self._arriving = []
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Listen to the peer server, and meanwhile find what is to give way, until `close`."""
        more = False
        while not self._closing:
            with self._lock:
                sock = self._sock
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            if sock is not None:
                poll.register(sock, select.POLLIN)
            ready = [fd for fd, _ in poll.poll(0 if more else None)]
            if self._wake in ready:
                os.eventfd_read(self._wake)
            elif ready and sock is not None and not self._hear(sock):
                with self._lock:
                    if self._sock is sock:
                        self._sock = None  # it died: the supervisor sends another
                sock.close()
            more = self._sort()

    def _hear(self, sock: socket.socket) -> bool:
        try:
            packet = sock.recv(link.MOST)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if packet[:1] == b"?":
            _, number, node, offset = link.QUESTION.unpack(packet)
            self._answer(sock, number, self._may_serve(node, offset))
        elif packet:
            message = link.decode(packet)
            if "end" in message:
                self._set_members(self._arriving)
                self._arriving = []
                self._answer(sock, 0, False)
            else:
                self._arriving += [link.Member(*fields) for fields in message["members"]]
        return bool(packet)

    def _answer(self, sock: socket.socket, number: int, yes: bool) -> None:
        pinned = self._admission.policy.pinned_pages * pages.PAGE
        with suppress(OSError):
            sock.send(link.ANSWER.pack(b"!", number, yes, pinned))

    def _set_members(self, members: list[link.Member]) -> None:
        self._members = members
        alive = {m.name: m for m in members if m.alive and m.name != self._own.name}
        ownership = Ownership([self._own, *(Node(m.name, m.capacity) for m in alive.values())])
        places = {(m.name, m.host, m.port): m for m in alive.values()}
        if (
            self._view is not None
            and self._view.ownership.nodes == ownership.nodes
            and places.keys() == self._peers.keys()
        ):
            return
        for place in places.keys() - self._peers.keys():
            name, host, port = place
            self._peers[place] = Peer(
                name,
                (host, port),
                self._credentials,
                self._tls,
                self.receiver,
                self._openers,
                self._own.name,
            )
        for gone in self._peers.keys() - places.keys():
            self._peers.pop(gone).close()
        view = _View(ownership, {place[0]: peer for place, peer in self._peers.items()})
        with self._lock:  # together, or something would give way that is this node's own by now
            self._view = view
            self._displaceable.clear()
            self._lacks_room = False
        self._unsorted = None
        log.info("the cache is shared by %s", ", ".join(node.name for node in ownership.nodes))

    def watch(self) -> None:
        """Give up what other nodes answer too late, until `close`: the work of a thread of its own."""
        self.receiver.run()

    def close(self) -> None:
        """End `run` and `watch`, and every connection."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self.receiver.close()

    # -- figures ------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """For `status`."""
        return {
            "name": self._own.name,
            "known": len(self._members),
            "alive": sum(m.alive for m in self._members),
        }

    def table(self) -> list[dict[str, Any]]:
        """For `coordlfs peers`: this node and every other."""
        view = self._view
        total = sum(node.weight for node in view.ownership.nodes) if view else 0
        pinned = self._admission.policy.pinned_pages * pages.PAGE
        rows: list[dict[str, Any]] = [
            {
                "name": self._own.name,
                "self": True,
                "state": "alive",
                "problem": "",
                "capacity_bytes": self._own.weight,
                "pinned_bytes": pinned,
                "share": self._own.weight / total if total else 0.0,
            }
        ]
        for m in self._members:
            peer = self._peers.get((m.name, m.host, m.port))
            outcomes = peer.outcomes if peer else dict.fromkeys(Outcome, 0)
            resting = peer is not None and peer.breaker.open
            rows.append(
                {
                    "name": m.name,
                    "self": False,
                    "address": f"{m.host}:{m.port}",
                    "state": "dead" if not m.alive else "resting" if resting else "alive",
                    "problem": m.problem,
                    "capacity_bytes": m.capacity,
                    "pinned_bytes": m.pinned,
                    "share": m.capacity / total if total and peer else 0.0,
                    "latency_seconds": m.latency,
                    "received_bytes": peer.received_bytes if peer else 0,
                    "served_bytes": m.served_bytes,
                    "answers": {outcome.value: count for outcome, count in outcomes.items()},
                }
            )
        return rows
