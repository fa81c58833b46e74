"""Asking a peer: a pool of connections to each, on which requests are pipelined, and a breaker before it.

Called by byte-lane threads, which receive straight into the memory that the reply to the kernel is sent from. Replies
come in the order of the requests, so each thread waits for its turn and reads its own; no thread is needed to
distribute them. Whatever goes wrong costs a bounded time, and the caller reads the source.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum

from coordlfs.peers import connection, protocol
from coordlfs.peers.breaker import Breaker
from coordlfs.peers.connection import Credentials
from coordlfs.peers.protocol import ProtocolError, Request, Status, Verb

_CONNECTIONS = 8  # per peer
_WAITING = 64  # requests that wait for one peer: half of the byte lane's threads, which all have other things to do
_ALL_WAITING = 96  # and for all peers
_SLOW_AFTER, _SLOW_RATE = 0.3, 1e6  # a payload that takes so many seconds at fewer bytes a second is a failure


class Outcome(Enum):
    """What came of asking."""

    OK = "ok"
    NO = "no"
    WRONG_VERSION = "wrong_version"
    ERROR = "error"  # the peer's source failed
    FAILED = "failed"  # no answer, or one that breaks the protocol
    BAD = "bad"  # the checksum is wrong
    SKIPPED = "skipped"  # not asked: the breaker is open, or too many wait


_OUTCOMES = {Status.NO: Outcome.NO, Status.WRONG_VERSION: Outcome.WRONG_VERSION, Status.ERROR: Outcome.ERROR}


class Pipe:
    """One connection. Requests go out at once; replies are read in turn, each by who asked."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.broken = False
        self.number = 0
        self.turns: deque[threading.Lock] = deque()
        self._lock = threading.Lock()
        # OpenSSL wants one thread at a time, also of a sender and a receiver.
        self._alone = threading.Lock() if isinstance(sock, ssl.SSLSocket) else None

    def ask(self, request: Callable[[int], Request], into: memoryview) -> protocol.Reply:
        """Send a request and receive its reply and payload. Raises OSError, ProtocolError, and is broken then."""
        if self._alone is None:
            return self._ask(request, into)
        if not self._alone.acquire(timeout=connection.ANSWER):
            raise TimeoutError("too slow")
        try:
            return self._ask(request, into)
        finally:
            self._alone.release()

    def _ask(self, request: Callable[[int], Request], into: memoryview) -> protocol.Reply:
        turn = threading.Lock()
        turn.acquire()
        with self._lock:
            self.number = self.number + 1 & 0xFFFFFFFF
            asked = request(self.number)
            if self.broken:
                raise ProtocolError("the connection broke before")
            try:
                self.sock.sendall(protocol.encode_request(asked))
            except OSError:
                self._break()
                raise
            self.turns.append(turn)
            if len(self.turns) == 1:
                turn.release()
        try:
            if not turn.acquire(timeout=connection.ANSWER):
                raise TimeoutError("too slow")
            return self._receive(asked, into)
        except BaseException:
            self._break()
            raise
        finally:
            with self._lock:
                first = self.turns[0] is turn
                self.turns.remove(turn)
                if first and self.turns:
                    self.turns[0].release()
                self._close_if_unused()

    def _receive(self, asked: Request, into: memoryview) -> protocol.Reply:
        if self.broken:
            raise ProtocolError("the connection broke before")
        head = bytearray(protocol.REPLY)
        connection.fill(self.sock, memoryview(head))
        reply = protocol.parse_reply(head, asked)
        if reply.length:
            began = time.monotonic()
            connection.fill(self.sock, into[: reply.length])
            took = time.monotonic() - began
            if took > _SLOW_AFTER and reply.length / took < _SLOW_RATE:
                raise TimeoutError("too slow")
        return reply

    def _break(self) -> None:
        self.broken = True
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes whoever is receiving

    def close(self) -> None:
        """Break the connection; its descriptor is closed when nobody uses it any more."""
        with self._lock:
            self._break()
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self.broken and not self.turns:
            self.sock.close()


class Waiting:
    """How many threads wait for peers: never so many that none is left for the source."""

    def __init__(self, most: int = _ALL_WAITING) -> None:
        self._free = threading.Semaphore(most)

    def enter(self) -> bool:
        """Whether one more may wait; it calls `leave` afterwards."""
        return self._free.acquire(blocking=False)

    def leave(self) -> None:
        """It waits no longer."""
        self._free.release()


class Peer:
    """Another node, as one asks it. Thread-safe."""

    def __init__(
        self,
        name: str,
        address: tuple[str, int],
        credentials: Credentials,
        tls: ssl.SSLContext | None,
        waiting: Waiting,
    ) -> None:
        self.name = name
        self.address = address
        self.received_bytes = 0
        self.received = 0
        self.outcomes = dict.fromkeys(Outcome, 0)
        self.breaker = Breaker()
        self._credentials = credentials
        self._tls = tls
        self._waiting = waiting
        self._pipes: list[Pipe] = []
        self._opening = 0
        self._asking = 0
        self._lock = threading.Lock()

    def get(
        self,
        path: bytes,
        version: tuple[int, int],
        offset: int,
        into: memoryview,
        before_wait: Callable[[], None],
    ) -> Outcome:
        """Have the peer fill `into` with the bytes at `offset` of a file in `version` (size, mtime_ns).

        `before_wait` is called before anything that may wait. Takes a few seconds at most, and raises nothing.
        """
        if not self._waiting.enter():
            return self._count(Outcome.SKIPPED, 0)
        try:
            with self._lock:
                if self._asking >= _WAITING or not self.breaker.allows(time.monotonic()):
                    self.outcomes[Outcome.SKIPPED] += 1
                    return Outcome.SKIPPED
                self._asking += 1
            outcome = Outcome.FAILED
            try:
                before_wait()
                outcome = self._ask(path, version, offset, into)
            finally:
                with self._lock:
                    self._asking -= 1
                    if outcome in (Outcome.FAILED, Outcome.BAD):
                        self.breaker.failed(time.monotonic())
                    else:
                        self.breaker.succeeded()
            return self._count(outcome, len(into))
        finally:
            self._waiting.leave()

    def _count(self, outcome: Outcome, nbytes: int) -> Outcome:
        with self._lock:
            self.outcomes[outcome] += 1
            if outcome is Outcome.OK:
                self.received += 1
                self.received_bytes += nbytes
        return outcome

    def _ask(self, path: bytes, version: tuple[int, int], offset: int, into: memoryview) -> Outcome:
        pipe = None
        try:
            pipe = self._pipe()
            reply = pipe.ask(lambda number: Request(Verb.GET, number, len(into), offset, *version, path), into)
        except (OSError, ProtocolError, ValueError):
            if pipe is not None:
                self._remove(pipe)
            self._close_idle()
            return Outcome.FAILED
        if reply.status is not Status.OK:
            return _OUTCOMES[reply.status]
        if protocol.checksum(into) != reply.checksum:
            self._remove(pipe)
            return Outcome.BAD
        return Outcome.OK

    def _pipe(self) -> Pipe:
        """The connection with the fewest requests under way; a new one if all are in use and there may be more."""
        with self._lock:
            best = min(self._pipes, key=lambda pipe: len(pipe.turns), default=None)
            if best is not None and (not best.turns or len(self._pipes) + self._opening >= _CONNECTIONS):
                return best
            self._opening += 1
        pipe = None
        try:
            pipe = Pipe(connection.connect(self.address, self._credentials, self._tls))
        finally:
            with self._lock:
                self._opening -= 1
                if pipe is not None:
                    self._pipes.append(pipe)
        return pipe

    def _remove(self, pipe: Pipe) -> None:
        pipe.close()
        with self._lock, suppress(ValueError):
            self._pipes.remove(pipe)

    def _close_idle(self) -> None:
        """If the peer was restarted every connection is of no use: find that out once, and not for each."""
        with self._lock:
            idle = [pipe for pipe in self._pipes if not pipe.turns]
            self._pipes = [pipe for pipe in self._pipes if pipe.turns]
        for pipe in idle:
            pipe.close()

    def close(self) -> None:
        """Close every connection; who waits on one gets FAILED."""
        with self._lock:
            pipes, self._pipes = self._pipes, []
        for pipe in pipes:
            pipe.close()
