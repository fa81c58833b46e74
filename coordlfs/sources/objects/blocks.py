"""Bytes of objects on their way to readers: each is fetched once, however many wait for it, and memory is bounded.

An object is fetched in blocks: up to 16 MiB at once, a larger one by ranges. What was fetched stays until it was read
to its end, or others need the room: it is no cache, which lies behind. It does not know how bytes are fetched.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from coordlfs.sources.objects.names import Entry

WHOLE = 16 << 20  # bytes up to which an object is fetched at once: what `cache.items` takes for one item
_RANGE = 4 << 20  # bytes of a block of a larger one


class Block(NamedTuple):
    """A part of an object that is fetched by one request."""

    path: bytes
    entry: Entry
    first: int
    end: int


def blocks_of(path: bytes, entry: Entry, offset: int, size: int) -> Iterator[Block]:
    """The blocks that a part of an object touches; none behind its end."""
    step = entry.size if entry.size <= WHOLE else _RANGE
    end = min(offset + size, entry.size)
    if offset < end:
        for first in range(offset // step * step, end, step):
            yield Block(path, entry, first, min(first + step, entry.size))


@dataclass(slots=True)
class _Held:
    """A block that is being fetched, or was."""

    left: int  # bytes of it that nobody has read
    ready: threading.Event = field(default_factory=threading.Event)
    data: memoryview | None = None
    error: OSError | None = None


class Blocks:
    """The blocks that are in memory, at most `room` bytes. `fetch` gets one, and raises OSError. Thread-safe."""

    def __init__(self, fetch: Callable[[Block], memoryview], room: int) -> None:
        self._fetch = fetch
        self._room = room
        self._used = 0
        self._held: OrderedDict[Block, _Held] = OrderedDict()  # the last used last
        self._changed = threading.Condition()

    @property
    def used(self) -> int:
        """Bytes that are taken up."""
        return self._used

    def read(self, block: Block, offset: int, into: memoryview, slow: Callable[[], None]) -> int:
        """Copy what a block has at `offset` of its object, as much as there is room for. Raises OSError.

        `slow` is called before it is waited for.
        """
        held, is_mine = self._take(block)
        if is_mine:
            slow()
            self._fill(block, held)
        elif not held.ready.is_set():
            slow()
            held.ready.wait()
        if held.error is not None:
            raise held.error
        assert held.data is not None
        at = offset - block.first
        n = min(len(into), len(held.data) - at)
        into[:n] = held.data[at : at + n]
        self._was_read(block, held, n)
        return n

    def _take(self, block: Block) -> tuple[_Held, bool]:
        with self._changed:
            held = self._held.get(block)
            if held is not None:
                self._held.move_to_end(block)
                return held, False
            held = self._held[block] = _Held(block.end - block.first)
            return held, True

    def _fill(self, block: Block, held: _Held) -> None:
        self._reserve(held.left)
        try:
            held.data = self._fetch(block)
        except OSError as e:
            held.error = e
        finally:
            if held.data is None:
                self._drop(block, held)
            held.ready.set()

    def _reserve(self, nbytes: int) -> None:
        """Wait until there is room: what was fetched and waits for a reader gives way, what is on its way does not."""
        with self._changed:
            while self._used and self._used + nbytes > self._room:
                ready = next((block for block, held in self._held.items() if held.data is not None), None)
                if ready is None:
                    self._changed.wait()
                else:
                    self._forget(ready)
            self._used += nbytes

    def _was_read(self, block: Block, held: _Held, nbytes: int) -> None:
        with self._changed:
            held.left -= nbytes
            if held.left <= 0 and self._held.get(block) is held:
                self._forget(block)

    def _drop(self, block: Block, held: _Held) -> None:
        with self._changed:
            if self._held.get(block) is held:
                self._forget(block)

    def _forget(self, block: Block) -> None:
        del self._held[block]
        self._used -= block.end - block.first
        self._changed.notify_all()
