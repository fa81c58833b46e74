"""The mount's server's side of the partitioned cache: hearing who the nodes are, and asking the one that owns an item.

A member that died is left out of ownership after a while, and its items are admitted by others on their next misses.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from coordlfs.cache import items
from coordlfs.cache.admission import Admission
from coordlfs.cache.disk_tier import DiskTier
from coordlfs.cache.minio import State
from coordlfs.catalogue.catalog import Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import pages, process
from coordlfs.peers import client, link, protocol, settings
from coordlfs.peers.client import Outcome, Peer, Receiver
from coordlfs.peers.ownership import Node, Ownership
from coordlfs.peers.placement import Placement
from coordlfs.peers.wishes import Exchange

log = logging.getLogger(__name__)

_COUNTED = {
    Outcome.NO: "peer_refusals",
    Outcome.WRONG_VERSION: "peer_wrong_versions",
    Outcome.ERROR: "peer_failures",
    Outcome.FAILED: "peer_failures",
    Outcome.BAD: "peer_bad_payloads",
    Outcome.SKIPPED: "peer_skipped",
}


class Sharing:
    """What the server of one mount knows of the others. Every method may be called from any thread."""

    def __init__(
        self,
        config: dict[str, Any],
        catalog: Catalog,
        placement: Placement,
        admission: Admission,
        counters: Counters,
        exchange: Exchange,
        tier: DiskTier | None = None,
    ) -> None:
        """`config` is what `coordlfs.peers.settings` made of the options. `exchange`: what nodes say of warming."""
        self._own = placement.own
        self._catalog = catalog
        self._placement = placement
        self._admission = admission
        self._tier = tier
        self._counters = counters
        # Whether the peer server's READs are always marked (O_NOATIME), which takes the rights of a file's owner.
        self.marks = process.has_capability(process.CAP_FOWNER) and process.in_initial_user_namespace()
        self._credentials = settings.credentials(config)
        self._tls = self._credentials.context(server=False)
        self.receiver = Receiver()
        self._openers = client.openers()
        self._exchange = exchange
        self._said: dict[str, Any] = {}  # to the peer server, last
        self._arriving: list[link.Member] = []
        self._peers: dict[tuple[str, str, int], Peer] = {}
        self._peer_of: dict[str, Peer] = {}  # by the node's name
        self.pid = 0
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False

    # -- on the way of a miss -----------------------------------------------------------------------------------

    def is_peer_server(self, tid: int) -> bool:
        """Whether a thread belongs to this mount's peer server, whose READs are answered from the source alone."""
        return os.path.exists(f"/proc/{self.pid}/task/{tid}")

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
        owner = self._placement.owner(item)
        peer = None if owner is None else self._peer_of.get(owner.name)
        if peer is None:
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

        said = peer.ask(path, version, offset, length, answered, before_wait)
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

    def _may_serve(self, node: int, offset: int) -> bool:
        record = self._catalog.find(node)
        if record is None:
            return False
        item = items.item_at(record, offset)
        if self._admission.policy.state(item) is not State.ABSENT:
            return True
        if not self._placement.owns(item):
            return False
        if self._admission.has_room(pages.count(items.length(item, self._catalog.size(record)))):
            return True
        return self._tier is not None and self._tier.keeps(record, offset)

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
            for fd in (self._wake, self._placement.fd):
                poll.register(fd, select.POLLIN)
            if sock is not None:
                poll.register(sock, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(0 if more else None)}
            for fd in ready & {self._wake, self._placement.fd}:
                os.eventfd_read(fd)
            if sock is not None and sock.fileno() in ready and not self._hear(sock):
                with self._lock:
                    if self._sock is sock:
                        self._sock = None  # it died: the supervisor sends another
                sock.close()
            more = self._placement.sort(self._admission.lock)

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
                self._say(sock)
                self._answer(sock, 0, False)
            else:
                self._arriving += [link.Member(*fields) for fields in message["members"]]
        return bool(packet)

    def _answer(self, sock: socket.socket, number: int, yes: bool) -> None:
        pinned = self._admission.policy.pinned_pages * pages.PAGE
        with suppress(OSError):
            sock.send(link.ANSWER.pack(b"!", number, yes, pinned))

    def _say(self, sock: socket.socket) -> None:
        """Tell the peer server what the other nodes are to know."""
        disk = None if self._tier is None else self._disk_of(self._tier)
        message = {"disk": disk, "warming": self._exchange.told.plain()}
        if any(message.values()) or any(self._said.values()):  # a peer server of version 0.2 would not understand it
            with suppress(OSError):
                sock.send(link.encode(message))
        self._said = message

    @staticmethod
    def _disk_of(tier: DiskTier) -> tuple[int, int]:
        return tier.store.bytes, tier.store.size

    def _set_members(self, members: list[link.Member]) -> None:
        self._exchange.members = members
        alive = {m.name: m for m in members if m.alive and m.name != self._own.name}
        ownership = Ownership([self._own, *(Node(m.name, m.capacity) for m in alive.values())])
        places = {(m.name, m.host, m.port): m for m in alive.values()}
        known = self._placement.ownership
        if known is not None and known.nodes == ownership.nodes and places.keys() == self._peers.keys():
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
        self._peer_of = {place[0]: peer for place, peer in self._peers.items()}
        self._placement.change(ownership)
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
            "known": len(self._exchange.members),
            "alive": sum(m.alive for m in self._exchange.members),
        }

    def table(self) -> list[dict[str, Any]]:
        """For `coordlfs peers`: this node and every other."""
        ownership = self._placement.ownership
        total = sum(node.weight for node in ownership.nodes) if ownership else 0
        pinned = self._admission.policy.pinned_pages * pages.PAGE
        rows: list[dict[str, Any]] = [
            {
                "name": self._own.name,
                "self": True,
                "state": "alive",
                "is_alive": True,
                "problem": "",
                "capacity_bytes": self._own.weight,
                "pinned_bytes": pinned,
                **_tiers(self._own.weight, None if self._tier is None else self._disk_of(self._tier)),
                "share": self._own.weight / total if total else 0.0,
            }
        ]
        for m in self._exchange.members:
            peer = self._peers.get((m.name, m.host, m.port))
            outcomes = peer.outcomes if peer else dict.fromkeys(Outcome, 0)
            resting = peer is not None and peer.breaker.open
            rows.append(
                {
                    "name": m.name,
                    "self": False,
                    "address": f"{m.host}:{m.port}",
                    "state": "dead" if not m.alive else "resting" if resting else "alive",
                    "is_alive": m.alive,
                    "problem": m.problem,
                    "capacity_bytes": m.capacity,
                    "pinned_bytes": m.pinned,
                    **_tiers(m.capacity, m.disk),
                    "share": m.capacity / total if total and peer else 0.0,
                    "latency_seconds": m.latency,
                    "received_bytes": peer.received_bytes if peer else 0,
                    "served_bytes": m.served_bytes,
                    "answers": {outcome.value: count for outcome, count in outcomes.items()},
                }
            )
        return rows


def _tiers(capacity: int, disk: tuple[int, int] | None) -> dict[str, int]:
    """Bytes of memory and disk, where `disk` is what is held and the size; `capacity` is that of both."""
    held, size = disk or (0, 0)
    return {"memory_bytes": max(0, capacity - size), "disk_held_bytes": held, "disk_size_bytes": size}
