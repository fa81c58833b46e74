"""Going through what the disk tier holds, once after a mount: what changed or is gone meanwhile, and filling memory.

A mount that begins knows no names, so nobody would ask again for a file that is gone, and its room would be lost. What
is good is brought to memory from the disk while that has room, a few items at a time, so that readers hardly notice.
What follows from a change of a file that is known is decided elsewhere.
"""

from __future__ import annotations

import errno
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import trio

from coordlfs.cache import items
from coordlfs.cache.admission import Admission
from coordlfs.cache.disk_tier import DiskTier
from coordlfs.catalogue.catalog import Catalog
from coordlfs.disk.layout import BLOCK, Version
from coordlfs.kernel import pages, threads
from coordlfs.serving.namespace import Namespace
from coordlfs.sources import versions
from coordlfs.sources.contract import Source

if TYPE_CHECKING:
    from coordlfs.disk.store import Found

_AT_ONCE = 64  # blocks
_PAUSE = 0.02  # seconds between those: thousands of names a second are looked up, and not more
_LOOK_EVERY = 0.1  # seconds
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV})


class Inventory:
    """Compares what a disk tier holds with the source. `checks`: that may have changed since."""

    def __init__(
        self,
        tier: DiskTier,
        catalog: Catalog,
        source: Source,
        namespace: Namespace,
        admission: Admission,
        *,
        checks: bool,
    ) -> None:
        self._tier = tier
        self._catalog = catalog
        self._source = source
        self._namespace = namespace
        self._admission = admission
        self._checks = checks
        self._last: tuple[bytes, Version, bool] | None = None  # path and version of the block before, and if it is good
        self._directories: dict[bytes, int] = {b"": 0}

    async def run(self) -> None:
        """Go through all that was there when the mount began, then return."""
        writer = self._tier.writer
        while not writer.is_ready:
            await trio.sleep(_LOOK_EVERY)
        rows = self._tier.store.all()
        while self._checks or self._has_room(1):
            batch = await threads.run(lambda: list(islice(rows, _AT_ONCE)), abandon_on_cancel=True)
            if not batch:
                return
            wanted = await threads.run(partial(self._check, batch), abandon_on_cancel=True)
            if wanted:
                self._admission.admit(wanted)
                self._admission.flush()
                while not self._admission.settled(wanted):
                    await trio.sleep(_LOOK_EVERY / 10)
            await trio.sleep(_PAUSE)

    def _check(self, batch: list[Found]) -> list[int]:
        """Have what is of no version that is there removed; the items of the rest that find room in memory."""
        wanted = []
        for found in batch:
            path = self._tier.store.name(found.row)
            if path is None:
                continue  # whoever reads the file finds it all the same
            if not self._is_good(path, found.row.version):
                self._tier.writer.retire(found)
            elif found.row.block * BLOCK % items.CHUNK == 0 and (item := self._item(path, found)) is not None:
                wanted.append(item)
        return wanted

    def _is_good(self, path: bytes, version: Version) -> bool:
        if not self._checks:
            return True
        if self._last is None or self._last[:2] != (path, version):
            self._last = path, version, self._has(path, version)
        return self._last[2]

    def _has(self, path: bytes, version: Version) -> bool:
        """Whether the source has that version of a file, as far as it says."""
        try:
            found = versions.Version.of(self._source.lstat(path))
        except OSError as e:
            return e.errno not in _GONE
        return Version(*found[:3]) == version

    def _item(self, path: bytes, found: Found) -> int | None:
        """The item that begins with a block, if memory has room for it."""
        if not self._has_room(
            pages.count(items.CHUNK if found.row.version.size > items.CHUNK else found.row.version.size)
        ):
            return None
        record = self._namespace.resolve(path, self._directories)
        if record is None or Version(*self._catalog.version(record)[:3]) != found.row.version:
            return None
        item = items.item_at(record, found.row.block * BLOCK)
        return item if self._admission.is_absent(item) else None

    def _has_room(self, npages: int) -> bool:
        policy = self._admission.policy
        return policy.used + npages <= policy.capacity
