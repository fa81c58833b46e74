"""The namespace loop: pyfuse3 and trio answer what is asked about names and is not worth being fast.

Links, extended attributes and file system figures. pyfuse3 reads from a socket pair that the data loop feeds; see
`coordlfs.processes.server`. A source that may never answer, as on a network, is asked from threads, so that nothing
waits but who asked. It must do nothing that a hit has to wait for.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio

from coordlfs.catalogue.catalog import DIRECTORY, REGULAR, Catalog
from coordlfs.kernel import pages, threads
from coordlfs.serving.namespace import Namespace
from coordlfs.sources.contract import Source

log = logging.getLogger(__name__)

TASKS = 500  # questions about names that may wait for the source at a time
XATTR_PREFIX = b"user.coordl."
_ACL_PREFIX = b"system.posix_acl_"
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


class NamespaceLoop(pyfuse3.Operations):
    """Names of one mount, as pyfuse3 asks for them."""

    enable_acl = False  # the kernel was told in INIT

    def __init__(
        self,
        catalog: Catalog,
        source: Source,
        namespace: Namespace,
        held_on_disk: Callable[[int], int] = lambda record: 0,
    ) -> None:
        """`held_on_disk`: how many bytes of a file, by its record, are in the disk tier."""
        super().__init__()
        self._held_on_disk = held_on_disk
        self.root_xattrs: dict[bytes, Callable[[], bytes]] = {}  # names beneath user.coordl., and who knows them
        self._catalog = catalog
        self._source = source
        self._namespace = namespace
        self._threads = trio.CapacityLimiter(TASKS)

    async def _ask(self, question: Callable[[], T]) -> T:
        """Ask the source something, from a thread if it may never answer."""
        if not self._source.is_remote:
            return question()
        return await threads.run(question, abandon_on_cancel=True, limiter=self._threads)

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

    # -- extended attributes ------------------------------------------------------------------------------------

    @_errno
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """The source's, and those of coordlfs itself beneath `user.coordl.`."""
        record = self._namespace.record_of(inode)
        if name.startswith(XATTR_PREFIX):
            return self._own_xattr(record, name[len(XATTR_PREFIX) :])
        path = self._catalog.path(record)
        try:
            return await self._ask(lambda: self._source.xattr(path, name))
        except OSError as e:
            # A file system without ACLs beneath one that has them: the kernel asks all the same, and takes any other
            # answer for a failure of what it is about.
            if e.errno == errno.EOPNOTSUPP and name.startswith(_ACL_PREFIX):
                raise pyfuse3.FUSEError(errno.ENODATA) from e
            raise

    def _own_xattr(self, record: int, name: bytes) -> bytes:
        if name == b"cached" and self._catalog.flags(record) & REGULAR:
            return self._cached(record)
        # A container may have been given a part of the mount only, and is to find that hints are taken.
        everywhere = name == b"hint" and self._catalog.flags(record) & DIRECTORY
        if (record == 0 or everywhere) and name in self.root_xattrs:
            return self.root_xattrs[name]()
        raise pyfuse3.FUSEError(errno.ENODATA)

    def _cached(self, record: int) -> bytes:
        pinned = self._catalog.pinned_pages(record)
        size = self._catalog.size(record)
        if pinned >= pages.count(size):
            return b"pinned"
        held = self._held_on_disk(record)
        return b"disk" if held == size else b"partial" if pinned or held else b"no"

    @_errno
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """The source's: a copy made with its attributes must equal the source."""
        path = self._catalog.path(self._namespace.record_of(inode))
        names = await self._ask(lambda: self._source.xattrs(path))
        # The kernel guards their values itself, not their names.
        return [name for name in names if ctx.uid == 0 or not name.startswith(b"trusted.")]
