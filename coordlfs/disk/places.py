"""Where stores are: a directory that the user names holds one for each source, which belongs to one mount at a time.

A store's own directory is for its owner only. It is locked by whoever has it open, and says of which source it is, and
where that is mounted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import xxhash

from coordlfs.disk.layout import FILES
from coordlfs.errors import UserError
from coordlfs.kernel import mounts

_PREFIX = "coordlfs-"
SOURCE, MOUNTED = "source", "mounted"  # files that hold a path each
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_LONGEST = 1 << 13
_LOOKED_AT_FOR = 0.5  # seconds
# File systems that give themselves the same number for as long as they live: others are numbered as they are mounted.
_NUMBERED = frozenset({b"ext2", b"ext3", b"ext4", b"btrfs"})


@dataclass(frozen=True, slots=True)
class Place:
    """One store as it lies there."""

    name: str
    source: bytes  # the path of what it is of
    mounted: bytes | None  # where, if it is in use; empty if that is not seen here
    used: float  # when it was last mounted: seconds since 1970


def identity(path: bytes, root: int) -> bytes:
    """16 bytes for the directory that is open as `root`, found at `path`: another one, later, has others."""
    st, fstype = os.fstat(root), mounts.fstype(root) or b""
    number = os.statvfs(root).f_fsid if fstype in _NUMBERED else 0
    digest: bytes = xxhash.xxh3_128_digest(b"%b\0%b %d %d" % (path, fstype, number, st.st_ino))
    return digest


def identity_of_bucket(address: str, endpoint: str | None) -> bytes:
    """As `identity`, of a bucket: that of another store has others."""
    digest: bytes = xxhash.xxh3_128_digest(f"{address}\0{endpoint or ''}".encode())
    return digest


def _name(source: bytes) -> str:
    return _PREFIX + xxhash.xxh3_64_hexdigest(source)


def claim(directory: str, source: bytes, mountpoint: bytes) -> int:
    """The directory of the store of a source, open, locked, and made if need be. Raises UserError.

    The lock is there as long as the descriptor, or a copy of it, is open in any process.
    """
    above = _open(directory)
    try:
        name = _name(source)
        try:
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=above)
            fd = os.open(name, _DIRECTORY, dir_fd=above)
        except OSError as e:
            raise UserError(f"{os.path.join(directory, name)} cannot be used as a disk cache: {e.strerror}") from None
        try:
            _check_owner(directory, fd)
            if not _lock_soon(fd):
                raise UserError(
                    f"{directory} already holds the disk cache of {os.fsdecode(source)}, and {_user(fd)} first"
                )
            _write(directory, fd, SOURCE, source)
            _write(directory, fd, MOUNTED, mountpoint)
        except BaseException:
            os.close(fd)
            raise
        return fd
    finally:
        os.close(above)


def _open(directory: str) -> int:
    with suppress(FileExistsError):
        try:
            os.mkdir(directory, 0o700)
        except FileNotFoundError:
            above = os.path.dirname(os.path.abspath(directory))
            raise UserError(f"{above} does not exist: make it, then --disk-cache in it") from None
        except OSError as e:
            if e.errno != errno.EEXIST:
                raise UserError(f"--disk-cache {directory} cannot be made: {e.strerror}") from None
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        raise UserError(f"--disk-cache {directory} is not a directory: give one on a local disk") from None
    except OSError as e:
        raise UserError(f"--disk-cache {directory} cannot be used: {e.strerror}") from None


def _check_owner(directory: str, fd: int) -> None:
    st = os.fstat(fd)
    if st.st_uid != os.geteuid():
        raise UserError(f"the disk cache in {directory} is another user's (uid {st.st_uid}): give another directory")
    if stat.S_IMODE(st.st_mode) != 0o700:
        os.fchmod(fd, 0o700)


def _lock_soon(fd: int) -> bool:
    """`_lock`, but for who only looks for a moment whether anybody has it."""
    until = time.monotonic() + _LOOKED_AT_FOR
    while not _lock(fd):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _mountpoint(store: int) -> bytes:
    """Where a store that is locked is mounted, if that is seen here, or empty: what was killed left its note."""
    at = _read(store, MOUNTED)
    return at if any(mount.point == at for mount in mounts.table()) else b""


def _user(store: int) -> str:
    """Who uses a store that is locked, and what is to be done."""
    if at := _mountpoint(store):
        return f"{os.fsdecode(at)} uses it: unmount that"
    return "another process uses it, or a mount that is not seen here, as in a container: end that"


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(directory: int, name: str) -> bytes:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return b""
    try:
        return os.read(fd, _LONGEST)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _write(directory: str, store: int, name: str, text: bytes) -> None:
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=store)
        try:
            os.write(fd, text)
        finally:
            os.close(fd)
    except OSError as e:
        raise UserError(f"--disk-cache {directory} cannot be written to: {e.strerror}") from None


def taken(store: int) -> int:
    """Bytes that a store takes of its file system."""
    return sum(os.stat(name, dir_fd=store, follow_symlinks=False).st_blocks for name in os.listdir(store)) * 512


# -- all of them --------------------------------------------------------------------------------------------------


def stores(directory: str) -> list[Place]:
    """The stores in a directory that are this user's. Raises UserError if it cannot be read."""
    above = _open_existing(directory)
    try:
        found = []
        for name in sorted(os.listdir(above)):
            if name.startswith(_PREFIX):
                with suppress(OSError), _opened(above, name) as fd:
                    if os.fstat(fd).st_uid != os.geteuid():
                        continue
                    is_free = _lock(fd)
                    used = os.stat(MOUNTED, dir_fd=fd, follow_symlinks=False).st_mtime
                    found.append(Place(name, _read(fd, SOURCE), None if is_free else _mountpoint(fd), used))
        return found
    finally:
        os.close(above)


@contextmanager
def opened(directory: str, place: Place) -> Iterator[int]:
    """The directory of a store, open meanwhile. Raises UserError if it cannot be opened."""
    above = _open_existing(directory)
    try:
        with _opened(above, place.name) as fd:
            yield fd
    except FileNotFoundError:
        raise UserError(f"{os.path.join(directory, place.name)} is gone: nothing is left to do") from None
    finally:
        os.close(above)


@contextmanager
def locked(directory: str, place: Place) -> Iterator[int]:
    """`opened`, and locked. Raises UserError if the store is in use."""
    with opened(directory, place) as fd:
        if not _lock_soon(fd):
            raise UserError(f"the disk cache of {os.fsdecode(place.source)} is in use: {_user(fd)} first")
        yield fd


def clear(directory: str, place: Place) -> None:
    """Remove a store. Raises UserError if it is in use."""
    with locked(directory, place) as fd:
        try:
            for name in (*FILES, SOURCE, MOUNTED):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=fd)
            os.rmdir(os.path.join(directory, place.name))
        except OSError as e:
            raise UserError(f"{os.path.join(directory, place.name)} cannot be removed: {e.strerror}") from None


@contextmanager
def _opened(above: int, name: str) -> Iterator[int]:
    fd = os.open(name, _DIRECTORY, dir_fd=above)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_existing(directory: str) -> int:
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise UserError(f"{directory} cannot be read: {e.strerror}") from None
