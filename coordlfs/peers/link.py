"""Packets between the server of a mount and its peer server, over a SOCK_SEQPACKET pair that only these two hold.

A question ("may I read this item, and keep it?") and its answer are structs, as they are on the way of a miss; what the
peer server knows of the cluster comes as JSON, in parts. It does not know what follows from them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

MOST = 1 << 16
QUESTION = struct.Struct("=cIQQ")  # b"?", number, node, offset
ANSWER = struct.Struct("=cI?Q")  # b"!", number, yes, bytes that are pinned here
_PER_PACKET = 100


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


def encode_members(members: list[Member]) -> Iterator[bytes]:
    """The packets that tell of all members."""
    for start in range(0, len(members), _PER_PACKET):
        yield json.dumps({"members": members[start : start + _PER_PACKET]}).encode()
    yield json.dumps({"end": True}).encode()


def decode(packet: bytes) -> dict[str, Any]:
    """What one of these packets says."""
    message: dict[str, Any] = json.loads(packet)
    return message
