"""What is done in the directory, as the kernel tells it (inotify): changes always, and reads while there is room.

What happens on another machine, as on NFS, it does not tell; a pass (`coordlfs.serving.revalidation`) sees to that, and
to directories for which there are no watches to be had. What follows from a change is decided in `dataset`.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import trio

from coordlfs.catalogue.catalog import Catalog
from coordlfs.kernel import paths, threads
from coordlfs.kernel.inotify import READS, DirectoryWatch
from coordlfs.pinning.dataset import Dataset
from coordlfs.pinning.filling import Filling
from coordlfs.sources.directory import DirectorySource

log = logging.getLogger(__name__)

_TOGETHER = 0.05  # seconds in which events are gathered before they are seen to
_LOOK_EVERY = 0.5  # seconds
_NO_INOTIFY = 60.0  # seconds until it is tried again
_QUIET = 1.0  # seconds after which a file that is being written to is looked at again

Place = tuple[int, bytes]  # record of a directory, and a name in it


class Directories:
    """Watches of directories, by the record that each belongs to. Thread-safe."""

    def __init__(self, mask: int) -> None:
        self._records: dict[int, int] = {}
        self.unwatched = 0  # directories for which there was no watch to be had
        self.lacking = ""  # why there is none to be had at all
        self._watch: DirectoryWatch | None = None
        try:
            self._watch = DirectoryWatch(mask)
        except OSError as e:
            too_few = "fs.inotify.max_user_instances is too small"
            self.lacking = too_few if e.errno == errno.EMFILE else e.strerror or str(e)
        self.fd = -1 if self._watch is None else self._watch.fd

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: int, fd: int) -> None:
        """Watch the directory that is open as `fd`, if there is a watch to be had."""
        if self._watch is None:
            self._leave_out(self.lacking)
            return
        try:
            self._records[self._watch.add(fd)] = record
        except OSError as e:
            too_few = "fs.inotify.max_user_watches is too small"
            self._leave_out(too_few if e.errno == errno.ENOSPC else e.strerror or str(e))

    def _leave_out(self, why: str) -> None:
        self.unwatched += 1
        if self.unwatched == 1:
            log.warning("not every directory is watched (%s): changes are noticed within --revalidate", why)

    def happened(self) -> tuple[list[tuple[Place, bool]], bool]:
        """Where something was done since, and whether a directory came or went; whether some of it is not known."""
        events, is_lost = self._watch.events() if self._watch is not None else ([], False)
        return [
            ((record, event.name), event.is_directory)
            for event in events
            if (record := self._records.get(event.watch)) is not None
        ], is_lost

    def close(self) -> None:
        """Watch nothing any more."""
        if self._watch is not None:
            self._watch.close()


class Watching:
    """Tells `dataset` of changes and `filling` of reads.

    `compare`: has all that is known at and below some paths compared with the source.
    """

    def __init__(
        self,
        catalog: Catalog,
        source: DirectorySource,
        changes: Directories,
        dataset: Dataset,
        filling: Filling,
        compare: Callable[[set[bytes]], Awaitable[object]],
    ) -> None:
        self._catalog = catalog
        self._source = source
        self.changes = changes
        self._dataset = dataset
        self._filling = filling
        self._compare = compare
        self._again: dict[Place, float] = {}  # files that are written to, and when to look at them again
        self.is_scanned = False  # all that there was at the beginning has been found

    async def run(self) -> None:
        """Find all files, and see to what happens, until cancelled."""
        async with trio.open_nursery() as nursery:
            if not self.changes.lacking:
                nursery.start_soon(self._follow_changes)
            await threads.run(self._dataset.scan, abandon_on_cancel=True)
            self.is_scanned = True
            await self._follow_reads()

    # -- changes ------------------------------------------------------------------------------------------------

    async def _follow_changes(self) -> None:
        while True:
            with trio.move_on_after(_LOOK_EVERY if self._again else float("inf")):
                await trio.lowlevel.wait_readable(self.changes.fd)
            await trio.sleep(_TOGETHER)
            happened, is_lost = self.changes.happened()
            places = dict.fromkeys(place for place, _ in happened)
            moved = {place for place, is_directory in happened if is_directory}
            now = time.monotonic()
            places |= dict.fromkeys(place for place, due in self._again.items() if due <= now)
            gone = await threads.run(partial(self._look, places, moved), abandon_on_cancel=True)
            if gone:
                await self._compare(gone)
            if is_lost:
                log.warning("more changed at once than the kernel could tell: everything is compared")
                await threads.run(self._dataset.scan, abandon_on_cancel=True)
                await self._compare({b""})

    def _look(self, places: Iterable[Place], moved: Iterable[Place]) -> set[bytes]:
        """See what is at some places now; the paths of those, of `moved`, where a directory was and is no more."""
        for place in places:
            if self._dataset.look(*place):
                self._again.pop(place, None)
            else:
                self._again[place] = time.monotonic() + _QUIET
        self._dataset.place()
        return {self._path(place) for place in moved if self._was_directory(place)}

    def _path(self, place: Place) -> bytes:
        directory, name = self._catalog.directory_path(place[0]), place[1]
        return paths.join(directory, name)

    def _was_directory(self, place: Place) -> bool:
        """Whether something that was known is gone, or is no directory any more."""
        if self._dataset.record_at(*place) is None:
            return False
        try:
            return not stat.S_ISDIR(self._source.lstat(self._path(place)).st_mode)
        except OSError:
            return True

    # -- reads --------------------------------------------------------------------------------------------------

    async def _follow_reads(self) -> None:
        """Listen to what is read for as long as that is of use: each file that is read costs its reader an event."""
        while True:
            if self._filling.has_use_for_reads:
                reads = Directories(READS)
                if reads.lacking:
                    log.warning("what jobs read is not seen: %s", reads.lacking)
                    await trio.sleep(_NO_INOTIFY)
                    continue
                try:
                    await self._follow(reads)
                finally:
                    reads.close()
            await trio.sleep(_LOOK_EVERY)

    async def _follow(self, reads: Directories) -> None:
        await threads.run(partial(self._watch_all, reads), abandon_on_cancel=True)
        while self._filling.has_use_for_reads:
            with trio.move_on_after(_LOOK_EVERY):
                await trio.lowlevel.wait_readable(reads.fd)
                await trio.sleep(_TOGETHER)
                self._tell(reads)

    def _watch_all(self, reads: Directories) -> None:
        for record in self._dataset.directories():
            try:
                fd = self._source.open(self._catalog.directory_path(record), os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue
            reads.add(record, fd)
            os.close(fd)

    def _tell(self, reads: Directories) -> None:
        happened, _ = reads.happened()
        for place in dict.fromkeys(place for place, _ in happened):
            record = self._dataset.record_at(*place)
            if record is not None:
                self._filling.was_read(record)
