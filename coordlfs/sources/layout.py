"""How a directory's files lie: in the tree, and on the disk. It reads names and places, and no bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from coordlfs.kernel import fiemap, paths
from coordlfs.sources.contract import Source
from coordlfs.sources.directory import DirectorySource


def walk(source: Source, path: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Everything at and below `path`, directories before what they hold; what vanishes meanwhile is left out."""
    waiting = [path]
    while waiting:
        path = waiting.pop()
        with suppress(FileNotFoundError):
            st = source.lstat(path)
            yield path, st
            if stat.S_ISDIR(st.st_mode):
                listing = source.listing(path)
                listing.close()
                waiting += [paths.join(path, name) for name in reversed(listing.names)]


def files(source: Source, path: bytes) -> Iterator[tuple[bytes, int]]:
    """The regular files at and below `path` that have bytes, each by one of its names, and how many."""
    linked = set()
    for found, st in walk(source, path):
        if stat.S_ISREG(st.st_mode) and st.st_size and (st.st_dev, st.st_ino) not in linked:
            if st.st_nlink > 1:
                linked.add((st.st_dev, st.st_ino))
            yield found, st.st_size


def place(source: DirectorySource, path: bytes) -> int:
    """The byte of its disk at which a file begins; 0 where nobody says."""
    try:
        fd = source.open(path)
    except OSError:
        return 0
    try:
        return fiemap.first_block(fd) or 0
    finally:
        os.close(fd)


def by_extent(source: DirectorySource, files: list[bytes]) -> list[bytes]:
    """Files in the order in which they lie on their disk, to be read with few seeks."""
    return sorted(files, key=partial(place, source))
