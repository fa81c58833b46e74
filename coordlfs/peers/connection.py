"""A connection between two nodes, from either end: TCP, TLS where it is asked for, and proofs of the key both ways.

Every step has a time limit. Sockets are blocking, with the kernel's limits (SO_RCVTIMEO), which cost no system call.
It does not know who owns what.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 (the first name that is looked up would import it, when there may be no descriptor left)
import os
import socket
import ssl
import struct
import time
from dataclasses import dataclass

from coordlfs.peers import protocol
from coordlfs.peers.protocol import ProtocolError, Reply, Request

CONNECT = 1.0  # seconds for each step until both sides know each other
ANSWER = 3.0  # seconds until a reply begins, and then until its payload is there
_BUFFER = 4 << 20
_TIME = struct.Struct("@ll")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a node proves itself with: the cluster's key, and certificates if there are any."""

    key: bytes
    cert: str | None = None
    private: str | None = None
    ca: str | None = None

    def context(self, *, server: bool) -> ssl.SSLContext | None:
        """What TLS needs for this side; None without TLS. Raises OSError for files that are of no use.

        Both sides show a certificate of the cluster's own CA. Names are not compared: whoever has such a certificate
        and the key belongs to the cluster, whatever its address is today.
        """
        if self.cert is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.ca)
        context.load_cert_chain(self.cert, self.private)
        return context


def set_limits(sock: socket.socket, receive: float, send: float) -> None:
    """Seconds after which a call on a blocking socket gives up, with BlockingIOError; with TLS, `receive` for both.

    OpenSSL's calls, the handshake among them, would try again for ever what the kernel gave up: there the interpreter
    watches the time, and says TimeoutError.
    """
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(receive)
        return
    for option, seconds in ((socket.SO_RCVTIMEO, receive), (socket.SO_SNDTIMEO, send)):
        sock.setsockopt(socket.SOL_SOCKET, option, _TIME.pack(int(seconds), int(seconds % 1 * 1e6)))


def fill(sock: socket.socket, view: memoryview) -> None:
    """Receive exactly as much as `view` holds. Raises OSError, ProtocolError if the other side ends before."""
    if not isinstance(sock, ssl.SSLSocket):
        n = sock.recv_into(view, 0, socket.MSG_WAITALL)
        if n == len(view):
            return
        raise TimeoutError("too slow") if n else ProtocolError("the connection ended in the middle")
    deadline = time.monotonic() + ANSWER
    while view:
        n = sock.recv_into(view)
        if not n:
            raise ProtocolError("the connection ended in the middle")
        view = view[n:]
        if view and time.monotonic() > deadline:
            raise TimeoutError("too slow")


def _receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    fill(sock, memoryview(data))
    return bytes(data)


def _prepare(sock: socket.socket) -> None:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    set_limits(sock, CONNECT, CONNECT)


def _wrap(sock: socket.socket, tls: ssl.SSLContext, *, server: bool) -> socket.socket:
    wrapped = tls.wrap_socket(sock, server_side=server, do_handshake_on_connect=False)
    set_limits(wrapped, CONNECT, CONNECT)
    wrapped.do_handshake()
    return wrapped


def connect(address: tuple[str, int], credentials: Credentials, tls: ssl.SSLContext | None) -> socket.socket:
    """A connection on which requests may be sent. Raises OSError, ProtocolError."""
    sock = socket.create_connection(address, CONNECT)
    try:
        _prepare(sock)
        if tls is not None:
            sock = _wrap(sock, tls, server=False)
        server_nonce = protocol.parse_greeting(_receive(sock, protocol.GREETING))
        client_nonce = os.urandom(protocol.NONCE)
        sock.sendall(protocol.client_proof(credentials.key, server_nonce, client_nonce))
        protocol.check_server(credentials.key, server_nonce, client_nonce, _receive(sock, protocol.PROOF))
        set_limits(sock, ANSWER, CONNECT)
    except BaseException:
        sock.close()
        raise
    return sock


def accept(sock: socket.socket, credentials: Credentials, tls: ssl.SSLContext | None) -> socket.socket:
    """The other end of `connect`: a connection on which requests may be awaited. Raises OSError, ProtocolError."""
    _prepare(sock)
    if tls is not None:
        sock = _wrap(sock, tls, server=True)
    nonce = os.urandom(protocol.NONCE)
    sock.sendall(protocol.greeting(nonce))
    sock.sendall(protocol.check_client(credentials.key, nonce, _receive(sock, protocol.CLIENT_PROOF)))
    return sock


def ask(sock: socket.socket, request: Request, room: memoryview) -> Reply:
    """Send one request, and receive the reply; its payload is in `room` then. Raises OSError, ProtocolError.

    For who has nothing else under way on the connection.
    """
    sock.sendall(protocol.encode_request(request))
    reply = protocol.parse_reply(_receive(sock, protocol.REPLY), request)
    fill(sock, room[: reply.length])
    return reply
