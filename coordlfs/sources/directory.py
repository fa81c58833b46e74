"""Reading the dataset directory without leaving a second copy of it in the page cache.

Bytes that are in the source's page cache already are taken from there; everything else is read with O_DIRECT, or,
where the file system refuses that, read and dropped. `preadv2(RWF_NOWAIT)` alone would not do: since Linux 5.10 it
starts readahead of what is missing (measured on 6.18: the whole file was cached by the call), so cachestat(2) is asked
first. It does not know which version the kernel has cached: that is in the catalogue.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from mmap import mmap
from typing import TypeVar

from coordlfs.kernel import leases, mounts, pages, paths
from coordlfs.sources.contract import Listing, Neighbours, Opened, Part
from coordlfs.sources.numbering import Numbering
from coordlfs.sources.versions import Version, is_young

T = TypeVar("T")

_KEEP_OPEN_FROM = 1 << 20  # files from this size on are read by many READs: keep the descriptor
_KEPT, _KEPT_PER_FILE = 256, 8
# What may pass: too many open files, a file handle of NFS that is known no longer, a server that is being started.
_PASSING = frozenset(
    {errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT}
)
_RETRIES = (0.0, 0.05, 0.5)  # seconds between the attempts
_ASK_OTHERS = frozenset({b"fuseblk", b"gfs2", b"ocfs2"})  # though they have a block device
# Where a lease says that nobody writes: all of it lies on this machine, or the file system asks its server.
_LEASES_TELL = frozenset({b"ext2", b"ext3", b"ext4", b"xfs", b"btrfs", b"bcachefs", b"f2fs", b"tmpfs", b"zfs", b"nfs4"})
_ROOT_IS_GONE = frozenset({errno.ENOTCONN, errno.ESTALE})
_ATTEMPTS = 4  # at reading a file that is written to meanwhile
_KEPT_FOR = 1.0  # seconds after which a name is looked at again
# Two writes within a tick of the kernel's clock give a file the same time.
_TICK_NS, _SETTLE_EVERY, _SETTLES_WITHIN = 20_000_000, 0.005, 2.0


def lies_elsewhere(root: int, path: bytes | None = None) -> bool:
    """Whether a file system has no block device of its own, as NFS and Lustre, or asks others: to open takes its time.

    Or one that is mounted beneath its path.
    """
    if _is_elsewhere(os.fstat(root).st_dev, mounts.fstype(root)):
        return True
    return path is not None and holds_elsewhere(path)


def holds_elsewhere(path: bytes) -> bool:
    """Whether such a file system is mounted beneath a path. Asks none of them."""
    return any(_is_elsewhere(mount.device, mount.fstype) for mount in mounts.beneath(path))


def _is_elsewhere(device: int, fstype: bytes | None) -> bool:
    return os.major(device) == 0 or (fstype or b"").partition(b".")[0] in _ASK_OTHERS


def _same(a: os.stat_result, b: os.stat_result) -> bool:
    """Whether an open file was not written to between two looks."""
    return a.st_size == b.st_size and a.st_mtime_ns == b.st_mtime_ns


class _Listing(Listing):
    """One that keeps its directory open."""

    def lstat(self, name: bytes) -> os.stat_result:
        """See `Listing`."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def close(self) -> None:
        """See `Listing`."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:  # so that one thread may forget a listing that another one still reads
        self.close()


class _Neighbours:
    """See `contract.Neighbours`: a directory is opened once.

    For as long as a change may go unnoticed: a directory that is moved meanwhile is followed.
    """

    def __init__(self, source: DirectorySource) -> None:
        self._source = source
        self._directory: bytes | None = None
        self._fd = -1
        self._is_patient = True  # until the source fails in a way that may pass: it is waited for once

    def lstat(self, directory: bytes, name: bytes) -> os.stat_result:
        """As `Source.lstat` of the name in the directory, which is empty for the root; so is the root's own name."""
        if directory != self._directory or not name:
            self.close()
            self._directory = directory
        elif self._fd < 0:
            with suppress(OSError):
                self._fd = self._source.open(directory, os.O_PATH | os.O_DIRECTORY)
        if self._fd >= 0:
            with suppress(OSError):
                return os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        path = paths.join(directory, name)
        if not self._is_patient:
            return self._source.lstat_once(path)
        try:
            return self._source.lstat(path)
        except OSError as e:
            self._is_patient = e.errno not in _PASSING
            raise

    def close(self) -> None:
        """Let go of the directory."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class DirectorySource:
    """A directory; see `contract.Source`.

    `root` is a descriptor of it; `path`, if given, leads to what is mounted in its place once its file system is gone.
    A file system of another type than `fstype` is not in its place: it shows while nothing is mounted there.
    `since`: when it was mounted, in ns; now, if it is not given.
    `is_remote`: see `lies_elsewhere`, which is asked if it is not given, and may not be where the source may be gone.
    It is set later where such a file system is mounted beneath the source meanwhile.
    Errors that may pass are returned only after a few attempts, in about half a second.
    """

    def __init__(
        self,
        root: int,
        path: bytes | None = None,
        *,
        is_remote: bool | None = None,
        fstype: bytes | None = None,
        since: int | None = None,
    ) -> None:
        self.root = root
        self.retries = 0
        self._path = path
        self._fstype = fstype
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, list[tuple[int, float]]] = OrderedDict()
        self._direct_refused: set[int] = set()  # devices of file systems that know no O_DIRECT
        self.numbering: Numbering | None = Numbering(self.lstat_once, time.time_ns() if since is None else since)
        self.is_remote = lies_elsewhere(root) if is_remote is None else is_remote

    def requests(self) -> dict[str, int]:
        """A directory is asked nothing that costs money."""
        return {}

    # -- names --------------------------------------------------------------------------------------------------

    def open(self, path: bytes, flags: int = os.O_RDONLY) -> int:
        """A descriptor of the file at `path`, never through a symbolic link, never above the root."""
        return paths.open_beneath(self.root, path, flags)

    def _persistently(self, action: Callable[[], T], slow: Callable[[], None] | None) -> T:
        """`action`, again if it fails in a way that may pass; `slow` is called before that is waited for."""
        for pause in _RETRIES:
            try:
                return action()
            except OSError as e:
                if e.errno not in _PASSING:
                    raise
                if slow is not None:
                    slow()
                if e.errno in _ROOT_IS_GONE:
                    self._find_root()
                self.retries += 1
            time.sleep(pause)
        return action()

    def _find_root(self) -> None:
        """If the file system of the root is gone, take what its path leads to now, with the same descriptor."""
        try:
            os.fstat(self.root)
        except OSError as e:
            if e.errno not in _ROOT_IS_GONE or self._path is None:
                return
            try:
                found = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                return
            if self._fstype is None or mounts.fstype(found) == self._fstype:
                os.dup2(found, self.root)
            os.close(found)

    @contextmanager
    def _reference(self, path: bytes) -> Iterator[int]:
        fd = self.open(path, os.O_PATH)
        try:
            yield fd
        finally:
            os.close(fd)

    def lstat(self, path: bytes, slow: Callable[[], None] | None = None) -> os.stat_result:
        """The attributes of a name, itself if it is a symbolic link.

        `slow` is called before the disk has to be waited for.
        """
        return self._persistently(lambda: self.lstat_once(path, slow), slow)

    def lstat_once(self, path: bytes, slow: Callable[[], None] | None = None) -> os.stat_result:
        """`lstat`, without another attempt if that fails."""
        fd = paths.open_if_cached(self.root, path, os.O_PATH)
        if fd is None:
            if slow is not None:
                slow()
            fd = self.open(path, os.O_PATH)
        try:
            return os.fstat(fd)
        finally:
            paths.close_at_once(fd)

    def readlink(self, path: bytes) -> bytes:
        """Where a symbolic link leads."""
        with self._reference(path) as fd:
            return os.readlink(b"", dir_fd=fd)

    def listing(self, path: bytes, opened: Callable[[int], object] | None = None) -> Listing:
        """The entries of a directory as they are now; `opened` is called with its descriptor before they are read."""
        fd = self._persistently(lambda: self.open(path, os.O_RDONLY | os.O_DIRECTORY), None)
        try:
            if opened is not None:
                opened(fd)
            return _Listing(sorted(map(os.fsencode, os.listdir(fd))), fd)
        except BaseException:
            os.close(fd)
            raise

    def neighbours(self, age: float = 0.0) -> Neighbours:
        """What to ask for the attributes of many names."""
        return _Neighbours(self)

    def xattr(self, path: bytes, name: bytes) -> bytes:
        """An extended attribute of a name, not followed if it is a symbolic link."""
        with self._reference(path) as fd:
            return os.getxattr(b"/proc/self/fd/%d" % fd, name)

    def xattrs(self, path: bytes) -> list[bytes]:
        """The names of the extended attributes."""
        with self._reference(path) as fd:
            return [os.fsencode(name) for name in os.listxattr(b"/proc/self/fd/%d" % fd)]

    def statvfs(self) -> os.statvfs_result:
        """Figures of the file system that the source lies on."""
        return os.statvfs(self.root)

    # -- bytes --------------------------------------------------------------------------------------------------

    def read(self, part: Part, into: mmap | memoryview, slow: Callable[[], None]) -> tuple[int, os.stat_result]:
        """Read a part of a file into page-aligned memory; how many bytes, and the attributes they belong to.

        `slow` is called before what will wait.
        """
        if self.is_remote:
            slow()
        return self._persistently(lambda: self._read_file(part, into, slow), slow)

    def fetch(self, part: Part, into: mmap | memoryview, slow: Callable[[], None]) -> tuple[memoryview, os.stat_result]:
        """See `contract.Source`."""
        n, st = self.read(part, into, slow)
        return memoryview(into)[:n], st

    def _read_file(self, part: Part, into: mmap | memoryview, slow: Callable[[], None]) -> tuple[int, os.stat_result]:
        record, path, offset, size, is_first = part
        fd, opened = self._take(record) or (self._open(path, slow), time.monotonic())
        keep = False
        try:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode):
                raise FileNotFoundError(errno.ENOENT, "no longer a regular file")
            for _ in range(_ATTEMPTS):
                if is_first and is_young(st.st_mtime_ns, time.time_ns()):
                    slow()
                    st = self._settled(fd)
                n = self._read(fd, into, offset, min(size, st.st_size - offset), slow)
                before, st = st, os.fstat(fd)
                if _same(before, st):
                    break
            else:  # it was written to all the while, and the bytes belong to no version
                raise OSError(errno.ESTALE, "it is being written to")
            keep = st.st_size >= _KEEP_OPEN_FROM
            return n, st
        finally:
            if keep:
                self._give(record, fd, opened)
            elif self.is_remote:
                os.close(fd)
            else:
                paths.close_at_once(fd)

    def _settled(self, fd: int) -> os.stat_result:
        """Wait until nobody writes to a file that has just changed, but not for ever; its attributes then."""
        until = time.monotonic() + _SETTLES_WITHIN
        lease_tells = mounts.fstype(fd) in _LEASES_TELL
        while True:
            now = time.time_ns()
            is_free = lease_tells and leases.nobody_writes(fd)
            st = os.fstat(fd)
            if is_free and now - st.st_mtime_ns >= _TICK_NS:
                return st  # nobody wrote to it at `now`, nor has begun to since
            if not is_young(st.st_mtime_ns, now) or time.monotonic() > until:
                return st
            time.sleep(_SETTLE_EVERY)

    def expect(self, path: bytes) -> None:
        """A keeper has a disk read ahead."""

    def begin(self, part: Part, into: memoryview) -> Version | Opened | None:
        """Read a part that begins with a page, if the page cache holds all of it; never waits.

        Returns the version that the file has afterwards: if it is not the one that it had before, it may have been
        written to meanwhile, and `read` is to be called. So it is if None is returned, whatever the reason. Otherwise
        the disk has to be read, which is to be followed by `end`.
        """
        if self.is_remote:
            return None
        record, path, offset, size, is_first = part
        taken = self._take(record)
        if taken is None:
            try:
                fd = paths.open_if_cached(self.root, path, os.O_RDONLY)
            except OSError:
                return None
            if fd is None:
                return None
            taken = fd, 0.0
        fd, since = taken
        try:
            if is_first and is_young(os.fstat(fd).st_mtime_ns, time.time_ns()):
                return None
            npages = pages.count(size)
            cached = pages.resident(fd, offset, npages * pages.PAGE)
            if cached == npages:
                # Should a page be on its way from the disk still, or gone by now, this ends there.
                if os.preadv(fd, [into[:size]], offset, os.RWF_NOWAIT) == size:
                    version = Version.of_open(fd)
                    if version.size >= _KEEP_OPEN_FROM:
                        given, fd = fd, -1
                        self._give(record, given, since or time.monotonic())
                    return version
            elif cached is not None:
                st = os.fstat(fd)
                length = min(size, st.st_size - offset)
                if length > 0 and stat.S_ISREG(st.st_mode) and self.go_direct(fd):
                    opened = Opened(record, fd, since or time.monotonic(), offset, length, st)
                    fd = -1
                    return opened
        except OSError:
            pass  # `read` will say
        finally:
            if fd >= 0:
                paths.close_at_once(fd)
        return None

    def end(self, opened: Opened) -> os.stat_result | None:
        """Let go of a file that was read; the attributes that the bytes belong to.

        None if it was written to meanwhile: they belong to no version, and `read` is to be called.
        """
        try:
            st = os.fstat(opened.fd)
        except OSError:
            os.close(opened.fd)
            return None
        if st.st_size >= _KEEP_OPEN_FROM:
            self._give(opened.record, opened.fd, opened.since)
        else:
            paths.close_at_once(opened.fd)
        return st if _same(opened.st, st) else None

    def _open(self, path: bytes, slow: Callable[[], None]) -> int:
        fd = None if self.is_remote else paths.open_if_cached(self.root, path, os.O_RDONLY)
        if fd is None:
            slow()
            fd = self.open(path)
        return fd

    def go_direct(self, fd: int, on: bool = True) -> bool:
        """Have a file read around the page cache, or no longer; False if its file system refuses that."""
        if on and self._direct_refused and os.fstat(fd).st_dev in self._direct_refused:
            return False
        try:
            pages.set_direct(fd, on)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            st = os.fstat(fd)
            if stat.S_ISREG(st.st_mode):  # else it is the file that is wrong
                self._direct_refused.add(st.st_dev)
            return False
        return True

    def _take(self, record: int) -> tuple[int, float] | None:
        # A descriptor is used by one thread at a time, since O_DIRECT is a property of it and not of the read.
        if not self._kept:
            return None
        with self._lock:
            kept = self._kept.get(record)
            if not kept:
                return None
            fd, opened = kept.pop()
        with suppress(OSError):  # ESTALE, or whatever a source that fails says
            if time.monotonic() - opened < _KEPT_FOR and os.fstat(fd).st_nlink:
                return fd, opened
        os.close(fd)
        return None

    def _give(self, record: int, fd: int, opened: float) -> None:
        self.go_direct(fd, False)
        closing: list[tuple[int, float]] = []
        with self._lock:
            kept = self._kept.setdefault(record, [])
            self._kept.move_to_end(record)
            (kept if len(kept) < _KEPT_PER_FILE else closing).append((fd, opened))
            while len(self._kept) > _KEPT:
                closing += self._kept.popitem(last=False)[1]
        for old, _ in closing:
            os.close(old)

    def forget(self, record: int) -> None:
        """Close what is kept open of a file, because its name may lead elsewhere now."""
        with self._lock:
            kept = self._kept.pop(record, [])
        for fd, _ in kept:
            os.close(fd)

    def _read(self, fd: int, into: mmap | memoryview, offset: int, want: int, slow: Callable[[], None]) -> int:
        if want <= 0:
            return 0
        first = offset // pages.PAGE * pages.PAGE
        span = pages.count(offset + want - first) * pages.PAGE  # bytes of the pages that are touched
        cached = pages.resident(fd, first, span)
        if cached is not None and cached * pages.PAGE == span:
            self.go_direct(fd, False)
            with suppress(OSError):
                if os.preadv(fd, [memoryview(into)[:want]], offset, os.RWF_NOWAIT) == want:
                    return want
            slow()  # a page is on its way from the disk still, or the file system cannot say
            return pread_all(fd, memoryview(into)[:want], offset)
        slow()
        if self.go_direct(fd):
            try:
                return min(want, pread_all(fd, memoryview(into)[: pages.count(want) * pages.PAGE], offset))
            except OSError as e:
                if e.errno != errno.EINVAL:  # not aligned as this file system wants it
                    raise
        self.go_direct(fd, False)
        if cached:
            return pread_all(fd, memoryview(into)[:want], offset)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # or more than is asked for would be read, and stay
        n = pread_all(fd, memoryview(into)[:want], offset)
        pages.drop(fd, first, span)
        return n


def pread_all(fd: int, view: memoryview, offset: int) -> int:
    """Read until `view` is full or the file ends: a short read in the middle would show as zeros."""
    n = os.preadv(fd, [view], offset)
    if n == len(view) or n == 0:
        return n
    total = n
    while total < len(view) and total % pages.PAGE == 0:
        n = os.preadv(fd, [view[total:]], offset + total)
        if n == 0:
            break
        total += n
    return total
