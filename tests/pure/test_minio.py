"""MinIO against a naive model, and the reads per epoch that it promises."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coordlfs.cache.minio import MinIO, State

ITEMS = st.integers(0, 7)


class Model(RuleBasedStateMachine):
    """Any interleaving of calls leaves the bookkeeping of MinIO equal to a plain dictionary's."""

    @initialize(capacity=st.integers(0, 20))
    def begin(self, capacity: int) -> None:
        self.cache = MinIO(capacity)
        self.capacity = capacity
        self.most_held = 0  # pages accounted for when the last one came in that was held already
        self.room: dict[int, int] = {}
        self.holder: dict[int, int] = {}

    @rule(item=ITEMS, pages=st.integers(-1, 9))
    def admit(self, item: int, pages: int) -> None:
        fits = pages > 0 and item not in self.room and sum(self.room.values()) + pages <= self.capacity
        assert self.cache.admit(item, pages) is fits
        if fits:
            self.room[item] = pages

    @rule(item=ITEMS, pages=st.integers(-1, 9))
    def learn(self, item: int, pages: int) -> None:
        """What is held in memory is accounted for, be there room or not."""
        is_new = pages > 0 and item not in self.room
        assert self.cache.admit(item, pages, is_held=True) is is_new
        if is_new:
            self.room[item] = pages
            self.most_held = sum(self.room.values())

    @rule(item=ITEMS, holder=st.integers(0, 2))
    def pin(self, item: int, holder: int) -> None:
        if item in self.room and item not in self.holder:
            self.cache.pin(item, holder)
            self.holder[item] = holder
        else:
            with pytest.raises(ValueError, match="not admitted"):
                self.cache.pin(item, holder)

    @rule(item=ITEMS)
    def unpin(self, item: int) -> None:
        if item in self.holder:
            assert self.cache.unpin(item) == self.room[item]
            del self.holder[item]
        else:
            with pytest.raises(KeyError):
                self.cache.unpin(item)

    @rule(item=ITEMS)
    def release(self, item: int) -> None:
        pages = self.room.pop(item, 0)
        assert self.cache.release(item) == (pages if self.holder.pop(item, None) is not None else 0)

    @invariant()
    def bookkeeping_is_right(self) -> None:
        cache, room, holder = self.cache, self.room, self.holder
        assert cache.items() == list(room)  # nothing goes but by release: never evicted
        assert cache.used == sum(room.values()) <= max(self.capacity, self.most_held)
        assert cache.capacity == self.capacity
        assert cache.pinned_pages == sum(room[i] for i in holder) <= cache.used
        assert len(cache) == len(holder)
        for item in range(8):
            assert cache.pages(item) == room.get(item, 0)
            assert cache.holder(item) == holder.get(item)
            expected = State.PINNED if item in holder else State.ADMITTED if item in room else State.ABSENT
            assert cache.state(item) is expected
        for who in range(3):
            assert sorted(cache.held_by(who)) == sorted(i for i, h in holder.items() if h == who)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def missed_per_epoch(cache: MinIO, sizes: list[int], rng: random.Random, epochs: int = 4) -> list[int]:
    """Pages read from the source in each epoch by a training that reads every item once, in random order."""
    result = []
    for _ in range(epochs):
        order = rng.sample(range(len(sizes)), len(sizes))
        missed = [item for item in order if cache.state(item) is State.ABSENT]
        for item in missed:
            if cache.admit(item, sizes[item]):
                cache.pin(item, 0)
        result.append(sum(sizes[item] for item in missed))
    return result


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200), capacity=st.integers(0, 300), seed=st.integers())
def test_steady_epochs_of_equal_items_miss_exactly_what_does_not_fit(n: int, capacity: int, seed: int) -> None:
    first, *steady = missed_per_epoch(MinIO(capacity), [1] * n, random.Random(seed))
    assert first == n
    assert steady == [max(0, n - capacity)] * len(steady)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=200), share=st.floats(0, 1.2), seed=st.integers())
def test_steady_epochs_of_varied_items_miss_no_more_than_one_item_above_the_least(
    sizes: list[int], share: float, seed: int
) -> None:
    dataset, capacity = sum(sizes), int(sum(sizes) * share)
    first, *steady = missed_per_epoch(MinIO(capacity), sizes, random.Random(seed))
    least = max(0, dataset - capacity)
    assert first == dataset
    assert len(set(steady)) == 1, "an item that was cached was evicted"
    assert least <= steady[0] < least + max(sizes)
