"""The item catalogue: which node id stands for which path, and which version of it was shown.

A node id is derived from the path relative to the dataset's root (xxh3, 63 bits), so that it survives the server
and is the same on every node of a cluster. Two paths with one hash are told apart by hashing again with the next
seed. Names with several hard links are one node, derived from the source's inode. Attributes are handed in: it asks
the source nothing, and does not know what is cached.

A node stands for one version of one file, from the first byte on that is handed out of it. A file that changes after
that, in whatever way, becomes a new node, whose id is derived from the path, size and time: whoever has the old one
open never gets bytes of the new one.

The records live in memory that the supervisor owns (two memfds), about 64 bytes and the name per file, and are only
ever appended, so that a server killed at any moment leaves a catalogue that its successor can use. The hash index is
the server's own and made anew. Any thread may find and write at any time.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import stat
import struct
import threading
from array import array
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import xxhash

from coordlfs.kernel import paths
from coordlfs.kernel.fuse import ROOT_NODE
from coordlfs.sources.numbering import Numbering
from coordlfs.sources.versions import Version, access

_HEADER = 4096
HEADER_WORDS = _HEADER // 8
RECORD_WORDS = 8
_MASK = (1 << 63) - 1
COUNTERS = 128  # words of the header that are free for counters
COUNT, NAMES_USED, _STALE = 0, 1, 2
_RECORD = struct.Struct("=QQQQqQQQ")  # node, entry and flags, name, then as below
_VERSION_KEY = struct.Struct("=xQq")  # after a path, which holds no NUL
_VERSION = struct.Struct("=24xQqQ8xQ")  # of a record's words: size, mtime, inode, and above 32 bits the access

_FEW_REUSED = 1 << 10  # of an index of 1 << 12 slots or more, which is half empty

_NO_VERSION = Version(0, 0, 0)

P = ParamSpec("P")
T = TypeVar("T")

REGULAR, SERVED, LINKED, DIRECTORY, SUPERSEDED, OTHER_CGROUP, STALE, RENUMBERED = 1, 2, 4, 8, 16, 32, 64, 128
LATER = 256


def node_of_path(path: bytes, seed: int = 0) -> int:
    """The node id of a relative path; `seed` counts the collisions before it."""
    return _node(path, seed)


def _node(key: bytes, seed: int) -> int:
    # 0 means "no node" to the kernel and 1 is the root.
    return max(xxhash.xxh3_64_intdigest(key, seed) & _MASK, 2)


def kind_of(st: os.stat_result) -> int:
    """REGULAR, DIRECTORY or neither."""
    return REGULAR if stat.S_ISREG(st.st_mode) else DIRECTORY if stat.S_ISDIR(st.st_mode) else 0


def _locked(method: Callable[Concatenate[Catalog, P], T]) -> Callable[Concatenate[Catalog, P], T]:
    @functools.wraps(method)
    def call(self: Catalog, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.lock:
            return method(self, *args, **kwargs)

    return call


class Catalog:
    """The records of one mount. Record numbers are small integers that stay valid for the life of the mount."""

    def __init__(self, records: int, names: int, *, id_bits: int = 63, numbering: Numbering | None = None) -> None:
        self._map = mmap.mmap(records, os.fstat(records).st_size)
        # Read as they lie here by `coordlfs.catalogue.records` as well.
        self.words = memoryview(self._map).cast("Q")
        self.names = mmap.mmap(names, os.fstat(names).st_size)
        self.id_mask = (1 << id_bits) - 1
        self.lock = threading.RLock()
        self._numbering = numbering
        self._other_names: dict[int, set[tuple[int, bytes]]] = {}  # of files with several hard links
        self._directories: dict[int, bytes] = {0: b""}
        self._latest: dict[bytes, int] = {}  # by what ids are hashed of, records of later versions
        # By parent and name, records of versions that are forgotten.
        self._free: dict[tuple[int, bytes], list[int]] = {}
        self._reused = 0  # since the index was built: as many of its slots lead to no node
        self._staled: dict[int, int] = {}  # of records that are stale, when they last came to be
        self._moments = itertools.count(1)
        self.counters = self.words[HEADER_WORDS - COUNTERS : HEADER_WORDS]
        if self.words[COUNT] == 0:
            self._append(ROOT_NODE, 0, b"", DIRECTORY)
        self.index: tuple[memoryview, int] = (memoryview(array("I", bytes(4 << 12))), (1 << 12) - 1)
        if self.words[COUNT] > 1:
            self.index = self._build_index(self.words[COUNT])
        else:
            self._insert(ROOT_NODE, 0)

    def __len__(self) -> int:
        return self.words[COUNT]

    @property
    def memory(self) -> int:
        """Bytes that the records, the names and the index take up."""
        return _HEADER + len(self) * RECORD_WORDS * 8 + self.words[NAMES_USED] + self.index[0].nbytes

    # -- finding ------------------------------------------------------------------------------------------------

    def find(self, node: int) -> int | None:
        """The record of a node id."""
        slots, mask = self.index
        at = node & mask
        while record := slots[at]:
            record -= 1
            if self.words[HEADER_WORDS + record * RECORD_WORDS] == node:
                return record
            at = (at + 1) & mask
        return None

    def node(self, record: int) -> int:
        """The node id of a record."""
        return self.words[HEADER_WORDS + record * RECORD_WORDS]

    def entry(self, record: int) -> tuple[int, bytes]:
        """Record of the parent directory, and the name in it."""
        at = HEADER_WORDS + record * RECORD_WORDS
        packed, offset = self.words[at + 1], self.words[at + 2]
        if packed & LINKED:  # the only ones that `move` gives another name
            with self.lock:
                packed, offset = self.words[at + 1], self.words[at + 2]
        return packed >> 32, self.names[offset : offset + (packed >> 16 & 0xFFFF)]

    def path(self, record: int) -> bytes:
        """The path relative to the root; empty for the root."""
        parent, name = self.entry(record)
        if directory := self._directories.get(parent):
            return directory + b"/" + name
        names = [name]
        while (known := self._directories.get(parent)) is None:
            parent, name = self.entry(parent)
            names.append(name)
        if known:
            names.append(known)
        return b"/".join(reversed(names))

    def directory_path(self, record: int) -> bytes:
        """`path` of a directory, remembered."""
        known = self._directories.get(record)
        if known is None:
            if len(self._directories) > 100_000:
                self._directories = {0: b""}
            known = self._directories[record] = self.path(record)
        return known

    def version(self, record: int) -> Version:
        """The version that the kernel was last told of."""
        size, mtime_ns, inode, last = _VERSION.unpack_from(self._map, _HEADER + record * RECORD_WORDS * 8)
        return Version(size, mtime_ns, inode, last >> 32)

    def size_and_mtime(self, record: int) -> tuple[int, int]:
        """Of `version`, what nodes tell each other: size and mtime_ns."""
        size, mtime_ns, _, _ = _VERSION.unpack_from(self._map, _HEADER + record * RECORD_WORDS * 8)
        return size, mtime_ns

    def shows(self, record: int, version: Version) -> bool:
        """Whether `version` is the one that the kernel was last told of."""
        size, mtime_ns, inode, last = _VERSION.unpack_from(self._map, _HEADER + record * RECORD_WORDS * 8)
        if inode != version.inode and self.flags(record) & RENUMBERED:
            inode = version.inode
        return (size, mtime_ns, inode, last >> 32) == version

    def shows_file(self, record: int, st: os.stat_result) -> bool:
        """Whether these attributes are of the version that the kernel was last told of. May ask the source."""
        version = Version.of(st)
        return self.shows(record, version) or (self.settle(record, st) and self.shows(record, version))

    def settle(self, record: int, st: os.stat_result) -> bool:
        """See whether nothing but the inode's number differs, and that says nothing: then it is ignored from now on.

        The number that was recorded stays, so that all else that was recorded with it still holds.
        """
        if self._numbering is None or self.flags(record) & RENUMBERED or not self._numbering.may_change(st.st_dev):
            return False
        if self.version(record)[:2] != Version.of(st)[:2] or not self._numbering.is_made_up(self.path(record), st):
            return False
        with self.lock:
            self.words[HEADER_WORDS + record * RECORD_WORDS + 1] |= RENUMBERED
        return True

    def settle_entry(self, parent: int, name: bytes, st: os.stat_result) -> None:
        """`settle` for what is recorded of a directory entry, if anything is."""
        if self._numbering is None or not self._numbering.may_change(st.st_dev):
            return
        if (record := self.named(parent, name)) is not None:
            self.shows_file(record, st)

    def named(self, parent: int, name: bytes) -> int | None:
        """The record that a directory's entry leads to; None if none is known, or its file has several names."""
        directory, seed = self.directory_path(parent), 0
        path = paths.join(directory, name)
        if (later := self._latest.get(path)) is not None and not self.flags(later) & SUPERSEDED:
            return later
        while (record := self.find(max(_node(path, seed) & self.id_mask, 2))) is not None:
            if not self.flags(record) & (LINKED | SUPERSEDED) and self.entry(record) == (parent, name):
                return record
            seed += 1
        return None

    def shows_bytes(self, record: int, st: os.stat_result) -> bool:
        """Whether the bytes are those of that version, whoever may read them now."""
        of = 2 if self.flags(record) & RENUMBERED else 3
        return self.version(record)[:of] == Version.of(st)[:of]

    def stamp(self, record: int) -> int:
        """64 bits for what tells the bytes of that version from those of any other."""
        at = HEADER_WORDS + record * RECORD_WORDS
        return xxhash.xxh3_64_intdigest(self.words[at + 3 : at + 6])

    def is_stricter(self, record: int, st: os.stat_result) -> bool:
        """Whether `st` may forbid somebody what the version that was shown allowed."""
        shown, now = (
            self.words[HEADER_WORDS + record * RECORD_WORDS + 7] >> 32,
            access(st.st_mode, st.st_uid, st.st_gid),
        )
        return (shown ^ now) & 0xFFFFF != 0 or shown >> 20 & ~(now >> 20) & 0o777 != 0

    @_locked
    def set_access(self, record: int, st: os.stat_result) -> None:
        """Record that the kernel is told of another mode or owner, and nothing else."""
        at = HEADER_WORDS + record * RECORD_WORDS + 7
        self.words[at] = access(st.st_mode, st.st_uid, st.st_gid) << 32 | self.words[at] & 0xFFFFFFFF

    @_locked
    def supersedes(self, record: int, st: os.stat_result) -> bool:
        """Whether `st` needs another node: it is another version than the one of which bytes have been handed out.

        Or of another kind, or another symbolic link or device: the kernel keeps with the node what it is and where it
        leads, whatever attributes it is told.
        """
        flags = self.flags(record)
        kind = flags & (REGULAR | DIRECTORY)
        is_other = kind != kind_of(st) or ((flags & SERVED or not kind) and not self.shows_bytes(record, st))
        if is_other and not flags & SUPERSEDED:
            self.supersede(record)
        return bool(self.flags(record) & SUPERSEDED)

    @_locked
    def supersede(self, record: int) -> None:
        """The name leads to another node from now on, or nowhere: the kernel is to be told."""
        self.set_stale(record)
        self.words[HEADER_WORDS + record * RECORD_WORDS + 1] |= SUPERSEDED

    def size(self, record: int) -> int:
        """Bytes of the file, as the kernel was last told."""
        return self.words[HEADER_WORDS + record * RECORD_WORDS + 3]

    def flags(self, record: int) -> int:
        """REGULAR, DIRECTORY, LINKED, SUPERSEDED and so on: see below; SERVED: bytes of it went out.

        RENUMBERED: the inode's number says nothing.
        """
        return self.words[HEADER_WORDS + record * RECORD_WORDS + 1] & 0xFFFF

    # -- writing ------------------------------------------------------------------------------------------------

    @_locked
    def enter(self, parent: int, name: bytes, st: os.stat_result) -> tuple[int, bool, int | None]:
        """The record of a directory entry, made if it is new, and whether its version differs from the one shown.

        Third, the record that it just took the place of, if it did.
        A version that differs is NOT recorded: call `renew`.
        """
        linked = st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode)
        if linked and self._numbering is not None and self._numbering.says_nothing(st.st_dev):
            linked = False  # which names are one file is not known
        if linked:
            key = struct.pack("=cQQ", b"\0", st.st_dev & _MASK, st.st_ino)  # no path begins with a NUL
        else:
            directory = self.directory_path(parent)
            key = paths.join(directory, name)
        record, changed, superseded = self._enter(key, parent, name, st, linked)
        is_later = self.flags(record) & LATER
        if self._latest or is_later:
            before = self._latest.pop(key, record)
            if before != record and not self.flags(before) & SUPERSEDED:
                self.supersede(before)
                superseded = before
            if is_later:
                self._latest[key] = record
        return record, changed, superseded

    def _enter(
        self, key: bytes, parent: int, name: bytes, st: os.stat_result, linked: bool
    ) -> tuple[int, bool, int | None]:
        seed, superseded, is_first = 0, None, True
        while True:
            node = max(_node(key, seed) & self.id_mask, 2)
            record = self.find(node)
            if record is None:
                break
            flags = self.flags(record)
            if linked:
                same = flags & LINKED and self.version(record).inode == st.st_ino
            else:
                same = not flags & LINKED and self.entry(record) == (parent, name)
            if same and not is_first and not stat.S_ISDIR(st.st_mode):
                same = self.size_and_mtime(record) == Version.of(st)[:2]  # else the ids are equal by chance
            if same and linked and self.entry(record) != (parent, name):
                self._other_names.setdefault(record, set()).add((parent, name))
            is_shown = same and self.shows(record, Version.of(st))
            if same and (is_shown or flags & kind_of(st) & DIRECTORY) and flags & SUPERSEDED:  # it is back
                self.words[HEADER_WORDS + record * RECORD_WORDS + 1] &= ~SUPERSEDED
            if is_shown:
                return record, False, superseded
            if same and not self.supersedes(record, st):
                if flags & (REGULAR | DIRECTORY):
                    return record, True, superseded
                self.set_version(record, Version.of(st))
                return record, False, superseded
            if same and not flags & SUPERSEDED:
                superseded = record
            if same and is_first:
                # From the second version on; other nodes of a cluster know no more of it than size and time.
                # A directory stays one node, whatever becomes of its time.
                later = (0, 0) if stat.S_ISDIR(st.st_mode) else (st.st_size, st.st_mtime_ns)
                key, seed, is_first = key + _VERSION_KEY.pack(*later), 0, False
            else:
                seed += 1
        kind = kind_of(st) | (LINKED if linked else 0) | (0 if is_first else LATER)
        if not is_first and (free := self._free.get((parent, name))):
            record = free.pop()
            self._reuse(record, node, kind, Version.of(st))
        else:
            record = self.add(node, parent, name, kind, Version.of(st))
        return record, False, superseded

    @_locked
    def add(self, node: int, parent: int, name: bytes, kind: int, version: Version) -> int:
        """The record of a new directory entry whose node id no other has."""
        record = self._append(node, parent, name, kind, version)
        self._insert(node, record)
        return record

    @_locked
    def give_back(self, record: int, staleness: int) -> None:
        """Forget a version that neither the kernel nor the cache has anything of: another one may have its record.

        Unless its name leads to it again, or there was something new to tell the kernel since `staleness`. That of the
        first version stays: from it the later ones are found.
        """
        flags = self.flags(record)
        is_past = flags & SUPERSEDED and flags & LATER and self.node(record)  # which is 0 if it was given back before
        if is_past and not flags & (STALE | LINKED) and staleness == self.staleness(record):
            self.words[HEADER_WORDS + record * RECORD_WORDS] = 0
            self._free.setdefault(self.entry(record), []).append(record)

    def _reuse(self, record: int, node: int, kind: int, version: Version) -> None:
        at = HEADER_WORDS + record * RECORD_WORDS
        self.words[at + 6] = self.words[at + 7] = 0
        self.words[at + 1] &= ~0xFFFF
        self.set_version(record, version, kind)
        self.words[at] = node
        self._reused += 1
        if self._reused > _FEW_REUSED:
            self.index, self._reused = self._build_index(len(self)), 0
        else:
            self._insert(node, record)

    def other_names(self, record: int) -> list[tuple[int, bytes]]:
        """Names of a file with several hard links that are known, but for the one that it is read by."""
        return list(self._other_names.get(record, ()))

    @_locked
    def move(self, record: int, parent: int, name: bytes) -> None:
        """Give a file with several hard links another of its names to be read by."""
        self._other_names.get(record, set()).discard((parent, name))
        at = HEADER_WORDS + record * RECORD_WORDS
        offset = self._store_name(name)
        self.words[at + 2] = offset
        self.words[at + 1] = parent << 32 | len(name) << 16 | self.flags(record)

    @_locked
    def set_version(self, record: int, version: Version, kind: int | None = None) -> None:
        """Record that the kernel is told of `version`, of which nothing has been handed out yet."""
        at = HEADER_WORDS + record * RECORD_WORDS
        self.words[at + 3] = version.size
        self.words[at + 4] = version.mtime_ns & 0xFFFFFFFFFFFFFFFF
        self.words[at + 5] = version.inode
        self.words[at + 7] = version.access << 32 | self.words[at + 7] & 0xFFFFFFFF
        flags = self.flags(record) & ~SERVED if kind is None else kind | self.flags(record) & STALE
        self.words[at + 1] = self.words[at + 1] & ~0xFFFF | flags

    @_locked
    def renew(self, record: int, version: Version) -> bool:
        """Record that the source has another version, unless bytes of this one have been handed out: then False.

        The kernel may show attributes of the one before: it is to be told before `take`.
        """
        if self.flags(record) & SERVED:
            return False
        self.set_stale(record)
        self.set_version(record, version)
        return True

    @_locked
    def take(self, record: int, version: Version, staleness: int) -> bool:
        """Have a node stand for a version from now on, whose first bytes are about to be handed out.

        False if it stands for another one already, or there is something new to tell the kernel since `staleness`.
        """
        if not self.flags(record) & SERVED:
            if staleness != self.staleness(record):
                return False
            self.set_version(record, version)
            self.words[HEADER_WORDS + record * RECORD_WORDS + 1] |= SERVED
            if not self.flags(record) & SUPERSEDED:
                self.set_fresh(record)
        return self.version(record)[:3] == version[:3]

    def set_served(self, record: int) -> None:
        """Record that bytes of this version have been handed out."""
        at = HEADER_WORDS + record * RECORD_WORDS + 1
        if not self.words[at] & SERVED:
            with self.lock:
                self.words[at] |= SERVED

    @_locked
    def set_other_cgroup(self, record: int) -> None:
        """Record that a process outside the keepers' memory cgroup has read of the file."""
        self.words[HEADER_WORDS + record * RECORD_WORDS + 1] |= OTHER_CGROUP

    @_locked
    def set_stale(self, record: int) -> None:
        """Record that the kernel may hold what is not true any more: a name that leads here, or older attributes.

        A server that is killed before it has seen to it leaves it to the next one.
        """
        self._staled[record] = next(self._moments)
        if not self.flags(record) & STALE:
            self.words[_STALE] += 1
            self.words[HEADER_WORDS + record * RECORD_WORDS + 1] |= STALE

    def staleness(self, record: int) -> int:
        """What is to be given to `set_fresh` and `take`, to be asked for before the kernel is told."""
        return self._staled.get(record, 0)

    @_locked
    def set_fresh(self, record: int, staleness: int | None = None) -> None:
        """Record that the kernel has been told, unless there is something new to tell it since `staleness`."""
        if staleness is not None and staleness != self._staled.get(record, 0):
            return
        self._staled.pop(record, None)
        if self.flags(record) & STALE:
            self.words[HEADER_WORDS + record * RECORD_WORDS + 1] &= ~STALE
            self.words[_STALE] -= 1

    def stale(self) -> list[int]:
        """The records of which the kernel is still to be told something."""
        return [r for r in range(len(self)) if self.flags(r) & STALE] if self.words[_STALE] else []

    def serves(self, record: int, version: Version) -> bool:
        """Whether a version is shown; if so, bytes of it are being handed out."""
        return self.serves_if(record, lambda: self.shows(record, version))

    def serves_if(self, record: int, is_shown: Callable[[], bool]) -> bool:
        """`serves` a version that is shown if `is_shown` finds so, and the kernel does not have to be told of it first.

        Once that is recorded, the node is given no other version. `is_shown` is called with the lock held: no I/O.
        """
        if self.flags(record) & SERVED:
            return is_shown()
        with self.lock:
            if self.flags(record) & STALE or not is_shown():
                return False
            self.set_served(record)
            return True

    def last_miss(self, record: int) -> tuple[int, int]:
        """Epoch of the file's last miss and the page it began at; (0, 0) if there was none."""
        packed = self.words[HEADER_WORDS + record * RECORD_WORDS + 6]
        return packed >> 32, packed & 0xFFFFFFFF

    def set_last_miss(self, record: int, epoch: int, page: int) -> None:
        """See `last_miss`."""
        self.words[HEADER_WORDS + record * RECORD_WORDS + 6] = epoch << 32 | page & 0xFFFFFFFF

    def pinned_pages(self, record: int) -> int:
        """How many pages of the file are pinned."""
        return self.words[HEADER_WORDS + record * RECORD_WORDS + 7] & 0xFFFFFFFF

    @_locked
    def add_pinned_pages(self, record: int, pages: int) -> None:
        """Count `pages` more (or fewer, if negative) as pinned."""
        self.words[HEADER_WORDS + record * RECORD_WORDS + 7] += pages

    def clear_pinned_pages(self) -> dict[int, int]:
        """Forget what is pinned, for a server that is about to be told by the keepers; what was, by the record."""
        pinned = {record: found for record in range(len(self)) if (found := self.pinned_pages(record))}
        for record in pinned:
            self.words[HEADER_WORDS + record * RECORD_WORDS + 7] &= ~0xFFFFFFFF
        return pinned

    # -- inside -------------------------------------------------------------------------------------------------

    def _append(self, node: int, parent: int, name: bytes, flags: int, version: Version = _NO_VERSION) -> int:
        record = self.words[COUNT]
        if record >= (len(self._map) - _HEADER) // (RECORD_WORDS * 8) - 1:
            raise OSError(28, "the catalogue is full")
        entry, at = parent << 32 | len(name) << 16 | flags, _HEADER + record * _RECORD.size
        size, mtime_ns, inode, access_ = version
        _RECORD.pack_into(self._map, at, node, entry, self._store_name(name), size, mtime_ns, inode, 0, access_ << 32)
        self.words[COUNT] = record + 1  # only now does it exist
        return record

    def _store_name(self, name: bytes) -> int:
        offset = self.words[NAMES_USED]
        if offset + len(name) > len(self.names):
            raise OSError(28, "the catalogue's names are full")
        self.names[offset : offset + len(name)] = name
        self.words[NAMES_USED] = offset + len(name)
        return offset

    def _insert(self, node: int, record: int) -> None:
        slots, mask = self.index
        if (record + 1) * 2 > mask + 1:
            self.index = self._build_index((record + 1) * 2)
            return
        at = node & mask
        while slots[at]:
            at = (at + 1) & mask
        slots[at] = record + 1

    def _build_index(self, capacity: int) -> tuple[memoryview, int]:
        """Open addressing with linear probing, at most half full; a slot holds a record number plus one."""
        from coordlfs.catalogue.records import fill_index  # which imports this module

        size = 1 << max(12, (2 * capacity - 1).bit_length())
        mask = size - 1
        slots = array("I", bytes(4 * size))
        fill_index(slots, self.words, len(self))
        return memoryview(slots), mask
