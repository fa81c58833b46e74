"""Asking a peer: a pool of connections to each, on which requests are pipelined, and a breaker before it.

Whoever asks sends its request and goes on. Replies come in the order of the requests; whoever sees that one has come
has the receiver take it, and hand it to the function that waits for it, in memory that is used for the next one
afterwards. So a READ that another node answers holds no thread, and costs no switch between threads where those who ask
are those who look. Whatever goes wrong is said within a bounded time, and the source is read. It does not know who
owns what, or what to do without an answer.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from coordlfs.kernel import pages
from coordlfs.peers import connection, protocol
from coordlfs.peers.breaker import Breaker
from coordlfs.peers.connection import Credentials
from coordlfs.peers.protocol import ProtocolError, Reply, Request, Status, Verb

log = logging.getLogger(__name__)

_CONNECTIONS = 8  # per peer
_ASKED = 64  # requests that one peer has not answered
_OPENING = 96  # threads that wait for connections to be opened: so many are left for the source
_SLOW_AFTER, _SLOW_RATE = 0.3, 1e6  # a payload that takes so many seconds at fewer bytes a second is a failure
_LOOK_EVERY = 0.2  # seconds between two looks for what is late
_ROOMS = 4  # buffers for payloads that are kept


class Outcome(Enum):
    """What came of asking."""

    OK = "ok"
    NO = "no"
    WRONG_VERSION = "wrong_version"
    ERROR = "error"  # the peer's source failed
    FAILED = "failed"  # no answer, or one that breaks the protocol
    BAD = "bad"  # the checksum is wrong
    SKIPPED = "skipped"  # not asked: the breaker is open, or too many wait


Done = Callable[[Outcome, memoryview | None], None]  # the payload goes with OK, and is good until the call returns
_OUTCOMES = {
    Status.OK: Outcome.OK,
    Status.NO: Outcome.NO,
    Status.WRONG_VERSION: Outcome.WRONG_VERSION,
    Status.ERROR: Outcome.ERROR,
}
_PAYLOAD_AT = pages.PAGE  # in a buffer: a payload begins with a page, and its head lies before it
_HEAD_AT = _PAYLOAD_AT - protocol.REPLY


@dataclass(slots=True)
class _Call:
    """A request that is under way."""

    request: Request
    since: float
    done: Done


class Pipe:
    """One connection. Any thread sends; the receiver alone receives, one thread at a time, and closes."""

    def __init__(
        self, sock: socket.socket, on_end: Callable[[Pipe], None], on_busy: Callable[[float], None] = lambda _: None
    ) -> None:
        """`on_busy` is told for how many seconds the other side wants to be left alone, before who asked is."""
        self.sock = sock
        self._on_busy = on_busy
        self.calls: deque[_Call] = deque()
        self.broken = False
        self._on_end = on_end
        # Also keeps receiving apart from sending where that is TLS: OpenSSL wants one thread at a time.
        self._lock = threading.Lock()
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        self._room: memoryview | None = None  # what was received of the reply that is due lies here
        self._got = 0  # bytes of it, its head included
        self._reply: Reply | None = None  # its head, once that is there
        self._began = self._heard = 0.0  # the reply that is due; the last one
        if self._is_tls:
            sock.setblocking(False)
        else:
            connection.set_limits(sock, connection.CONNECT, connection.CONNECT)  # of which only sending may wait

    def send(self, request: Request, done: Done) -> bool:
        """Send a request, after which `done` is called once. False: the connection is broken, and it is not."""
        encoded = protocol.encode_request(request)
        with self._lock:
            if self.broken:
                return False
            self.calls.append(_Call(request, time.monotonic(), done))
            try:
                self.sock.sendall(encoded)
                return True
            except OSError:
                pass
        self.fail()
        return True

    def fail(self, outcome: Outcome = Outcome.FAILED) -> None:
        """Break the connection: the first call that is under way gets `outcome`, all others FAILED."""
        with self._lock:
            calls, self.calls = self.calls, deque()
            self.broken = True
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)  # which tells the receiver
        self._on_end(self)
        for call in calls:
            call.done(outcome, None)
            outcome = Outcome.FAILED

    # -- called by the receiver ---------------------------------------------------------------------------------

    def _take(self, view: memoryview) -> int:
        """Receive into `view` what there is; 0 if there is nothing now. Raises OSError, ProtocolError."""
        try:
            if self._is_tls:
                with self._lock:
                    if self.broken:
                        raise ProtocolError("the connection broke before")
                    n = self.sock.recv_into(view)
            else:
                n = self.sock.recv_into(view, 0, socket.MSG_DONTWAIT)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        if not n:
            raise ProtocolError("the connection ended")
        return n

    def receive(self, rooms: list[memoryview]) -> None:
        """Take what has come, and hand on what is complete. Raises OSError, ProtocolError.

        One call of recv takes head and payload of the reply that is due, where both have come. If it is a refusal, what
        was taken for its payload is of the replies that follow.
        """
        if self._room is None:
            self._room = rooms.pop() if rooms else memoryview(pages.buffer(_PAYLOAD_AT + protocol.MOST_PAYLOAD))
        self._receive(self._room)
        if not self._got:  # else it is kept for what is still to come
            if len(rooms) < _ROOMS:
                rooms.append(self._room)
            self._room = None

    def _receive(self, room: memoryview) -> None:
        while True:
            try:
                due = self._reply.length if self._reply else self.calls[0].request.length
            except IndexError:
                due = 0
            if self._got < protocol.REPLY or (self._reply and self._got < protocol.REPLY + due):
                n = self._take(room[_HEAD_AT + self._got : _PAYLOAD_AT + due])
                if not n:
                    return
                self._got += n
            if self._reply is None and self._got >= protocol.REPLY:
                try:
                    request = self.calls[0].request
                except IndexError:
                    raise ProtocolError("a reply that nobody asked for") from None
                self._began = time.monotonic()  # first, since another thread looks for what is late
                self._reply = protocol.parse_reply(room[_HEAD_AT:_PAYLOAD_AT], request)
            reply = self._reply
            if reply is None or self._got < protocol.REPLY + reply.length:
                continue  # nearly always more has come meanwhile, and to look is cheaper than to come again
            payload = room[_PAYLOAD_AT : _PAYLOAD_AT + reply.length]
            if reply.status is Status.OK and protocol.checksum(payload) != reply.checksum:
                self.fail(Outcome.BAD)
                return
            if reply.status is Status.NO and reply.checksum:
                self._on_busy(reply.checksum / 1000)
            self._finish(_OUTCOMES[reply.status], payload)
            self._got -= protocol.REPLY + reply.length
            if self._got:
                after = _PAYLOAD_AT + reply.length
                room[_HEAD_AT : _HEAD_AT + self._got] = room[after : after + self._got]
            elif not self._is_tls or self.broken:  # OpenSSL may have more, of which the kernel knows nothing
                return

    def _finish(self, outcome: Outcome, payload: memoryview) -> None:
        self._reply, self._heard = None, time.monotonic()
        with self._lock:
            if self.broken:
                return  # and who waited was told
            call = self.calls.popleft()
        call.done(outcome, payload)

    def is_late(self, now: float) -> bool:
        """Whether a reply should have come by now, or goes on too slowly."""
        if self._reply is not None:
            took = now - self._began
            return took > connection.ANSWER or (took > _SLOW_AFTER and self._got < took * _SLOW_RATE)
        try:
            since = self.calls[0].since
        except IndexError:
            return False
        return now - max(since, self._heard) > connection.ANSWER or now - since > 2 * connection.ANSWER


class Receiver:
    """Receives what peers answer: `receive` when `fd` is readable, by any thread. One of its own calls `run`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.fd = self._epoll.fileno()
        self._pipes: dict[int, Pipe] = {}
        self._rooms: list[memoryview] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def add(self, pipe: Pipe) -> None:
        """Receive of a connection from now on, and close it when it is broken. Raises OSError."""
        fd = pipe.sock.fileno()
        self._pipes[fd] = pipe
        try:
            self._epoll.register(fd, select.EPOLLIN)
        except OSError:
            del self._pipes[fd]
            raise

    def receive(self) -> None:
        """Take what has come of all connections, and hand on what is complete."""
        with self._lock:
            for fd, _ in self._epoll.poll(0):
                pipe = self._pipes.get(fd)
                if pipe is not None:
                    self._receive(pipe)

    def run(self) -> None:
        """Give up what is late, until `close`."""
        while not self._closing.wait(_LOOK_EVERY):
            self.receive()  # what lies there already is not late, should all who look be held up
            now = time.monotonic()
            for pipe in list(self._pipes.values()):
                if pipe.is_late(now):
                    pipe.fail()
        for pipe in list(self._pipes.values()):
            pipe.fail()
        self.receive()  # which closes them

    def _receive(self, pipe: Pipe) -> None:
        if not pipe.broken:
            try:
                pipe.receive(self._rooms)
            except (OSError, ProtocolError) as e:
                log.debug("a connection to a peer ends: %s", e)
                pipe.fail()
        if pipe.broken:
            del self._pipes[pipe.sock.fileno()]
            self._epoll.unregister(pipe.sock)
            pipe.sock.close()

    def close(self) -> None:
        """End `run`, and every connection."""
        self._closing.set()


class Peer:
    """Another node, as one asks it. Thread-safe."""

    def __init__(
        self,
        name: str,
        address: tuple[str, int],
        credentials: Credentials,
        tls: ssl.SSLContext | None,
        receiver: Receiver,
        opening: threading.Semaphore,
        asker: str,
    ) -> None:
        """`opening` bounds how many threads wait for the connections of all peers; `asker` is the name of this node."""
        self.name = name
        self._asker = asker
        self.address = address
        self.received_bytes = 0
        self.outcomes = dict.fromkeys(Outcome, 0)
        self.breaker = Breaker()
        self._credentials = credentials
        self._tls = tls
        self._receiver = receiver
        self._openers = opening
        self._pipes: list[Pipe] = []
        self._opening = 0
        self._asked = self._number = 0
        self._lock = threading.Lock()

    def ask(
        self,
        path: bytes,
        version: tuple[int, int],
        offset: int,
        length: int,
        done: Done,
        before_wait: Callable[[], None],
    ) -> Outcome | None:
        """Ask for `length` bytes at `offset` of a file in `version` (size, mtime_ns).

        None: it is asked, and `done` will be called, by whatever thread, within a few seconds. Else why it is not.
        `before_wait` is called before a connection is opened, which may take a second or three.
        """
        with self._lock:
            if self._asked >= _ASKED or not self.breaker.allows(time.monotonic()):
                return self._count(Outcome.SKIPPED)
            pipe = self._free_pipe()
            if pipe is None and self._opening >= _CONNECTIONS:
                return self._count(Outcome.SKIPPED)
            self._asked += 1
            self._number = self._number + 1 & 0xFFFFFFFF
            request = Request(Verb.GET, self._number, length, offset, *version, path)
            if pipe is None:
                self._opening += 1
        if pipe is None:
            pipe = self._open(before_wait)

        def answered(outcome: Outcome, payload: memoryview | None) -> None:
            with self._lock:
                self._asked -= 1
                if outcome is Outcome.OK:
                    self.received_bytes += length
                if outcome in (Outcome.FAILED, Outcome.BAD, Outcome.ERROR):  # an error takes its source's time
                    self.breaker.failed(time.monotonic())
                else:
                    self.breaker.succeeded()
                self._count(outcome)
            done(outcome, payload)

        if pipe is not None and pipe.send(request, answered):
            return None
        with self._lock:
            self._asked -= 1
            self.breaker.failed(time.monotonic())
            return self._count(Outcome.FAILED)

    def _count(self, outcome: Outcome) -> Outcome:
        self.outcomes[outcome] += 1
        return outcome

    def _free_pipe(self) -> Pipe | None:
        """A connection without requests; the one with the fewest if there may be no more; else None: open another."""
        for pipe in self._pipes:
            if not pipe.calls:
                return pipe
        if len(self._pipes) + self._opening < _CONNECTIONS:
            return None
        return min(self._pipes, key=lambda pipe: len(pipe.calls), default=None)

    def _open(self, before_wait: Callable[[], None]) -> Pipe | None:
        pipe = None
        try:
            if self._openers.acquire(blocking=False):
                before_wait()
                try:
                    sock = connection.connect(self.address, self._credentials, self._tls)
                    pipe = Pipe(sock, self._ended, self._is_busy)
                finally:
                    self._openers.release()
        except (OSError, ProtocolError) as e:
            log.debug("%s cannot be reached: %s", self.name, e)
        finally:
            with self._lock:
                self._opening -= 1
                if pipe is not None:
                    self._pipes.append(pipe)
        if pipe is not None:
            try:
                self._receiver.add(pipe)
            except OSError as e:  # too many watch what is to be watched
                log.warning("%s cannot be asked: %s", self.name, e)
                pipe.fail()
                pipe.sock.close()
                return None
            # Says for whom the peer counts what it sends; what it says of itself in turn is known.
            pipe.send(Request(Verb.INFO, 0, path=self._asker.encode()), lambda outcome, payload: None)
        return pipe

    def _is_busy(self, seconds: float) -> None:
        """The peer wants to be left alone: what waits there already is answered, or refused as well."""
        with self._lock:
            self.breaker.rest(time.monotonic(), seconds)

    def _ended(self, pipe: Pipe) -> None:
        with self._lock, suppress(ValueError):
            self._pipes.remove(pipe)

    def close(self) -> None:
        """Close every connection; who waits on one gets FAILED."""
        with self._lock:
            pipes, self._pipes = self._pipes, []
        for pipe in pipes:
            pipe.fail()


def openers() -> threading.Semaphore:
    """What bounds the threads that open connections to peers: never so many that none is left for the source."""
    return threading.Semaphore(_OPENING)
