"""The commonest miss, answered in one go: of a whole file that is not cached, and lies in the source's page cache.

No disk is waited for then, and what a miss costs is the interpreter and two copies. So this is what the byte lane,
`Reader.begin` and `Reader.account` do, written out for the case in which nothing has to be weighed, in half the time.
Whatever is unusual is left to them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from coordlfs import items
from coordlfs.admission import Fetched
from coordlfs.catalog import REGULAR
from coordlfs.kernel import fuse
from coordlfs.kernel.cached_files import CachedFiles
from coordlfs.reading import Reader
from coordlfs.versions import access

_UNUSUAL = os.O_DIRECT | os.O_NOATIME
_RESTS = 32  # READs that are left to the others after one that the disk had to be read for: more of those will come


class WarmReads:
    """What one thread answers; `into` is page-aligned memory of its own, `reply` takes a header and bytes."""

    def __init__(self, reader: Reader, into: memoryview, reply: Callable[[bytes, memoryview], None]) -> None:
        self._reader = reader
        self._files = CachedFiles(reader.source.root)
        self._into = into
        self._reply = reply
        self._is_off = reader.sharing is not None or reader.source.is_remote
        self._rests = 0

    def answer(self, request: bytearray, length: int) -> bool:
        """Answer a message of `length` bytes; False if it is to be dispatched as any other, and nothing was done."""
        if length != fuse.READ_SIZE or self._is_off:
            return False
        says, opcode, unique, node, pid, offset, asked, flags = fuse.READ_MESSAGE.unpack_from(request)
        if opcode != fuse.READ or says != length or offset or flags & _UNUSUAL:
            return False
        if self._rests:
            self._rests -= 1
            return False
        reader = self._reader
        catalog, admission = reader.catalog, reader.admission
        record = catalog.find(node)
        if record is None or pid in admission.keeper_threads or reader.ends.knows(node):
            return False
        item = items.item_at(record, 0)
        state, shown, path = catalog.glance(record)
        if not state & REGULAR or not 0 < shown.size <= asked or not admission.is_absent(item):
            return False
        data = self._into[: shown.size]
        found = self._files.read(path, data)
        if found is None:
            self._rests = _RESTS
            return False
        mode, uid, gid, inode, size, mtime_ns = found
        if (size, mtime_ns, inode, access(mode, uid, gid)) != shown or not catalog.serves(record, shown):
            return False
        reader.counters.count_warm_read(shown.size)
        self._reply(fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + shown.size, 0, unique), data)
        admission.missed(Fetched(item, 0, data, shown), pid, False)
        return True
