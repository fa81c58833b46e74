"""Having files cached that nobody has read: in memory, and on disk, as far as there is room and they are this node's.

It waits until they are, or cannot be. Files are named by their paths, and found through the catalogue alone. Who wants
them is not known here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import trio

from coordlfs.cache import items
from coordlfs.cache.admission import Admission
from coordlfs.cache.minio import State
from coordlfs.catalogue.catalog import REGULAR, Catalog
from coordlfs.kernel import pages, threads
from coordlfs.serving.namespace import Namespace

if TYPE_CHECKING:
    from coordlfs.cache.disk_tier import DiskTier

_AT_ONCE = 1024  # items that are asked for before it is seen what became of them
_PAGES_OF_CHUNK = pages.count(items.CHUNK)


class Done(NamedTuple):
    """What became of some files. `on_disk` and its bytes are of what is there, and not in memory."""

    items: int
    pinned: int
    pinned_pages: int
    free_pages: int
    on_disk: int
    on_disk_bytes: int
    is_disk_full: bool
    disk_stopped: str | None  # why nothing more is kept there

    @property
    def cached_bytes(self) -> int:
        """Bytes of them that are cached here."""
        return self.pinned_pages * pages.PAGE + self.on_disk_bytes

    @property
    def is_full(self) -> bool:
        """Whether something of what follows may find no room."""
        return self.free_pages < _PAGES_OF_CHUNK and self.is_disk_full


class Fetching:
    """For trio's thread. `expect`: a record will be read soon, of which its source has to know early; see `Source`."""

    def __init__(
        self,
        catalog: Catalog,
        namespace: Namespace,
        admission: Admission,
        tier: DiskTier | None,
        expect: Callable[[int], None] | None,
    ) -> None:
        self._catalog = catalog
        self._namespace = namespace
        self._admission = admission
        self._tier = tier
        self._expect = expect

    async def items(self, named: list[bytes]) -> list[range]:
        """The items of each of the files named; names that are no regular files are left out.

        From a thread: the source may take its time, or never answer, and all else goes on.
        """
        return await threads.run(lambda: self._look_up(named), abandon_on_cancel=True)

    def _look_up(self, named: list[bytes]) -> list[range]:
        found: list[range] = []
        directories: dict[bytes, int] = {b"": 0}
        for path in named:
            record = self._namespace.resolve(path, directories)
            if record is not None and self._catalog.flags(record) & REGULAR:
                found.append(items.items_of(record, self._catalog.size(record)))
        return found

    async def fetch(self, named: list[bytes]) -> Done:
        """Have files pinned, and kept on disk, and wait until they are or cannot be. Raises OSError."""
        wanted = await self.items(named)
        policy, pinned, npages, on_disk, disk_bytes = self._admission.policy, 0, 0, 0, 0
        for some in _some_at_a_time(wanted):
            found = await self._pin(some)
            pinned += len(found)
            npages += sum(map(policy.pages, found))
            kept = await self._keep_on_disk(some, set(found))
            on_disk += len(kept)
            disk_bytes += sum(self._length(item) for item in kept)
            is_full = not found and policy.capacity - policy.used < _PAGES_OF_CHUNK and self._is_disk_full()
            if is_full and len(some) == _AT_ONCE:
                break  # what follows finds no room either
        return Done(
            items=sum(map(len, wanted)),
            pinned=pinned,
            pinned_pages=npages,
            free_pages=policy.capacity - policy.used,
            on_disk=on_disk,
            on_disk_bytes=disk_bytes,
            is_disk_full=self._is_disk_full(),
            disk_stopped=None if self._tier is None else self._tier.writer.why_not,
        )

    def _length(self, item: int) -> int:
        return items.length(item, self._catalog.size(items.record_of(item)))

    def _is_disk_full(self) -> bool:
        return self._tier is None or self._tier.writer.is_full or self._tier.writer.hangs

    async def _pin(self, wanted: list[int]) -> list[int]:
        """Have items pinned, and wait until they are or cannot be; those that are."""
        self._admission.admit(wanted)
        self._announce(filter(self._admission.is_pending, wanted))
        self._admission.flush()
        while not self._admission.settled(wanted):
            await trio.sleep(0.005)
        return [item for item in wanted if self._admission.policy.state(item) is State.PINNED]

    def _announce(self, wanted: Iterable[int]) -> None:
        """Have a source that takes its time begin with what keepers or the disk's writer will come to."""
        if self._expect is not None:
            for item in wanted:
                if items.chunk_of(item) == 0:
                    self._expect(items.record_of(item))

    async def _keep_on_disk(self, wanted: list[int], pinned: set[int]) -> list[int]:
        """Have items kept on disk, and wait until they are or cannot be; those that are, but for what is pinned."""
        tier = self._tier
        if tier is None:
            return []
        self._announce(item for item in wanted if item not in pinned and tier.lacks(item))
        for item in wanted:
            while not tier.fill(item) and not tier.writer.hangs:
                await trio.sleep(0.01)
        for item in wanted:
            while not tier.is_settled(item) and not tier.writer.stopped and not tier.writer.hangs:
                await trio.sleep(0.01)
        return [item for item in wanted if item not in pinned and tier.holds(item)]


def _some_at_a_time(wanted: list[range]) -> Iterator[list[int]]:
    """Some items after the others: of one file there may be too many to be listed."""
    items_ = itertools.chain.from_iterable(wanted)
    while some := list(itertools.islice(items_, _AT_ONCE)):
        yield some
