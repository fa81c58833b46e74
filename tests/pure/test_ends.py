"""Which READs are refused so that the kernel asks again: each page once after a notification, and only then."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordlfs.kernel.pages import PAGE
from coordlfs.serving.ends import Ends


def test_nothing_is_refused_of_what_the_kernel_was_not_notified_about() -> None:
    ends = Ends()
    ends.notified(3, 11 * PAGE)
    assert not ends.refuses(2, 0, 10 * PAGE, 5)


@given(
    first=st.integers(0, 1000), pages=st.integers(1, 256), short=st.integers(1, PAGE * 256), again=st.integers(0, 255)
)
def test_a_page_is_refused_once_after_each_notification(first: int, pages: int, short: int, again: int) -> None:
    ends = Ends()
    offset, size = first * PAGE, pages * PAGE
    end = offset + max(0, size - short)
    for _ in range(2):
        ends.notified(2, offset + size)
        assert ends.refuses(2, offset, size, end)
        # Now the kernel asks page by page; the one in which the file ends comes back short.
        assert not ends.refuses(2, end // PAGE * PAGE, PAGE, end)
        assert not ends.refuses(2, offset, size, end)
    ends.notified(2, offset + size + (again + 1) * PAGE)
    elsewhere = (first + pages + again) * PAGE
    assert ends.refuses(2, elsewhere, PAGE, elsewhere + 1)


@given(sizes=st.lists(st.integers(1, 1 << 40), min_size=1, max_size=5), grown=st.integers(0, 1 << 20))
def test_no_page_is_refused_of_a_file_whose_end_has_not_come_down(sizes: list[int], grown: int) -> None:
    ends = Ends()
    for size in sizes:
        ends.notified(2, size)
    largest = max(sizes)
    end = largest + grown
    assert not ends.refuses(2, end // PAGE * PAGE, PAGE, end)
    assert ends.refuses(2, (largest - 1) // PAGE * PAGE, PAGE, largest - 1)


def test_what_is_remembered_is_bounded() -> None:
    ends = Ends()
    for node in range(2, 20_002):
        ends.notified(node, 10_000 * PAGE)
    assert not ends.refuses(2, 0, PAGE, 1)
    for page in range(10_000):
        assert ends.refuses(20_001, page * PAGE, PAGE, page * PAGE + 1)
    assert not ends.refuses(20_001, 9_999 * PAGE, PAGE, 9_999 * PAGE + 1)
