"""Which of two places is slower, by what READs took."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordlfs.cache.pace import Pace

SECONDS = st.floats(0.0001, 10)


def pace(seconds: float, reads: int) -> Pace:
    made = Pace()
    for _ in range(reads):
        made.took(seconds)
    return made


@given(SECONDS, SECONDS)
def test_it_takes_a_few_reads_to_know(ours: float, theirs: float) -> None:
    assert not pace(ours, 10).is_slower_than(pace(theirs, 1000))
    assert not pace(ours, 1000).is_slower_than(pace(theirs, 10))
    slower = pace(ours, 1000).is_slower_than(pace(theirs, 1000))
    if ours < 0.0049 or ours < 1.99 * theirs:
        assert not slower
    elif ours > 0.0051 and ours > 2.01 * theirs:
        assert slower
    assert not (slower and pace(theirs, 1000).is_slower_than(pace(ours, 1000)))


@given(SECONDS, SECONDS, st.integers(1, 500))
def test_what_changes_is_noticed(before: float, now: float, together: int) -> None:
    changed = pace(before, 1000)
    for _ in range(1000):
        changed.took(now)
    assert min(before, now) <= changed.mean * 1.001
    assert abs(changed.mean - now) <= 0.001 * (before + now)
    changed.took(now * together, together)
    assert abs(changed.mean - now) <= 0.001 * (before + now)
