"""The writer of the disk tier: what was read from the source goes to the store, off the way of whoever read it.

Bytes are copied into memory of a fixed size, the arena; if that is full, since the disk cannot keep up, they are not
kept this time. A block that was read in part waits there for the rest, or has it read, once nobody has read more of it
for a while. One thread writes, in batches, decides what finds room (`tiers`), and does whatever else changes the
store. It answers no reader and knows no request.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from coordlfs.cache import items
from coordlfs.cache.minio import MinIO
from coordlfs.cache.ranges import Ranges, merged
from coordlfs.cache.tiers import Tiers
from coordlfs.catalogue.catalog import SERVED, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.disk.layout import BLOCK, UNIT, Version, length_of, units_of
from coordlfs.disk.space import Space
from coordlfs.disk.store import Block, Found, Store
from coordlfs.kernel import pages
from coordlfs.sources import versions
from coordlfs.sources.contract import Part, Source

log = logging.getLogger(__name__)

ARENA = 64 << 20  # bytes that wait to be written, or for the rest of their block
_BATCH = 16 << 20  # bytes that are made durable at once
_GATHERS = 0.02  # seconds that blocks wait for others, so that one fdatasync does for all of them
_IDLE = 0.3  # seconds without a READ of it after which the rest of a block is read
_ENDS_WITHIN = 2.0  # seconds
_AGAIN = 60.0  # seconds after which a file system that was full is asked for more room
_BLOCKS_OF_ITEM = items.CHUNK // BLOCK
_HANGS = 10.0  # seconds for one thing, after which nobody waits for the disk any more
_LOOKS_EVERY = 5.0  # seconds, whether its files are there still
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(slots=True)
class _Waiting:
    """One block in the arena."""

    item: int
    path: bytes
    version: Version
    block: int
    first: int  # unit of the arena
    room: memoryview
    ranges: Ranges = ()  # of its bytes that are there
    read: float = 0.0  # when it was last

    @property
    def length(self) -> int:
        return length_of(self.version.size, self.block)


class DiskWriter:
    """Keeps what it is given, until `close`. `run` is its thread; any thread may call the rest."""

    def __init__(self, store: Store, catalog: Catalog, source: Source, memory: MinIO, counters: Counters) -> None:
        self.store = store
        self.stopped: str | None = None  # why nothing is kept any more
        self.is_ready = False  # it is known what the store holds
        self.on_completed: Callable[[int], object] = lambda nbytes: None  # told what completed a reader's block
        self._catalog = catalog
        self._counters = counters
        self._source = source
        self._tiers: Tiers[Block] = Tiers(memory, self)
        self._lock = threading.Lock()
        self._arena = pages.buffer(ARENA)
        self._space = Space([(0, ARENA // UNIT)])
        self._parts: OrderedDict[tuple[bytes, int], _Waiting] = OrderedDict()  # that are not whole
        self._queue: deque[_Waiting] = deque()
        self._queued: set[tuple[bytes, int]] = set()
        self._orders: deque[Callable[[], object]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._is_busy = True  # counting
        self._since = time.monotonic()  # when it began to have the disk do what it does now
        self._is_said_to_hang = False
        self._is_full = False  # what memory does not hold found no room, unless a copy has come to be since
        self._is_said_to_be_full = False  # by its file system
        self._grows_at = 0.0  # when the file system is asked for more room again

    # -- from any thread ----------------------------------------------------------------------------------------

    def offer(self, item: int, path: bytes, version: Version, offset: int, data: memoryview) -> None:
        """Keep a copy of bytes that the source gave for an item; be it later, or not at all."""
        if self.is_full:
            return
        at, end = offset, offset + len(data)
        while at < end:
            block = at // BLOCK
            n = min(end, (block + 1) * BLOCK) - at
            self._put(item, path, version, block, at - block * BLOCK, data[at - offset : at - offset + n])
            at += n

    def _put(self, item: int, path: bytes, version: Version, block: int, begin: int, data: memoryview) -> None:
        with self._lock:
            waiting = self._waiting(item, path, version, block)
            if waiting is None:
                return
            waiting.room[begin : begin + len(data)] = data
            waiting.ranges = merged(waiting.ranges, begin, begin + len(data))
            waiting.read = time.monotonic()
            if waiting.ranges == ((0, waiting.length),):
                self._is_whole(waiting)
        self._rouse()

    def _waiting(self, item: int, path: bytes, version: Version, block: int) -> _Waiting | None:
        """The block in the arena, which it enters unless it is there; None if it is not to be added to."""
        key = path, block
        waiting = self._parts.get(key)
        if waiting is not None and waiting.version == version:
            return waiting
        if waiting is not None:
            self._leave(self._parts.pop(key))
        if key in self._queued:
            return None
        length = length_of(version.size, block)
        first = self._space.take(units_of(length)) if length > 0 else None
        if first is None:
            self._counters.add("disk_not_admitted")
            return None
        room = memoryview(self._arena)[first * UNIT : (first + units_of(length)) * UNIT]
        room[length:] = bytes(len(room) - length)
        waiting = self._parts[key] = _Waiting(item, path, version, block, first, room)
        return waiting

    def _is_whole(self, waiting: _Waiting) -> None:
        key = waiting.path, waiting.block
        del self._parts[key]
        self._queue.append(waiting)
        self._queued.add(key)

    def _leave(self, waiting: _Waiting) -> None:
        self._space.give(waiting.first, len(waiting.room) // UNIT)
        waiting.room.release()

    def fill(self, item: int, path: bytes, version: Version) -> bool:
        """Have the source read for what is missing of an item; False if there is no room for it in the arena."""
        if self.is_full:
            return True
        for block in blocks_of(item, version.size):
            if self.store.find(path, version, block) is None:
                with self._lock:
                    if (path, block) not in self._queued and self._waiting(item, path, version, block) is None:
                        return False
        self._rouse()
        return True

    @property
    def waiting(self) -> int:
        """Blocks that wait for their rest or to be written, and whatever else is yet to be done."""
        return len(self._parts) + len(self._queued) + len(self._orders) + self._is_busy

    def is_settled(self, item: int, path: bytes, size: int) -> bool:
        """Whether nothing of an item of a file of `size` bytes waits."""
        keys = [(path, block) for block in blocks_of(item, size)]
        with self._lock:
            return not any(key in self._parts or key in self._queued for key in keys)

    @property
    def is_full(self) -> bool:
        """Whether nothing more finds room, or nothing more is kept."""
        return self.stopped is not None or (self._is_full and self._tiers.is_settled)

    @property
    def hangs(self) -> bool:
        """Whether its disk does not answer: who waits for what was asked for need not wait any longer."""
        return self._is_busy and time.monotonic() - self._since > _HANGS

    @property
    def why_not(self) -> str | None:
        """Why nothing is kept any more, or for now; None if it is."""
        return f"it has not answered for {_HANGS:.0f} s" if self.hangs and not self.stopped else self.stopped

    def look(self) -> None:
        """Say so if the disk hangs, once each time. Called every so often."""
        hangs = self.hangs
        if hangs and not self._is_said_to_hang:
            log.warning("nothing is kept in the disk cache for now: %s", self.why_not)
        self._is_said_to_hang = hangs

    def pinned(self, item: int) -> None:
        """An item is in memory now."""
        self._tiers.pinned(item)

    def release(self, path: bytes, size: int) -> None:
        """Give back the room of all that is there of a file, which had `size` bytes; soon."""
        self.order(lambda: self._remove(path, range(-(-size // BLOCK))))

    def doubt(self, found: Found) -> None:
        """What was read of a block is not what was written: forget it, unless it was removed meanwhile; soon."""
        self.order(lambda: self._forget(found))

    def retire(self, found: Found) -> None:
        """Give back the room of a block of a version that is gone, unless it was removed meanwhile; soon."""
        self.order(lambda: self._retire(found))

    def clear(self) -> None:
        """Give back the room of everything; soon."""
        self.order(self._clear)

    def order(self, order: Callable[[], object]) -> None:
        """Have something called after all that was asked for before, but for writing."""
        self._orders.append(order)
        self._rouse()

    def _rouse(self) -> None:
        if not self._wake.is_set():
            self._wake.set()

    def close(self) -> None:
        """End `run`."""
        self._closing = True
        self._wake.set()

    # -- the thread ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Take stock, then write, until `close`."""
        try:
            self._take_stock()
            if self.store.is_read_only:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            while not self._closing:
                self._wake.wait(_IDLE if self._parts else _LOOKS_EVERY)
                time.sleep(_GATHERS)
                self._wake.clear()
                self._work()
                self._look_whether_it_is_there()
            self._end()
        except OSError as e:
            self._stop(e)
            self._drain()

    def _work(self) -> None:
        self._since, self._is_busy = time.monotonic(), True
        try:
            self._do_all()
        finally:
            self._is_busy = False

    def _do_all(self) -> None:
        while not self._closing:
            batch = self._batch()
            while self._orders:  # after the batch was taken: what made room for a block of it was ordered before
                self._since = time.monotonic()
                self._orders.popleft()()
            if not batch:
                break
            self._since = time.monotonic()
            self._write(batch)
        self._since = math.inf  # from here on it waits for the source
        self._complete()

    def _end(self) -> None:
        """Write what waits, for a moment: a mount that ends must not be held up."""
        until = time.monotonic() + _ENDS_WITHIN
        while self._queue and time.monotonic() < until:
            self._write(self._batch())

    def _take_stock(self) -> None:
        stock = self.store.take_stock(self._pause)
        self.is_ready, self._is_busy = True, False
        if self.store.emptied:
            log.warning("the disk cache begins empty: %s", self.store.emptied)
        if stock.bad_rows:
            self._counters.add("disk_bad_blocks", stock.bad_rows)
            log.warning("%d blocks of the disk cache are damaged, and are read from the source again", stock.bad_rows)

    def _pause(self) -> None:
        time.sleep(0.001)
        self._since = time.monotonic()

    def _look_whether_it_is_there(self) -> None:
        if self.store.is_removed:
            self.store.give_up()
            raise OSError(errno.ENOENT, "its files were removed")

    def _batch(self) -> list[_Waiting]:
        batch, size = [], 0
        with self._lock:
            while self._queue and size < _BATCH:
                batch.append(self._queue.popleft())
                size += batch[-1].length
        return batch

    def _write(self, batch: list[_Waiting]) -> None:
        placed: list[tuple[int, Block]] = []
        kept: list[_Waiting] = []
        try:
            for waiting in batch:
                block = Block(waiting.path, waiting.version, waiting.block, waiting.room)
                if self.store.find(*block[:3]) is None and (place := self._place(waiting.item, block)) is not None:
                    placed.append((place, block))
                    kept.append(waiting)
            if placed:
                self.store.add(placed)
        except OSError as e:  # of a file system that cannot allot room ahead
            if e.errno not in _FULL:
                raise
            self._stop_growing(e)
            kept.clear()
        finally:
            with self._lock:
                for waiting in batch:
                    self._queued.discard((waiting.path, waiting.block))
                    self._leave(waiting)
        for waiting in kept:
            self._tiers.stored(waiting.item)
        self._counters.add("disk_written_bytes", sum(waiting.length for waiting in kept))
        self._counters.add("disk_written_blocks", len(kept))

    def _place(self, item: int, block: Block) -> int | None:
        place = self._tiers.place(item, block)
        if place is None and self._tiers.is_settled:
            self._is_full = True
        return place

    def _complete(self) -> None:
        """Read the rest of blocks of which nobody reads more."""
        before = time.monotonic() - _IDLE
        with self._lock:
            idle = [waiting for waiting in self._parts.values() if waiting.read < before]
            for waiting in idle:
                del self._parts[waiting.path, waiting.block]
                self._queued.add((waiting.path, waiting.block))
        for waiting in idle:
            is_read = not self._closing and not self.is_full and self._read_whole(waiting)
            with self._lock:
                if is_read:
                    waiting.room[waiting.length :] = bytes(len(waiting.room) - waiting.length)
                    self._queue.append(waiting)
                else:
                    self._queued.discard((waiting.path, waiting.block))
                    self._leave(waiting)
        if idle:
            self._rouse()

    def _read_whole(self, waiting: _Waiting) -> bool:
        """Read a block from the source; False if it cannot be, or is of another version."""
        record = items.record_of(waiting.item)
        is_first = not self._catalog.flags(record) & SERVED
        part = Part(record, waiting.path, waiting.block * BLOCK, waiting.length, is_first)
        try:
            n, st = self._source.read(part, waiting.room, lambda: None)
        except OSError:  # who reads it will be told
            return False
        self._counters.count_read(n)
        if waiting.ranges:  # else nobody has read of it
            self.on_completed(n)
        return n == waiting.length and Version(*versions.Version.of(st)[:3]) == waiting.version

    def _stop(self, error: OSError) -> None:
        self.stopped = error.strerror or str(error)
        log.warning("nothing more is kept in the disk cache: %s", self.stopped)

    def _drain(self) -> None:
        """Do without the disk until `close`."""
        while not self._closing:
            with self._lock:
                for waiting in [*self._parts.values(), *self._queue]:
                    self._leave(waiting)
                self._parts.clear()
                self._queue.clear()
                self._queued.clear()
            while self._orders:
                with suppress(OSError):
                    self._orders.popleft()()
            self._is_busy = False
            with suppress(OSError):
                self._look_whether_it_is_there()
            self._wake.wait(_LOOKS_EVERY)
            self._wake.clear()
            self._wake.clear()

    # -- what changes the store; called by the thread --------------------------------------------------------------

    def take(self, block: Block) -> int | None:
        """Room in the store for a block, as `tiers.Disk` says."""
        if not self.store.may_grow and time.monotonic() >= self._grows_at:
            self.store.may_grow = True
        try:
            return self.store.take(block)
        except OSError as e:
            if e.errno not in _FULL:
                raise
            self._stop_growing(e)
            return self.store.take(block)

    def _stop_growing(self, error: OSError) -> None:
        """For a while."""
        self._grows_at = time.monotonic() + _AGAIN
        self.store.may_grow = False
        if not self._is_said_to_be_full:
            log.warning("the disk cache cannot grow, as its file system says: %s", error.strerror)
        self._is_said_to_be_full = True

    def remove_item(self, item: int) -> int:
        """Give back the room of an item, as `tiers.Disk` says."""
        record = items.record_of(item)
        return self._remove(self._catalog.path(record), blocks_of(item, self._catalog.size(record)))

    def _remove(self, path: bytes, blocks: Iterable[int]) -> int:
        freed = sum(self.store.remove(path, block) for block in blocks)
        self._is_full = self._is_full and not freed
        return freed

    def _retire(self, found: Found) -> bool:
        is_there = self.store.forget(found)
        self._is_full = self._is_full and not is_there
        return is_there

    def _forget(self, found: Found) -> None:
        if self._retire(found):
            self._counters.add("disk_bad_blocks")
            bad = self._counters["disk_bad_blocks"]
            if bad & bad - 1 == 0:  # the first, the second, the fourth …
                log.warning("%d blocks of the disk cache are damaged so far, and are read from the source again", bad)

    def _clear(self) -> None:
        self.store.clear()
        self._is_full = False


def blocks_of(item: int, size: int) -> range:
    """The blocks of an item of a file of `size` bytes."""
    first = items.chunk_of(item) * _BLOCKS_OF_ITEM
    return range(first, first + -(-items.length(item, size) // BLOCK))
