"""Taking stock of the rows of a store: which are none, which are in the way of others, and what room is free.

Of many millions, so with numpy, and no more than a few bytes for each. No I/O here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coordlfs.disk.layout import BLOCK, ROW, UNIT, is_row

_ROWS = np.dtype(
    [
        ("key", "u8"),
        ("name", "u8"),
        ("size", "u8"),
        ("mtime_ns", "i8"),
        ("inode", "u8"),
        ("block", "u4"),
        ("unit", "u4"),
        ("checksum", "u8"),
        ("proof", "u8"),
    ]
)
_Numbers = npt.NDArray[np.uint32]


@dataclass(slots=True)
class Stock:
    """What was found when a store was opened."""

    rows: int = 0
    bytes: int = 0
    bad_rows: int = 0  # torn, flipped, or in the way of others
    beyond: int = 0  # rows of blocks that lie behind the size that is wanted now


@dataclass(slots=True)
class Rows:
    """The rows that were seen so far."""

    seed: int
    used: int = 0  # so many were ever used, the first ones
    erased: list[int] = field(default_factory=list)  # numbers
    bad: list[int] = field(default_factory=list)
    last_name: int = -1  # the largest place of a name
    _seen: list[tuple[_Numbers, _Numbers, npt.NDArray[np.uint16], npt.NDArray[np.uint32]]] = field(default_factory=list)

    def see(self, first: int, raw: memoryview) -> None:
        """Some more of them, as they lie in the file; the first has the number `first`."""
        rows = np.frombuffer(raw, _ROWS)
        is_used = rows["key"] != 0
        good = np.array([is_row(raw[at : at + ROW], self.seed) for at in range(0, len(raw), ROW)])
        numbers = np.arange(first, first + len(rows), dtype=np.uint32)
        self.erased += numbers[~is_used & ~good].tolist()
        self.bad += numbers[is_used & ~good].tolist()
        if is_used.any():
            self.used = int(numbers[is_used][-1]) + 1
        kept = is_used & good
        rows = rows[kept]
        if len(rows):
            lengths = np.minimum(BLOCK, rows["size"].astype(np.int64) - rows["block"].astype(np.int64) * BLOCK)
            units = (-(-lengths // UNIT)).astype(np.uint16)
            self._seen.append((numbers[kept], rows["unit"].copy(), units, lengths.astype(np.uint32)))
            self.last_name = max(self.last_name, int(rows["name"].max()))

    def settle(self, end: int) -> tuple[Stock, list[int], list[tuple[int, int]]]:
        """What there is in units 0 to `end`; the numbers of the rows that are to be erased; and the free ranges."""
        if not self._seen:
            return Stock(bad_rows=len(self.bad)), self.bad, [(0, end)] if end else []
        numbers, firsts, units, lengths = (np.concatenate(column) for column in zip(*self._seen, strict=True))
        self._seen.clear()
        order = np.argsort(firsts, kind="stable")
        numbers, firsts, units, lengths = numbers[order], firsts[order].astype(np.int64), units[order], lengths[order]
        ends = np.maximum.accumulate(firsts + units)
        apart = np.ones(len(firsts), bool)
        apart[1:] = firsts[1:] >= ends[:-1]
        kept = apart & (ends <= end)
        stock = Stock(
            rows=int(kept.sum()),
            bytes=int(lengths[kept].sum(dtype=np.int64)),
            bad_rows=len(self.bad) + int((~apart).sum()),
            beyond=int((apart & ~kept).sum()),
        )
        free = list(_gaps(firsts[kept], (firsts + units)[kept], end))
        return stock, self.bad + numbers[~kept].tolist(), free


def _gaps(firsts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], end: int) -> Iterator[tuple[int, int]]:
    """The ranges between others, which are in order and apart, up to `end`."""
    begins = np.concatenate([np.zeros(1, np.int64), ends])
    lengths = np.append(firsts, end) - begins
    for at in np.flatnonzero(lengths > 0):
        yield int(begins[at]), int(lengths[at])
