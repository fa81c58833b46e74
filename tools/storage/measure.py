"""Measures S and C: bytes a second from storage and from memory, read as a training job's loader reads.

Threads read files (or parts of large ones) in random order, each a different one, until a time or a number of bytes is
over. What is in flight at the beginning and at the end would distort a short measurement, so it is taken between two
moments when reads began, and the first part is left out.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from coordlfs_tools.storage.files import Dropped, File, drop

from coordlfs.errors import UserError
from coordlfs.kernel import pages

_WARM_UP = 0.2  # of each measurement that is left out
_BUFFER = 16 << 20  # bytes: what is read of a file at once, at most
_REQUEST = 1 << 20  # of a read from storage


@dataclass(frozen=True, slots=True)
class Part:
    """What is read at once: a whole file, or a range of it."""

    path: str
    offset: int
    length: int


def parts(files: Sequence[File], each: int | None = None) -> list[Part]:
    """The files as they are read: whole, or in parts of `each` bytes where a file is much larger than that."""
    result = []
    for file in files:
        step = each if each and file.size > 4 * each else min(file.size, _BUFFER)
        result += [Part(file.path, at, min(step, file.size - at)) for at in range(0, file.size, step)]
    return result


@dataclass(slots=True)
class _Reading:
    """Threads that take parts from one list; `begins` has (when it began, bytes) of each read."""

    todo: list[Part]
    direct: bool
    deadline: float
    begins: list[tuple[float, int]] = field(default_factory=list)
    failed: OSError | None = None

    def work(self) -> None:
        buffer = pages.buffer(_BUFFER)
        view = memoryview(buffer)
        try:
            while self.todo and time.perf_counter() < self.deadline and not self.failed:
                with suppress(IndexError):  # another thread took the last
                    part = self.todo.pop()
                    self.begins.append((time.perf_counter(), _read(part, view, self.direct)))
        except OSError as e:
            self.failed = e
        finally:
            view.release()
            buffer.close()


def _read(part: Part, view: memoryview, direct: bool) -> int:
    fd = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    try:
        got = 0
        start = part.offset // pages.PAGE * pages.PAGE if direct else part.offset
        while got < part.length:
            wanted = pages.count(part.length - got) * pages.PAGE if direct else part.length - got
            n = os.preadv(fd, [view[: min(wanted, _REQUEST)]], start + got)
            if not n:
                break
            got += n
        return min(got, part.length)
    finally:
        os.close(fd)


def rate(todo: Sequence[Part], threads: int, seconds: float, *, direct: bool = False) -> tuple[float, list[Part]]:
    """Bytes a second, and the parts that were not reached. Raises UserError if a file cannot be read.

    Each part is read once, by one of `threads`; it ends when there is none left or `seconds` are over.
    """
    reading = _Reading(list(todo)[::-1], direct, time.perf_counter() + seconds)
    start = time.perf_counter()
    workers = [threading.Thread(target=reading.work, name="coordlfs-read") for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if reading.failed:
        raise UserError(f"{reading.failed.filename} cannot be read: {reading.failed.strerror}")
    return _steady(start, reading.begins), reading.todo[::-1]


def _steady(start: float, begins: list[tuple[float, int]]) -> float:
    """Bytes a second from one read's beginning to another's, without the first part of the time."""
    begins = sorted(begins)
    length = begins[-1][0] - start
    kept = [read for read in begins if read[0] - start >= _WARM_UP * length]
    if len(kept) < 2 or kept[-1][0] == kept[0][0]:
        return sum(nbytes for _, nbytes in begins) / max(time.perf_counter() - start, 1e-9)
    return sum(nbytes for _, nbytes in kept[:-1]) / (kept[-1][0] - kept[0][0])


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second, one value a round: from storage, from storage by one reader alone, from memory; and notes."""

    storage: list[float]
    alone: list[float]
    cache: list[float]
    notes: list[str]

    @property
    def medians(self) -> tuple[float, float, float]:
        """The medians of the three."""
        return median(self.storage), median(self.alone), median(self.cache)


def measure(
    files: Sequence[File],
    threads: int,
    *,
    each: int | None = None,
    seconds: float = 2.0,
    rounds: int = 3,
    seed: int = 0,
) -> Rates:
    """Measure cold, then what was read again, warm. Every round reads parts that no other did, as far as they last.

    Where the files cannot be taken out of the page cache the cold reads go around it with O_DIRECT, and a note says so.
    Raises UserError if files cannot be read.
    """
    everything = parts(files, each)
    random.Random(seed).shuffle(everything)
    dropped = drop(files)
    notes = _notes(dropped)
    direct = dropped.cold is False
    if direct and not _takes_direct(everything[0]):
        direct = False
        notes.append("and reads with O_DIRECT are refused: S is that of what is cached, and too high")
    storage: list[float] = []
    alone: list[float] = []
    cache: list[float] = []
    left = everything
    for _ in range(rounds):
        for figures, readers, share in ((storage, threads, 1.0), (alone, 1, 0.5)):
            if figures is alone and threads == 1:
                alone.append(storage[-1])
                continue
            if _bytes(left) < 0.05 * _bytes(everything):
                drop(files)
                left = everything
            value, rest = rate(left, readers, seconds * share, direct=direct)
            if figures is storage:
                read = left[: len(left) - len(rest)]
            figures.append(value)
            left = rest
        rate(read, threads, seconds)
        value, _ = rate(read * max(1, min(64, int(256e6 / max(_bytes(read), 1)))), threads, seconds)
        cache.append(value)
    return Rates(storage, alone, cache, notes)


def _bytes(todo: Sequence[Part]) -> int:
    return sum(part.length for part in todo)


def _notes(dropped: Dropped) -> list[str]:
    if dropped.cold is None:
        return [f"cold by {dropped.how}; whether the page cache let go cannot be asked here"]
    if dropped.cold:
        return [f"cold by {dropped.how}"]
    return [f"the page cache could not be emptied ({dropped.how}): storage was read with O_DIRECT instead"]


def _takes_direct(part: Part) -> bool:
    try:
        os.close(os.open(part.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
    except OSError:
        return False
    return True


def device_of(path: Path) -> str:
    """The file system that `path` lies on, in words: its type and its source."""
    best = ("", "unknown")
    target = str(path.resolve())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4]
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            fstype, source, *_ = after.split()
            best = (point, f"{fstype} on {source}")
    return best[1]
