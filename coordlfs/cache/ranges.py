"""Which bytes of something are there: ranges, apart and in order. No I/O here."""

from __future__ import annotations

Ranges = tuple[tuple[int, int], ...]  # begin and end of each


def merged(ranges: Ranges, begin: int, end: int) -> Ranges:
    """`ranges` and one more, those that touch made one.

    >>> merged(((0, 2), (6, 8)), 2, 5)
    ((0, 5), (6, 8))
    """
    apart = [r for r in ranges if r[1] < begin or r[0] > end]
    touching = [r for r in ranges if not (r[1] < begin or r[0] > end)]
    whole = min([begin, *(r[0] for r in touching)]), max([end, *(r[1] for r in touching)])
    return tuple(sorted([*apart, whole]))
