"""Which of the two fits a dataset: `pin`, without a file system in between, or `mount`.

It knows types of file systems, and neither of the two.
"""

from __future__ import annotations

FITS = (
    "`coordlfs pin` is for data on this machine or on NFS, with memory to spare; `coordlfs mount` for caches that nodes"
    " share, a second tier on a disk, data in object stores, hints, private memory, and epochs that are counted"
)


def fits_pin(fstype: bytes | None) -> bool:
    """Whether a dataset on a file system of this type can do without one of ours in between.

    Not where another program shows it (FUSE), as it does an object store: it may drop pages whenever it likes.
    """
    return fstype is not None and not fstype.startswith((b"fuse", b"tmpfs", b"ramfs"))
