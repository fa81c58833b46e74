"""Messages between the server and its keepers, and between the server and the supervisor.

All travel over SOCK_SEQPACKET pairs that only these processes hold: a packet is a message, whole or not at all.
"""

from __future__ import annotations

import json
import socket
import struct
from enum import IntEnum
from typing import Any

MAX_PACKET = 1 << 16

REQUEST = struct.Struct("=BB6xQQQQ")  # verb, flags, item, node, offset, length; the path follows
REPLY = struct.Struct("=BB2xiQ")  # outcome, flags, errno, item
PINS = struct.Struct("=QQ")  # item, length: one of the list that answers Verb.LIST


class Verb(IntEnum):
    """What the server asks of a keeper."""

    PIN = 1
    DROP = 2
    LIST = 3
    PURGE = 4  # drop what is resident of the whole file


class How(IntEnum):
    """Flags of Verb.PIN: what happens first to pages that are resident."""

    KEEP = 1  # they are a dead keeper's: pin them as they are
    FORCE = 2  # drop them even where a job maps them


class Outcome(IntEnum):
    """What a keeper answers."""

    PINNED = 1
    BUSY = 2  # somebody uses the pages: ask again later
    FULL = 3  # this process may hold no more mappings
    FAILED = 4
    DROPPED = 5
    LISTED = 6
    WATCHED = 7  # an item is a sentinel from now on
    OPENED = 8  # a sentinel was opened
    PURGED = 9


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """One packet and the descriptors that came with it; None at the end."""
    packet, fds, _, _ = socket.recv_fds(sock, MAX_PACKET, 4)
    return (json.loads(packet), list(fds)) if packet else None


def send(sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send a packet, and descriptors with it."""
    socket.send_fds(sock, [json.dumps(message).encode()], list(fds))
