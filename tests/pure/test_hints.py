"""Hints as a format and as bookkeeping: whatever readers say in whatever order, what is kept stays true and bounded."""

from __future__ import annotations

import base64
import errno
import random
import struct
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlfs.cache import hints
from coordlfs.cache.hints import (
    AHEAD,
    HEADER,
    MAGIC,
    MOST_IN_NAME,
    PREFIX,
    READERS,
    READERS_OF_A_USER,
    Hint,
    HintError,
    Orders,
    parse,
    parse_name,
)

U64 = st.integers(0, (1 << 64) - 1)
SIZE = 100


def message(
    numbers: list[int],
    *,
    length: int,
    start: int = 0,
    position: int = 0,
    epoch: int = 0,
    reader: int = 1,
    job: int = 1,
) -> bytes:
    fields = (job, reader, epoch, length, position, start)
    return HEADER.pack(MAGIC, len(numbers), *fields) + array("Q", numbers).tobytes()


def name_of(message: bytes) -> bytes:
    """The name that says what a message says."""
    return PREFIX + b"1." + base64.urlsafe_b64encode(message[8:]).rstrip(b"=")


def refusal(text: bytes, parse: Callable[[bytes], Hint] = parse) -> int:
    with pytest.raises(HintError) as caught:
        parse(text)
    assert caught.value.errno is not None
    return caught.value.errno


# -- the format ---------------------------------------------------------------------------------------------------


@given(st.lists(U64, max_size=20), U64, U64, U64, st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_a_message_is_read_as_it_was_meant(
    numbers: list[int], job: int, reader: int, epoch: int, position: int, between: int, rest: int
) -> None:
    start = position + between
    length = start + len(numbers) + rest
    said = message(numbers, length=length, start=start, position=position, epoch=epoch, reader=reader, job=job)
    hint = parse(said)
    assert list(hint.numbers) == numbers
    assert (hint.job, hint.reader, hint.epoch) == (job, reader, epoch)
    assert (hint.length, hint.position, hint.start) == (length, position, start)
    assert parse_name(name_of(said)) == hint


@given(st.one_of(st.binary(max_size=200), st.builds(lambda tail: MAGIC + tail, st.binary(max_size=200))))
def test_noise_is_refused_or_keeps_the_bounds(text: bytes) -> None:
    with suppress(HintError):
        hint = parse(text)
        assert hint.position <= hint.start <= hint.start + len(hint.numbers) <= hint.length
        assert len(text) == HEADER.size + 8 * len(hint.numbers)
        return
    assert refusal(text) == errno.EINVAL


NOISE = st.binary(max_size=200) | st.text("ABCabc019-_", max_size=236).map(str.encode)


@given(NOISE | NOISE.map(lambda text: b"1." + text))
def test_a_name_of_noise_is_refused_or_keeps_the_bounds(text: bytes) -> None:
    with suppress(HintError):
        hint = parse_name(PREFIX + text)
        assert hint.position <= hint.start <= hint.start + len(hint.numbers) <= hint.length
        return
    assert refusal(PREFIX + text, parse_name) in (errno.EINVAL, errno.EPROTONOSUPPORT)


def test_a_name_holds_as_many_numbers_as_are_told_and_no_more() -> None:
    fullest = message([(1 << 64) - 1] * MOST_IN_NAME, length=1 << 40)
    assert len(name_of(fullest)) <= 255 < len(name_of(fullest + bytes(8)))
    assert len(parse_name(name_of(fullest)).numbers) == MOST_IN_NAME


def test_names_are_refused_for_what_is_wrong_with_them() -> None:
    good = name_of(message([1, 2], length=2))
    text = good[len(PREFIX) + 2 :]
    for version in (b"0", b"2", b"10", b"9" * 200):
        assert refusal(PREFIX + version + b"." + text, parse_name) == errno.EPROTONOSUPPORT
    other = text.replace(b"A", b"+", 1), text.replace(b"A", b"/", 1), text.replace(b"A", b"\xff", 1)
    for flawed in (b"", text[:-1], text + b"=", text + b"A", b" " + text, text + b"\n", *other):
        assert refusal(PREFIX + b"1." + flawed, parse_name) == errno.EINVAL
    for name in (PREFIX, PREFIX + b"1", PREFIX + text, PREFIX + b"one." + text, PREFIX + b"-1." + text):
        assert refusal(name, parse_name) == errno.EINVAL
    assert refusal(name_of(message([1, 2], length=1)), parse_name) == errno.EINVAL


@pytest.mark.parametrize(
    "text",
    [
        b"",
        message([1, 2], length=2)[:-1],
        message([1, 2], length=2) + b"\0",
        message([1, 2], length=1),
        message([1], length=9, start=2, position=3),
        message([], length=1 << 41),
        b"CLH2" + message([1], length=1)[4:],
        struct.pack("<4sIQQQQQQ", MAGIC, (1 << 32) - 1, 1, 1, 0, 1 << 39, 0, 0),
        message(list(range(hints.MOST_NUMBERS + 1)), length=1 << 20),
    ],
)
def test_what_contradicts_itself_is_refused(text: bytes) -> None:
    assert refusal(text) == errno.EINVAL


# -- bookkeeping --------------------------------------------------------------------------------------------------


class Server:
    """What the server does with hints, on files numbered from 1 of which the even ones are pinned."""

    def __init__(self, files: int, bound: int) -> None:
        self.files = files
        self.bound = bound
        self.now = 0.0
        self.held: set[int] = set()
        self.resident: set[int] = set()
        self.ended: set[int] = set()
        self.orders = Orders(self.find, self.cost, lambda job, record: False)

    def find(self, number: int) -> tuple[int, int, int] | None:
        return (number, SIZE, 1) if 0 < number <= self.files else None

    def cost(self, record: int) -> int:
        return SIZE if record % 2 else 0

    def hear(self, text: bytes, uid: int = 0, pid: int = 0) -> None:
        self.now += 1
        self.orders.take(parse(text), uid, pid, self.now)
        self.work()

    def ask(self, number: int, uid: int = 0) -> bool:
        entry = self.orders.ask(number, uid, self.now, self.bound)
        self.work()
        return entry is not None

    def work(self) -> None:
        while True:
            for record in self.orders.trim(self.bound):
                assert record % 2, "a pinned file is let go"
                self.held.discard(record)
                self.resident.discard(record)
            self.check()
            entry = self.orders.next(self.bound)
            if entry is None:
                return
            self.held.add(entry.record)
            self.read(entry.record)
            self.orders.fetched(entry.record)

    def read(self, record: int) -> None:
        if record % 2 and record not in self.resident:
            self.resident.add(record)
            self.orders.missed(record, SIZE)

    def leave(self) -> None:
        self.orders.leave(self.now, self.ended.__contains__)
        self.work()

    def check(self) -> None:
        orders = self.orders
        wanted = Counter(
            entry.record
            for reader in orders.readers.values()
            for entry in [*reader.waiting, *reader.ahead, *reader.behind]
            if entry.record >= 0
        )
        assert wanted == orders.wanted
        for reader in orders.readers.values():
            assert reader.ahead_bytes == sum(e.held for e in [*reader.ahead, *reader.waiting])
            assert reader.behind_bytes == sum(e.held for e in reader.behind)
            assert len(reader.waiting) + len(reader.ahead) <= AHEAD
            assert len(reader.behind) <= AHEAD
        # What is held is wanted by somebody; and nobody has more than his share.
        assert self.held <= set(orders.wanted) & orders.kept
        assert orders.held_bytes <= self.bound
        for figures in orders.figures():
            assert min(figures["hits"], figures["misses"], figures["bytes_read"], figures["bytes"]) >= 0
            assert figures["misses"] <= figures["bytes"] // SIZE


@settings(max_examples=60, deadline=None)
@given(
    files=st.integers(1, 60),
    epochs=st.integers(1, 4),
    bound=st.integers(0, 40 * SIZE),
    window=st.integers(1, 30),
    seed=st.integers(0, 1 << 32),
)
def test_an_order_gives_every_epoch_its_exact_figures(
    files: int, epochs: int, bound: int, window: int, seed: int
) -> None:
    rng = random.Random(seed)
    server = Server(files, bound)
    for epoch in range(epochs):
        order = rng.sample(range(1, files + 1), files)
        announced = position = 0
        while position < files:
            count = rng.randint(0, min(window, files - announced))
            text = message(
                order[announced : announced + count], length=files, start=announced, position=position, epoch=epoch
            )
            server.hear(text)
            announced += count
            step = rng.randint(0, announced - position)
            for record in order[position : position + step]:
                server.read(record)  # if the reader was faster
            position += step
        server.hear(message([], length=files, start=files, position=files, epoch=epoch))
        [figures] = server.orders.figures()
        assert figures["epoch"] == epoch
        assert figures["position"] == figures["files"] == files
        assert figures["hits"] + figures["misses"] == files
        assert figures["bytes"] == files * SIZE
        assert figures["bytes_read"] == figures["misses"] * SIZE
        assert figures["hits"] >= files // 2  # what is pinned
    server.orders.leave(server.now + 1e6, lambda pid: True)
    server.work()
    assert not server.held
    assert not server.orders.wanted
    assert not server.orders.jobs


HINTS = st.builds(
    lambda numbers, reader, job, epoch, position, between, rest: message(
        numbers,
        length=position + between + len(numbers) + rest,
        position=position,
        start=position + between,
        reader=reader,
        job=job,
        epoch=epoch,
    ),
    st.lists(st.integers(0, 25), max_size=12),
    *[st.integers(0, 3)] * 3,
    *[st.integers(0, 12)] * 3,
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("hear"), HINTS, st.integers(0, 2), st.integers(0, 3)),
        st.tuples(st.just("miss"), st.integers(0, 25)),
        st.tuples(st.just("ask"), st.integers(0, 25), st.integers(0, 2)),
        st.tuples(st.just("wait"), st.integers(1, 700)),
        st.tuples(st.just("end"), st.integers(1, 3)),
        st.tuples(st.just("bound"), st.integers(0, 20 * SIZE)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_whatever_readers_say_what_is_kept_is_true(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    server = Server(20, 10 * SIZE)
    for kind, *rest in steps:
        if kind == "hear":
            text, uid, pid = rest
            with suppress(HintError):
                server.hear(text, uid, pid)
        elif kind == "miss":
            server.orders.missed(rest[0], SIZE)
        elif kind == "ask":
            server.ask(*rest)
        elif kind == "wait":
            server.now += rest[0]
            server.leave()
        elif kind == "end":
            server.ended = {rest[0]}
            server.leave()
        else:
            server.bound = rest[0]
            server.work()


def test_readers_and_windows_are_bounded() -> None:
    server = Server(5, 0)
    for reader in range(READERS_OF_A_USER):
        server.hear(message([1], length=1, reader=reader), uid=7)
    with pytest.raises(HintError) as caught:
        server.hear(message([1], length=1, reader=99), uid=7)
    assert caught.value.errno == errno.EBUSY
    server.hear(message([1], length=1, reader=99), uid=8)  # another user is not kept out

    for start in range(0, 8000, 1000):
        server.hear(message([1] * 1000, length=1 << 20, start=start, reader=5), uid=8)
    start = 8000
    with pytest.raises(HintError) as caught:
        server.hear(message([1] * 1000, length=1 << 20, start=start, reader=5), uid=8)
    assert caught.value.errno == errno.ENOBUFS
    server.hear(message([1] * 1000, length=1 << 20, start=start, position=1000, reader=5), uid=8)


def test_what_is_asked_for_one_by_one_is_bounded_and_of_no_epoch() -> None:
    server = Server(1000, 20 * SIZE)
    asked = range(1, 1000, 2)
    assert [server.ask(number) for number in asked] == [True] * 10 + [False] * 490
    assert server.held == set(asked[:10])
    assert server.ask(1)  # it is there
    assert not server.orders.jobs
    assert server.ask(101, uid=1)  # half of the bound is another user's
    assert server.held == {1, 3, 5, 7, 9, 101}
    server.now += 100
    assert server.ask(201)  # the first ones had their minute; they stay while there is room behind
    assert server.held == {1, 3, 5, 7, 9, 101, 201}
    server.now += 1000
    server.leave()
    assert not server.held
    assert not server.orders.readers


def test_a_file_is_asked_for_by_itself_and_by_a_reader() -> None:
    server = Server(10, 100 * SIZE)
    assert server.ask(1)
    server.hear(message([1, 3], length=2), uid=0)
    server.hear(message([], length=2, start=2, position=2), uid=0)
    [figures] = server.orders.figures()
    assert (figures["hits"], figures["misses"]) == (1, 1)
    server.now += 1000
    server.leave()
    assert not server.held


def test_there_are_not_more_readers_for_those_who_ask_one_by_one() -> None:
    server = Server(10, 10_000 * SIZE)
    assert [server.ask(1, uid) for uid in range(READERS + 1)] == [True] * READERS + [False]


def test_files_that_are_too_large_or_unknown_are_passed_over() -> None:
    server = Server(AHEAD, SIZE)  # half of which is less than any file
    for start in range(0, AHEAD, 1024):
        numbers = [*range(start + 1, start + 1024), AHEAD + 1]
        server.hear(message(numbers, length=AHEAD, start=start, position=start))
    server.hear(message([], length=AHEAD, start=AHEAD, position=AHEAD))
    assert not server.held
    [figures] = server.orders.figures()
    assert (figures["position"], figures["hits"], figures["misses"]) == (AHEAD, AHEAD - 8, 0)
    assert server.orders.ignored == 8


def test_what_is_announced_anew_counts_once() -> None:
    server = Server(10, 100 * SIZE)
    server.hear(message([1, 3, 5], length=6))
    server.hear(message([3, 5, 7], length=6, start=1, position=1))  # in another place: what was announced is void
    server.hear(message([9, 1], length=6, start=4, position=4))
    server.hear(message([], length=6, start=6, position=6))
    [figures] = server.orders.figures()
    assert (figures["hits"] + figures["misses"], figures["position"]) == (5, 6)


def test_two_readers_of_a_job_share_its_epochs_and_a_file_both_want_is_kept() -> None:
    server = Server(10, 100 * SIZE)
    server.hear(message([1, 3, 5], length=3, reader=1, job=9))
    server.hear(message([5, 7], length=2, reader=2, job=9))
    [figures] = server.orders.figures()
    assert (figures["readers"], figures["files"], figures["position"]) == (2, 5, 0)
    server.hear(message([], length=3, position=3, start=3, reader=1, job=9))
    server.hear(message([9], length=1, epoch=1, reader=1, job=9))  # lets go 1 and 3, for 5 is wanted still
    assert server.held == {5, 7, 9}
    [figures] = server.orders.figures()
    assert (figures["epoch"], figures["files"]) == (1, 1)


def test_another_user_has_no_part_in_a_readers_order() -> None:
    server = Server(10, 100 * SIZE)
    server.hear(message([1, 3, 5], length=3), uid=1)
    server.hear(message([], length=3, position=3, start=3, epoch=5), uid=2)
    mine, other = server.orders.figures()
    assert (mine["user"], mine["position"], mine["epoch"]) == (1, 0, 0)
    assert (other["user"], other["position"], other["epoch"]) == (2, 3, 5)
