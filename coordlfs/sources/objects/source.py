"""A bucket, or what lies below a prefix of it, as a source: see `coordlfs.sources.contract`.

Names are what listings say, a directory at a time, and nothing else: a listing is good until it is `lasts` seconds
old, and no request looks for a single name. Bytes are those of the object that was listed, which its ETag tells from
others; what has changed meanwhile is looked at, and given with its new attributes, so that whoever asked sees it.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from itertools import chain
from mmap import mmap
from typing import NoReturn

import xxhash

from coordlfs.kernel import paths
from coordlfs.sources.address import Address, Options
from coordlfs.sources.contract import Listing, Neighbours, Opened, Part
from coordlfs.sources.numbering import Numbering
from coordlfs.sources.objects.blocks import WHOLE, Block, Blocks, blocks_of
from coordlfs.sources.objects.names import LONGEST_NAME, Directory, Entry
from coordlfs.sources.objects.sequences import Sequences
from coordlfs.sources.objects.store import TRIED_FOR, ChangedError, GoneError, Store
from coordlfs.sources.objects.tree import Tree
from coordlfs.sources.versions import Version

_ROOM = 256 << 20  # bytes on their way to readers
_ATTEMPTS = 3  # at reading an object that changes meanwhile
_BLOCK = 4096  # bytes, for `st_blksize`
_FILE, _DIRECTORY = stat.S_IFREG | 0o444, stat.S_IFDIR | 0o555
_MASK = (1 << 63) - 1


class ObjectSource:
    """See `contract.Source`.

    `lasts`: seconds that a listing is good for, None if nothing ever changes. `since`: when it was mounted, in ns; it
    is when its directories last changed, until another change is seen. `tried_for`: seconds after which a request that
    fails is not made again.
    """

    root = -1

    def __init__(
        self,
        address: Address,
        options: Options,
        *,
        lasts: float | None = None,
        since: int | None = None,
        tried_for: float = TRIED_FOR,
    ) -> None:
        self.is_remote = True
        self.numbering: Numbering | None = None  # a number is of the ETag
        self.store = Store(address, options, tried_for=tried_for)
        self._prefix = address.prefix + "/" if address.prefix else ""
        self.tree = Tree(self.store, self._prefix, lasts, time.time_ns() if since is None else since)
        self._owner = os.geteuid(), os.getegid()
        self._blocks = Blocks(self._fetch, _ROOM)
        self._sequences = Sequences()

    @property
    def retries(self) -> int:
        """Attempts that were made again."""
        return self.store.figures()["retries"]

    def requests(self) -> dict[str, int]:
        """See `Store.figures`; and keys that are not shown, and bytes that wait for a reader."""
        return self.store.figures() | {"hidden_keys": self.tree.hidden, "buffered_bytes": self._blocks.used}

    def is_empty(self) -> bool:
        """Whether there is no key that it could show. One request, however many there are. Raises OSError."""
        return not self.store.holds_anything(self._prefix)

    # -- names --------------------------------------------------------------------------------------------------

    def lstat(self, path: bytes, slow: Callable[[], None] | None = None) -> os.stat_result:
        """See `contract.Source`."""
        return self.attributes(path, self.tree.find(path, None, slow))

    def attributes(self, path: bytes, entry: Entry) -> os.stat_result:
        """What a file system says of what was listed."""
        uid, gid = self._owner
        if entry.is_directory:
            number = xxhash.xxh3_64_intdigest(path) & _MASK
            return _stat(_DIRECTORY, number, 1, uid, gid, 0, self.tree.changed_ns(path))
        tells = entry.etag or f"{entry.size} {entry.mtime_ns}"
        return _stat(_FILE, xxhash.xxh3_64_intdigest(tells.encode()) & _MASK, 1, uid, gid, entry.size, entry.mtime_ns)

    def listing(self, path: bytes) -> Listing:
        """See `contract.Source`."""
        return _Listing(self, path, self.tree.directory(path))

    def neighbours(self, age: float = 0.0) -> Neighbours:
        """See `contract.Source`."""
        return _Neighbours(self, time.monotonic() - age)

    def readlink(self, path: bytes) -> bytes:
        """There are no links."""
        self.lstat(path)
        raise OSError(errno.EINVAL, "it is no symbolic link")

    def xattr(self, path: bytes, name: bytes) -> bytes:
        """There are no attributes but those of `lstat`."""
        raise OSError(errno.ENODATA, "an object has no such attribute")

    def xattrs(self, path: bytes) -> list[bytes]:
        """None."""
        return []

    def statvfs(self) -> os.statvfs_result:
        """A store does not say how much it holds."""
        return os.statvfs_result((_BLOCK, _BLOCK, 0, 0, 0, 0, 0, 0, os.ST_RDONLY, LONGEST_NAME))

    # -- bytes --------------------------------------------------------------------------------------------------

    def read(self, part: Part, into: mmap | memoryview, slow: Callable[[], None]) -> tuple[int, os.stat_result]:
        """See `contract.Source`."""
        data, st = self.fetch(part, into, slow)
        room = memoryview(into)[: len(data)]
        if data.obj is not room.obj:
            room[:] = data
        return len(data), st

    def fetch(self, part: Part, into: mmap | memoryview, slow: Callable[[], None]) -> tuple[memoryview, os.stat_result]:
        """See `contract.Source`: what one request brought is not copied."""
        for _ in range(_ATTEMPTS):
            entry = self.tree.find(part.path, None, slow)
            if entry.is_directory:
                raise FileNotFoundError(errno.ENOENT, "no longer a regular file")
            try:
                return self._put_together(part, entry, into, slow), self.attributes(part.path, entry)
            except ChangedError:
                slow()
                self._look_again(part.path)
            except GoneError:
                self.tree.remove(part.path)
                raise
        raise ChangedError

    def _put_together(self, part: Part, entry: Entry, into: mmap | memoryview, slow: Callable[[], None]) -> memoryview:
        pieces = self._pieces(part, entry, slow)
        first = next(pieces, None)
        if first is None or len(first) == min(part.size, entry.size - part.offset):
            return memoryview(b"") if first is None else first
        together, done = memoryview(into), 0
        for piece in chain((first,), pieces):
            together[done : done + len(piece)] = piece
            done += len(piece)
        return together[:done]

    def _pieces(self, part: Part, entry: Entry, slow: Callable[[], None]) -> Iterator[memoryview]:
        at, end = part.offset, part.offset + part.size
        for block in blocks_of(part.path, entry, part.offset, part.size):
            for ahead in self._sequences.ahead_of(block):
                self._blocks.expect(ahead)
            yield self._blocks.read(block, at, end - at, slow)
            at = block.end

    def expect(self, path: bytes) -> None:
        """See `contract.Source`: of a large object, its beginning. What was not listed is not looked for."""
        parent, _, name = path.rpartition(b"/")
        known = self.tree.known(parent)
        entry = None if known is None else known.find(name)
        if entry is not None and not entry.is_directory:
            for block in blocks_of(path, entry, 0, WHOLE):
                self._blocks.expect(block)

    def close(self) -> None:
        """Ask for nothing more, and try nothing again."""
        self.store.ended.set()
        self._blocks.close()

    def _fetch(self, block: Block) -> memoryview:
        return self.store.get(self.tree.key(block.path), block.entry, block.first, block.end)

    def _look_again(self, path: bytes) -> None:
        """See what has become of an object that is not the one that was listed. Raises OSError if it is gone."""
        try:
            self.tree.replace(path, self.store.head(self.tree.key(path)))
        except GoneError:
            self.tree.remove(path)
            raise

    def begin(self, part: Part, into: memoryview) -> Version | Opened | None:
        """Nothing is read without this thread; see `contract.Source`."""
        return None

    def end(self, opened: Opened) -> NoReturn:
        """Nothing is opened."""
        raise AssertionError("an object store opens no files")

    def forget(self, record: int) -> None:
        """Nothing is kept of a file by its record."""


class _Listing(Listing):
    """See `contract.Listing`."""

    def __init__(self, source: ObjectSource, path: bytes, directory: Directory) -> None:
        super().__init__(directory.names)
        self._source = source
        self._path = path
        self._directory = directory

    def lstat(self, name: bytes) -> os.stat_result:
        """See `contract.Listing`."""
        path = paths.join(self._path, name)
        entry = self._directory.find(name)
        if entry is None:  # a name of an earlier listing, see `keep_positions`
            raise FileNotFoundError(errno.ENOENT, "no such name")
        return self._source.attributes(path, entry)

    def close(self) -> None:
        """Nothing is open."""


class _Neighbours:
    """See `contract.Neighbours`: what was listed before `oldest` is listed again."""

    def __init__(self, source: ObjectSource, oldest: float) -> None:
        self._source = source
        self._oldest = oldest

    def lstat(self, directory: bytes, name: bytes) -> os.stat_result:
        """See `contract.Neighbours`."""
        tree, path = self._source.tree, paths.join(directory, name)
        entry = tree.find(path, self._oldest)
        if entry.is_directory and tree.known(path) is not None:
            tree.directory(path, self._oldest)  # what it holds tells when it changed
        return self._source.attributes(path, entry)

    def close(self) -> None:
        """Nothing is open."""


def _stat(mode: int, ino: int, nlink: int, uid: int, gid: int, size: int, time_ns: int) -> os.stat_result:
    seconds = time_ns // 1_000_000_000
    return os.stat_result(
        (mode, ino, 0, nlink, uid, gid, size, seconds, seconds, seconds),
        {
            "st_atime_ns": time_ns,
            "st_mtime_ns": time_ns,
            "st_ctime_ns": time_ns,
            "st_blksize": _BLOCK,
            "st_blocks": -(-size // 512),
            "st_rdev": 0,
        },
    )
