"""The machine's page cache and its disks, as a whole. Knows nothing of processes: their limits are cgroups.py's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from coordlfs_tools.lab.errors import LabError


def drop_caches() -> None:
    """Empty the page cache, and the kernel's names and inodes with it, of all that nobody holds."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def drop_pages() -> None:
    """Empty the page cache, but leave the names and inodes that the kernel knows."""
    Path("/proc/sys/vm/drop_caches").write_text("1")


def drop_files(paths: Iterable[Path]) -> None:
    """Empty the page cache of some files, as far as nobody holds them; others' are left alone."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def disk_of(path: Path) -> str:
    """The disk that `path` lies on, as MAJOR:MINOR; a partition's whole disk. Raises LabError if it lies on none."""
    number = path.stat().st_dev
    directory = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not directory.exists():
        raise LabError(f"{path} does not lie on a disk of its own: give another directory with --dir")
    directory = directory.resolve()
    if (directory / "partition").exists():
        directory = directory.parent
    return (directory / "dev").read_text().strip()
