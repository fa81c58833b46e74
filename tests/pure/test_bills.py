"""What each epoch cost in requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordlfs.processes.bills import Bills


@given(st.integers(0, 3), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 5))
def test_bills_of_all_epochs_are_what_was_asked_for(earlier: int, asked: list[int], most: int) -> None:
    total = 0
    bills = Bills(lambda: {"get": total, "errors": 7}, earlier, most + 2)
    for number, gets in enumerate(asked, earlier):
        if number > earlier:
            bills.begin(number)
        total += gets
        assert bills.of(number) == {"get": gets if number > 1 or number == earlier else sum(asked[: number + 1])}
    last = earlier + len(asked) - 1
    kept = range(max(earlier, last - most), last + 1)
    assert [bills.of(number)["get"] for number in kept if number > 1] == [
        asked[number - earlier] for number in kept if number > 1
    ]
    assert bills.of(last + 1) == {}


def test_a_directory_has_none() -> None:
    bills = Bills(dict, 0, 9)
    assert bills.of(0) == {}
    bills.begin(1)
    bills.begin(2)
    assert (bills.of(1), bills.of(2)) == ({}, {})
