"""Memory that outlives the server: memfds that the supervisor makes and every server of the mount writes in turn.

What lies in it is known by those who write it: `catalog`, `metrics`, and `coordlfs.cache.store`.
"""

from __future__ import annotations

import os
import resource

RECORDS, NAMES = 1 << 33, 1 << 35  # bytes of address space, not of memory: pages come as they are written


def allocate() -> tuple[int, int]:
    """Two memfds for a new catalogue: records and names. Smaller where the limits of this process ask for it."""
    records, names = os.memfd_create("coordlfs-records"), os.memfd_create("coordlfs-names")
    os.ftruncate(records, _room(RECORDS))
    os.ftruncate(names, _room(NAMES))
    return records, names


def _room(size: int) -> int:
    """So much of `size` that `ulimit -f` lets a file have, and `ulimit -v` a server map, beside what else it needs."""
    (file_size, _), (address_space, _) = map(resource.getrlimit, (resource.RLIMIT_FSIZE, resource.RLIMIT_AS))
    if file_size != resource.RLIM_INFINITY:
        size = min(size, file_size)
    if address_space != resource.RLIM_INFINITY:
        size = min(size, address_space * size // (4 * (RECORDS + NAMES)))
    page: int = os.sysconf("SC_PAGE_SIZE")
    return max(size // page, 2) * page


TABLE_HEADER, SLOT = 4096, 32  # bytes, behind the cache's own: see `coordlfs.cache.store`


def cache(capacity: int) -> int:
    """A memfd for `capacity` bytes of cache and the table of what is in it. Its pages come as they are written."""
    fd = os.memfd_create("coordlfs-cache")
    pages = capacity // os.sysconf("SC_PAGE_SIZE")
    os.ftruncate(fd, pages * os.sysconf("SC_PAGE_SIZE") + TABLE_HEADER + pages * SLOT)
    return fd
