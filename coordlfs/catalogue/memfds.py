"""Memory that outlives the server: memfds that the supervisor makes and every server of the mount writes in turn."""

from __future__ import annotations

import os

RECORDS, NAMES = 1 << 33, 1 << 35  # bytes of address space, not of memory: pages come as they are written


def allocate() -> tuple[int, int]:
    """Two memfds for a new catalogue: records and names."""
    records, names = os.memfd_create("coordlfs-records"), os.memfd_create("coordlfs-names")
    os.ftruncate(records, RECORDS)
    os.ftruncate(names, NAMES)
    return records, names


TABLE_HEADER, SLOT = 4096, 32  # bytes, behind the cache's own: see `coordlfs.cache.store`


def cache(capacity: int) -> int:
    """A memfd for `capacity` bytes of cache and the table of what is in it. Its pages come as they are written."""
    fd = os.memfd_create("coordlfs-cache")
    pages = capacity // os.sysconf("SC_PAGE_SIZE")
    os.ftruncate(fd, pages * os.sysconf("SC_PAGE_SIZE") + TABLE_HEADER + pages * SLOT)
    return fd
