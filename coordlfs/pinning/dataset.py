"""The files of a directory that is pinned: what there is, where it lies on the disk, and what follows when it changes.

They are records of the catalogue, as a mount's are. A file that is gone stays as one without bytes, so that there is
nothing of it to be pinned; it has them again as soon as its name does. Which files are pinned when is not decided here.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from contextlib import closing, suppress

from coordlfs.cache.admission import Admission
from coordlfs.catalogue.catalog import DIRECTORY, LINKED, REGULAR, Catalog
from coordlfs.kernel import mounts, paths
from coordlfs.serving.links import use_other_name
from coordlfs.sources import layout
from coordlfs.sources.directory import DirectorySource
from coordlfs.sources.versions import Version, is_young

log = logging.getLogger(__name__)

IN_MEMORY = frozenset({b"tmpfs", b"ramfs", b"hugetlbfs", b"devtmpfs"})  # types of file systems that are memory already
MADE_UP = frozenset(  # whose files are the kernel's words, or its devices' registers
    b"proc sysfs cgroup cgroup2 debugfs tracefs configfs securityfs pstore efivarfs fusectl bpf devpts mqueue"
    b" binfmt_misc nsfs selinuxfs smackfs rpc_pipefs nfsd".split()
)
_OURS = frozenset({b"fuse.coordlfs"})  # what these cache is in memory already
_PLACED_AT_ONCE = 200_000  # files whose place on the disk is asked for before the first of them is pinned
_LISTED_AT_ONCE = 1 << 16
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV})
_NOTHING = Version(0, 0, 0)


class Wanted:
    """Which paths beneath the directory are to be pinned: those named, and all below them. Bytes, relative to it.

    >>> wanted = Wanted([b"train"])
    >>> wanted.covers(b"train/cat/1.jpg"), wanted.covers(b"test"), wanted.leads_to(b"")
    (True, False, True)
    """

    def __init__(self, paths: Iterable[bytes]) -> None:
        self._paths = frozenset(paths) or frozenset({b""})
        self._beneath = tuple(path + b"/" if path else b"" for path in self._paths)
        self._above = {b"/".join(path.split(b"/")[:n]) for path in self._paths for n in range(path.count(b"/") + 1)}
        self._above |= {b""}

    def covers(self, path: bytes) -> bool:
        """Whether a file at `path` is to be pinned."""
        return path in self._paths or path.startswith(self._beneath)

    def leads_to(self, path: bytes) -> bool:
        """Whether a directory at `path` is to be looked into."""
        return path in self._above or self.covers(path)


class Dataset:
    """What is known of the files. Thread-safe; what asks the source may take its time, or never return.

    `order` has the records of all regular files that were ever found, in the order in which they are to be pinned.
    `findings` grows with everything that may have to be pinned since.
    """

    def __init__(
        self,
        catalog: Catalog,
        source: DirectorySource,
        admission: Admission,
        wanted: Wanted,
        watch: Callable[[int, int], object],
    ) -> None:
        """`watch` is given the record and a descriptor of each directory before it is read."""
        self._catalog = catalog
        self._source = source
        self._admission = admission
        self._wanted = wanted
        self._watch = watch
        self._lock = threading.RLock()
        self._linked: dict[tuple[int, bytes], int] = {}  # records of names that lead to files with several
        self._device = os.fstat(source.root).st_dev
        self._fresh = array("I")  # records found, and not yet in `order`
        self._listed = bytearray()  # by record, whether it is in either
        self.order = array("I")
        self.findings = 0

    # -- looking ------------------------------------------------------------------------------------------------

    def scan(self, record: int = 0) -> None:
        """Find all that is at and below a directory; what cannot be read is left out, and the log says so."""
        waiting = [record]
        while waiting:
            directory = waiting.pop()
            try:
                waiting += reversed(self._scan_one(directory))
            except OSError as e:
                if e.errno not in _ABSENT:
                    name = os.fsdecode(self._catalog.path(directory)) or "the directory"
                    log.warning("%s cannot be listed: %s", name, e.strerror)
            if len(self._fresh) >= _PLACED_AT_ONCE:
                self.place()
        self.place()

    def _scan_one(self, directory: int) -> list[int]:
        """Find what a directory holds; the directories that are new among it."""
        path = self._catalog.directory_path(directory)
        before = self._source.lstat(path)
        found = []
        with closing(self._source.listing(path, lambda fd: self._watch(directory, fd))) as listing:
            for name in listing.names:
                with suppress(OSError):
                    entered = self._enter(directory, name, listing.lstat(name))
                    if entered is not None and self._catalog.flags(entered) & DIRECTORY:
                        found.append(entered)
        self._catalog.set_version(directory, Version.of(before))
        return found

    def place(self) -> None:
        """Give what was found its place in `order`."""
        with self._lock:
            fresh, self._fresh = self._fresh, array("I")
        if fresh:
            ordered = sorted(fresh, key=lambda record: layout.place(self._source, self._catalog.path(record)))
            self.order.extend(ordered)
            self.findings += 1

    def look(self, parent: int, name: bytes) -> bool:
        """See what a name leads to now. False if that is being written to: it is to be looked at again in a while."""
        directory = self._catalog.directory_path(parent)
        path = paths.join(directory, name)
        if not self._wanted.leads_to(path):
            return True
        try:
            st = self._source.lstat(path)
        except OSError as e:
            if e.errno in _ABSENT:
                self._lose(parent, name)
            return True
        if self._is_being_written(parent, name, st):
            return False
        record = self._enter(parent, name, st)
        if record is not None and self._catalog.flags(record) & DIRECTORY:
            self.scan(record)
        return True

    def directories(self) -> list[int]:
        """The records of all directories that are looked into."""
        return [record for record in range(len(self._catalog)) if self._catalog.flags(record) & DIRECTORY]

    def record_at(self, parent: int, name: bytes) -> int | None:
        """The record of a name that is known."""
        return self._linked.get((parent, name), self._catalog.named(parent, name))

    def _is_being_written(self, parent: int, name: bytes, st: os.stat_result) -> bool:
        """Whether all that happened to a file is that it grows, as it may for a while yet."""
        if not stat.S_ISREG(st.st_mode) or not is_young(st.st_mtime_ns, time.time_ns()):
            return False
        record = self.record_at(parent, name)
        if record is None:
            return True
        known = self._catalog.version(record)
        return not known.size or (st.st_ino == known.inode and st.st_size >= known.size)

    # -- what follows; see `coordlfs.serving.revalidation.Consequences` -----------------------------------------

    def is_old(self, record: int) -> None:
        """Nobody has to be told."""

    def use_other_name(self, record: int) -> bool:
        """Whether a file whose name is gone goes by another one from now on."""
        return use_other_name(self._catalog, self._source, record)

    def vanished(self, record: int) -> None:
        """A file is gone: let its pages go."""
        with self._lock:
            if self._catalog.flags(record) & REGULAR:
                self._let_go(record)
                self._catalog.set_version(record, _NOTHING)

    def changed(self, record: int, st: os.stat_result) -> None:
        """A name leads to another version, or to something else."""
        parent, name = self._catalog.entry(record)
        entered = self._enter(parent, name, st) if record else record
        if entered is not None and self._catalog.flags(entered) & DIRECTORY:
            self.scan(entered)

    # -- inside -------------------------------------------------------------------------------------------------

    def _lose(self, parent: int, name: bytes) -> None:
        """A name leads to nothing that is to be pinned."""
        record = self.record_at(parent, name)
        self._linked.pop((parent, name), None)
        if record is not None:
            self._part(record, parent, name)

    def _part(self, record: int, parent: int, name: bytes) -> None:
        """A name does not lead to the file of a record any more; another name may."""
        is_linked = self._catalog.flags(record) & LINKED
        if not is_linked or (self._catalog.entry(record) == (parent, name) and not self.use_other_name(record)):
            self.vanished(record)

    def _enter(self, parent: int, name: bytes, st: os.stat_result) -> int | None:
        """The record of a name that has the attributes `st`; None if it is nothing to be pinned or looked into."""
        directory = self._catalog.directory_path(parent)
        path = paths.join(directory, name)
        if stat.S_ISDIR(st.st_mode):
            if not self._wanted.leads_to(path) or self._is_left_out(st.st_dev):
                return None
        elif not stat.S_ISREG(st.st_mode) or not self._wanted.covers(path):
            self._lose(parent, name)
            return None
        with self._lock:
            before = self.record_at(parent, name)
            if before is not None and bool(self._catalog.flags(before) & DIRECTORY) != stat.S_ISDIR(st.st_mode):
                self.vanished(before)
            self._catalog.settle_entry(parent, name, st)
            record, has_changed, _ = self._catalog.enter(parent, name, st)
            if before is not None and before != record:  # another kind, or it went by its inode and not by its name
                self._linked.pop((parent, name), None)
                self._part(before, parent, name)
            if stat.S_ISREG(st.st_mode):
                if self._catalog.flags(record) & LINKED:
                    self._linked[parent, name] = record
                if not self._is_listed(record):
                    self._fresh.append(record)
                elif has_changed:
                    self._renew(record, st)
                if self._know(record) or has_changed:
                    self.findings += 1
        return record

    def _is_listed(self, record: int) -> bool:
        """Whether a record has a place in `order`, or will have; from now on it has."""
        if record >= len(self._listed):
            self._listed.extend(bytes(record + 1 + _LISTED_AT_ONCE - len(self._listed)))
        was, self._listed[record] = self._listed[record], 1
        return bool(was)

    def _renew(self, record: int, st: os.stat_result) -> None:
        before, now = self._catalog.version(record), Version.of(st)
        if before[:3] != now[:3]:
            # Though it is the same file: whatever truncates it, writes around the page cache or makes a hole takes
            # pages away from under the locked mapping, which never has the new ones.
            self._let_go(record)
        if before != _NOTHING:
            self._admission.counters.add("changed_files")
        self._catalog.set_version(record, now)

    def _know(self, record: int) -> bool:
        """Count a file as part of the dataset; whether it was not yet."""
        before = self._admission.counters["dataset_items"]
        with self._admission.lock:
            self._admission.accounts.know(record, self._catalog.size(record))
        return self._admission.counters["dataset_items"] != before

    def _let_go(self, record: int) -> None:
        size = self._catalog.size(record)
        with self._admission.lock:
            self._admission.drop_file(record, size)
            self._admission.accounts.forget(record, size)

    def _is_left_out(self, device: int) -> bool:
        """Whether a directory lies on another file system, of which nothing is to be pinned."""
        if device == self._device:
            return False
        kinds = {mount.fstype for mount in mounts.table() if mount.device == device}
        return bool(kinds & (IN_MEMORY | MADE_UP | _OURS))
