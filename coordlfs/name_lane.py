"""The name lane: pyfuse3 and trio answer what is asked about names, but for single names and attributes.

Listings, links, extended attributes and file system figures. The kernel asks nothing twice: names, attributes and
listings are good for a day. pyfuse3 reads from a socket pair that the byte lane feeds; see `coordlfs.server`.
A source that may never answer, as on a network, is asked from threads, so that nothing waits but who asked; so is every
directory, whose names may take a disk seconds.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio

from coordlfs import items
from coordlfs.catalog import DIRECTORY, REGULAR, Catalog
from coordlfs.kernel import pages
from coordlfs.metrics import Counters
from coordlfs.namespace import NAME_TIMEOUT, Namespace, believed
from coordlfs.source import Listing, Source

log = logging.getLogger(__name__)

_LISTINGS = 64
TASKS = 500  # questions about names that may wait for the source at a time
XATTR_PREFIX = b"user.coordl."
P = ParamSpec("P")
T = TypeVar("T")


def _errno(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Answer an error of the source with its errno, and a mistake of ours with EIO: neither may end the server."""

    @functools.wraps(method)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except OSError as e:
            raise pyfuse3.FUSEError(e.errno or errno.EIO) from e
        except Exception as e:
            log.exception("a request about names failed")
            raise pyfuse3.FUSEError(errno.EIO) from e

    return answer


class NameLane(pyfuse3.Operations):
    """Names of one mount, as pyfuse3 asks for them."""

    enable_acl = False  # the kernel was told in INIT

    def __init__(
        self,
        catalog: Catalog,
        source: Source,
        namespace: Namespace,
        counters: Counters,
    ) -> None:
        super().__init__()
        self.root_xattrs: dict[bytes, Callable[[], bytes]] = {}  # names beneath user.coordl., and who knows them
        self._catalog = catalog
        self._source = source
        self._namespace = namespace
        self._counters = counters
        self._listings: OrderedDict[int, Listing] = OrderedDict()
        self._lock = threading.Lock()  # of the listings
        self._threads = trio.CapacityLimiter(TASKS)

    async def _ask(self, question: Callable[[], T], *, is_long: bool = False) -> T:
        """Ask the source something, from a thread if it may never answer or take long."""
        if not self._source.is_remote and not is_long:
            return question()
        return await trio.to_thread.run_sync(question, abandon_on_cancel=True, limiter=self._threads)

    def _attributes(self, node: int, st: os.stat_result) -> pyfuse3.EntryAttributes:
        a = pyfuse3.EntryAttributes()
        a.st_ino = node
        a.st_mode = st.st_mode
        a.st_nlink = st.st_nlink
        a.st_uid = st.st_uid
        a.st_gid = st.st_gid
        a.st_rdev = st.st_rdev
        a.st_size = st.st_size
        a.st_blksize = st.st_blksize
        a.st_blocks = st.st_blocks
        a.st_atime_ns = st.st_atime_ns
        a.st_mtime_ns = st.st_mtime_ns
        a.st_ctime_ns = st.st_ctime_ns
        a.entry_timeout = NAME_TIMEOUT
        a.attr_timeout = believed(st)
        return a

    @_errno
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """Where a symbolic link leads."""
        path = self._catalog.path(self._namespace.record_of(inode))
        return await self._ask(lambda: self._source.readlink(path))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing is kept per kernel reference."""

    @_errno
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """The source's figures."""
        v = await self._ask(self._source.statvfs)
        d = pyfuse3.StatvfsData()
        d.f_bsize, d.f_frsize, d.f_blocks, d.f_bfree, d.f_bavail = (
            v.f_bsize,
            v.f_frsize,
            v.f_blocks,
            v.f_bfree,
            v.f_bavail,
        )
        d.f_files, d.f_ffree, d.f_favail, d.f_namemax = v.f_files, v.f_ffree, v.f_favail, v.f_namemax
        return d

    # -- directories --------------------------------------------------------------------------------------------

    @_errno
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Entries from position `start_id` on; `fh` is the node id, since directories are not opened."""
        record = self._namespace.record_of(fh)
        await self._ask(lambda: self._list(fh, record, start_id, token), is_long=True)

    def _list(self, fh: int, record: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listing(fh, record, start_id)
        names = listing.names
        position = start_id
        while position < 2:
            name = b"." if position == 0 else b".."
            a = pyfuse3.EntryAttributes()
            a.st_ino = fh if position == 0 else self._catalog.node(self._catalog.entry(record)[0])
            a.st_mode = stat.S_IFDIR | 0o755
            position += 1
            if not pyfuse3.readdir_reply(token, name, a, position):
                return
        while position - 2 < len(names):
            name = names[position - 2]
            position += 1
            try:
                st = listing.lstat(name)
            except FileNotFoundError:
                continue
            except OSError:
                self._counters.add("source_errors")
                continue  # a name without attributes cannot be listed; whoever asks for it gets the error
            node = self._catalog.node(self._namespace.enter(record, name, st))
            if not pyfuse3.readdir_reply(token, name, self._attributes(node, st), position):
                return
        if start_id >= position:  # the empty reply that ends it
            self._close_listing(fh)

    def _listing(self, node: int, record: int, position: int) -> Listing:
        with self._lock:
            listing = self._listings.get(node)
            if listing is not None and position:
                self._listings.move_to_end(node)
                return listing
        listing = self._source.listing(self._catalog.directory_path(record))
        with self._lock:
            self._listings[node] = listing
            self._listings.move_to_end(node)
            if len(self._listings) > _LISTINGS:
                self._listings.popitem(last=False)
        return listing

    def _close_listing(self, node: int) -> None:
        with self._lock:
            self._listings.pop(node, None)

    # -- extended attributes ------------------------------------------------------------------------------------

    @_errno
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """The source's, and those of coordlfs itself beneath `user.coordl.`."""
        record = self._namespace.record_of(inode)
        if name.startswith(XATTR_PREFIX):
            return self._own_xattr(record, name[len(XATTR_PREFIX) :])
        path = self._catalog.path(record)
        return await self._ask(lambda: self._source.xattr(path, name))

    def _own_xattr(self, record: int, name: bytes) -> bytes:
        if name == b"cached" and self._catalog.flags(record) & REGULAR:
            return self._cached(record)
        # A container may have been given a part of the mount only, and is to find that hints are taken.
        everywhere = name == b"hint" and self._catalog.flags(record) & DIRECTORY
        if (record == 0 or everywhere) and name in self.root_xattrs:
            return self.root_xattrs[name]()
        raise pyfuse3.FUSEError(errno.ENODATA)

    def _cached(self, record: int) -> bytes:
        size = self._catalog.size(record)
        pinned = self._catalog.pinned_pages(record)
        whole = sum(pages.count(items.span(item, size)[1]) for item in items.items_of(record, size))
        return b"pinned" if pinned >= whole else b"partial" if pinned else b"no"

    @_errno
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """The source's: a copy made with its attributes must equal the source."""
        path = self._catalog.path(self._namespace.record_of(inode))
        names = await self._ask(lambda: self._source.xattrs(path))
        # The kernel guards their values itself, not their names.
        return [name for name in names if ctx.uid == 0 or not name.startswith(b"trusted.")]
