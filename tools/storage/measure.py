"""Measures S and C: bytes a second from storage and from memory, read as a training job's loader reads.

Threads read files (or parts of large ones) in random order, each a different one, until a time or a number of bytes is
over. What is in flight at the beginning and at the end would distort a short measurement, so it is taken from when
reads began, and the first part is left out.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from coordlfs_tools.storage.files import Dropped, File, drop, resident_share

from coordlfs.errors import UserError
from coordlfs.kernel import pages

_WARM_UP = 0.2  # of each measurement that is left out
_BUFFER = 16 << 20  # bytes: what is read of a file at once, at most
_REQUEST = 1 << 20  # of a read from storage
_LINE = 4  # reads that a line can be drawn through
_MANY = 4  # times the readers, to see what the storage gives at most
_IDLE = 3  # times what a read takes of the storage's time that it is left alone between two
_STAYS = 0.9  # of what was read must be in memory for C to be memory's
_FORGOT = "what was read did not stay in memory, or somebody empties the page cache: C is too low"
_MOST = 200_000  # parts that are listed: of a large dataset more could not be read in the time
_ENOUGH = 0.05  # of all parts: when fewer are left, all are made cold again


@dataclass(frozen=True, slots=True)
class Part:
    """What is read at once: a whole file, or a range of it."""

    path: str
    offset: int
    length: int


def parts(files: Sequence[File], each: int | None = None, most: int | None = None) -> list[Part]:
    """The files as they are read: whole, or in parts of `each` bytes (at least a page) where a file is much larger.

    With `most`, about so many of them at most, evenly chosen, but one of each file.
    """
    each = max(each, pages.PAGE) if each else None
    steps = [each if each and file.size > 4 * each else min(file.size, _BUFFER) for file in files]
    every = 1
    if most:
        every = max(-(-sum(-(-file.size // step) for file, step in zip(files, steps, strict=True)) // most), 1)
    return [
        Part(file.path, at, min(step, file.size - at))
        for file, step in zip(files, steps, strict=True)
        for at in range(0, file.size, step * every)
    ]


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
            # One read at least: on a busy machine a thread may not run before the time is over.
            while self.todo and (not self.begins or time.perf_counter() < self.deadline) and not self.failed:
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
    """Bytes a second, without the first part of the time.

    It is the slope of a line through what had been read by when: a disk that is throttled, or busy, delivers in gusts,
    and from one moment to another is as much off as one of them is large.
    """
    times, sizes = np.array(sorted(begins)).T
    kept = times >= start + _WARM_UP * (times[-1] - start)
    if np.count_nonzero(kept) < _LINE or times[kept][0] == times[-1]:
        return float(sizes.sum() / max(time.perf_counter() - start, 1e-9))
    before = np.cumsum(sizes) - sizes  # read when each began
    return float(np.polyfit(times[kept] - start, before[kept], 1)[0])


def latency(todo: Sequence[Part], seconds: float, idle: float, *, direct: bool = False) -> tuple[float, list[Part]]:
    """Seconds that a read takes when nothing else reads, the median, and the parts that were not reached.

    One reader pauses for `idle` seconds after each read, so that the storage is never busy with what was before.
    Raises UserError if a file cannot be read.
    """
    buffer = pages.buffer(_BUFFER)
    view = memoryview(buffer)
    taken: list[float] = []
    deadline = time.perf_counter() + seconds
    try:
        for part in todo:
            if taken and time.perf_counter() >= deadline:
                break
            time.sleep(idle)
            began = time.perf_counter()
            _read(part, view, direct)
            taken.append(time.perf_counter() - began)
    except OSError as e:
        raise UserError(f"{e.filename} cannot be read: {e.strerror}") from e
    finally:
        view.release()
        buffer.close()
    return median(taken), list(todo[len(taken) :])


@dataclass(frozen=True, slots=True)
class Rates:
    """One value a round: bytes a second from storage, from storage by many readers, from memory; seconds for one read
    from storage that is idle. `read_bytes` is the mean of a read. And notes."""

    storage: list[float]
    most: list[float]
    cache: list[float]
    latency: list[float]
    read_bytes: float
    notes: list[str]


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
    everything = parts(files, each, _MOST)
    random.Random(seed).shuffle(everything)
    dropped = drop(files)
    notes = _notes(dropped)
    direct = dropped.cold is False
    if direct and not _takes_direct(everything[0]):
        direct = False
        notes.append("and reads with O_DIRECT are refused: S is that of what is cached, and too high")
    mean = _bytes(everything) / len(everything)
    found = Rates([], [], [], [], mean, notes)
    left = everything

    def cold() -> list[Part]:
        nonlocal left
        if _bytes(left) < _ENOUGH * _bytes(everything):
            drop(files)
            left = everything
        return left

    for _ in range(rounds):
        value, rest = rate(cold(), threads, seconds, direct=direct)
        found.storage.append(value)
        read, left = left[: len(left) - len(rest)], rest
        value, left = rate(cold(), _MANY * threads, seconds / 2, direct=direct)
        found.most.append(value)
        value, left = latency(cold(), seconds / 2, _IDLE * mean / found.storage[-1], direct=direct)
        found.latency.append(value)
        rate(read, threads, seconds)
        held = resident_share([File(part.path, part.length, part.offset) for part in read])
        if held is not None and held < _STAYS and _FORGOT not in notes:
            notes.append(_FORGOT)
        value, _ = rate(read * max(1, min(64, int(256e6 / max(_bytes(read), 1)))), threads, seconds)
        found.cache.append(value)
    return found


def _bytes(todo: Sequence[Part]) -> int:
    return sum(part.length for part in todo)


def _notes(dropped: Dropped) -> list[str]:
    if dropped.cold is None:
        return [f"cold by {dropped.how}; whether the page cache dropped them cannot be seen here"]
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
    fstype, source = mounted_on(path)
    return f"{fstype} on {source}" if source else fstype


def mounted_on(path: Path) -> tuple[str, str]:
    """The type and the source of the file system that `path` lies on; the source is empty if they are unknown."""
    best = ("", "unknown", "")
    target = str(path.resolve())
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        point = _unescaped(before.split(" ")[4])
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            fstype, source, *_ = after.split(" ")
            best = (point, fstype, _unescaped(source))
    return best[1:]


def _unescaped(word: str) -> str:
    """As mountinfo writes names: blanks, line ends and backslashes are octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)
