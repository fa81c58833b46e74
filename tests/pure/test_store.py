"""The cache in private memory against naive models: right bytes or a gap, exact room, and what a successor finds."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from mounts import MIB, PAGE, noise

from coordlfs.cache import items
from coordlfs.cache.extents import Extents
from coordlfs.cache.residence import KEEPERS, Residence, choose, wanted
from coordlfs.cache.store import Store
from coordlfs.catalogue import memfds

PAGES = 12
ITEMS = [items.item_at(1, 0), items.item_at(2, 0), items.item_at(2, items.CHUNK), items.item_at(3, 0)]
CONTENT = {item: {version: noise(6 * PAGE, item + version) for version in (1, 2)} for item in ITEMS}
AN_ITEM = st.sampled_from(ITEMS)
# Lengths and offsets near the edges of pages as well as in the middle of them.
NEAR = st.builds(lambda page, off: max(0, page * PAGE + off), st.integers(0, 5), st.integers(-2, 2))
LENGTHS = (NEAR | st.integers(1, 6 * PAGE)).filter(bool)


class Model(RuleBasedStateMachine):
    """Items with the versions they were begun in, and which of their bytes were put."""

    @initialize()
    def begin(self) -> None:
        self.fd = memfds.cache(PAGES * PAGE)
        self.versions = dict.fromkeys(ITEMS, 1)
        self.cache = Store(self.fd, PAGES, self.versions.__getitem__)
        self.lengths: dict[int, int] = {}
        self.begun: dict[int, int] = {}
        self.there: dict[int, set[int]] = {}

    def teardown(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def used(self) -> int:
        return sum(-(-length // PAGE) for length in self.lengths.values())

    def is_whole(self, item: int) -> bool:
        return item in self.lengths and len(self.there[item]) == self.lengths[item]

    @rule(item=AN_ITEM, length=LENGTHS)
    def reserve(self, item: int, length: int) -> None:
        # Exact: however the free pages are scattered, what fits is taken.
        fits = item not in self.lengths and self.used() + -(-length // PAGE) <= PAGES
        assert self.cache.reserve(item, length) == fits
        if fits:
            self.lengths[item], self.begun[item], self.there[item] = length, self.versions[item], set()

    @rule(item=AN_ITEM, offset=NEAR, length=LENGTHS, whole=st.booleans())
    def put(self, item: int, offset: int, length: int, whole: bool) -> None:
        if whole:
            offset, length = 0, self.lengths.get(item, length)
        start = items.span(item, 0)[0]
        version = self.versions[item]
        data = bytearray(CONTENT[item][version][offset : offset + length])
        fits = item in self.lengths and offset + len(data) <= self.lengths[item] and self.begun[item] == version
        assert self.cache.put(item, start + offset, memoryview(data)) == fits
        data[:] = bytes(len(data))  # the caller's buffer is used again
        if fits:
            self.there[item].update(range(offset, offset + len(data)))

    @rule(item=AN_ITEM, offset=NEAR, size=LENGTHS)
    def parts(self, item: int, offset: int, size: int) -> None:
        found = self.cache.parts(item, items.span(item, 0)[0] + offset, size)
        if item not in self.lengths or self.begun[item] != self.versions[item] or offset >= self.lengths[item]:
            assert found == [size]
            return
        at = offset
        for part in found:
            if isinstance(part, int):
                assert self.there[item].isdisjoint(range(at, at + part)), "it is kept, and called a gap"
                at += part
            else:
                assert bytes(part) == CONTENT[item][self.begun[item]][at : at + len(part)]
                assert self.there[item].issuperset(range(at, at + len(part)))
                at += len(part)
        assert at == min(offset + size, self.lengths[item])

    @rule(item=AN_ITEM)
    def remove(self, item: int) -> None:
        self.cache.remove(item)
        self.lengths.pop(item, None)

    @rule(item=AN_ITEM)
    def change(self, item: int) -> None:
        self.versions[item] = 3 - self.versions[item]

    @rule()
    def take_over(self) -> None:
        """A new server: what was whole, and is of the version shown, is there; the room of all else is free."""
        lengths = dict(self.lengths)
        self.cache = Store(self.fd, PAGES, self.versions.__getitem__)
        kept = {i for i in self.lengths if self.is_whole(i) and self.begun[i] == self.versions[i]}
        assert set(self.cache.recover(lambda item: lengths.get(item, 0))) == kept
        self.lengths = {item: length for item, length in self.lengths.items() if item in kept}

    @invariant()
    def holds_what_it_says(self) -> None:
        if not hasattr(self, "cache"):
            return
        for item in ITEMS:
            assert self.cache.is_whole(item) == self.is_whole(item)
            assert self.cache.held(item) == (len(self.there[item]) if item in self.lengths else 0)
        # And no memory is held for what is not there: pages of items, and one each of the table's header and rows.
        assert os.fstat(self.fd).st_blocks * 512 <= (self.used() + 2) * PAGE


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_table_that_no_server_wrote_is_an_empty_cache() -> None:
    fd = memfds.cache(4 * PAGE)
    try:
        first = Store(fd, 4, lambda _: 7)
        assert first.reserve(ITEMS[0], 2 * PAGE)
        assert first.put(ITEMS[0], 0, noise(2 * PAGE))
        row = bytearray(os.pread(fd, memfds.SLOT, 4 * PAGE + memfds.TABLE_HEADER))
        for extent in ((3 << 32) | 2, (1 << 62) | 2, 0):  # beyond the end, far beyond it, and no pages
            row[16:24] = extent.to_bytes(8, "little")
            os.pwrite(fd, row, 4 * PAGE + memfds.TABLE_HEADER)
            second = Store(fd, 4, lambda _: 7)
            assert second.recover(lambda _: 2 * PAGE) == []
            assert second.reserve(ITEMS[1], 4 * PAGE)
            second.remove(ITEMS[1])
            os.pwrite(fd, row, 4 * PAGE + memfds.TABLE_HEADER)
    finally:
        os.close(fd)


@given(st.integers(1, 40), st.data())
def test_free_ranges(pages: int, data: st.DataObject) -> None:
    space = Extents(pages)
    held: list[list[tuple[int, int]]] = []
    for _ in range(data.draw(st.integers(0, 30))):
        taken = {page for extents in held for first, n in extents for page in range(first, first + n)}
        assert space.free == pages - len(taken)
        given = data.draw(st.integers(-3, len(held) - 1))
        if given >= 0:
            space.give(held.pop(given))
            continue
        wanted = data.draw(st.integers(1, pages))
        got = space.take(wanted)
        assert (got is None) == (wanted > pages - len(taken))
        if got is not None:
            new = [page for first, n in got for page in range(first, first + n)]
            assert len(new) == wanted == len(set(new))
            assert taken.isdisjoint(new)
            assert set(new) <= set(range(pages))
            held.append(got)
    again = Extents(pages, [extent for extents in held for extent in extents])
    assert again.ranges() == space.ranges()
    for extents in held:
        space.give(extents)
    assert space.ranges() == [(0, pages)]


def test_ranges_that_overlap_are_refused() -> None:
    for taken in ([(0, 3), (2, 1)], [(3, 2)], [(-1, 2)], [(1, 0)]):
        with pytest.raises(ValueError):
            Extents(4, taken)


@given(st.integers(0, 1 << 40), st.none() | st.integers(0, 1 << 40))
def test_where_the_cache_is(capacity: int, lockable: int | None) -> None:
    kind = choose(capacity, lockable)
    if lockable is None or lockable >= capacity:
        assert kind is Residence.PAGE_CACHE
    elif kind is Residence.PAGE_CACHE:
        # Even if every keeper stops short of its limit by all but the whole of an item.
        assert KEEPERS * (lockable - items.CHUNK) >= capacity
    # What the user is told to allow is enough, and a little less than that is not.
    assert choose(capacity, wanted(capacity)) is Residence.PAGE_CACHE
    if capacity:
        assert choose(capacity, wanted(capacity) - KEEPERS) is Residence.PRIVATE_MEMORY


def test_a_small_limit_means_memory() -> None:
    assert choose(8 * MIB, 8 * MIB) is Residence.PAGE_CACHE
    assert choose(9 * MIB, 8 * MIB) is Residence.PRIVATE_MEMORY
    assert choose(0, 0) is Residence.PAGE_CACHE


def test_what_a_supervisor_of_version_0_1_says_is_understood() -> None:
    assert Residence("memory of its own") is Residence.PRIVATE_MEMORY
    assert Residence("page cache (mlock)") is Residence.PAGE_CACHE
    with pytest.raises(ValueError, match="elsewhere"):
        Residence("elsewhere")
