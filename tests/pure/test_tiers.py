"""The policy over memory and disk against models that keep every item's place by brute force."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coordlfs.cache.minio import MinIO, State
from coordlfs.cache.tiers import Tiers

ITEMS = st.integers(0, 7)
SIZES = (1, 1, 2, 2, 3, 3, 4, 5)


class Disk:
    """Room, and what of it each item takes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: dict[int, int] = {}

    @property
    def free(self) -> int:
        return self.capacity - sum(self.held.values())

    def take(self, block: int) -> int | None:
        return 0 if block <= self.free else None

    def remove_item(self, item: int) -> int:
        return self.held.pop(item, 0)


class Model(RuleBasedStateMachine):
    """Items are read, pinned, given back by memory and changed in any order."""

    @initialize(memory=st.integers(0, 12), disk=st.integers(0, 16))
    def begin(self, memory: int, disk: int) -> None:
        self.memory, self.disk = MinIO(memory), Disk(disk)
        self.tiers: Tiers[int] = Tiers(self.memory, self.disk)

    def pinned(self, item: int) -> bool:
        return self.memory.state(item) is State.PINNED

    @rule(item=ITEMS, late=st.booleans())
    def read(self, item: int, late: bool) -> None:
        """A reader asks for an item; if it is admitted it is pinned at once, or later, by `pin`."""
        size = SIZES[item]
        if self.pinned(item):
            return
        on_disk = item in self.disk.held
        if self.memory.admit(item, size) and not late:
            self.pin(item)
        if on_disk:
            return  # it was read from there
        duplicates = sum(n for each, n in self.disk.held.items() if self.pinned(each))
        had_room, fits = size <= self.disk.free, size <= self.disk.free + duplicates
        others = {i for i in self.disk.held if not self.pinned(i)}
        place = self.tiers.place(item, size)
        assert others <= set(self.disk.held), "what is nowhere else gave way"
        if had_room:
            assert place is not None, "with room to spare all that was read is on the disk"
        elif self.memory.state(item) is not State.ABSENT:
            assert place is None, "a copy took the place of another"
        else:
            assert (place is not None) == fits
        if place is not None:
            self.disk.held[item] = size
            self.tiers.stored(item)
        elif self.memory.state(item) is State.ABSENT:
            # Read from the source in every epoch: no copy takes up its room.
            assert not any(map(self.pinned, self.disk.held))
            assert size > self.disk.free

    @rule(item=ITEMS)
    def pin(self, item: int) -> None:
        if self.memory.state(item) is State.ADMITTED:
            self.memory.pin(item, 0)
            self.tiers.pinned(item)

    @rule(item=ITEMS)
    def give_back(self, item: int) -> None:
        """Memory is short: nothing moves on the disk."""
        before = dict(self.disk.held)
        self.memory.release(item)
        assert self.disk.held == before

    @rule(item=ITEMS)
    def change(self, item: int) -> None:
        """A file changes: it is nowhere any more."""
        self.memory.release(item)
        self.disk.remove_item(item)

    @invariant()
    def sizes_hold(self) -> None:
        if hasattr(self, "disk"):
            assert self.memory.used <= self.memory.capacity
            assert self.disk.free >= 0


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def read_per_epoch(n: int, memory: MinIO, disk: Disk, rng: random.Random, epochs: int) -> list[int]:
    """Items of one page that a training reads of the source in each epoch, which reads every item once."""
    tiers: Tiers[int] = Tiers(memory, disk)
    found = []
    for _ in range(epochs):
        read = 0
        for item in rng.sample(range(n), n):
            if memory.state(item) is State.PINNED:
                continue
            on_disk = item in disk.held
            if memory.admit(item, 1):
                memory.pin(item, 0)
                tiers.pinned(item)
            if not on_disk:
                read += 1
                if tiers.place(item, 1) is not None:
                    disk.held[item] = 1
                    tiers.stored(item)
        found.append(read)
    return found


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 100), memory=st.integers(0, 120), disk=st.integers(0, 120), seed=st.integers())
def test_a_steady_epoch_reads_what_fits_into_neither(n: int, memory: int, disk: int, seed: int) -> None:
    read = read_per_epoch(n, MinIO(memory), Disk(disk), random.Random(seed), 4)
    assert read == [n] + [max(0, n - memory - disk)] * 3


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 100), memory=st.integers(0, 120), disk=st.integers(0, 120), seed=st.integers())
def test_a_reboot_costs_what_is_not_on_the_disk_and_then_nothing(n: int, memory: int, disk: int, seed: int) -> None:
    rng, store = random.Random(seed), Disk(disk)
    read_per_epoch(n, MinIO(memory), store, rng, 2)
    there = len(store.held)
    assert there == min(n, disk)
    assert read_per_epoch(n, MinIO(memory), store, rng, 3) == [n - there] + [max(0, n - memory - disk)] * 2
