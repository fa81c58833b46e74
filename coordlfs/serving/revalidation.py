"""Noticing what changed in the source where no reader would show it: cached files are read without a request.

A pass compares every name and file that the kernel may believe with the source, at such a pace that each is looked
at once in the time that was promised (`--revalidate`); `coordlfs refresh` has some or all of them looked at at once.
Reads that hit are not slowed down; what changed is dropped, and comes back in its new version when it is read. What
follows from a change is decided by the `Consequences` that it is given.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from typing import Protocol

import trio

from coordlfs.catalogue.catalog import STALE, SUPERSEDED, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import threads
from coordlfs.sources.contract import Neighbours, Source

log = logging.getLogger(__name__)

_BATCH = 1024
_SHARE = 0.8  # of the promised time in which a pass is to be through
_LONGEST_PAUSE = 0.01  # of that time, after which it is seen what else has become known
_HANGS_AFTER = 30.0  # seconds that the source may take for a batch
_THREADS = 16  # that may wait for a source which does not answer


class Consequences(Protocol):
    """What follows from what was found. Called from any thread; when it returns, whoever opens a name gets the new."""

    def is_old(self, record: int) -> None:
        """A change of a record was met before; not all who believe in it may have been told."""

    def use_other_name(self, record: int) -> bool:
        """The name of a record is gone. Whether its file has another one, which it goes by from now on."""

    def vanished(self, record: int) -> None:
        """The name of a record is gone, and leads to no file."""

    def changed(self, record: int, st: os.stat_result) -> None:
        """The name of a record leads to what has the attributes `st`, another version or something else."""


class Revalidation:
    """Compares records of the catalogue with the source. `check` may be called from any thread."""

    def __init__(
        self,
        catalog: Catalog,
        source: Source,
        consequences: Consequences,
        counters: Counters,
    ) -> None:
        self._catalog = catalog
        self._source = source
        self._consequences = consequences
        self._counters = counters
        self._passes, self._refreshers = trio.CapacityLimiter(_THREADS), trio.CapacityLimiter(_THREADS)
        self._gone: set[int] = set()  # what was missing already when it was last looked at

    async def run(self, interval: float) -> None:
        """Pass until cancelled, so that a change is noticed within `interval` seconds.

        What becomes known during a pass is looked at in that pass: so nothing is looked at later than one after it
        was, or after it became known.
        """
        late = False
        while True:
            checked, began = 0, time.monotonic()
            looked = began
            while (left := len(self._catalog) - checked) > 0:
                pause = self._due(looked, began + interval * _SHARE, left) - time.monotonic()
                if pause > (longest := interval * _LONGEST_PAUSE):
                    await trio.sleep(longest)
                    continue  # there may be more to look at by now
                await trio.sleep(max(0.0, pause))
                batch = range(checked, checked + min(left, _BATCH))
                await self._within(_HANGS_AFTER, batch, interval * (1 - _SHARE))
                checked, looked = batch.stop, time.monotonic()
            self._counters.add("passes")
            took = time.monotonic() - began
            if took > interval and not late:
                late = True
                log.warning("a pass of %d names took %.0f s, longer than --revalidate %.0f s", checked, took, interval)

    @staticmethod
    def _due(looked: float, end: float, left: int) -> float:
        """When the batch after the one of `looked` is due, so that what is left is spread evenly until `end`."""
        return looked + (end - looked) * min(left, _BATCH) / left

    async def _within(self, seconds: float, batch: range, age: float) -> None:
        """Look at a batch; one that hangs in the source is left to its thread, and the others go on.

        What the source says may be `age` seconds old.
        """
        with trio.move_on_after(seconds) as scope:
            await self._in_thread(batch, self._passes, age)
        if scope.cancelled_caught:
            path = os.fsdecode(self._catalog.path(batch.start))
            log.warning("names from %s on are not looked at: the source does not answer", path or "the root")

    async def refresh(self, paths: Collection[bytes]) -> tuple[int, int]:
        """Look now at what is known of `paths` and below them; how many names there were, and how many had changed."""
        wanted = await threads.run(lambda: self._below(paths))
        changed = 0
        for first in range(0, len(wanted), _BATCH):
            changed += await self._in_thread(wanted[first : first + _BATCH], self._refreshers)
        return len(wanted), changed

    async def _in_thread(self, records: Iterable[int], limiter: trio.CapacityLimiter, age: float = 0.0) -> int:
        # Abandoned when the mount ends: a source that never answers must not hold that up.
        return await threads.run(lambda: self._check_all(records, age), abandon_on_cancel=True, limiter=limiter)

    def _check_all(self, records: Iterable[int], age: float) -> int:
        with closing(self._source.neighbours(age)) as neighbours:
            return sum(self.check(record, neighbours) for record in records)

    def _below(self, paths: Collection[bytes]) -> list[int]:
        """Records at and below `paths`, and of the directories that hold these, which show what is new."""
        if b"" in paths:
            return list(range(len(self._catalog)))
        exact = {*paths, *(path.rpartition(b"/")[0] for path in paths)}
        prefixes = tuple(path + b"/" for path in paths)

        return [
            record
            for record in range(len(self._catalog))
            if any(path in exact or path.startswith(prefixes) for path in self._paths(record))
        ]

    def _paths(self, record: int) -> Iterator[bytes]:
        yield self._catalog.path(record)
        for parent, name in self._catalog.other_names(record):  # hard links
            yield self._catalog.path(parent) + b"/" + name if parent else name

    def check(self, record: int, neighbours: Neighbours) -> bool:
        """Compare a record with the source; whether it had changed. What the source fails at is left for later.

        When this returns, whoever opens the name gets what it leads to now.
        """
        if self._catalog.flags(record) & SUPERSEDED:
            if self._catalog.flags(record) & STALE:
                self._consequences.is_old(record)
            return False
        self._counters.add("checked_files")
        try:
            parent, name = self._catalog.entry(record)
            st = neighbours.lstat(self._catalog.directory_path(parent), name)
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return False
            return self._lost(record)
        self._gone.discard(record)
        if self._catalog.shows_file(record, st):
            return False
        self._consequences.changed(record, st)
        return True

    def _lost(self, record: int) -> bool:
        if record == 0 or record in self._gone or self._consequences.use_other_name(record):
            return False
        self._gone.add(record)
        self._consequences.vanished(record)
        return True
