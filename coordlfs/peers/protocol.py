"""What two nodes say to each other over one connection. Pure: bytes in, bytes out, nothing believed.

    server → client   greeting: magic, version, nonce
    client → server   proof: nonce, HMAC
    server → client   proof: HMAC; both know the key now
    client → server   requests, as many at a time as it likes
    server → client   a reply to each, in their order

Both nonces are part of both HMACs, and so is the role, so that no proof can be recorded, reflected or relayed between
roles. Without a key the same is said with an empty one, over loopback only. Integers are big-endian.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import xxhash

MAGIC = b"coordlfs"
VERSION = 1
NONCE = 32  # bytes
PROOF = 32
MOST_PAYLOAD = 1 << 20  # bytes that one request may ask for
LONGEST_PATH = 1 << 14
MOST_INFO = 1 << 14  # bytes of a node's description of itself

_GREETING = struct.Struct("!8sB7x32s")
_CLIENT_PROOF = struct.Struct("!32s32s")
_REQUEST = struct.Struct("!BxHIIQQq")  # verb, length of the path, number, length, offset, size, mtime_ns
_REPLY = struct.Struct("!B3xIIQ")  # status, number of the request, length, checksum

GREETING, CLIENT_PROOF, REPLY = _GREETING.size, _CLIENT_PROOF.size, _REPLY.size


class ProtocolError(Exception):
    """The other side broke the protocol, or does not know the key: the connection is of no use any more."""


class Verb(IntEnum):
    """What is asked for."""

    GET = 1  # bytes of a file
    INFO = 2  # the node's description of itself, JSON; the path is the asker's name, or empty


class Status(IntEnum):
    """How it is answered; all but OK without a payload."""

    OK = 0
    NO = 1  # not cached, and not going to be
    WRONG_VERSION = 2  # there is another version of the file here
    ERROR = 3  # it could not be read


_VERBS, _STATUSES = {int(verb): verb for verb in Verb}, tuple(Status)  # by number: faster than to call the class


class Request(NamedTuple):
    """`length` bytes at `offset` of the file at `path` in the version given by `size` and `mtime_ns`."""

    verb: Verb
    number: int
    length: int = 0
    offset: int = 0
    size: int = 0
    mtime_ns: int = 0
    path: bytes = b""


class Reply(NamedTuple):
    """The head of a reply; `length` bytes with `checksum` (xxh3, 64 bits) follow.

    With NO, `checksum` may say for how many milliseconds nothing more is to be asked: the node is busy.
    """

    status: Status
    number: int
    length: int = 0
    checksum: int = 0


def checksum(data: bytes | memoryview) -> int:
    """xxh3 of a payload."""
    return xxhash.xxh3_64_intdigest(data)


# -- proofs ---------------------------------------------------------------------------------------------------------


def greeting(nonce: bytes) -> bytes:
    """What a server says first."""
    return _GREETING.pack(MAGIC, VERSION, nonce)


def parse_greeting(data: bytes) -> bytes:
    """The server's nonce. Raises ProtocolError."""
    if len(data) != GREETING:
        raise ProtocolError("the greeting is cut short")
    magic, version, nonce = _GREETING.unpack(data)
    if magic != MAGIC:
        raise ProtocolError("this is no coordlfs")
    if version != VERSION:
        raise ProtocolError(f"it speaks version {version} of the protocol, and not {VERSION}")
    return bytes(nonce)


def proof(key: bytes, role: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """What only one who knows the key can say; `role` is b"client" or b"server"."""
    text = MAGIC + bytes([VERSION, len(role)]) + role + server_nonce + client_nonce
    return hmac.digest(key, text, hashlib.sha256)


def client_proof(key: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """What a client answers to a greeting."""
    return _CLIENT_PROOF.pack(client_nonce, proof(key, b"client", server_nonce, client_nonce))


def check_client(key: bytes, server_nonce: bytes, data: bytes) -> bytes:
    """The server's proof, if the client's is right. Raises ProtocolError."""
    if len(data) != CLIENT_PROOF:
        raise ProtocolError("the proof is cut short")
    client_nonce, said = _CLIENT_PROOF.unpack(data)
    if not hmac.compare_digest(said, proof(key, b"client", server_nonce, client_nonce)):
        raise ProtocolError("it does not know the cluster key")
    return proof(key, b"server", server_nonce, client_nonce)


def check_server(key: bytes, server_nonce: bytes, client_nonce: bytes, said: bytes) -> None:
    """Raises ProtocolError unless the server has proved that it knows the key."""
    if not hmac.compare_digest(said, proof(key, b"server", server_nonce, client_nonce)):
        raise ProtocolError("it does not know the cluster key")


# -- requests and replies -------------------------------------------------------------------------------------------


def encode_request(request: Request) -> bytes:
    """The bytes of a request. Raises ValueError for a path that is too long."""
    if len(request.path) > LONGEST_PATH:
        raise ValueError("the path is too long")
    r = request
    return _REQUEST.pack(r.verb, len(r.path), r.number, r.length, r.offset, r.size, r.mtime_ns) + r.path


class Requests:
    """Takes a connection's bytes in pieces of any size, and gives the requests in them."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[Request]:
        """The requests that `data` completes. Raises ProtocolError, after which there is nothing more to be had."""
        pending = self._pending + data if self._pending else data
        at, end = 0, len(pending)
        while end - at >= _REQUEST.size:
            verb, path_length, number, length, offset, size, mtime_ns = _REQUEST.unpack_from(pending, at)
            if verb not in (1, 2) or path_length > LONGEST_PATH:
                raise ProtocolError("a request that makes no sense")
            if verb == Verb.GET and not (0 < length <= MOST_PAYLOAD and offset + length <= size < 1 << 63):
                raise ProtocolError("a request for bytes that cannot be")
            start = at + _REQUEST.size
            if end - start < path_length:
                break
            at = start + path_length
            yield Request(_VERBS[verb], number, length, offset, size, mtime_ns, pending[start:at])
        self._pending = pending[at:]


def encode_reply(reply: Reply) -> bytes:
    """The head of a reply."""
    return _REPLY.pack(reply.status, reply.number, reply.length, reply.checksum)


def parse_reply(data: bytes | bytearray | memoryview, request: Request) -> Reply:
    """The head of the reply to `request`. Raises ProtocolError if it is another's, or offers what was not asked for."""
    if len(data) != REPLY:
        raise ProtocolError("a reply is cut short")
    status, number, length, check = _REPLY.unpack(data)
    if status > Status.ERROR or number != request.number:
        raise ProtocolError("a reply that makes no sense")
    if status != Status.OK:
        wanted = length == 0
    elif request.verb == Verb.GET:
        wanted = length == request.length
    else:
        wanted = length <= MOST_INFO
    if not wanted:
        raise ProtocolError(f"a reply of {length} bytes, where {request.length} were asked for")
    return Reply(_STATUSES[status], number, length, check)
