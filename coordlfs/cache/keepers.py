"""The talk with keepers: requests in batches, never more at once than they can take, and what they say in return.

What is asked for and what an answer means is for `coordlfs.cache.admission`; here is who there is, which of them has
room, and what lies in the sockets.
"""

from __future__ import annotations

import logging
import select
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from coordlfs.cache import items
from coordlfs.cache.keeper_protocol import MAX_PACKET, REQUEST, Outcome, Reply, Verb, parse_reply
from coordlfs.catalogue.catalog import Catalog
from coordlfs.kernel.libc import quick_reader, quick_write
from coordlfs.kernel.timer import Timer

log = logging.getLogger(__name__)

_WINDOW = 64  # requests that a keeper has not answered
# To wake a process for one item costs more than to pin it: PIN requests wait for each other, though not for long.
_TOGETHER, _GATHERS = 16, 0.002
_AGAIN = 0.02  # seconds after which a keeper is tried again that could take nothing
_UNASKED = (Outcome.WATCHED, Outcome.THREAD, Outcome.OPENED)  # what a keeper says of its own accord


@dataclass(slots=True)
class Link:
    """One keeper, as the server sees it."""

    index: int
    pid: int
    sock: socket.socket
    packet: bytearray  # what `receive` received last
    receive: Callable[[], int | None]
    asked: int = 0
    full: bool = False
    threads: set[int] = field(default_factory=set)  # of the process, that read as well as its first
    backlog: deque[bytes] = field(default_factory=deque)
    delayed: bool = False  # the backlog waits for answers


class Keepers:
    """The keepers of a mount, by index. `fd` is readable when one has said something, or `flush` is due.

    Not thread-safe, but for `spoke` and the frozen sets: the lock of admission is held.
    """

    def __init__(self, catalog: Catalog, more: Callable[[], None], inode: Callable[[int], int]) -> None:
        """`more` asks the supervisor for another keeper. `inode`: of a record, as keepers see it; 0 if unknown."""
        self.links: dict[int, Link] = {}
        self.pids: frozenset[int] = frozenset()
        self.threads: frozenset[int] = frozenset()  # by which the kernel names who reads
        self._by_fd: dict[int, Link] = {}
        self._catalog = catalog
        self._more = more
        self._inode = inode
        self._is_coming = False  # another keeper
        self._gathering = Timer()  # ends when requests that wait for others have waited long enough
        self._is_gathering = False
        self._events = select.epoll()
        self._events.register(self._gathering.fd, select.EPOLLIN | select.EPOLLET)
        self.fd = self._events.fileno()

    # -- who there is -------------------------------------------------------------------------------------------

    def add(self, index: int, pid: int, sock: socket.socket) -> None:
        """A keeper joins."""
        sock.setblocking(False)
        packet, fd = bytearray(MAX_PACKET), sock.fileno()
        self.links[index] = self._by_fd[fd] = Link(index, pid, sock, packet, quick_reader(fd, packet))
        self._events.register(fd, select.EPOLLIN)
        self.pids |= {pid}
        self.threads |= {pid}
        self._is_coming = False

    def remove(self, index: int) -> bool:
        """A keeper died, and the supervisor is about to replace it; False if it is not known."""
        link = self.links.pop(index, None)
        if link is None:
            return False
        self.pids -= {link.pid}
        self.threads -= {link.pid, *link.threads}
        # Closing would not end it, since the supervisor has the same socket.
        self._events.unregister(link.sock)
        del self._by_fd[link.sock.fileno()]
        link.sock.close()
        self._is_coming = True
        return True

    def expect(self) -> None:
        """Another keeper comes without being asked for."""
        self._is_coming = True

    def want(self) -> None:
        """Have another keeper started, unless one is coming."""
        if not self._is_coming:
            self._is_coming = True
            self._more()

    def first(self) -> Link | None:
        """A keeper, whichever; None if there is none."""
        return next(iter(self.links.values()), None)

    def with_room(self) -> Link | None:
        """A keeper that may take another item; None if there is none."""
        return next((link for link in self.links.values() if not link.full), None)

    def load(self) -> int:
        """How many requests have no answer yet."""
        return sum(link.asked + len(link.backlog) for link in self.links.values())

    # -- asking -------------------------------------------------------------------------------------------------

    def ask(self, link: Link, verb: Verb, item: int = 0, flags: int = 0) -> None:
        """Ask a keeper for something, soon."""
        record = items.record_of(item)
        offset, length = items.span(item, self._catalog.size(record))
        packet = REQUEST.pack(verb, flags, item, self._inode(record), offset, length)
        link.backlog.append(packet + self._catalog.path(record))
        if verb != Verb.PIN or len(link.backlog) >= _TOGETHER:
            self._flush(link)
        else:
            self._flush_in(_GATHERS)

    def flush(self) -> None:
        """Send now what waits for more of the same."""
        self._is_gathering = False  # if the timer ends all the same, there is nothing to send
        for link in self.links.values():
            self._flush(link)

    def _flush_in(self, seconds: float) -> None:
        """Have `fd` be readable then, if it is not to be already."""
        if not self._is_gathering:
            self._is_gathering = True
            self._gathering.start(seconds)

    def _flush(self, link: Link) -> None:
        while link.backlog and link.asked < _WINDOW:
            try:
                quick_write(link.sock.fileno(), link.backlog[0])
            except (BlockingIOError, OSError):  # full, or dying: the supervisor will say so
                if not link.asked:  # no answer will come that has it tried again
                    self._flush_in(_AGAIN)
                break
            link.backlog.popleft()
            link.asked += 1
        link.delayed = bool(link.backlog)

    # -- listening ----------------------------------------------------------------------------------------------

    def spoke(self) -> Iterator[Link | None]:
        """The keepers that have said something; None where `flush` is due."""
        for fd, _ in self._events.poll(0):
            if fd == self._gathering.fd:
                yield None
            elif link := self._by_fd.get(fd):
                yield link

    def hear(self, link: Link) -> Reply | None:
        """What a keeper says; None if that is nothing more. Raises EOFError if it died."""
        while self.links.get(link.index) is link:  # else its descriptor's number may be another one's by now
            try:
                n = link.receive()
            except OSError:
                return None
            if n is None:
                return None
            if not n:
                raise EOFError
            try:
                reply = parse_reply(bytes(link.packet[:n]))
            except ValueError as e:
                log.warning("keeper %d: %s", link.pid, e)
                continue
            self._note(link, reply)
            return reply
        return None

    def _note(self, link: Link, reply: Reply) -> None:
        """See to what an answer says of the keeper itself."""
        if reply.outcome is Outcome.THREAD:
            link.threads.add(reply.item)
            self.threads |= {reply.item}
        if reply.outcome in _UNASKED or reply.pins:
            return
        link.asked = max(0, link.asked - 1)
        if reply.outcome is Outcome.DROPPED:
            link.full = False
        elif reply.outcome is Outcome.FULL:
            link.full = True
        if link.delayed:
            self._flush(link)
