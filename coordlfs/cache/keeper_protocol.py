"""Messages between the server and its keepers, and between the server and the supervisor.

All travel over SOCK_SEQPACKET pairs that only these processes hold: a packet is a message, whole or not at all. What
is read is checked nevertheless: a process whose memory went bad must not take the others with it. It does not know
what is done with them.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from enum import IntEnum
from typing import Any, NamedTuple

from coordlfs.cache import items

MAX_PACKET = 1 << 16
_LAST_OFFSET = (1 << 63) - 1 - items.CHUNK

REQUEST = struct.Struct("=BB6xQQQQ")  # verb, flags, item, node, offset, length; the path follows
REPLY = struct.Struct("=BB2xiQ")  # outcome, flags, errno, item
PINS = struct.Struct("=QQ")  # item, length: one of the list that answers Verb.LIST


class Verb(IntEnum):
    """What the server asks of a keeper."""

    PIN = 1
    DROP = 2
    LIST = 3
    FETCH = 5  # read it into the page cache, and answer when it is there
    RELEASE = 6  # drop what is resident of an item that is not pinned
    FILL = 7  # read the item through the mount, so that the server has it
    WATCH = 8  # make the file a sentinel, if there is room


class How(IntEnum):
    """Flags of Verb.PIN: what happens first to pages that are resident.

    Of Verb.FILL: KEEP leaves the pages that it brings, FORCE goes around those that are there.
    """

    KEEP = 1  # they are a dead keeper's: pin them as they are
    FORCE = 2  # the kernel was told to drop them, even where a job maps them, and the attributes with them
    OWN = 4  # pin them as they are if all are charged where the keeper is, else drop them
    RESIDENT = 8  # with OWN: pin it only if all of it is there and the keeper's, else leave all as it is and say LEFT
    SPARE = 16  # with OWN: if some of it is there and another's, leave all as it is and say LEFT


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
    FETCHED = 10  # or, with an errno, it cannot be
    GONE = 11  # let go
    FILLED = 12
    THREAD = 13  # the item is the number of a thread that reads as well
    SEEN = 14  # to WATCH, whether or not it is watched
    LEFT = 15  # not pinned, and nothing changed


def parse_request(packet: bytes) -> tuple[Verb, int, int, int, int, int, bytes]:
    """Verb, flags, item, node, offset, length and path. Raises ValueError for what is no request.

    The node is the inode number that the file must have, 0 if that says nothing.
    """
    if len(packet) < REQUEST.size:
        raise ValueError("a request is too short")
    verb, flags, item, node, offset, length = REQUEST.unpack_from(packet)
    if length > items.CHUNK or offset > _LAST_OFFSET:
        raise ValueError("a request for no part of a file")
    return Verb(verb), flags, item, node, offset, length, packet[REQUEST.size :]


class Reply(NamedTuple):
    """What a keeper said."""

    outcome: Outcome
    code: int  # errno
    item: int
    pins: list[tuple[int, int]]  # items and lengths of a list


def parse_reply(packet: bytes) -> Reply:
    """Raises ValueError for what is no reply."""
    if len(packet) < REPLY.size or (len(packet) - REPLY.size) % PINS.size:
        raise ValueError("a reply is cut off")
    outcome, _, code, item = REPLY.unpack_from(packet)
    return Reply(Outcome(outcome), code, item, list(PINS.iter_unpack(packet[REPLY.size :])))


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """One packet and the descriptors that came with it; None at the end. What is no message counts as an empty one."""
    packet, fds, _, _ = socket.recv_fds(sock, MAX_PACKET, 4)
    if not packet:
        return None
    try:
        message = json.loads(packet)
    except (ValueError, RecursionError):
        message = None
    if isinstance(message, dict):
        return message, list(fds)
    for fd in fds:
        os.close(fd)
    return {}, []


def send(sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send a packet, and descriptors with it."""
    socket.send_fds(sock, [json.dumps(message).encode()], list(fds))
