"""The disk tier as those see it who read: which bytes of which file are on this node's disk, and proved.

A file is found by its path, and its bytes are good for the very version that the kernel was told of. It is read around
the page cache and checked each time. What is read of the source is handed to the `disk_writer`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coordlfs.cache import items
from coordlfs.cache.pace import Pace
from coordlfs.catalogue.catalog import Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.disk.layout import BLOCK, UNIT, Row, Version
from coordlfs.kernel import pages
from coordlfs.sources import versions

if TYPE_CHECKING:
    from coordlfs.cache.admission import Fetched
    from coordlfs.cache.disk_writer import DiskWriter
    from coordlfs.cache.interfaces import Owners
    from coordlfs.disk.store import Found, Store

log = logging.getLogger(__name__)

_RECENT = 16  # blocks of which a part was asked for: the next READ will want the rest
_RESTS = 30.0  # seconds
_MOST_LOOKED_AT = 1 << 16  # blocks of a file that are looked for to say what is here of it


@dataclass(slots=True, frozen=True)
class Stored:
    """A block that is to be read from the disk: `length` bytes at `offset` of `fd`, with O_DIRECT."""

    fd: int
    offset: int
    length: int
    found: Found
    record: int  # of the file
    shown: versions.Version  # which the kernel was told of
    begin: int  # which of the block's bytes are wanted
    end: int


@dataclass(slots=True, frozen=True)
class Rest:
    """For how long the disk is left alone."""

    until: float  # as time.monotonic()
    why: str

    def is_over(self) -> bool:
        """Whether it is to be tried again."""
        return time.monotonic() >= self.until


class DiskTier:
    """Thread-safe. `owners`: None if this node shares with no other."""

    def __init__(
        self, store: Store, writer: DiskWriter, catalog: Catalog, counters: Counters, owners: Owners | None = None
    ) -> None:
        self.store = store
        self.writer = writer
        self._catalog = catalog
        self._counters = counters
        self._owners = owners
        self._recent: OrderedDict[int, tuple[Row, bytes]] = OrderedDict()  # by the row's number
        self._recent_lock = threading.Lock()
        self._scratch = threading.local()
        self.pace, self.pace_of_source = Pace(), Pace()
        self.rest: Rest | None = None  # while the source is asked instead
        self.blocked: dict[int, float] = {}  # threads that wait for the disk, and since when

    # -- reading ------------------------------------------------------------------------------------------------

    def begin(
        self, found: Found, record: int, shown: versions.Version, offset: int, size: int
    ) -> Stored | memoryview | None:
        """Where a part of a file is to be read, which lies in one block, or the bytes; None if `read` is to be called.

        The caller reads what is stored, and calls `proved`.
        """
        begin = offset - found.row.block * BLOCK
        recent = self._recently(found)
        if recent is not None and self._serves(record, shown, size):
            return memoryview(recent)[begin : begin + size]
        if recent is not None or not self.store.is_direct:
            return None
        length = found.row.length
        return Stored(self.store.data, found.position, length, found, record, shown, begin, begin + size)

    def proved(self, stored: Stored, data: memoryview) -> memoryview | None:
        """The bytes that were wanted of what was read; None if they are not what was written, or not to be given."""
        proved = stored.found.proved(data)
        if proved is None:
            self.writer.doubt(stored.found)
            return None
        self._counters.add("disk_read_bytes", stored.found.row.units * UNIT)
        if not self._serves(stored.record, stored.shown, stored.end - stored.begin):
            return None
        if stored.end - stored.begin < len(proved):
            self._remember(stored.found, proved)
        return proved[stored.begin : stored.end]

    def spans(self, record: int, shown: versions.Version, offset: int, size: int) -> list[tuple[int, list[Found]]]:
        """A part of a file, cut into what is here and what is not: how long each span is, and the blocks it is in."""
        if self.is_resting:
            return [(size, [])]
        spans: list[tuple[int, list[Found]]] = []
        at, end = offset, offset + size
        while at < end:
            block = at // BLOCK
            n = min(end, (block + 1) * BLOCK) - at
            found = self._find(record, shown, block)
            before, blocks = spans[-1] if spans else (0, [])
            if spans and bool(blocks) == (found is not None):
                spans.pop()
            else:
                before, blocks = 0, []
            spans.append((before + n, blocks if found is None else [*blocks, found]))
            at += n
        return spans

    def read(
        self,
        record: int,
        shown: versions.Version,
        offset: int,
        into: memoryview,
        blocks: list[Found],
        before_wait: Callable[[], None],
    ) -> bool:
        """Read a part of a file from the blocks that it is in; False if it is not to be had."""
        at, end = offset, offset + len(into)
        for found in blocks:
            data = self._bytes(found, before_wait)
            if data is None:
                return False
            start = found.row.block * BLOCK
            n = min(end, start + BLOCK) - at
            into[at - offset : at - offset + n] = data[at - start : at - start + n]
            at += n
        return self._serves(record, shown, len(into))

    def _bytes(self, found: Found, before_wait: Callable[[], None]) -> bytes | memoryview | None:
        if (recent := self._recently(found)) is not None:
            return recent
        before_wait()
        if not hasattr(self._scratch, "room"):
            self._scratch.room = memoryview(pages.buffer(BLOCK))
        try:
            with self.seen_waiting():
                data = self.store.read(found, self._scratch.room)
        except OSError:
            data = None
        if data is None:
            self.writer.doubt(found)
            return None
        self._counters.add("disk_read_bytes", found.row.units * UNIT)
        self._remember(found, data)
        return data

    @contextmanager
    def seen_waiting(self) -> Iterator[None]:
        """The calling thread waits for the disk meanwhile, and whoever looks for long waits sees it."""
        thread = threading.get_ident()
        self.blocked[thread] = time.monotonic()
        try:
            yield
        finally:
            self.pace.took(time.monotonic() - self.blocked.pop(thread))

    def _find(self, record: int, shown: versions.Version, block: int) -> Found | None:
        path = self._catalog.path(record)
        try:
            return self.store.find(path, Version(*shown[:3]), block, waits=False)
        except BlockingIOError:  # it is read from the source this time, and found the next time
            self.writer.order(lambda: self.store.index.find(path, block))
        except OSError:
            pass
        return None

    def _recently(self, found: Found) -> bytes | None:
        row, data = self._recent.get(found.number, (None, b""))
        return data if row == found.row else None

    def _remember(self, found: Found, data: memoryview) -> None:
        copy = bytes(data)
        with self._recent_lock:
            self._recent[found.number] = found.row, copy
            self._recent.move_to_end(found.number)
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)

    def _serves(self, record: int, shown: versions.Version, nbytes: int) -> bool:
        """Whether bytes of a version may be given, which are counted then: from now on the node stands for it."""
        if not self._catalog.serves(record, shown):
            return False
        self._counters.add("disk_reads")
        self._counters.add("disk_bytes", nbytes)
        return True

    def leave_alone(self, why: str) -> None:
        """Have the source read instead for a while."""
        if self.rest is None or self.rest.is_over():
            log.warning("the disk cache is left alone for %.0f s: %s", _RESTS, why)
        self.rest = Rest(time.monotonic() + _RESTS, why)

    def look_at_pace(self) -> None:
        """See whether the disk is slower than the source, or hangs. Called every so often."""
        self.writer.look()
        if self.pace.is_slower_than(self.pace_of_source):
            theirs, ours = self.pace_of_source.mean * 1000, self.pace.mean * 1000
            self.leave_alone(f"a read of it takes {ours:.0f} ms, and one of the source {theirs:.0f} ms")
            self.pace = Pace()  # it is measured anew

    @property
    def is_resting(self) -> bool:
        """Whether the source is read instead of the disk."""
        return self.rest is not None and not self.rest.is_over()

    # -- what is to be here -------------------------------------------------------------------------------------

    def keep(self, fetched: Fetched) -> None:
        """Bytes came from the source: keep them, if they are this node's to cache."""
        if self._owners is None or self._owners.owns(fetched.item):
            path = self._catalog.path(items.record_of(fetched.item))
            self.writer.offer(fetched.item, path, Version(*fetched.version[:3]), fetched.offset, fetched.data)

    def pinned(self, item: int) -> None:
        """An item is in memory now."""
        self.writer.pinned(item)

    def release(self, record: int, size: int) -> None:
        """A file of `size` bytes is another one by now, or gone: give its room back."""
        self.writer.release(self._catalog.path(record), size)

    def fill(self, item: int) -> bool:
        """Have the source read for what is missing of an item; False if it is to be asked for again, a little later."""
        if self._owners is not None and not self._owners.owns(item):
            return True
        record = items.record_of(item)
        return self.writer.fill(item, self._catalog.path(record), Version(*self._catalog.version(record)[:3]))

    def lacks(self, item: int) -> bool:
        """Whether an item would be kept here, and is not."""
        is_own = self._owners is None or self._owners.owns(item)
        return is_own and not self.writer.is_full and not self.holds(item)

    def is_settled(self, item: int) -> bool:
        """Whether nothing of an item waits to be written."""
        record = items.record_of(item)
        return self.writer.is_settled(item, self._catalog.path(record), self._catalog.size(record))

    def keeps(self, record: int, offset: int) -> bool:
        """Whether a byte of a file is here, or would be kept if it were read."""
        return not self.writer.is_full or bool(self.spans(record, self._catalog.version(record), offset, 1)[0][1])

    def holds(self, item: int) -> bool:
        """Whether all of an item is here."""
        record, shown = items.record_of(item), self._catalog.version(items.record_of(item))
        offset, length = items.span(item, shown.size)
        return all(blocks for _, blocks in self.spans(record, shown, offset, length))

    def held(self, record: int) -> int:
        """Bytes that are here of a file, of the version that the kernel was told of."""
        shown = self._catalog.version(record)
        blocks = range(min(-(-shown.size // BLOCK), _MOST_LOOKED_AT))
        return sum(found.row.length for block in blocks if (found := self._find(record, shown, block)) is not None)

    def figures(self) -> dict[str, Any]:
        """For `status`."""
        store, c = self.store, self._counters
        return {
            "size_bytes": store.size,
            "taken_bytes": store.taken,
            "held_bytes": store.bytes,
            "held_blocks": len(store.index),
            "index_memory_bytes": store.index.memory,
            "waiting_blocks": self.writer.waiting,
            "is_ready": self.writer.is_ready,
            "is_direct": store.is_direct,
            "stopped": self.writer.why_not,
            "resting": self.rest.why if self.rest is not None and self.is_resting else None,
            "bytes": c["disk_bytes"],
            "reads": c["disk_reads"],
            "read_bytes": c["disk_read_bytes"],
            "written_bytes": c["disk_written_bytes"],
            "written_blocks": c["disk_written_blocks"],
            "not_admitted": c["disk_not_admitted"],
            "bad_blocks": c["disk_bad_blocks"],
        }
