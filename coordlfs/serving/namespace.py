"""Names and attributes as the source shows them now, and as the catalogue records that the kernel was shown them.

Both loops answer from here. Methods raise OSError; what the source gives for a name that is not there, whatever the
reason, is ENOENT. Thread-safe. It does not know which of them asks.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from coordlfs.catalogue.catalog import DIRECTORY, REGULAR, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import paths
from coordlfs.serving.reading import Reader
from coordlfs.sources.contract import Listing, Source
from coordlfs.sources.versions import Version

_NO_NAMES = frozenset({b"", b".", b".."})
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV})


class Namespace:
    """Looks names up in the source, and enters them into the catalogue."""

    def __init__(self, catalog: Catalog, source: Source, reader: Reader, counters: Counters) -> None:
        self._catalog = catalog
        self._source = source
        self._reader = reader
        self._counters = counters

    def record_of(self, node: int) -> int:
        """The record of a node; ESTALE if the kernel knows it and we do not."""
        record = self._catalog.find(node)
        if record is None:
            raise OSError(errno.ESTALE, "unknown node")
        return record

    def node(self, record: int) -> int:
        """The node id of a record."""
        return self._catalog.node(record)

    def kind(self, record: int) -> int:
        """REGULAR, DIRECTORY or neither."""
        return self._catalog.flags(record) & (REGULAR | DIRECTORY)

    def lookup(
        self, parent: int, name: bytes, before_wait: Callable[[], None] | None = None, *, announce: bool = False
    ) -> tuple[int, os.stat_result]:
        """Record and attributes of a name in the directory whose record is `parent`.

        `before_wait` is called if a disk has to be waited for.
        """
        if name in _NO_NAMES or b"/" in name or b"\0" in name:
            raise OSError(errno.EINVAL, "no name of a directory's entry")
        directory = self._catalog.directory_path(parent)
        st = self._lstat(paths.join(directory, name), before_wait)
        return self.enter(parent, name, st, announce=announce), st

    def resolve(self, path: bytes, directories: dict[bytes, int]) -> int | None:
        """The record of a path that the kernel did not ask for; None if it cannot be found.

        `directories` keeps the records of those that were found on the way, from the root's, b"", on.
        """
        above, _, name = path.rpartition(b"/")
        if not name:
            return 0 if not path else None
        if above not in directories:
            parent = self.resolve(above, directories)
            if parent is None:
                return None
            directories[above] = parent
        try:
            return self.lookup(directories[above], name, announce=True)[0]
        except OSError:
            return None

    def attributes(self, record: int, before_wait: Callable[[], None] | None = None) -> os.stat_result:
        """Attributes of a node that the kernel knows; ESTALE if its name leads to another file by now."""
        try:
            st = self._lstat(self._catalog.path(record), before_wait)
        except FileNotFoundError:
            if not self._reader.use_other_name(record):
                raise
            st = self._lstat(self._catalog.path(record), before_wait)
        if self._catalog.shows_file(record, st):
            return st
        if self._reader.supersedes(record, st):
            raise OSError(errno.ESTALE, "replaced")
        if stat.S_ISREG(st.st_mode):
            if not self._reader.modified(record, st):
                raise OSError(errno.ESTALE, "replaced")
        else:
            self._catalog.set_version(record, Version.of(st))
        return st

    def enter(self, parent: int, name: bytes, st: os.stat_result, *, announce: bool = False) -> int:
        """The record of a directory entry that has the attributes `st`.

        `announce` where the kernel did not ask: it is told, which may block, see `Reader.lead_elsewhere`.
        """
        self._catalog.settle_entry(parent, name, st)
        record, changed, superseded = self._catalog.enter(parent, name, st)
        if superseded is not None:
            self._reader.replaced(superseded)
        if not changed:
            return record
        if stat.S_ISREG(st.st_mode):
            if not self._reader.modified(record, st):
                return self.enter(parent, name, st, announce=announce)
        else:  # a directory, whose listing the kernel drops itself as soon as it is told the new time
            self._catalog.set_version(record, Version.of(st))
        if announce:
            self._reader.announce(record)
        return record

    def listing(self, record: int) -> Listing:
        """The entries of a directory as they are now; ENOENT also if its name leads to what is none by now."""
        with self._absences():
            return self._source.listing(self._catalog.directory_path(record))

    def _lstat(self, path: bytes, before_wait: Callable[[], None] | None) -> os.stat_result:
        with self._absences():
            return self._source.lstat(path, before_wait)

    @contextmanager
    def _absences(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if e.errno in _ABSENT:
                raise FileNotFoundError(errno.ENOENT, "no such name") from e
            self._counters.add("source_errors")
            raise
