"""The stash against a naive model: the very bytes and the gaps between them, and never more than was reserved."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coordlfs.cache.stash import Stash

FILE = 48  # bytes; small, so that pieces touch, overlap and leave gaps
ITEMS = st.integers(0, 2)
CONTENT = [bytes((item * FILE + at) % 256 for at in range(FILE)) for item in range(3)]


class Model(RuleBasedStateMachine):
    """Every piece that was accepted, and what each item has reserved."""

    @initialize(limit=st.integers(0, 150))
    def begin(self, limit: int) -> None:
        self.stash = Stash(limit)
        self.limit = limit
        self.reserved: dict[int, int] = {}
        self.pieces: dict[int, dict[int, int]] = {}  # item → offset → length

    def size(self, item: int) -> int:
        return sum(self.pieces.get(item, {}).values())

    def covered(self, item: int) -> set[int]:
        return {at for start, n in self.pieces.get(item, {}).items() for at in range(start, start + n)}

    @rule(item=ITEMS, length=st.integers(0, 2 * FILE))
    def reserve(self, item: int, length: int) -> None:
        room = item not in self.reserved and sum(self.reserved.values()) + length <= self.limit
        assert self.stash.reserve(item, length) == room
        if room:
            self.reserved[item] = length

    @rule(item=ITEMS, offset=st.integers(0, FILE - 1), length=st.integers(1, FILE), view=st.booleans())
    def put(self, item: int, offset: int, length: int, view: bool) -> None:
        data = bytearray(CONTENT[item][offset : offset + length])
        pieces = self.pieces.get(item, {})
        grown = max(0, len(data) - pieces.get(offset, 0))
        kept = self.stash.put(item, offset, memoryview(data) if view else bytes(data))
        assert kept == (item in self.reserved and self.size(item) + grown <= self.reserved[item])
        data[:] = bytes(len(data))  # the caller's buffer is used again: what is kept has to be a copy
        if kept:
            self.pieces.setdefault(item, {})[offset] = pieces.get(offset, 0) + grown

    @rule(item=ITEMS, offset=st.integers(0, FILE), size=st.integers(-5, FILE))
    def parts(self, item: int, offset: int, size: int) -> None:
        at = offset
        for part in self.stash.parts(item, offset, size):
            length = part if isinstance(part, int) else len(part)
            if isinstance(part, int):
                assert length > 0
                assert self.covered(item).isdisjoint(range(at, at + length)), "it is kept, and called a gap"
            else:
                assert bytes(part) == CONTENT[item][at : at + length]
            at += length
        assert at == offset + max(0, size)

    @rule(item=ITEMS)
    def remove(self, item: int) -> None:
        self.stash.remove(item)
        self.pieces.pop(item, None)
        self.reserved.pop(item, None)

    @invariant()
    def sizes_are_right(self) -> None:
        assert self.stash.reserved == sum(self.reserved.values()) <= self.limit
        assert self.stash.size == sum(map(self.size, self.pieces)) <= self.stash.reserved
        assert all(self.stash.held(item) == self.size(item) for item in range(3))


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
