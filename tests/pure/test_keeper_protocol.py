"""Packets between server, keepers and supervisor, through a real socket pair."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordlfs.cache import keeper_protocol
from coordlfs.cache.keeper_protocol import PINS, REPLY, REQUEST, How, Outcome, Verb

LONG = st.integers(0, (1 << 64) - 1)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends, none of which waits for ever."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.settimeout(240)
    yield ends
    for end in ends:
        end.close()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    verb=st.sampled_from(Verb),
    flags=st.sampled_from([0, How.KEEP, How.FORCE, How.KEEP | How.FORCE]),
    numbers=st.tuples(LONG, LONG, LONG, LONG),
    path=st.binary(max_size=8192),
)
def test_a_request_arrives_whole(
    pair: tuple[socket.socket, socket.socket], verb: Verb, flags: int, numbers: tuple[int, int, int, int], path: bytes
) -> None:
    pair[0].send(REQUEST.pack(verb, flags, *numbers) + path)
    packet = pair[1].recv(keeper_protocol.MAX_PACKET)
    assert REQUEST.unpack_from(packet) == (verb, flags, *numbers)
    assert packet[REQUEST.size :] == path


@given(outcome=st.sampled_from(Outcome), code=st.integers(0, 133), item=LONG)
def test_a_reply_is_read_as_it_was_written(outcome: Outcome, code: int, item: int) -> None:
    got, _, error, about = REPLY.unpack_from(REPLY.pack(outcome, 0, code, item))
    assert (Outcome(got), error, about) == (outcome, code, item)


def test_a_list_of_pins_fits_a_packet(pair: tuple[socket.socket, socket.socket]) -> None:
    pins = [(1 << 63 | number, number) for number in range(2000)]
    pair[0].send(REPLY.pack(Outcome.LISTED, 0, 0, 0) + b"".join(PINS.pack(*pin) for pin in pins))
    packet = pair[1].recv(keeper_protocol.MAX_PACKET)
    assert list(PINS.iter_unpack(packet[REPLY.size :])) == pins


def test_messages_carry_descriptors_until_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    reading, writing = os.pipe()
    keeper_protocol.send(pair[0], {"keeper": 1, "name": "ü"}, (writing,))
    keeper_protocol.send(pair[0], {})
    pair[0].close()
    os.close(writing)
    first = keeper_protocol.receive(pair[1])
    assert first is not None
    message, fds = first
    assert message == {"keeper": 1, "name": "ü"}
    os.write(fds[0], b"through the copy")
    assert os.read(reading, 100) == b"through the copy"
    os.close(fds[0])
    os.close(reading)
    assert keeper_protocol.receive(pair[1]) == ({}, [])
    assert keeper_protocol.receive(pair[1]) is None
