"""Items cut a file into parts that cover it once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordlfs.cache import items
from coordlfs.cache.items import CHUNK, LIMIT

RECORDS = st.integers(0, (1 << 31) - 1)
EDGES = st.builds(lambda chunks, around: max(0, chunks * CHUNK + around), st.integers(0, 40), st.integers(-2, 2))
SIZES = EDGES | st.integers(0, 40 * CHUNK)


@given(record=RECORDS, size=SIZES)
def test_items_cover_the_file_in_order_without_overlap(record: int, size: int) -> None:
    at = 0
    for item in items.items_of(record, size):
        offset, length = items.span(item, size)
        assert offset == at
        assert 0 < length <= CHUNK
        assert items.length(item, size) == length
        assert items.record_of(item) == record
        at += length
    assert at == size


@given(record=RECORDS, size=st.integers(1, LIMIT), data=st.data())
def test_every_byte_lies_in_the_span_of_its_item(record: int, size: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, size - 1) | st.sampled_from([0, size - 1]))
    item = items.item_at(record, at)
    offset, length = items.span(item, size)
    assert offset <= at < offset + length
    assert item in items.items_of(record, size)


@given(first=RECORDS, second=RECORDS, size=st.integers(0, 1 << 52))
def test_files_share_no_item(first: int, second: int, size: int) -> None:
    if first != second:
        one, other = sorted((items.items_of(first, size), items.items_of(second, size)), key=lambda r: r.start)
        assert one.stop <= other.start


@given(record=RECORDS, size=SIZES, beyond=st.integers(0, 3 * CHUNK))
def test_an_item_beyond_the_end_of_a_file_that_shrank_is_empty(record: int, size: int, beyond: int) -> None:
    item = items.item_at(record, size + CHUNK + beyond)
    assert items.length(item, size) == 0


@given(record=RECORDS, size=st.integers(LIMIT, (1 << 63) - 1), data=st.data())
def test_what_lies_beyond_the_limit_is_of_its_file_and_never_cached(
    record: int, size: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(LIMIT, size) | st.sampled_from([LIMIT, size]))
    item = items.item_at(record, at)
    assert items.record_of(item) == record
    assert items.length(item, size) == items.span(item, size)[1] == 0
    assert item not in items.items_of(record, size)
    assert items.items_of(record, size).stop <= items.items_of(record + 1, size).start
    assert next((one, start) for one, start, _ in items.cut(record, at, 10)) == (item, at)
