"""Who the nodes are: addresses from a list, the name service, Slurm or etcd, and which of them live.

Every address is greeted every few seconds. A node that answers is a member, with the name and the capacity that it
gives; one that has not answered for a while is none, until it answers again. It does not know who owns which item:
that follows from it, in `ownership`.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from coordlfs.kernel import threads
from coordlfs.peers import connection, discovery, link, protocol, settings, wishes
from coordlfs.peers.connection import Credentials
from coordlfs.peers.protocol import ProtocolError, Request, Status, Verb

log = logging.getLogger(__name__)

_ROUND = 1.0  # seconds between two greetings
_DEAD_AFTER = 6.0  # seconds without an answer after which a member is none: longer than a restart takes
_AT_ONCE = 40  # greetings
_LONGEST = 300  # characters of a node's name
_FIRST_ROUND = 3.0  # seconds that the first greetings may take, before members are told without the rest


@dataclass(slots=True)
class _Known:
    """One address, and what was heard from there."""

    host: str
    port: int
    at: tuple[str, int] | None = None  # where it was reached last, in numbers
    is_sought: bool = True  # by its name, which may lead elsewhere since
    info: dict[str, Any] | None = None  # what the node said of itself, last
    heard: float = 0.0  # when
    latency: float | None = None
    problem: str = "not yet reached"
    sock: socket.socket | None = None
    asking: bool = False  # a thread is greeting it, perhaps one that was given up
    gone: bool = False  # whoever is greeting it closes the connection

    def is_alive(self, now: float) -> bool:
        return self.info is not None and now - self.heard < _DEAD_AFTER


class Membership:
    """Keeps the list of members, and tells it with `tell`, packet by packet, after every round."""

    def __init__(
        self,
        config: dict[str, Any],
        credentials: Credentials,
        tell: Callable[[bytes], None],
        served: Counter[str],
    ) -> None:
        self._config = config
        self._credentials = credentials
        self._tls: ssl.SSLContext | None = credentials.context(server=False)
        self._tell = tell
        self._served = served
        self._instance = os.urandom(8).hex()
        self._known: dict[tuple[str, int], _Known] = {}
        # Names that cannot be resolved may hold their threads for long: not those by which others are greeted.
        self._reached, self._unreached = trio.CapacityLimiter(_AT_ONCE), trio.CapacityLimiter(_AT_ONCE)
        self._told: dict[str, str] = {}

    def own(self, pinned: int, said: dict[str, Any]) -> dict[str, Any]:
        """What this node says of itself. `said`: what its server adds, which may be nothing."""
        return {
            "disk": said.get("disk"),
            "warming": said.get("warming"),
            "name": self._config["name"],
            "instance": self._instance,
            "capacity": self._config["capacity"],
            "pinned": pinned,
        }

    def knows(self, name: str) -> bool:
        """Whether some node has called itself so."""
        return any(known.info is not None and known.info["name"] == name for known in list(self._known.values()))

    async def run(self) -> None:
        """Watch, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(discovery.watch, self._config, self._set_addresses)
            while True:
                with trio.move_on_after(_FIRST_ROUND):
                    async with trio.open_nursery() as round_:
                        for known in self._in_order():
                            round_.start_soon(self._greet, known)
                await threads.run(self._report)
                await trio.sleep(_ROUND)

    def _set_addresses(self, addresses: set[tuple[str, int]]) -> None:
        for gone in self._known.keys() - addresses:
            known = self._known.pop(gone)
            known.gone = True
            if known.sock is not None and not known.asking:
                known.sock.close()
        for new in addresses - self._known.keys():
            self._known[new] = _Known(*new)

    def _in_order(self) -> list[_Known]:
        """Who lives comes first: however many do not answer, no live one is taken for dead for want of a greeting."""
        now = time.monotonic()
        waiting = [known for known in self._known.values() if not known.asking]
        random.shuffle(waiting)
        return sorted(waiting, key=lambda known: not known.is_alive(now))

    async def _greet(self, known: _Known) -> None:
        limiter = self._unreached if known.is_sought else self._reached
        await threads.run(lambda: self._ask(known), limiter=limiter, abandon_on_cancel=True)

    def _ask(self, known: _Known) -> None:
        """Greet one address; on a thread, which is not waited for if that takes too long."""
        known.asking, began = True, time.monotonic()
        try:
            if known.sock is None:
                where = (known.host, known.port) if known.is_sought or known.at is None else known.at
                known.sock = connection.connect(where, self._credentials, self._tls)
                known.at, known.is_sought = known.sock.getpeername()[:2], False
                began = time.monotonic()
            room = memoryview(bytearray(protocol.MOST_INFO))
            reply = connection.ask(known.sock, Request(Verb.INFO, 0), room)
            text = bytes(room[: reply.length])
            if reply.status is not Status.OK or protocol.checksum(text) != reply.checksum:
                raise ProtocolError("it does not say who it is")
            known.info = _checked(json.loads(text))
            known.heard = time.monotonic()
            known.latency = known.heard - began
            known.problem = ""
        except (OSError, ProtocolError, ValueError, KeyError, TypeError, RecursionError) as e:
            if known.sock is not None:
                known.sock.close()
                known.sock = None
            else:
                known.is_sought = True
            known.problem = (e.strerror if isinstance(e, OSError) else None) or str(e) or type(e).__name__
        finally:
            known.asking = False
            if known.gone and known.sock is not None:
                known.sock.close()

    def _members(self) -> list[link.Member]:
        now = time.monotonic()
        found: dict[str, link.Member] = {}
        instances: dict[str, str] = {self._config["name"]: self._instance}
        for known in list(self._known.values()):
            info, alive, problem = known.info, known.is_alive(now), known.problem
            if info is not None and info["instance"] == self._instance:
                continue
            name = info["name"] if info else f"{known.host}:{known.port}"
            if info is not None and alive and instances.setdefault(name, info["instance"]) != info["instance"]:
                name, alive, problem = f"{known.host}:{known.port}", False, f"it calls itself {name}, as another does"
            if name in found and (found[name].alive or not alive):
                continue  # one node at two addresses
            found[name] = link.Member(
                name,
                *(known.at or (known.host, known.port)),  # in numbers, since READs must wait for no name service
                info["capacity"] if info else 0,
                info["pinned"] if info else 0,
                alive,
                known.latency if alive else None,
                self._served[name],
                "" if alive else problem,
                info["disk"] if info else None,
                info["warming"] if info else None,
            )
        return list(found.values())

    def _report(self) -> None:
        members = self._members()
        for member in members:
            state = "alive" if member.alive else f"not alive: {member.problem}"
            if self._told.get(member.name) != state:
                self._told[member.name] = state
                log.info("node %s is %s", member.name, state)
        for packet in link.encode_members(members):
            self._tell(packet)


def _checked(info: Any) -> dict[str, Any]:
    """What a node says of itself, if it makes sense. Raises ValueError, KeyError, TypeError."""
    checked = {"name": info["name"], "instance": info["instance"], "capacity": info["capacity"]}
    checked["pinned"] = info["pinned"]
    texts = all(isinstance(text := checked[key], str) and 0 < len(text) < _LONGEST for key in ("name", "instance"))
    numbers = all(isinstance(checked[key], int) and 0 <= checked[key] < 1 << 62 for key in ("capacity", "pinned"))
    checked["disk"] = _checked_disk(info.get("disk"))  # nodes of version 0.2 say neither this
    checked["warming"] = wishes.parse(info.get("warming")).plain()  # nor that
    # The name is hashed, logged and shown: no more than the address that it is made of.
    if not texts or not numbers or not (checked["name"].isascii() and checked["name"].isprintable()):
        raise ValueError("what it says of itself makes no sense")
    settings.address(checked["name"])
    return checked


def _checked_disk(disk: Any) -> tuple[int, int] | None:
    """Bytes held and size of a disk tier; None if there is none. Raises ValueError, TypeError."""
    if disk is None:
        return None
    held, size = disk
    if not all(isinstance(number, int) and 0 <= number < 1 << 62 for number in (held, size)):
        raise ValueError("what it says of its disk makes no sense")
    return held, size
