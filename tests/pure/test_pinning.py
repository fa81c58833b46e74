"""Which files of a directory are pinned when: order and pace, and what keepers are asked for. No mount, no disk."""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordlfs.cache import items, residence
from coordlfs.cache.announcements import Announcements
from coordlfs.cache.epochs import Epochs
from coordlfs.cache.keeper_protocol import REPLY, How, Outcome, Verb, parse_request
from coordlfs.cache.minio import MinIO
from coordlfs.cache.pin_admission import PinAdmission
from coordlfs.catalogue import memfds
from coordlfs.catalogue.catalog import Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import pages
from coordlfs.pinning.dataset import Wanted
from coordlfs.pinning.filling import Filling
from coordlfs.pinning.pace import Pace

SIZE = 10_000
PAGES = pages.count(SIZE)
_INODE = 1000  # of the first file


# -- which paths --------------------------------------------------------------------------------------------------


def test_without_names_everything_is_wanted() -> None:
    everything = Wanted([])
    assert everything.covers(b"a/b")
    assert everything.leads_to(b"")


NAMES = st.lists(st.sampled_from([b"a", b"b", b"ab"]), min_size=1, max_size=4).map(b"/".join)


@given(wanted=st.lists(NAMES, min_size=1, max_size=3), path=NAMES)
def test_what_is_wanted_is_what_was_named_and_what_is_below(wanted: list[bytes], path: bytes) -> None:
    ours = Wanted(wanted)
    expected = any(path == name or path.startswith(name + b"/") for name in wanted)
    assert ours.covers(path) is expected
    on_the_way = any(name.startswith(path + b"/") for name in wanted)
    assert ours.leads_to(path) is (expected or on_the_way)
    parents = [path.rsplit(b"/", n)[0] for n in range(1, path.count(b"/") + 1)]
    if expected:
        assert all(map(ours.leads_to, parents)), "it is not found otherwise"


# -- pace ---------------------------------------------------------------------------------------------------------


@given(steps=st.lists(st.tuples(st.floats(0.001, 0.2), st.booleans()), min_size=1, max_size=200))
def test_nothing_is_asked_for_while_it_is_looked(steps: list[tuple[float, bool]]) -> None:
    pace, now = Pace(), 10.0
    was_allowed, since_allowed = True, 0.0
    for step, is_idle in steps:
        now += step
        allowed = pace.may_ask(now, now, is_idle=is_idle)  # somebody waits all the while
        since_allowed += step
        if allowed and not was_allowed:
            assert since_allowed >= 0.05, "others are seen only in a while without ours"
        if allowed:
            since_allowed = 0.0
        was_allowed = allowed


def test_where_nobody_says_who_waits_it_is_asked_at_once() -> None:
    assert Pace().may_ask(5.0, None, is_idle=False)


def share(waited_of: float, seconds: float = 60.0) -> float:
    """The share of the time in which may be asked, if others wait for the disk for so much of it."""
    pace, allowed, step = Pace(), 0, 0.005
    for number in range(int(seconds / step)):
        now = number * step
        allowed += pace.may_ask(now, now * waited_of, is_idle=True)
    return allowed * step / seconds


def test_others_go_first_and_do_not_keep_us_out_for_ever() -> None:
    assert share(0.0) > 0.9
    assert share(0.1) > 0.9
    assert 0.1 < share(1.0) < 0.25
    assert 0.1 < share(8.0) < 0.25


# -- how much may be locked ---------------------------------------------------------------------------------------


@given(capacity=st.integers(0, 1 << 40), lockable=st.one_of(st.none(), st.integers(0, 1 << 40)))
def test_what_may_be_pinned_can_be_locked(capacity: int, lockable: int | None) -> None:
    pinnable, most = residence.pinnable(capacity, lockable)
    assert 0 <= pinnable <= capacity
    assert 0 <= most <= items.CHUNK
    if lockable is not None and pinnable > lockable:
        # A keeper is full when an item does not fit: until then each holds more than this.
        assert pinnable <= residence.KEEPERS * (lockable - most)


# -- what is asked for --------------------------------------------------------------------------------------------


@dataclass
class Files:
    """A directory's files, as `Filling` sees them."""

    order: array[int] = field(default_factory=lambda: array("I"))
    findings: int = 0


@dataclass
class Pinner:
    """Filling, admission and the other end of the keeper's socket; room for `room` files."""

    catalog: Catalog
    room: int
    files: Files = field(default_factory=Files)
    waited: float | None = None

    def __post_init__(self) -> None:
        counters, epochs = Counters(self.catalog.counters), Epochs()
        policy = MinIO(self.room * PAGES)
        self.admission = PinAdmission(
            *(self.catalog, policy, epochs, counters, lambda: None),
            announced=Announcements(self.catalog, policy, epochs, counters),
            has_inodes=lambda record: record % 2 == 0,
        )
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        self.admission.add_keeper(1, os.getpid(), ours)
        most = pages.count(items.CHUNK)
        self.filling = Filling(self.catalog, self.files, self.admission, Pace(), lambda: self.waited, most)  # type: ignore[arg-type]
        self.now = 1.0

    def add(self, count: int) -> list[int]:
        """So many files more; their items."""
        found = []
        for _ in range(count):
            number = len(self.files.order)
            st_ = os.stat_result((0o100644, _INODE + number, 1, 1, 0, 0, SIZE, 0, 0, 0), {"st_mtime_ns": 0})
            record, *_ = self.catalog.enter(0, b"file-%d" % number, st_)
            self.files.order.append(record)
            found.append(items.item_at(record, 0))
        self.files.findings += 1
        return found

    def asked(self) -> list[tuple[Verb, int, int]]:
        """What the keeper is asked for: verb, flags and item."""
        self.now += 0.01
        self.filling._step(self.now)
        self.admission.flush()
        found: list[tuple[Verb, int, int]] = []
        while True:
            try:
                verb, flags, item, inode, _, _, path = parse_request(self.sock.recv(8192))
            except BlockingIOError:
                return found
            record = items.record_of(item)
            assert path == self.catalog.path(record)
            assert inode == (self.catalog.version(record).inode if record % 2 == 0 else 0)
            found.append((verb, flags, item))

    def say(self, outcome: Outcome, *answered: int) -> None:
        """What the keeper answers."""
        for item in answered:
            self.sock.send(REPLY.pack(outcome, 0, 0, item))
        self.admission.receive()

    def serve(self, rounds: int = 20) -> list[int]:
        """Answer whatever is asked for; what was pinned, in that order."""
        pinned = []
        for _ in range(rounds):
            for verb, _, item in self.asked():
                if verb is Verb.PIN:
                    pinned.append(item)
                self.say(Outcome.PINNED if verb is Verb.PIN else Outcome.DROPPED, item)
        return pinned


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    with ExitStack() as stack:
        fds = memfds.allocate()
        for fd in fds:
            stack.callback(os.close, fd)
        yield Catalog(*fds)


def test_files_are_pinned_in_their_order_until_it_is_full(catalog: Catalog) -> None:
    pinner = Pinner(catalog, 5)
    files = pinner.add(8)
    assert pinner.asked() == [(Verb.PIN, How.OWN | How.SPARE, item) for item in files[:5]]
    pinner.say(Outcome.PINNED, *files[:5])
    assert pinner.asked() == []
    assert pinner.filling.room == 0


def test_room_that_comes_to_be_is_filled(catalog: Catalog) -> None:
    pinner = Pinner(catalog, 5)
    files = pinner.add(8)
    assert pinner.serve() == files[:5]
    pinner.admission.drop(files[:2])
    assert pinner.serve() in (files[:2], files[5:7])
    assert pinner.admission.outcomes()["pinned"] == 5


def test_what_memory_pressure_took_comes_back(catalog: Catalog) -> None:
    pinner = Pinner(catalog, 10)
    files = pinner.add(10)
    assert pinner.serve() == files
    given = pinner.admission.limit(4 * PAGES)
    pinner.admission.counters.add("given_back_bytes", given * pages.PAGE)
    assert pinner.serve() == []
    assert pinner.admission.outcomes()["pinned"] == 4
    pinner.admission.limit(10 * PAGES)
    assert len(pinner.serve()) == 6
    assert pinner.admission.outcomes()["pinned"] == 10


def test_files_that_are_found_later_are_pinned(catalog: Catalog) -> None:
    pinner = Pinner(catalog, 10)
    assert len(pinner.serve()) == 0
    first = pinner.add(3)
    assert pinner.serve() == first
    assert pinner.serve() == []
    assert pinner.serve() == []
    assert pinner.serve(5) == []
    second = pinner.add(3)
    assert pinner.serve() == second


def test_what_is_anothers_comes_last(catalog: Catalog) -> None:
    pinner = Pinner(catalog, 200)
    pinner.filling._waited = lambda: 1e9
    files = pinner.add(6)
    pinner.filling.pace._until = 0.5  # so that it is looked first
    pinner.filling.was_read(items.record_of(files[1]))
    pinner.filling.was_read(items.record_of(files[3]))
    resident = How.OWN | How.RESIDENT
    assert pinner.asked() == [(Verb.PIN, resident, files[1]), (Verb.PIN, resident, files[3])]
    pinner.say(Outcome.LEFT, files[1])
    pinner.say(Outcome.PINNED, files[3])
    pinner.waited = None
    pinner.filling._waited = lambda: None
    assert pinner.serve() == [files[0], files[2], files[4], files[5], files[1]]


def test_what_is_anothers_is_spared_until_all_else_is_asked_for(catalog: Catalog) -> None:
    pinner = Pinner(catalog, 10)
    files = pinner.add(4)
    spare = How.OWN | How.SPARE
    assert pinner.asked() == [(Verb.PIN, spare, item) for item in files]
    pinner.say(Outcome.LEFT, files[0])
    pinner.say(Outcome.PINNED, files[1], files[3])
    late = [ask for _ in range(3) for ask in pinner.asked()]
    assert late == [(Verb.PIN, How.OWN, files[0])]
    pinner.say(Outcome.LEFT, files[2])  # which comes late
    pinner.say(Outcome.PINNED, files[0])
    assert [ask for _ in range(6) for ask in pinner.asked()] == [(Verb.PIN, How.OWN, files[2])]
    pinner.say(Outcome.PINNED, files[2])
    assert [ask for _ in range(6) for ask in pinner.asked()] == []
    assert not pinner.filling.has_use_for_reads


def test_what_cannot_be_read_is_not_asked_for_without_end(catalog: Catalog) -> None:
    pinner = Pinner(catalog, 10)
    [file] = pinner.add(1)
    asked = 0
    for _ in range(50):
        for _, _, item in pinner.asked():
            asked += 1
            pinner.say(Outcome.FAILED, item)
    assert asked == 2
    pinner.now += 60
    assert pinner.asked(), "what failed may have passed"
    assert pinner.admission.is_pending(file)


def test_what_is_left_as_it_was_has_its_room_back(catalog: Catalog) -> None:
    pinner = Pinner(catalog, 2)
    [file] = pinner.add(1)
    pinner.admission.ask_for([file], How.RESIDENT)
    pinner.admission.flush()
    pinner.say(Outcome.LEFT, file)
    assert pinner.admission.is_absent(file)
    assert pinner.admission.policy.used == 0


def test_a_file_that_a_job_maps_is_asked_for_again_and_then_left(catalog: Catalog) -> None:
    pinner = Pinner(catalog, 2)
    [file] = pinner.add(1)
    asked = pinner.asked()
    for attempt in range(10):
        if not asked:
            break
        assert asked == [(Verb.PIN, How.OWN | How.SPARE, file)]
        pinner.say(Outcome.BUSY, file)
        if (due := pinner.admission._pending.next_due()) is None:
            break
        for item in list(pinner.admission._pending.due(due)):
            pinner.admission._ask(item, pinner.admission._pending.by_item[item])
        asked = pinner.asked()
        assert attempt < 9
    assert pinner.admission.counters["not_admitted"] == 1
    assert pinner.asked() in ([], [(Verb.DROP, 0, file)])
