"""How much the cache may hold: as a function of what is available, over any course of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordlfs.cache.governor import Governor, Marks
from coordlfs.kernel.memory import Memory

GIB = 1 << 30
TOTAL = 24 * GIB
MARKS = Marks.of(TOTAL)


def test_the_marks_of_machines_large_and_small() -> None:
    assert Marks.of(TOTAL).low == int(0.04 * TOTAL)
    assert Marks.of(1 << 40).low == 2 * GIB
    assert Marks.of(GIB).low == 48 << 20
    assert Marks.of(100 << 20).low == 25 << 20


def test_nothing_changes_while_there_is_enough() -> None:
    governor = Governor(8 * GIB)
    assert governor.update(0, Memory(TOTAL, 20 * GIB), 0.0, 0) == 8 * GIB
    assert governor.update(8 * GIB, Memory(TOTAL, 12 * GIB), 0.9, 1) == 8 * GIB


def test_memory_is_released_up_to_the_high_mark_and_taken_again_after_a_rest() -> None:
    governor = Governor(8 * GIB)
    available = MARKS.low - 1
    limit = governor.update(8 * GIB, Memory(TOTAL, available), 0.0, 100)
    assert limit == 8 * GIB - (MARKS.high - available)
    assert governor.update(limit, Memory(TOTAL, 10 * GIB), 0.0, 129) == limit
    assert governor.update(limit, Memory(TOTAL, 10 * GIB), 0.0, 131) == 8 * GIB


def test_between_the_marks_the_cache_stays_as_it_is() -> None:
    governor = Governor(8 * GIB)
    assert governor.update(5 * GIB, Memory(TOTAL, MARKS.low + 1), 0.0, 0) == 5 * GIB


def test_between_the_marks_it_gives_back_if_everything_waits_for_memory() -> None:
    governor = Governor(8 * GIB)
    assert governor.update(5 * GIB, Memory(TOTAL, MARKS.low + 1), 0.5, 0) == 5 * GIB - (MARKS.high - MARKS.low - 1)


@given(
    configured=st.integers(0, TOTAL),
    others=st.lists(st.tuples(st.integers(0, TOTAL), st.floats(0, 1), st.floats(0.01, 100)), max_size=60),
)
def test_whatever_others_use_the_low_mark_stays_available_and_the_cache_comes_back(
    configured: int, others: list[tuple[int, float, float]]
) -> None:
    governor, now, pinned = Governor(configured), 0.0, 0
    for used, stalled, passes in others:
        now += passes
        pinned = min(pinned, TOTAL - used)  # what the kernel cannot give is not there
        available = TOTAL - used - pinned
        limit = governor.update(pinned, Memory(TOTAL, available), stalled, now)
        assert 0 <= limit <= configured
        # A cache that fills up to its limit, or shrinks to it, leaves others what they need.
        assert limit == 0 or limit <= pinned or TOTAL - used - limit >= MARKS.high
        assert limit == 0 or TOTAL - used - limit >= min(MARKS.low, available)
        pinned = limit
    for _ in range(2):  # the second time with what the first one allowed
        now += 100
        pinned = governor.update(pinned, Memory(TOTAL, TOTAL - pinned), 0.0, now)
    assert pinned == min(configured, TOTAL - MARKS.high)
