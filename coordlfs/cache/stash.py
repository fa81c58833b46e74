"""Bytes of items that are being admitted, kept until the keeper has pinned them.

The pages that a job's READ filled are charged to the job, so the keeper drops them and faults the item in anew; its
READs are answered from here, and the source is read once. The stash is bounded: an item reserves room for all of itself
before it is admitted, and without room it is not admitted this time. Not thread-safe. It does not know what is
admitted, or who reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Pieces:
    reserved: int
    pieces: dict[int, bytes | memoryview] = field(default_factory=dict)  # by offset in the file
    size: int = 0


def _may_be_kept(data: bytes | memoryview) -> bool:
    """Whether nobody changes it, and nothing larger is kept with it."""
    return isinstance(data, memoryview) and data.readonly and data.nbytes == len(data.obj)  # type: ignore[arg-type]


class Stash:
    """Bytes by item and offset, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reserved = 0
        self._items: dict[int, _Pieces] = {}

    @property
    def size(self) -> int:
        """Bytes kept."""
        return sum(kept.size for kept in self._items.values())

    def has_room(self, length: int) -> bool:
        """Whether an item of `length` bytes could reserve room."""
        return self.reserved + length <= self.limit

    def reserve(self, item: int, length: int) -> bool:
        """Take room for an item of `length` bytes; False if there is too little, and then nothing changes."""
        if item in self._items or not self.has_room(length):
            return False
        self._items[item] = _Pieces(length)
        self.reserved += length
        return True

    def put(self, item: int, offset: int, data: bytes | memoryview) -> bool:
        """Keep `data`, found at `offset` of the file, or a copy of it; False if the item has no room for it."""
        kept = self._items.get(item)
        if kept is None:
            return False
        known = len(kept.pieces.get(offset, b""))
        if known >= len(data):
            return True
        if kept.size - known + len(data) > kept.reserved:
            return False  # pieces that overlap
        kept.pieces[offset] = data if _may_be_kept(data) else bytes(data)
        kept.size += len(data) - known
        return True

    def held(self, item: int) -> int:
        """Bytes kept for an item; pieces that overlap count each."""
        kept = self._items.get(item)
        return kept.size if kept else 0

    def parts(self, item: int, offset: int, size: int) -> list[memoryview | int]:
        """What makes up `size` bytes at `offset`: bytes that are kept, and between them the lengths of gaps."""
        kept = self._items.get(item)
        found: list[memoryview | int] = []
        at, end = offset, offset + size
        for start, piece in sorted(kept.pieces.items()) if kept else ():
            if start >= end:
                break
            if start + len(piece) <= at:
                continue
            if start > at:
                found.append(start - at)
                at = start
            found.append(memoryview(piece)[at - start : end - start])
            at = min(end, start + len(piece))
        if at < end:
            found.append(end - at)
        return found

    def remove(self, item: int) -> None:
        """Forget an item's bytes."""
        kept = self._items.pop(item, None)
        if kept is not None:
            self.reserved -= kept.reserved
