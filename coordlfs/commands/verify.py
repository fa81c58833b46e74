"""`coordlfs verify`: every byte, name and attribute of a mount, held against its source.

It reads both as any program does, and knows nothing of what is cached.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from coordlfs.commands import buckets, mounted
from coordlfs.commands.client import Client
from coordlfs.kernel import fuse, pages
from coordlfs.kernel.paths import shown
from coordlfs.sources import address
from coordlfs.sources.contract import Part, Source
from coordlfs.sources.directory import DirectorySource
from coordlfs.sources.layout import walk

_STEP = fuse.MAX_READ
_ATTRIBUTES = (
    "st_mode",
    "st_nlink",
    "st_uid",
    "st_gid",
    "st_rdev",
    "st_size",
)
_TIMES = "st_mtime_ns", "st_ctime_ns"


def _no_wait() -> None:
    pass


def differences(mount: DirectorySource, source: Source, path: bytes, buffer: pages.Buffer) -> Iterator[str]:
    """What differs at one path; `buffer` has room for `_STEP` bytes."""
    try:
        theirs = source.lstat(path)
    except FileNotFoundError:
        return  # gone since it was listed
    try:
        ours = mount.lstat(path)
    except OSError as e:
        yield f"cannot be found on the mount: {e.strerror}"
        return
    # A bucket's directories have the time at which who asks saw them change.
    has_times = source.root >= 0 or not stat.S_ISDIR(theirs.st_mode)
    for name in (*_ATTRIBUTES, *(_TIMES if has_times else ())):
        if getattr(ours, name) != getattr(theirs, name):
            yield f"{name} is {getattr(ours, name)}, not {getattr(theirs, name)}"
    if xattrs(mount, path) != xattrs(source, path):
        yield "extended attributes differ"
    if stat.S_ISLNK(theirs.st_mode):
        if mount.readlink(path) != source.readlink(path):
            yield "the link leads elsewhere"
    elif stat.S_ISDIR(theirs.st_mode):
        if names(mount, path) != names(source, path):
            yield "the names in it differ"
    elif stat.S_ISREG(theirs.st_mode):
        yield from _bytes_differ(mount, source, path, theirs.st_size, buffer)


def xattrs(tree: Source, path: bytes) -> dict[bytes, bytes]:
    """All extended attributes of a name."""
    try:
        return {name: tree.xattr(path, name) for name in sorted(tree.xattrs(path))}
    except OSError:
        return {}


def names(tree: Source, path: bytes) -> list[bytes]:
    """The names in a directory."""
    listing = tree.listing(path)
    listing.close()
    return listing.names


def _bytes_differ(
    mount: DirectorySource, source: Source, path: bytes, size: int, buffer: pages.Buffer
) -> Iterator[str]:
    try:
        fd = mount.open(path)
    except OSError as e:
        yield f"cannot be opened: {e.strerror}"
        return
    try:
        for offset in range(0, max(size, 1), _STEP):
            try:
                ours = os.pread(fd, _STEP, offset)
            except OSError as e:
                yield f"cannot be read at {offset}: {e.strerror}"
                return
            # Through Source, since reading for comparison must not fill the page cache.
            n, _ = source.read(Part(0, path, offset, _STEP), buffer, _no_wait)
            source.forget(0)
            if ours != memoryview(buffer)[:n]:
                yield f"bytes differ within {offset}–{offset + _STEP}"
                return
    finally:
        os.close(fd)


def _source(mountpoint: str) -> Source:
    """What is mounted. Raises UserError."""
    client = Client(mountpoint)
    try:
        figures = mounted.stats(client.root)
        bucket = address.parse(figures["source_path"])
        if bucket is None:
            return client.source()
        return buckets.opened(bucket, address.Options(**figures["source"]["options"]))
    finally:
        client.close()


def verify(mountpoint: str) -> tuple[int, int, list[str]]:
    """Files and bytes compared, and a line for everything that differs."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    source = _source(mountpoint)
    root = os.open(mounted.whole(mountpoint).point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mount = DirectorySource(root)
        found: list[str] = []
        everything = list(walk(source, b""))
        total = 0
        buffer = pages.buffer(_STEP + pages.PAGE)
        columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            for path, st in progress.track(everything):
                found += [f"'{shown(path or b'.')}': {d}" for d in differences(mount, source, path, buffer)]
                total += st.st_size if stat.S_ISREG(st.st_mode) else 0
        return len(everything), total, found
    finally:
        os.close(root)
        if source.root >= 0:
            os.close(source.root)
