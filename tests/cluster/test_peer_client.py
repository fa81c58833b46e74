"""The asking side of a connection: however replies are cut, refused, late or wrong, each request is answered once."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mounts import eventually, noise

from coordlfs.peers import protocol
from coordlfs.peers.breaker import LONGEST, Breaker
from coordlfs.peers.client import Outcome, Pipe, Receiver
from coordlfs.peers.protocol import ProtocolError, Reply, Request, Status, Verb

REPLIES = st.lists(st.tuples(st.sampled_from(Status), st.integers(1, 3000)), min_size=1, max_size=8)
CUTS = st.lists(st.integers(20, 12_000), min_size=1, max_size=8)


class _Asked:
    """Requests on a pipe, and what came of each."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.pipe = Pipe(ours, lambda pipe: None)
        self.came: dict[int, list[tuple[Outcome, bytes]]] = {}

    def ask(self, number: int, length: int) -> None:
        came = self.came[number] = []

        def done(outcome: Outcome, payload: memoryview | None) -> None:
            came.append((outcome, bytes(payload or b"")))

        assert self.pipe.send(Request(Verb.GET, number, length, 0, length, 0, b"x"), done)

    def outcomes(self) -> list[Outcome]:
        assert all(len(came) == 1 for came in self.came.values())
        return [came[0][0] for came in self.came.values()]


@contextlib.contextmanager
def _asked() -> Iterator[_Asked]:
    made = _Asked()
    try:
        yield made
    finally:
        made.theirs.close()
        made.pipe.sock.close()


def test_who_is_busy_is_left_alone_for_as_long_as_it_says() -> None:
    ours, theirs = socket.socketpair()
    said: list[float] = []
    pipe = Pipe(ours, lambda pipe: None, said.append)
    came: list[Outcome] = []
    with ours, theirs:
        for number in (1, 2):
            assert pipe.send(Request(Verb.GET, number, 1, 0, 1, 0, b"x"), lambda outcome, _: came.append(outcome))
        theirs.sendall(protocol.encode_reply(Reply(Status.NO, 1, 0, 1500)) + protocol.encode_reply(Reply(Status.NO, 2)))
        pipe.receive([])
    assert (came, said) == ([Outcome.NO, Outcome.NO], [1.5])


def test_a_breaker_rests_without_a_failure() -> None:
    breaker = Breaker()
    breaker.rest(10.0, 1.5)
    assert not breaker.allows(11.4)
    breaker.succeeded()  # what was asked before
    assert not breaker.allows(11.4)
    assert breaker.allows(11.6)
    assert not breaker.open
    breaker.rest(20.0, 1e9)  # whatever a peer says
    assert breaker.allows(20.0 + LONGEST)


@settings(deadline=None)
@given(REPLIES, CUTS)
def test_replies_that_are_cut_anywhere_reach_who_asked(replies: list[tuple[Status, int]], cuts: list[int]) -> None:
    with _asked() as asked:
        stream = b""
        rooms: list[memoryview] = []
        for number, (status, length) in enumerate(replies):
            asked.ask(number, length)
            data = noise(length, number) if status is Status.OK else b""
            head = Reply(status, number, len(data), protocol.checksum(data) if data else 0)
            stream += protocol.encode_reply(head) + data
        at = 0
        while at < len(stream):
            cut = cuts[at % len(cuts)]
            asked.theirs.sendall(stream[at : at + cut])
            at += cut
            for _ in range(3):
                asked.pipe.receive(rooms)
        while asked.pipe.calls:  # one reply a time, while the kernel says that there is more
            asked.pipe.receive(rooms)
        assert [outcome.value for outcome in asked.outcomes()] == [status.name.lower() for status, _ in replies]
        for number, (status, length) in enumerate(replies):
            assert asked.came[number][0][1] == (noise(length, number) if status is Status.OK else b"")
        assert len(rooms) == 1  # nothing is kept for a connection that waits


@settings(deadline=None)
@given(REPLIES, st.binary(min_size=1, max_size=400), st.integers(0, 60))
def test_whatever_comes_each_request_is_answered_once_and_never_with_wrong_bytes(
    replies: list[tuple[Status, int]], garbage: bytes, at: int
) -> None:
    with _asked() as asked:
        stream = b""
        for number, (_, length) in enumerate(replies):
            asked.ask(number, length)
            data = noise(length, number)
            stream += protocol.encode_reply(Reply(Status.OK, number, length, protocol.checksum(data))) + data
        asked.theirs.sendall(stream[:at] + garbage + stream[at:])
        asked.theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ProtocolError, OSError):
            while not asked.pipe.broken:
                asked.pipe.receive([])
        asked.pipe.fail()
        for number, outcome in enumerate(asked.outcomes()):
            if outcome is Outcome.OK:
                assert asked.came[number][0][1] == noise(replies[number][1], number)


def test_a_reply_that_nobody_asked_for_ends_the_connection() -> None:
    with _asked() as asked:
        asked.theirs.sendall(protocol.encode_reply(Reply(Status.NO, 0)))
        with pytest.raises(ProtocolError):
            asked.pipe.receive([])


def test_the_receiver_gives_up_who_is_late_and_closes_what_ends() -> None:
    receiver, done = Receiver(), threading.Event()

    def receive() -> None:  # as the data loop does
        while not done.is_set():
            if select.select([receiver.fd], [], [], 0.1)[0]:
                receiver.receive()

    threads = [threading.Thread(target=receiver.run), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    try:
        with contextlib.ExitStack() as stack:
            silent, half, ended, idle = (stack.enter_context(_asked()) for _ in range(4))
            for asked in (silent, half, ended, idle):
                receiver.add(asked.pipe)
            for asked in (silent, half, ended):
                asked.ask(1, 1000)
                asked.ask(2, 1000)
            half.theirs.sendall(protocol.encode_reply(Reply(Status.OK, 1, 1000)) + bytes(10))
            began = time.monotonic()
            ended.theirs.close()
            eventually(lambda: all(ended.came.values()))
            eventually(lambda: all(half.came.values()) and all(silent.came.values()))
            assert time.monotonic() - began > 2  # silence is borne for a while
            for asked in (silent, half, ended):
                assert asked.outcomes() == [Outcome.FAILED] * 2
                assert asked.pipe.broken
            assert not idle.pipe.broken
            idle.ask(1, 1)
            eventually(lambda: all(a.pipe.sock.fileno() < 0 for a in (silent, half, ended)))
            receiver.close()
            threads[0].join()
            assert idle.outcomes() == [Outcome.FAILED]
            assert idle.pipe.sock.fileno() < 0
    finally:
        receiver.close()
        done.set()
        for thread in threads:
            thread.join()
