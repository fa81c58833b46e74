"""Taking stock of a store's rows against a naive model, in pieces of whatever size, with the C function and without."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlfs.disk import layout
from coordlfs.disk.layout import BLOCK, ROW, UNIT, Row, Version
from coordlfs.disk.stock import Stock
from coordlfs.kernel import xxh3

SEED, UNITS = 7, 1 << 11
ROWS = st.builds(
    lambda size, block, unit, name: layout.pack_row(Row(1, name, Version(size, 0, 1), block, unit, 0), SEED),
    st.sampled_from([1, UNIT, UNIT + 1, 63 * UNIT, 65 * UNIT, BLOCK, BLOCK + 1, 3 * BLOCK]),
    st.integers(0, 3),
    st.integers(0, UNITS),
    st.integers(0, 1 << 40),
)
TORN = ROWS.map(lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))
RAW = st.lists(st.one_of(ROWS, ROWS, TORN, st.just(layout.NO_ROW)), max_size=60)


def naive(raws: list[bytes]) -> tuple[dict[int, Row], set[int], set[int]]:
    """The rows that are kept, the numbers of those that are not, and the units that are free."""
    kept: dict[int, Row] = {}
    free, unwanted = set(range(UNITS)), set()
    for number, raw in enumerate(raws):
        row = layout.parse_row(raw, SEED)
        units = set() if row is None else set(range(row.unit, row.unit + row.units))
        if row is not None and units <= free:
            kept[number] = row
            free -= units
        elif raw != layout.NO_ROW:
            unwanted.add(number)
    return kept, unwanted, free


@pytest.mark.parametrize("is_compiled", [True, False])
@settings(max_examples=150, deadline=None)
@given(raws=RAW, at_once=st.integers(1, 20))
def test_what_is_there_and_what_is_free(is_compiled: bool, raws: list[bytes], at_once: int) -> None:
    assert xxh3.address()
    with patch.object(xxh3, "address", xxh3.address if is_compiled else lambda: 0):
        stock = Stock(SEED, UNITS)
    for first in range(0, len(raws), at_once):
        stock.see(first, memoryview(b"".join(raws[first : first + at_once])))
    kept, unwanted, free = naive(raws)
    assert (stock.rows, stock.bytes) == (len(kept), sum(row.length for row in kept.values()))
    assert list(stock.unwanted) == sorted(unwanted)
    assert stock.bad_rows + stock.beyond == len(unwanted)
    assert stock.last_name == max((row.name for row in kept.values()), default=-1)
    assert stock.used == max((n + 1 for n, raw in enumerate(raws) if raw != layout.NO_ROW), default=0)
    assert list(stock.erased()) == [n for n in range(stock.used) if raws[n] == layout.NO_ROW]
    ranges = stock.free()
    assert {unit for first, n in ranges for unit in range(first, first + n)} == free
    assert all(first + n < after for (first, n), (after, _) in pairwise(ranges)), "they touch"


def test_many_rows_in_one_piece() -> None:
    rows = [layout.pack_row(Row(n, n, Version(9, 0, n), 0, n, 0), SEED) for n in range(1, 20_001)]
    rows[5_000] = layout.NO_ROW
    stock = Stock(SEED, 20_100)
    stock.see(3, memoryview(b"".join(rows)))
    assert (stock.rows, stock.bytes, stock.used, stock.bad_rows) == (19_999, 9 * 19_999, 20_003, 0)
    assert list(stock.erased()) == [5_003]
    assert stock.free() == [(0, 1), (5_001, 1), (20_001, 99)]


def test_a_row_behind_the_end_is_not_damaged() -> None:
    stock = Stock(SEED, 2)
    stock.see(0, memoryview(layout.pack_row(Row(1, 0, Version(3 * UNIT, 0, 1), 0, 0, 0), SEED)))
    assert (stock.rows, stock.beyond, stock.bad_rows, list(stock.unwanted)) == (0, 1, 0, [0])
    assert len(layout.NO_ROW) == ROW
