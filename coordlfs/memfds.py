"""The catalogue's memory: two memfds that the supervisor makes and every server of the mount writes in turn."""

from __future__ import annotations

import os

RECORDS, NAMES = 1 << 33, 1 << 35  # bytes of address space, not of memory: pages come as they are written


def allocate() -> tuple[int, int]:
    """Two memfds for a new catalogue: records and names."""
    records, names = os.memfd_create("coordlfs-records"), os.memfd_create("coordlfs-names")
    os.ftruncate(records, RECORDS)
    os.ftruncate(names, NAMES)
    return records, names
