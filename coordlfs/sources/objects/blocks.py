"""Bytes of objects on their way to readers: each is fetched once, however many wait for it, and memory is bounded.

An object is fetched in blocks: up to 16 MiB at once, a larger one by ranges. What was fetched stays until it was read
to its end, or others need the room: it is no cache, which lies behind. What somebody is expected to read is fetched
ahead, by threads of its own, once they find room: never what a reader has asked for since. It does not know how bytes
are fetched, or who expects what.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from coordlfs.kernel import threads
from coordlfs.sources.objects.names import Entry

WHOLE = 16 << 20  # bytes up to which an object is fetched at once: what `cache.items` takes for one item
_RANGE = 4 << 20  # bytes of a block of a larger one
_THREADS = 64  # that fetch ahead: as many requests as help most stores
_MOST_EXPECTED = 4096  # blocks
_WAITS = 30.0  # seconds that what nobody comes for is kept from others who are expected
_LOOK_EVERY = 1.0  # seconds


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
    fetching: threading.Lock  # held until it was; an Event costs ten times as much
    data: memoryview | None = None
    error: OSError | None = None
    since: float = field(default_factory=time.monotonic)


class Blocks:
    """The blocks that are in memory, at most `room` bytes, of which what is fetched ahead takes a half.

    `fetch` gets one, and raises OSError. Thread-safe.
    """

    def __init__(self, fetch: Callable[[Block], memoryview], room: int) -> None:
        self._fetch = fetch
        self._room = room
        self._used = 0
        self._held: OrderedDict[Block, _Held] = OrderedDict()  # the last used last
        self._expected: OrderedDict[Block, None] = OrderedDict()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # for readers who wait for room
        self._work = threading.Condition(self._lock)  # for threads that fetch ahead
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._is_closed = False

    def close(self) -> None:
        """Fetch nothing ahead any more."""
        with self._lock:
            self._is_closed = True
            self._expected.clear()
            self._work.notify_all()

    @property
    def used(self) -> int:
        """Bytes that are taken up."""
        return self._used

    def read(self, block: Block, offset: int, size: int, slow: Callable[[], None]) -> memoryview:
        """What a block has at `offset` of its object, up to `size` bytes. Raises OSError.

        `slow` is called before it is waited for.
        """
        held, is_mine = self._take(block)
        if is_mine:
            slow()
            self._fill(block, held)
        elif held.fetching.locked():
            slow()
            with held.fetching:
                pass
        if held.error is not None:
            raise held.error
        assert held.data is not None
        at = offset - block.first
        data = held.data[at : at + size]
        self._was_read(block, held, len(data))
        return data

    def expect(self, block: Block) -> None:
        """A block will be read soon. Never waits."""
        with self._lock:
            if block in self._held or block in self._expected or self._is_closed:
                return
            self._expected[block] = None
            if len(self._expected) > _MOST_EXPECTED:
                self._expected.popitem()
            if self._idle:
                self._work.notify()
            elif len(self._threads) < _THREADS:
                thread = threading.Thread(target=self._fetch_ahead, name="fetch ahead", daemon=True)
                if threads.start(thread):
                    self._threads.append(thread)

    def _fetch_ahead(self) -> None:
        while (taken := self._next()) is not None:
            block, held = taken
            self._fetch_into(block, held)

    def _next(self) -> tuple[Block, _Held] | None:
        """The next block that is expected, with room for it; None at the end."""
        with self._lock:
            while not self._is_closed:
                block = next(iter(self._expected), None)
                if block is not None and self._has_room_ahead(block):
                    del self._expected[block]
                    held = self._hold(block)
                    self._used += held.left
                    return block, held
                self._idle += 1
                self._work.wait(None if block is None else _LOOK_EVERY)
                self._idle -= 1
        return None

    def _has_room_ahead(self, block: Block) -> bool:
        """Whether a block may be fetched ahead; what nobody has come for in a while gives way."""
        size, now = block.end - block.first, time.monotonic()
        while self._used and self._used + size > self._room // 2:
            oldest = next((b for b, h in self._held.items() if h.data is not None and now - h.since > _WAITS), None)
            if oldest is None:
                return False
            self._forget(oldest)
        return True

    def _take(self, block: Block) -> tuple[_Held, bool]:
        with self._lock:
            self._expected.pop(block, None)
            held = self._held.get(block)
            if held is not None:
                self._held.move_to_end(block)
                return held, False
            return self._hold(block), True

    def _hold(self, block: Block) -> _Held:
        held = self._held[block] = _Held(block.end - block.first, threading.Lock())
        held.fetching.acquire()
        return held

    def _fill(self, block: Block, held: _Held) -> None:
        self._reserve(held.left)
        self._fetch_into(block, held)

    def _fetch_into(self, block: Block, held: _Held) -> None:
        try:
            held.data = self._fetch(block)
        except OSError as e:
            held.error = e
        finally:
            if held.data is None:
                self._drop(block, held)
            held.fetching.release()

    def _reserve(self, nbytes: int) -> None:
        """Wait until there is room: what was fetched and waits for a reader gives way, what is on its way does not."""
        with self._lock:
            while self._used and self._used + nbytes > self._room:
                ready = next((block for block, held in self._held.items() if held.data is not None), None)
                if ready is None:
                    self._changed.wait()
                else:
                    self._forget(ready)
            self._used += nbytes

    def _was_read(self, block: Block, held: _Held, nbytes: int) -> None:
        with self._lock:
            held.left -= nbytes
            if held.left <= 0 and self._held.get(block) is held:
                self._forget(block)

    def _drop(self, block: Block, held: _Held) -> None:
        with self._lock:
            if self._held.get(block) is held:
                self._forget(block)

    def _forget(self, block: Block) -> None:
        del self._held[block]
        self._used -= block.end - block.first
        self._changed.notify_all()
        if self._expected:
            self._work.notify()
