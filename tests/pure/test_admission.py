"""Admission without a mount: its keeper is a socket, whose other end is the test's."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coordlfs.cache import items
from coordlfs.cache.accounting import Accounts
from coordlfs.cache.admission import Admission, Fetched
from coordlfs.cache.epochs import Epochs
from coordlfs.cache.keeper_protocol import PINS, REPLY, How, Outcome, Verb, parse_request
from coordlfs.cache.minio import MinIO
from coordlfs.cache.pending import Pending, PendingItems
from coordlfs.cache.stash import Stash
from coordlfs.catalogue import memfds
from coordlfs.catalogue.catalog import OTHER_CGROUP, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import cgroups, pages

SIZE = 10_000
PAGES = pages.count(SIZE)


@dataclass
class Others:
    """What admission asks of others, as the test wants it."""

    wanted: Collection[int] = ()
    foreign: set[int] = field(default_factory=set)  # items of other nodes
    displaceable: list[int] = field(default_factory=list)
    awaited: set[int] = field(default_factory=set)  # nodes
    dropped: list[tuple[int, int, int, Callable[[], None]]] = field(default_factory=list)
    asked_for_keepers: int = 0

    def owns(self, item: int) -> bool:
        return item not in self.foreign

    def displaced(self, npages: int) -> list[int]:
        given, self.displaceable = self.displaceable, []
        return given

    def missed(self, record: int, nbytes: int) -> None:
        assert nbytes >= 0

    def fetched(self, record: int) -> None:
        pass

    def is_awaited(self, node: int, offset: int) -> bool:
        return node in self.awaited

    def drop_pages(self, node: int, offset: int, length: int, then: Callable[[], None]) -> bool:
        self.dropped.append((node, offset, length, then))
        return True

    def more_keepers(self) -> None:
        self.asked_for_keepers += 1


class Keeper:
    """The other end of a keeper's socket."""

    def __init__(self, admission: Admission, index: int, pid: int) -> None:
        self._admission = admission
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        admission.add_keeper(index, pid, ours)

    def asked(self) -> list[tuple[Verb, int, int]]:
        """What it was asked since: verb, flags and item."""
        self._admission.flush()
        found: list[tuple[Verb, int, int]] = []
        while True:
            try:
                verb, flags, item, *_ = parse_request(self.sock.recv(8192))
            except BlockingIOError:
                return found
            found.append((verb, flags, item))

    def say(self, outcome: Outcome, item: int = 0, code: int = 0, pins: tuple[tuple[int, int], ...] = ()) -> None:
        """Answer, and have it heard."""
        self.sock.send(REPLY.pack(outcome, 0, code, item) + b"".join(PINS.pack(*pin) for pin in pins))
        self._admission.receive()


@dataclass
class Cache:
    """Admission over an empty catalogue, with room for three files."""

    catalog: Catalog
    counters: Counters
    others: Others
    admission: Admission = field(init=False)

    def __post_init__(self) -> None:
        self.admission = self.another()

    def another(self) -> Admission:
        """As a server that takes over makes it."""
        return Admission(
            *(self.catalog, MinIO(3 * PAGES), Stash(1 << 20), Epochs(), self.counters, self.others.more_keepers),
            announced=self.others,
            awaited=self.others,
            invalidator=self.others,
            owners=self.others,
        )

    def file(self, number: int) -> int:
        """Enter a file; its item."""
        st_ = os.stat_result((0o100644, number + 2, 1, 1, 0, 0, SIZE, 0, 0, 0), {"st_mtime_ns": 0})
        record, *_ = self.catalog.enter(0, b"file-%d" % number, st_)
        self.catalog.serves(record, self.catalog.version(record))
        return items.item_at(record, 0)

    def miss(self, item: int, pid: int, at: int = 0, nbytes: int = SIZE) -> None:
        version = self.catalog.version(items.record_of(item))
        self.admission.missed(Fetched(item, at, memoryview(bytes(nbytes)), version), pid, False)

    def states(self) -> Counter[str]:
        return +self.admission.outcomes()


@pytest.fixture
def cache() -> Iterator[Cache]:
    with ExitStack() as stack:
        fds = memfds.allocate()
        for fd in fds:
            stack.callback(os.close, fd)
        catalog, others = Catalog(*fds), Others()
        yield Cache(catalog, Counters(catalog.counters), others)


needs_memory_cgroups = pytest.mark.skipif(cgroups.of_memory(os.getpid()) is None, reason="no cgroup of memory")


def test_what_fits_is_pinned_and_the_rest_is_not(cache: Cache) -> None:
    keeper = Keeper(cache.admission, 1, os.getpid())
    wanted = [cache.file(number) for number in range(5)]
    assert cache.admission.admit(wanted) == 3
    asked = keeper.asked()
    assert [(verb, item) for verb, _, item in asked] == [(Verb.PIN, item) for item in wanted[:3]]
    for item in wanted[:3]:
        keeper.say(Outcome.PINNED, item)
    assert cache.states() == {"pinned": 3}
    assert cache.admission.drop([wanted[0]]) == 1
    assert keeper.asked() == [(Verb.DROP, 0, wanted[0])]
    assert cache.admission.admit([wanted[0], wanted[3]]) == 0, "its memory is not free yet"
    keeper.say(Outcome.DROPPED, wanted[0])
    assert cache.admission.admit([wanted[3]]) == 1


@needs_memory_cgroups
def test_pages_charged_where_the_keeper_is_are_pinned_as_they_are(cache: Cache) -> None:
    keeper = Keeper(cache.admission, 1, os.getpid())
    item = cache.file(0)
    cache.miss(item, os.getpid())
    assert keeper.asked() == [(Verb.PIN, How.KEEP, item)]
    assert cache.admission.stash.size == 0


def test_pages_of_a_job_elsewhere_are_read_anew_from_the_stash(cache: Cache) -> None:
    keeper = Keeper(cache.admission, 1, os.getpid())
    item, nobody = cache.file(0), 0  # whose cgroup nobody can tell
    cache.miss(item, nobody)
    assert cache.catalog.flags(items.record_of(item)) & OTHER_CGROUP
    assert keeper.asked() == [(Verb.PIN, 0, item)]
    assert cache.admission.stashed(item, 0, SIZE, SIZE, nobody) == [memoryview(bytes(SIZE))]
    keeper.say(Outcome.PINNED, item)
    assert cache.states() == {"on_their_way": 1}, "that was a job's READ, in pages that are charged to it"
    assert cache.counters["pin_retries"] == 1


def test_pages_in_use_are_dropped_by_the_kernel_in_the_end(cache: Cache) -> None:
    keeper = Keeper(cache.admission, 1, os.getpid())
    item = cache.file(0)
    cache.admission.admit([item])
    assert keeper.asked() == [(Verb.PIN, 0, item)]
    for _ in range(2):
        keeper.say(Outcome.BUSY, item)
        while not (asked := keeper.asked()) and not cache.others.dropped:
            cache.admission._run_due()
    [(node, offset, length, then)] = cache.others.dropped
    assert (node, offset, length) == (cache.catalog.node(items.record_of(item)), 0, SIZE)
    assert asked == []
    then()
    assert keeper.asked() == [(Verb.PIN, How.FORCE, item)]


def test_a_hung_read_is_not_waited_for_by_a_keeper(cache: Cache) -> None:
    keeper = Keeper(cache.admission, 1, os.getpid())
    item = cache.file(0)
    cache.others.awaited = {cache.catalog.node(items.record_of(item))}
    cache.admission.admit([item])
    assert keeper.asked() == []
    cache.others.awaited = set()
    while not (asked := keeper.asked()):
        cache.admission._run_due()
    assert asked == [(Verb.PIN, 0, item)]


def test_what_a_dead_keeper_held_is_pinned_by_the_next_one(cache: Cache) -> None:
    keeper = Keeper(cache.admission, 1, os.getpid())
    held, asked_for = cache.file(0), cache.file(1)
    cache.admission.admit([held])
    keeper.asked()
    keeper.say(Outcome.PINNED, held)
    cache.admission.admit([asked_for])
    keeper.sock.close()
    cache.admission.receive()
    assert cache.states() == {"on_their_way": 2}
    assert cache.admission.keeper_pids == frozenset()
    another = Keeper(cache.admission, 2, os.getpid())
    assert sorted(another.asked(), key=lambda request: request[2]) == [
        (Verb.PIN, How.KEEP, held),
        (Verb.PIN, 0, asked_for),
    ]


def test_what_a_dead_keeper_held_is_pinned_though_the_server_dies_as_well(cache: Cache) -> None:
    """Before the next keeper has pinned it, and again and again."""
    keeper = Keeper(cache.admission, 1, os.getpid())
    held, dropped = cache.file(0), cache.file(1)
    cache.admission.admit([held, dropped])
    keeper.asked()
    for item in (held, dropped):
        keeper.say(Outcome.PINNED, item)
    keeper.sock.close()
    cache.admission.receive()
    assert cache.admission.drop([dropped]) == 1
    for _ in range(3):
        cache.admission = cache.another()
        cache.admission.recover()
        assert cache.states() == {"on_their_way": 1}
    last = Keeper(cache.admission, 2, os.getpid())
    assert last.asked() == [(Verb.PIN, How.KEEP, held)]
    last.say(Outcome.PINNED, held)
    assert cache.states() == {"pinned": 1}
    pinned = [cache.catalog.pinned_pages(items.record_of(item)) for item in (held, dropped)]
    assert pinned == [PAGES, 0]


def test_a_full_keeper_has_the_item_go_to_another(cache: Cache) -> None:
    keeper = Keeper(cache.admission, 1, os.getpid())
    item = cache.file(0)
    cache.admission.admit([item])
    keeper.asked()
    keeper.say(Outcome.FULL, item)
    assert cache.others.asked_for_keepers == 1
    cache.admission.admit([cache.file(1)])
    assert cache.others.asked_for_keepers == 1, "it comes already"
    another = Keeper(cache.admission, 2, os.getpid())
    assert len(another.asked()) == 2


def test_a_server_that_takes_over_learns_what_is_pinned(cache: Cache) -> None:
    keeper = Keeper(cache.admission, 1, os.getpid())
    held, gone, unknown = cache.file(0), cache.file(1), items.item_at(10**6, 0)
    for item in (held, gone):
        cache.catalog.add_pinned_pages(items.record_of(item), PAGES)
    cache.admission.recover()
    assert keeper.asked() == [(Verb.LIST, 0, 0)]
    cache.miss(cache.file(2), os.getpid())
    assert keeper.asked() == [], "nothing is admitted as long as it is not known what is"
    keeper.say(Outcome.LISTED, pins=((held, SIZE), (unknown, SIZE)))
    keeper.say(Outcome.LISTED)
    assert cache.states() == {"pinned": 1, "on_their_way": 1}
    assert keeper.asked() == [(Verb.PIN, How.KEEP, gone)], "another keeper held it, which died as well"


def test_what_others_own_is_theirs_to_cache_and_gives_way(cache: Cache) -> None:
    keeper = Keeper(cache.admission, 1, os.getpid())
    mine = [cache.file(number) for number in range(3)]
    theirs, new = cache.file(3), cache.file(4)
    cache.others.foreign = {theirs}
    assert cache.admission.admit([theirs, *mine]) == 3
    keeper.asked()
    for item in mine:
        keeper.say(Outcome.PINNED, item)
    cache.others.displaceable = [mine[0]]
    assert cache.admission.admit([new]) == 0
    assert keeper.asked() == [(Verb.DROP, 0, mine[0])]
    keeper.say(Outcome.DROPPED, mine[0])
    assert cache.admission.admit([new]) == 1


def test_what_is_no_answer_is_passed_over(cache: Cache) -> None:
    keeper = Keeper(cache.admission, 1, os.getpid())
    item = cache.file(0)
    cache.admission.admit([item])
    keeper.asked()
    for packet in (b"?", b"\xff" * REPLY.size, REPLY.pack(Outcome.PINNED, 0, 0, 1 << 60)):
        keeper.sock.send(packet)
    keeper.say(Outcome.PINNED, item)
    assert cache.states() == {"pinned": 1}


def test_the_account_follows_what_is_read(cache: Cache) -> None:
    epochs = Epochs()
    accounts = Accounts(cache.catalog, cache.admission.policy, epochs, cache.counters, cache.others)
    item = cache.file(0)
    assert accounts.miss(item, 0, 4096, SIZE)
    assert not accounts.miss(item, 4096, SIZE - 4096, SIZE), "the rest of it"
    assert (epochs.current.number, epochs.current.misses, epochs.current.bytes) == (1, 1, SIZE)
    assert accounts.miss(item, 0, SIZE, SIZE), "a second time: another epoch"
    assert (epochs.current.number, epochs.current.bytes) == (2, SIZE)
    assert (cache.counters["dataset_items"], cache.counters["dataset_bytes"]) == (1, SIZE)
    assert accounts.unpinned() == SIZE
    accounts.forget(items.record_of(item), SIZE)
    accounts.forget(items.record_of(item), SIZE)
    assert (cache.counters["dataset_items"], cache.counters["dataset_bytes"]) == (0, 0)


@example([(1, 0.0), (1, 0.0)], [0.0])
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 20).map(float))),
        max_size=40,
    ),
    st.lists(st.integers(0, 25).map(float), max_size=5),
)
def test_items_come_when_they_are_due_and_once(steps: list[tuple[int, float | None]], looks: list[float]) -> None:
    """Against a dictionary: an item is postponed to a time, or (None) is no longer pending."""
    pending, model = PendingItems(), dict[int, float]()
    for item, due in steps:
        if due is None:
            pending.by_item.pop(item, None)
            model.pop(item, None)
        else:
            pending.by_item.setdefault(item, Pending())
            is_first = pending.postpone(item, due)
            model[item] = due
            assert is_first or due > min(model.values()) or due >= (pending.next_due() or 0)
    for now in sorted(looks):
        expected = {item for item, due in model.items() if due <= now}
        came = list(pending.due(now))
        assert sorted(came) == sorted(expected)
        for item in expected:
            del model[item]
    left = pending.next_due()
    assert left is None or not model or left <= min(model.values())
