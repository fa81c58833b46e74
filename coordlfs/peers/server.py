"""The peer server of a mount: serves cached items to other nodes, and watches who they are.

An ordinary client of the mount, in a process of its own as the keeper is, so that serving takes nothing from the
process that answers the kernel. It sends what is resident with `sendfile`; for what is not, it asks the mount's server
whether there is room and this node is the owner, and then simply reads it, and so has it admitted as any miss has.
It opens files with O_NOATIME, by which the server knows these READs, and asks no peer for them in turn; an ordinary
user may do so with files of its own only, and then the server looks at who reads.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import trio

from coordlfs import logs
from coordlfs.kernel import pages, paths, process
from coordlfs.peers import connection, link, protocol, settings
from coordlfs.peers.membership import Membership
from coordlfs.peers.protocol import ProtocolError, Reply, Request, Requests, Status, Verb

log = logging.getLogger(__name__)

_MOST_CONNECTIONS = 4096
_MOST_STRANGERS = 64  # connections that have not yet proved anything
_OTHER_VERSION = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE}
)  # gone, or changed while it was read
_SEND = 5.0  # seconds that a call may wait for a receiver to take something
_WAITS = 1.0  # seconds that a request may wait for those before it; far less than askers wait for its answer
_IDLE = 120.0  # seconds without a request after which a connection is closed: nodes greet each other every few
_QUESTION = 1.0  # seconds that the mount's server may think
_RECEIVE = 1 << 16
_CHECKSUMS = 1 << 18  # that are remembered, at about 200 bytes each


class Questions:
    """Asks the mount's server, one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._number = 0
        self.pinned = 0
        self.said: dict[str, Any] = {}  # what the server wants other nodes to be told
        connection.set_limits(sock, _QUESTION, _QUESTION)

    def may_read(self, node: int, offset: int) -> bool:
        """Whether this node owns the item at `offset` of a file and has room for it. No if there is no answer."""
        with self._lock, suppress(OSError):
            self._number = self._number + 1 & 0xFFFFFFFF
            self._sock.send(link.QUESTION.pack(b"?", self._number, node, offset))
            while packet := self._sock.recv(link.MOST):
                number, yes = self._hear(packet)
                if number == self._number:  # else it answers one that was given up
                    return yes
        return False

    def _hear(self, packet: bytes) -> tuple[int, bool]:
        """The number of the question that a packet answers, and the answer; of one that answers none, 0."""
        if packet[:1] == b"{":
            self.said = link.decode(packet)
            return 0, False
        _, number, yes, self.pinned = link.ANSWER.unpack(packet)
        return number, bool(yes)

    def tell(self, packet: bytes) -> None:
        """Send what needs no answer."""
        with self._lock, suppress(OSError):
            self._sock.send(packet)
        with self._lock, suppress(OSError):
            while packet := self._sock.recv(link.MOST, socket.MSG_DONTWAIT):
                self._hear(packet)


class Checksums:
    """Checksums of ranges that were served before: what is resident need not be read to be sent again."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], int] = {}

    def get(self, key: tuple[int, ...]) -> int | None:
        """The checksum of a range of a version of a file, if it is known."""
        return self._known.get(key)

    def put(self, key: tuple[int, ...], value: int) -> None:
        """Remember one."""
        if len(self._known) >= _CHECKSUMS:
            self._known.clear()
        self._known[key] = value


def _is_asked_for(st: os.stat_result, request: Request) -> bool:
    """Whether a file is in the version that is asked for."""
    return stat.S_ISREG(st.st_mode) and (st.st_size, st.st_mtime_ns) == (request.size, request.mtime_ns)


def _status(error: OSError) -> Status:
    return Status.WRONG_VERSION if error.errno in _OTHER_VERSION else Status.ERROR


class PeerServer:
    """Accepts connections, each served by a thread of its own."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._tree: int = config["tree"]
        self._listener = socket.socket(fileno=config["listener"])
        self._credentials = settings.credentials(config)
        self._tls = self._credentials.context(server=True)
        self._questions = Questions(socket.socket(fileno=config["socket"]))
        self._checksums = Checksums()
        self._lock = threading.Lock()
        self._connections = threading.Semaphore(_MOST_CONNECTIONS)
        self._strangers = threading.Semaphore(_MOST_STRANGERS)
        self.served: Counter[str] = Counter()  # bytes by the name of the asker
        self.membership = Membership(config, self._credentials, self._questions.tell, self.served)

    def accept(self) -> None:
        """Accept connections, for ever; with as many as there may be, the next ones wait in the kernel's queue."""
        while True:
            self._strangers.acquire()
            self._connections.acquire()
            sock = None
            try:
                sock, where = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock, where[0]), name="peer", daemon=True).start()
            except (OSError, RuntimeError) as e:  # no descriptor, or no thread
                log.error("accepting: %s", e)
                if sock is not None:
                    sock.close()
                self._connections.release()
                self._strangers.release()
                time.sleep(1)

    def _serve(self, sock: socket.socket, who: str) -> None:
        stranger = True
        try:
            sock = connection.accept(sock, self._credentials, self._tls)
            self._strangers.release()
            stranger = False
            connection.set_limits(sock, _IDLE, _SEND)
            self._answer_all(sock, who)
        except ProtocolError as e:
            log.warning("connection from %s closed: %s", who, e)
        except OSError as e:
            log.debug("connection from %s closed: %s", who, e)
        finally:
            sock.close()
            self._connections.release()
            if stranger:
                self._strangers.release()

    def _answer_all(self, sock: socket.socket, who: str) -> None:
        requests = Requests()
        buffer = memoryview(pages.buffer(protocol.MOST_PAYLOAD))
        plain = self._tls is None
        while data := sock.recv(_RECEIVE):
            came = time.monotonic()
            for request in requests.feed(data):
                waited = time.monotonic() - came
                if request.verb is Verb.INFO:
                    self._info(sock, request)
                    if request.path and self.membership.knows(name := request.path.decode(errors="replace")):
                        who = name
                elif waited > _WAITS:  # the source is as fast, and those who ask later are spared the waiting
                    self._refuse(sock, request, Status.NO, waited)
                else:
                    sent = self._get(sock, request, buffer, plain)
                    with self._lock:
                        self.served[who] += sent

    def _info(self, sock: socket.socket, request: Request) -> None:
        text = json.dumps(self.membership.own(self._questions.pinned, self._questions.said)).encode()
        reply = Reply(Status.OK, request.number, len(text), protocol.checksum(text))
        sock.sendall(protocol.encode_reply(reply) + text)

    def _get(self, sock: socket.socket, request: Request, buffer: memoryview, plain: bool) -> int:
        """Answer one request for bytes; how many were sent. Raises OSError if the connection is of no use any more."""
        try:
            fd = self._open(request.path)
        except OSError as e:
            self._refuse(sock, request, _status(e))
            return 0
        try:
            try:
                status, check, is_read = self._find(fd, request, buffer, plain)
            except OSError as e:
                status, check, is_read = _status(e), 0, False
            if status is not Status.OK:
                self._refuse(sock, request, status)
                return 0
            head = protocol.encode_reply(Reply(Status.OK, request.number, request.length, check))
            if is_read:
                sock.sendall(head, socket.MSG_MORE if plain else 0)
                sock.sendall(buffer[: request.length])
            else:
                sock.sendall(head, socket.MSG_MORE)
                at, end = request.offset, request.offset + request.length
                while at < end:
                    n = os.sendfile(sock.fileno(), fd, at, end - at)
                    if not n:
                        raise OSError("the file ends too early")
                    at += n
            return request.length
        finally:
            os.close(fd)

    def _open(self, path: bytes) -> int:
        try:
            return paths.open_beneath(self._tree, path, os.O_RDONLY | os.O_NOATIME)
        except PermissionError:
            return paths.open_beneath(self._tree, path, os.O_RDONLY)

    def _find(self, fd: int, request: Request, buffer: memoryview, plain: bool) -> tuple[Status, int, bool]:
        """How to answer; the checksum; and whether the bytes were read into `buffer`. Raises OSError."""
        st = os.fstat(fd)
        if not _is_asked_for(st, request):
            return Status.WRONG_VERSION, 0, False
        first = request.offset // pages.PAGE * pages.PAGE
        span = pages.count(request.offset + request.length - first) * pages.PAGE
        resident = pages.resident(fd, first, span)
        if (resident is None or resident * pages.PAGE < span) and not self._questions.may_read(
            st.st_ino, request.offset
        ):
            return Status.NO, 0, False
        key = (st.st_ino, request.offset, request.length, st.st_size, st.st_mtime_ns)
        known = self._checksums.get(key)
        if plain and known is not None:
            return Status.OK, known, False
        view = buffer[: request.length]
        # What the mount believed of the file may be old; then it was this that made it look, and know better.
        if os.preadv(fd, [view], request.offset) != request.length or not _is_asked_for(os.fstat(fd), request):
            return Status.WRONG_VERSION, 0, False
        known = protocol.checksum(view)
        self._checksums.put(key, known)
        return Status.OK, known, True

    @staticmethod
    def _refuse(sock: socket.socket, request: Request, status: Status, stay_away: float = 0.0) -> None:
        sock.sendall(protocol.encode_reply(Reply(status, request.number, 0, round(stay_away * 1000))))


def _end_process(died: threading.ExceptHookArgs) -> None:
    log.error(
        "a thread of the peer server died",
        exc_info=(died.exc_type, died.exc_value or died.exc_type(), died.exc_traceback),
    )
    os._exit(1)  # another one takes its place


def main() -> None:
    """`python -m coordlfs.peers.server JSON`, started by the supervisor, with the descriptors that the JSON names."""
    config = json.loads(sys.argv[1])
    process.end_with_parent(config["parent"], signal.SIGKILL)
    process.set_name("coordlfs-peers")
    process.raise_limits()
    logs.configure(config["log"])
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor's to handle
    threading.excepthook = _end_process
    try:
        server = PeerServer(config)
        threading.Thread(target=server.accept, name="accept", daemon=True).start()
        trio.run(server.membership.run)
    except Exception:
        log.exception("the peer server ends")
        os._exit(1)


if __name__ == "__main__":
    main()
