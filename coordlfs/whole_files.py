"""The commonest READs, answered in one go: of a whole file that is not cached, or whose bytes are kept here.

What they cost is the interpreter and the copies. So this is what the byte lane, `Reader.begin`, `Reader.fetched` and
`Reader.account` do, written out for the case in which nothing has to be weighed, in half the time. Whatever is unusual
is left to them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from coordlfs import items
from coordlfs.admission import Fetched
from coordlfs.catalog import REGULAR
from coordlfs.kernel import fuse, paths
from coordlfs.kernel.cached_files import CachedFiles
from coordlfs.reading import Reader, Request
from coordlfs.versions import Version, is_open_as

_UNUSUAL = os.O_DIRECT | os.O_NOATIME
_LARGEST = fuse.MAX_READ - 1
_RESTS = 32  # READs that are left to the others after one that went wrong here: more of those will come


class Whole(NamedTuple):
    """A READ of a whole file, which is open."""

    unique: int
    node: int
    asked: int  # bytes, and no fewer than the file has
    pid: int
    item: int
    fd: int
    shown: Version

    @property
    def request(self) -> Request:
        """It, as the others know it."""
        return Request(self.node, 0, min(self.asked, fuse.MAX_READ), self.pid, direct=False)


class WholeFiles:
    """`reply` takes a header and bytes; `begin` has the disk read, and says False where it cannot. Thread-safe."""

    def __init__(
        self, reader: Reader, reply: Callable[[bytes, memoryview], None], begin: Callable[[Whole], bool]
    ) -> None:
        self._reader = reader
        self._reply = reply
        self._begin = begin
        self._is_off = reader.sharing is not None or reader.source.is_remote
        self._rests = 0

    def answer(self, request: bytearray, length: int, files: CachedFiles, into: memoryview) -> bool:
        """Answer a message of `length` bytes, or see that `finish` does, and never wait for the source.

        `into` is memory for the bytes. False if it is to be dispatched as any other, and nothing was done.
        """
        if length != fuse.READ_SIZE or self._is_off:
            return False
        says, opcode, unique, node, pid, offset, asked, flags = fuse.READ_MESSAGE.unpack_from(request)
        if opcode != fuse.READ or says != length or offset or flags & _UNUSUAL:
            return False
        reader = self._reader
        catalog, admission = reader.catalog, reader.admission
        record = catalog.find(node)
        if record is None or reader.ends.knows(node):
            return False
        state, shown, path = catalog.glance(record)
        size = shown.size
        if not state & REGULAR or not 0 < size <= asked or size > _LARGEST:
            return False
        item = items.item_at(record, 0)
        if not admission.is_absent(item):
            return self._answer_kept(unique, node, item, size, pid)
        if pid in admission.keeper_threads:
            return False
        if self._rests > 0:
            self._rests -= 1
            return False
        fd = files.open(path)
        if fd < 0:
            return False
        whole = Whole(unique, node, asked, pid, item, fd, shown)
        is_begun = False
        try:
            if files.holds(fd, size):
                # Should a page be on its way from the disk still, or gone by now, this ends there.
                data = into[:size]
                if os.preadv(fd, (data,), 0, os.RWF_NOWAIT) == size:
                    return self._give(whole, data)
            elif not is_open_as(shown, fd):
                return False  # it might be no file any more
            else:
                is_begun = reader.source.go_direct(fd) and self._begin(whole)
        except OSError:
            pass  # whoever reads it again will say
        finally:
            if not is_begun:
                paths.close_at_once(fd)
        if not is_begun:
            self._rests = _RESTS
        return is_begun

    def finish(self, whole: Whole, n: int, data: memoryview) -> bool:
        """Answer a READ with `n` bytes that the disk has read; False if `Reader.read` is to be called.

        Closes the file.
        """
        size = whole.shown.size
        try:
            return n >= size and self._give(whole, data[:size])
        except OSError:
            return False
        finally:
            paths.close_at_once(whole.fd)

    def _give(self, whole: Whole, data: memoryview) -> bool:
        """Answer with `data`, if it is certain to be of the version that is shown: the file has it afterwards."""
        unique, node, _, pid, item, fd, shown = whole
        reader = self._reader
        if not is_open_as(shown, fd):
            return False
        catalog, record, size = reader.catalog, items.record_of(item), shown.size
        if not catalog.serves(record, shown) or reader.ends.knows(node):
            return False
        reader.counters.count_whole_read(size)
        self._reply(fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + size, 0, unique), data)
        reader.admission.missed(Fetched(item, 0, data, shown), pid, False)
        return True

    def _answer_kept(self, unique: int, node: int, item: int, size: int, pid: int) -> bool:
        """Answer with what need not be read, if that is all of it."""
        reader = self._reader
        [data, *others] = reader.admission.stashed(item, 0, size, size, pid)
        if others or isinstance(data, int) or len(data) != size or reader.ends.knows(node):
            return False
        reader.counters.add("reads")
        reader.counters.add(reader.admission.served_from, size)
        self._reply(fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + size, 0, unique), data)
        return True
