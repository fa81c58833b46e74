"""Answering READ: from the stash, or from the source, and never with bytes of two versions.

The kernel shows a file as it was when it was listed. If the source holds another version by now, what happens depends
on what a reader may have got already:
  * nothing: it gets the new version, as if it had been listed later;
  * bytes of a file that was since changed in place: it gets the new bytes, as in the source itself;
  * bytes of a file that was since replaced: ESTALE, as on NFS. The name leads to a new node, which whoever opens it
    gets; whoever has the old one open must not mix the two.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from mmap import mmap

from coordlfs import items
from coordlfs.admission import Admission
from coordlfs.catalog import SERVED, Catalog, Version
from coordlfs.kernel import fuse
from coordlfs.metrics import Counters
from coordlfs.notifier import Notifier
from coordlfs.source import Source

Reply = list[bytes | memoryview]


class Reader:
    """What the byte lane's threads share. Thread-safe."""

    def __init__(
        self,
        catalog: Catalog,
        source: Source,
        admission: Admission,
        counters: Counters,
        notifier: Notifier,
    ) -> None:
        self.catalog = catalog
        self.source = source
        self.admission = admission
        self.counters = counters
        self.notifier = notifier

    def begin(self, node: int, offset: int, size: int, pid: int) -> tuple[int, Reply | None]:
        """The record of `node`, and the bytes if they are in the stash. Raises ESTALE for a node that is unknown."""
        record = self.catalog.find(node)
        if record is None:
            raise OSError(errno.ESTALE, "unknown node")
        end = self.catalog.size(record)
        data = self.admission.stashed(items.item_at(record, offset), offset, size, end, pid)
        if data is not None:
            self.counters.add("stash_bytes", sum(map(len, data)))
        return record, data

    def fetch(
        self, record: int, offset: int, size: int, into: mmap, before_wait: Callable[[], None]
    ) -> tuple[int, bool]:
        """Read from the source into `into`; how many bytes, and whether they may be cached. Raises OSError.

        `before_wait` is called if the source's disk has to be waited for.
        """
        try:
            path = self.catalog.path(record)
            n, st = self.source.read(record, path, into, offset, size, before_wait)
        except OSError as e:
            self.counters.add("source_errors")
            self.source.forget(record)
            if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                self._vanished(record)
                raise OSError(errno.ENOENT, "vanished") from e
            raise
        self.counters.add("source_bytes", n)
        self.counters.add("source_reads")
        if self.catalog.shows(record, st):
            self.catalog.set_served(record)
            return n, True
        self._changed(record, offset, st)
        return n, False

    def account(self, record: int, offset: int, data: memoryview, pid: int) -> None:
        """What follows once a READ is answered with bytes of the source: count the miss, admit the item."""
        if pid in self.admission.keeper_pids:
            return
        size = self.catalog.size(record)
        done = 0
        while done < len(data):
            item = items.item_at(record, offset + done)
            start, length = items.span(item, size)
            part = data[done : start + length - offset]
            if not part:
                return
            self.admission.missed(record, item, offset + done, part, size, pid)
            done += len(part)

    def _vanished(self, record: int) -> None:
        self.admission.drop_record(record)
        parent, name = self.catalog.entry(record)
        self.notifier.send(fuse.invalidate_entry(self.catalog.node(parent), name))

    def _changed(self, record: int, offset: int, st: os.stat_result) -> None:
        self.counters.add("changed_files")
        self.source.forget(record)
        shown = self.catalog.version(record)
        parent, name = self.catalog.entry(record)
        node = self.catalog.node(record)
        if self.catalog.supersedes(record, st):
            self.admission.drop_record(record)
            self.notifier.send(fuse.invalidate_entry(self.catalog.node(parent), name))
            raise OSError(errno.ESTALE, "replaced while it was read")
        served = self.catalog.flags(record) & SERVED
        self.admission.drop_record(record)
        if st.st_size < shown.size:
            # A short reply tells the kernel where the file ends now, but only one that covers all before the end:
            # it would fill the rest with zeros.
            self.notifier.send(fuse.invalidate_inode(node, 0, 0))
            if offset >= st.st_size or (served and offset):
                raise OSError(errno.ESTALE, "truncated while it was read")
        else:
            # Before the reply: at the old end of the file the reader asks for the attributes, and must get new ones.
            self.notifier.send_now(fuse.invalidate_inode(node, -1, 0))
            if served:
                self.notifier.send(fuse.invalidate_inode(node, 0, 0))
        self.catalog.set_version(record, Version.of(st))
        self.catalog.set_served(record)

    def modified(self, record: int, st: os.stat_result) -> None:
        """The name lane found another version of a file: the kernel is about to be told of it."""
        self.counters.add("changed_files")
        self.source.forget(record)
        self.admission.drop_record(record)
        self.catalog.set_version(record, Version.of(st))
