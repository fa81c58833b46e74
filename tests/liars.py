"""Nodes that lie: they prove that they know the key, and answer in every way that is wrong."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from coordlfs.peers import connection, protocol
from coordlfs.peers.connection import Credentials
from coordlfs.peers.protocol import ProtocolError, Reply, Request, Requests, Status, Verb

CAPACITY = 1 << 34  # bytes that a liar claims to cache: it owns nearly everything
Lie = Callable[[socket.socket, Request], None]


def introduction(name: str, capacity: int = CAPACITY) -> bytes:
    """What a node says of itself."""
    return json.dumps({"name": name, "instance": "liar", "capacity": capacity, "pinned": 0}).encode()


class Liar:
    """A node that knows the key, and answers requests for bytes with `lie`.

    `listener` is where: a socket that listens, which is closed in the end. `says`: who it is, if not what makes sense.
    """

    def __init__(self, listener: socket.socket, key: bytes, lie: Lie, says: bytes | None = None) -> None:
        self._listener = listener
        self._credentials = Credentials(key)
        self._lie = lie
        host, port = listener.getsockname()
        self._says = says or introduction(f"{host}:{port}")
        self.asked = 0
        self.strangers = 0
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._socks.append(sock)
                self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with suppress(OSError, ProtocolError):
            try:
                connection.accept(sock, self._credentials, None)
            except ProtocolError:
                self.strangers += 1
                sock.close()
                return
            connection.set_limits(sock, 30, 30)
            requests = Requests()
            while data := sock.recv(1 << 16):
                for request in requests.feed(data):
                    if request.verb is Verb.INFO:
                        text = self._says
                        reply = Reply(Status.OK, request.number, len(text), protocol.checksum(text))
                        sock.sendall(protocol.encode_reply(reply) + text)
                    else:
                        self.asked += 1
                        self._lie(sock, request)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._socks:
            sock.close()


def garbage(sock: socket.socket, request: Request) -> None:
    sock.sendall(os.urandom(5000))


def wrong_bytes(sock: socket.socket, request: Request) -> None:
    data = bytes(request.length)
    sock.sendall(protocol.encode_reply(Reply(Status.OK, request.number, len(data), protocol.checksum(b"x"))) + data)


def wrong_version(sock: socket.socket, request: Request) -> None:
    sock.sendall(protocol.encode_reply(Reply(Status.WRONG_VERSION, request.number)))


def half_a_frame(sock: socket.socket, request: Request) -> None:
    data = bytes(request.length // 2)
    sock.sendall(protocol.encode_reply(Reply(Status.OK, request.number, request.length, 1)) + data)
    sock.shutdown(socket.SHUT_RDWR)


def half_a_head(sock: socket.socket, request: Request) -> None:
    sock.sendall(protocol.encode_reply(Reply(Status.OK, request.number, request.length, 1))[:7])
    sock.shutdown(socket.SHUT_RDWR)


def nothing(sock: socket.socket, request: Request) -> None:
    pass


def too_much(sock: socket.socket, request: Request) -> None:
    data = bytes(request.length + 4096)
    sock.sendall(protocol.encode_reply(Reply(Status.OK, request.number, len(data), protocol.checksum(data))) + data)


def another_answer(sock: socket.socket, request: Request) -> None:
    data = bytes(request.length)
    sock.sendall(protocol.encode_reply(Reply(Status.OK, request.number + 1, len(data), protocol.checksum(data))) + data)


def an_error(sock: socket.socket, request: Request) -> None:
    sock.sendall(protocol.encode_reply(Reply(Status.ERROR, request.number)))
