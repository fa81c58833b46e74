"""Packets between the server of a mount and its peer server, over a SOCK_SEQPACKET pair that only these two hold.

A question ("may I read this item, and keep it?") and its answer are structs, as they are on the way of a miss; what the
peer server knows of the cluster comes as JSON, in parts, and so goes what the server wants to be said to it. It does
not know what follows from them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

MOST = 1 << 16
QUESTION = struct.Struct("=cIQQ")  # b"?", number, node, offset
ANSWER = struct.Struct("=cI?Q")  # b"!", number, yes, bytes that are pinned here
_PER_PACKET = MOST // 2  # bytes of JSON, and what one member adds at most


class Member(NamedTuple):
    """A node of the cluster, as the peer server knows it."""

    name: str
    host: str
    port: int
    capacity: int  # bytes
    pinned: int  # bytes
    alive: bool
    latency: float | None  # seconds, of the last sign of life
    served_bytes: int  # from here, to it
    problem: str  # why it is not alive
    disk: tuple[int, int] | None = None  # bytes of its disk tier, if it has one: held, and its size
    warming: dict[str, Any] | None = None  # what it says of warming, see `coordlfs.peers.warming`


def encode_members(members: list[Member]) -> Iterator[bytes]:
    """The packets that tell of all members."""
    texts: list[str] = []
    for text in map(json.dumps, members):
        if texts and sum(map(len, texts)) + len(text) > _PER_PACKET:
            yield _members(texts)
            texts = []
        texts.append(text)
    yield _members(texts)
    yield encode({"end": True})


def _members(texts: list[str]) -> bytes:
    return b'{"members": [%s]}' % ", ".join(texts).encode()


def encode(message: dict[str, Any]) -> bytes:
    """One of these packets."""
    return json.dumps(message).encode()


def decode(packet: bytes) -> dict[str, Any]:
    """What one of these packets says."""
    message: dict[str, Any] = json.loads(packet)
    return message
