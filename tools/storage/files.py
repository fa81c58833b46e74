"""The files of a dataset directory, and whether the page cache holds them."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coordlfs.errors import UserError
from coordlfs.kernel import pages
from coordlfs.kernel.writeback import write_back

_ASKED = 200  # files that are looked at to see whether any of the others is still cached
_COLD = 0.02  # a smaller share in the page cache is none
_SMALL = 16 << 20  # bytes
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True, slots=True)
class File:
    """A regular file that is not empty, or `size` bytes of one from `offset` on."""

    path: str
    size: int
    offset: int = 0


def listed(directory: Path) -> list[File]:
    """Every file below `directory`, by name, through links too, each once however many names it has.

    Raises UserError if there is none, or no directory.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give the dataset's", 2)
    found = []
    seen: set[tuple[int, int]] = set()  # directories and files, by device and inode
    for root, names, files in os.walk(directory, followlinks=True):
        names[:] = [name for name in sorted(names) if _is_new(f"{root}/{name}", seen)]  # a link may lead back
        for path in (f"{root}/{name}" for name in sorted(files)):
            with suppress(OSError):  # a link to nowhere, or gone meanwhile
                status = os.stat(path)
                key = (status.st_dev, status.st_ino)
                if stat.S_ISREG(status.st_mode) and status.st_size and key not in seen:
                    seen.add(key)
                    found.append(File(path, status.st_size))
    if not found:
        raise UserError(f"{directory} has no files with anything in them: give the dataset's directory", 2)
    return found


def _is_new(directory: str, seen: set[tuple[int, int]]) -> bool:
    with suppress(OSError):
        status = os.stat(directory)
        key = (status.st_dev, status.st_ino)
        if key not in seen:
            seen.add(key)
            return True
    return False


def _resident(file: File) -> int | None:
    """How many bytes of a file the page cache holds; None if it cannot be asked, and a file that is gone holds none."""
    with suppress(OSError):
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            held = pages.resident(fd, file.offset, file.size)
            return _had_at_once(fd, file) if held is None else min(held * pages.PAGE, file.size)
        finally:
            os.close(fd)
    return 0


def _had_at_once(fd: int, file: File) -> int | None:
    """For a file that is not one's own, of which the kernel does not tell: what a read gets without waiting."""
    if file.size > _SMALL:
        return None  # what of it is cached need not be its beginning
    try:
        return os.preadv(fd, [bytearray(file.size)], file.offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    except OSError:
        return None


def resident_share(files: Sequence[File]) -> float | None:
    """How much of the files the page cache holds, 0 to 1, from a sample of them; None if it cannot be asked."""
    asked = files[:: max(len(files) // _ASKED, 1)]
    held = [_resident(file) for file in asked]
    known = [each for each in held if each is not None]
    size = sum(file.size for file in asked)
    return sum(known) / size if size and len(known) == len(held) else None


@dataclass(frozen=True, slots=True)
class Dropped:
    """How the files were taken out of the page cache, in words, and whether they are out (None: nobody can say)."""

    how: str
    cold: bool | None


def drop(files: Sequence[File]) -> Dropped:
    """Take the files out of the page cache: each with posix_fadvise, then, if that did not do it and root asks, all.

    What was written and is not yet on disk cannot be dropped, so it is written first.
    """
    for is_dirty in (False, True):
        if is_dirty:
            for path in {os.stat(file.path).st_dev: file.path for file in files}.values():
                write_back(path)
        _advise(files)
        share = resident_share(files)
        if share is None or share <= _COLD:
            return Dropped("posix_fadvise(DONTNEED) on each file", None if share is None else True)
    with suppress(OSError):
        _DROP_CACHES.write_text("1")
        share = resident_share(files)
        if share is not None and share <= _COLD:
            return Dropped("/proc/sys/vm/drop_caches", True)
    return Dropped(f"nothing helped: {share or 0:.0%} of the files stays in the page cache", False)


def _advise(files: Sequence[File]) -> None:
    for file in files:
        with suppress(OSError):
            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                pages.drop(fd, 0, 0)
            finally:
                os.close(fd)


def resident_bytes(files: Sequence[File]) -> int:
    """How much of the files the page cache holds, as far as it can be asked."""
    return sum(_resident(file) or 0 for file in files)
