"""The protocol between nodes: whatever the other side says, the parser gives sense or ProtocolError."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordlfs.peers import protocol
from coordlfs.peers.protocol import ProtocolError, Reply, Request, Requests, Status, Verb

NUMBERS = st.integers(0, (1 << 32) - 1)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    if draw(st.booleans()):
        return Request(Verb.INFO, draw(NUMBERS))
    length = draw(st.integers(1, protocol.MOST_PAYLOAD))
    offset = draw(st.integers(0, 1 << 50))
    size = offset + length + draw(st.integers(0, 1 << 50))
    mtime = draw(st.integers(-(1 << 63), (1 << 63) - 1))
    return Request(Verb.GET, draw(NUMBERS), length, offset, size, mtime, draw(st.binary(max_size=50)))


@given(st.lists(requests(), max_size=6), st.lists(st.integers(1, 80), min_size=1))
def test_requests_survive_being_cut_anywhere(sent: list[Request], cuts: list[int]) -> None:
    stream = b"".join(map(protocol.encode_request, sent))
    received: list[Request] = []
    decoder, at, turn = Requests(), 0, 0
    while at < len(stream):
        cut = cuts[turn % len(cuts)]
        received += decoder.feed(stream[at : at + cut])
        at, turn = at + cut, turn + 1
    assert received == sent


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_garbage_is_refused_or_is_within_all_bounds(pieces: list[bytes]) -> None:
    decoder = Requests()
    try:
        for piece in pieces:
            for request in decoder.feed(piece):
                assert len(request.path) <= protocol.LONGEST_PATH
                assert request.verb is Verb.INFO or 0 < request.length <= protocol.MOST_PAYLOAD
                assert request.verb is Verb.INFO or request.offset + request.length <= request.size
    except ProtocolError:
        pass


@given(requests(), st.integers(0, 300), st.integers(1, 255))
def test_a_request_with_a_byte_changed_is_refused_or_within_bounds(request: Request, at: int, change: int) -> None:
    data = bytearray(protocol.encode_request(request))
    data[at % len(data)] ^= change
    try:
        for found in Requests().feed(bytes(data)):
            assert found.length <= protocol.MOST_PAYLOAD or found.verb is Verb.INFO
    except ProtocolError:
        pass


def test_a_length_that_is_too_large_is_refused_before_anything_is_kept() -> None:
    request = Request(Verb.GET, 1, protocol.MOST_PAYLOAD + 1, 0, 1 << 30)
    with pytest.raises(ProtocolError):
        list(Requests().feed(protocol.encode_request(request)))


@given(requests(), st.binary(max_size=40))
def test_a_reply_is_the_one_that_was_asked_for_or_refused(request: Request, data: bytes) -> None:
    try:
        reply = protocol.parse_reply(data, request)
    except ProtocolError:
        return
    assert reply.number == request.number
    assert reply.length <= protocol.MOST_PAYLOAD


@given(requests(), st.sampled_from(Status))
def test_replies_survive(request: Request, status: Status) -> None:
    length = request.length if status is Status.OK else 0
    reply = Reply(status, request.number, length, 7)
    assert protocol.parse_reply(protocol.encode_reply(reply), request) == reply


@given(requests())
def test_a_reply_to_another_request_or_of_another_length_is_refused(request: Request) -> None:
    other = Reply(Status.OK, request.number ^ 1, request.length)
    longer = Reply(Status.OK, request.number, protocol.MOST_PAYLOAD + 1)
    late = Reply(Status.NO, request.number, 1)
    for reply in (other, longer, late):
        with pytest.raises(ProtocolError):
            protocol.parse_reply(protocol.encode_reply(reply), request)


# -- proofs ---------------------------------------------------------------------------------------------------------


def _meet(server_key: bytes, client_key: bytes) -> None:
    server_nonce, client_nonce = os.urandom(protocol.NONCE), os.urandom(protocol.NONCE)
    assert protocol.parse_greeting(protocol.greeting(server_nonce)) == server_nonce
    said = protocol.client_proof(client_key, server_nonce, client_nonce)
    answered = protocol.check_client(server_key, server_nonce, said)
    protocol.check_server(client_key, server_nonce, client_nonce, answered)


def test_both_sides_with_the_key_meet() -> None:
    _meet(b"key", b"key")


@given(st.binary(), st.binary())
def test_different_keys_do_not_meet(one: bytes, other: bytes) -> None:
    # HMAC pads a short key with zeros.
    if one.rstrip(b"\0") != other.rstrip(b"\0"):
        with pytest.raises(ProtocolError, match="cluster key"):
            _meet(one, other)


def test_a_server_without_the_key_is_found_out_however_it_answers() -> None:
    server_nonce, client_nonce = os.urandom(32), os.urandom(32)
    reflected = protocol.client_proof(b"key", server_nonce, client_nonce)[protocol.NONCE :]
    for said in (reflected, bytes(32), b"", protocol.proof(b"", b"server", server_nonce, client_nonce)):
        with pytest.raises(ProtocolError):
            protocol.check_server(b"key", server_nonce, client_nonce, said)


def test_a_proof_is_good_for_one_greeting_only() -> None:
    said = protocol.client_proof(b"key", os.urandom(32), os.urandom(32))
    with pytest.raises(ProtocolError):
        protocol.check_client(b"key", os.urandom(32), said)


@given(st.binary(max_size=100))
def test_garbage_proves_nothing(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.parse_greeting(data)
    with pytest.raises(ProtocolError):
        protocol.check_client(b"key", bytes(32), data)
    with pytest.raises(ProtocolError):
        protocol.check_server(b"key", bytes(32), bytes(32), data)
