"""Hints: the order in which a loader is about to read files, and what that order tells about epochs. No I/O here.

A reader (one sampler in one process) hands over the numbers (`st_ino`) of the files that it will ask for next, in
windows, and says how far it has come. Readers of one job, as the ranks of a distributed one, share its epochs. What a
reader has been promised and has not passed is `ahead`; what it passed stays a while `behind`, since a loader hands
out indices before its workers read the files. The protocol is described in docs/hints.md.
"""

from __future__ import annotations

import errno
import struct
import sys
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

COMMAND = 1 << 30 | 0xC1 << 8 | 1  # _IOC(_IOC_WRITE, 0xC1, 1, size of the message), less the size
MAGIC = b"CLH1"
HEADER = struct.Struct("<4sIQQQQQQ")  # magic count job reader epoch length position start; numbers of 8 bytes follow
MOST_BYTES = (1 << 14) - 1  # of a message: as many as an ioctl takes
MOST_NUMBERS = (MOST_BYTES - HEADER.size) // 8
AHEAD = 8192  # files that a reader may announce before it asks for them
READERS, READERS_OF_A_USER = 256, 64
_LONGEST = 1 << 40  # files of an epoch
_IDLE = 600.0  # seconds after which a reader that says nothing, and whose process is not known, is gone


class HintError(OSError):
    """A hint that cannot be taken; the errno goes to who sent it, the text to the log."""


@dataclass(frozen=True, slots=True)
class Hint:
    """One message: `numbers` are asked for next, of which the first is at place `start` of the epoch's order."""

    job: int
    reader: int
    epoch: int
    length: int  # files of this reader's epoch
    position: int  # files of it that the reader has asked for so far
    start: int
    numbers: array[int]


def parse(message: bytes | memoryview) -> Hint:
    """Raises HintError (EINVAL) for what is no hint."""
    if not HEADER.size <= len(message) <= MOST_BYTES:
        raise HintError(errno.EINVAL, f"{len(message)} bytes are no hint")
    magic, count, job, reader, epoch, length, position, start = HEADER.unpack_from(message)
    if magic != MAGIC:
        raise HintError(errno.EINVAL, f"a hint begins with {MAGIC!r}, not {magic!r}")
    if len(message) != HEADER.size + 8 * count:
        raise HintError(errno.EINVAL, f"{len(message)} bytes do not hold {count} numbers")
    if not position <= start <= start + count <= length <= _LONGEST:
        raise HintError(
            errno.EINVAL, f"position {position} ≤ start {start} ≤ start + {count} ≤ length {length} does not hold"
        )
    numbers = array("Q", bytes(message[HEADER.size :]))
    if sys.byteorder == "big":
        numbers.byteswap()
    return Hint(job, reader, epoch, length, position, start, numbers)


@dataclass(slots=True, eq=False)
class Entry:
    """One file of an order. `held`: bytes of it that are kept in memory for the reader, but for what is pinned."""

    record: int
    size: int
    items: int
    held: int = 0
    counted: bool = False  # as a hit or a miss
    missed: bool = False
    read: int = 0  # bytes, from the source


@dataclass(slots=True, eq=False)
class Job:
    """Readers that share epochs. The figures are those of the epoch that runs, or of the last one."""

    uid: int
    name: int
    epoch: int
    begun: bool = False  # whether the mount's epochs have been told of this one
    files: int = 0  # passed, or missed before they were
    items: int = 0
    bytes: int = 0  # of those files
    misses: int = 0
    bytes_read: int = 0  # from the source

    @property
    def hits(self) -> int:
        """Files that were passed without being read from the source."""
        return self.files - self.misses

    def begin(self, epoch: int) -> None:
        """Another epoch begins."""
        self.epoch, self.begun = epoch, False
        self.files = self.items = self.bytes = self.misses = self.bytes_read = 0


@dataclass(slots=True, eq=False)
class Reader:
    """One order. Files go from `waiting` to `ahead` when they are fetched, and to `behind` when they are passed.

    The first `late` of those that wait were passed already. They are fetched all the same: the indices were handed out,
    and whoever got them is likely not to have read them yet.
    """

    job: Job
    pid: int
    epoch: int
    length: int
    position: int
    end: int  # place after the last file that was announced
    heard: float
    unknown: int = 0  # places between the position and the first file that is known
    late: int = 0
    waiting: deque[Entry] = field(default_factory=deque)
    ahead: deque[Entry] = field(default_factory=deque)
    behind: deque[Entry] = field(default_factory=deque)
    ahead_bytes: int = 0
    behind_bytes: int = 0
    by_record: dict[int, Entry] = field(default_factory=dict)


class Orders:
    """The orders of all readers. Not thread-safe.

    `find` gives record, bytes and number of items of a file by its inode number, or None; `cost` the bytes that it
    takes to keep what of a file is not pinned; `was_missed` whether it was read from the source in a job's epoch,
    before that job announced it.
    """

    def __init__(
        self,
        find: Callable[[int], tuple[int, int, int] | None],
        cost: Callable[[int], int],
        was_missed: Callable[[Job, int], bool],
    ) -> None:
        self._find = find
        self._cost = cost
        self._was_missed = was_missed
        self.readers: dict[tuple[int, int], Reader] = {}  # by user and the reader's own name for itself
        self.jobs: dict[tuple[int, int], Job] = {}
        self.wanted: Counter[int] = Counter()  # how many readers wait for, or hold, a record
        self.kept: set[int] = set()  # records that were fetched, or read, and not let go since
        self.free: deque[int] = deque()  # of those, records that nobody wants any more
        self.ignored = 0  # numbers of no file that is known

    # -- what readers say ---------------------------------------------------------------------------------------

    def take(self, hint: Hint, uid: int, pid: int, now: float) -> Job:
        """A reader of user `uid` in process `pid` (0: not known) says `hint`. Raises HintError (EBUSY, ENOBUFS).

        Returns its job, whose `begun` is False if an epoch begins with this.
        """
        key = (uid, hint.reader)
        reader = self.readers.get(key)
        if reader is None:
            reader = self._admit(key, hint, pid, now)
        follows = hint.epoch == reader.epoch and hint.start == reader.end and hint.position >= reader.position
        if follows:
            passed = hint.position - reader.position
            left = len(reader.ahead) + len(reader.waiting) - reader.late - max(0, passed - reader.unknown)
            if left + len(hint.numbers) > AHEAD:
                raise HintError(errno.ENOBUFS, f"more than {AHEAD} files announced before they are asked for")
            self._pass(reader, passed)
        else:
            self._restart(reader, hint)
        reader.heard, reader.pid = now, pid or reader.pid
        reader.length = hint.length
        reader.end = hint.start
        for number in hint.numbers:
            self._announce(reader, number)
        return reader.job

    def _admit(self, key: tuple[int, int], hint: Hint, pid: int, now: float) -> Reader:
        uid = key[0]
        if len(self.readers) >= READERS or sum(who == uid for who, _ in self.readers) >= READERS_OF_A_USER:
            raise HintError(errno.EBUSY, f"user {uid} has too many readers")
        job = self.jobs.get((uid, hint.job))
        if job is None:
            job = self.jobs[uid, hint.job] = Job(uid, hint.job, hint.epoch)
        elif job.epoch != hint.epoch:
            job.begin(hint.epoch)
        reader = Reader(job, pid, hint.epoch, hint.length, hint.position, hint.start, now)
        reader.unknown = hint.start - hint.position
        self.readers[key] = reader
        return reader

    def _restart(self, reader: Reader, hint: Hint) -> None:
        """Another epoch, or another place: what was announced is void."""
        waiting = list(reader.waiting)
        if reader.epoch == reader.job.epoch:
            for entry in [*reader.ahead, *waiting[reader.late :]]:
                self._discount(reader.job, entry)
        for entry in [*reader.ahead, *waiting]:
            self._release(reader, entry)
        reader.ahead.clear()
        reader.waiting.clear()
        reader.ahead_bytes = reader.late = 0
        if hint.epoch != reader.epoch:
            reader.epoch = hint.epoch
            if reader.job.epoch != hint.epoch:
                reader.job.begin(hint.epoch)
            for entry in reader.behind:  # whoever begins an epoch has read the one before
                self._release(reader, entry)
            reader.behind.clear()
            reader.behind_bytes = 0
        reader.position = hint.position
        reader.unknown = hint.start - hint.position

    def _announce(self, reader: Reader, number: int) -> None:
        found = self._find(number)
        reader.end += 1
        if found is None:
            self.ignored += 1
            # Nothing to fetch, but a place in the order all the same.
            reader.waiting.append(Entry(-1, 0, 0))
            return
        entry = Entry(*found)
        reader.waiting.append(entry)
        reader.by_record[entry.record] = entry
        self.wanted[entry.record] += 1
        if self._was_missed(reader.job, entry.record):
            self._miss(reader.job, entry, entry.size)

    def _pass(self, reader: Reader, count: int) -> None:
        reader.position += count
        skipped = min(count, reader.unknown)
        reader.unknown -= skipped
        for _ in range(count - skipped):
            if reader.ahead:
                entry = reader.ahead.popleft()
                reader.ahead_bytes -= entry.held
                reader.behind.append(entry)
                reader.behind_bytes += entry.held
            else:
                entry = reader.waiting[reader.late]
                reader.late += 1
            if entry.record >= 0:
                self._count(reader.job, entry)
        while reader.late > AHEAD:
            self._pass_late(reader)

    def _pass_late(self, reader: Reader) -> Entry:
        """The first of those that wait was passed, and now lies behind, fetched or not."""
        entry = reader.waiting.popleft()
        reader.late -= 1
        entry.held = self._cost(entry.record) if entry.record >= 0 else 0
        if entry.held:
            self.kept.add(entry.record)
        reader.behind.append(entry)
        reader.behind_bytes += entry.held
        return entry

    def _count(self, job: Job, entry: Entry) -> None:
        if not entry.counted:
            entry.counted = True
            job.files += 1
            job.items += entry.items
            job.bytes += entry.size

    def _discount(self, job: Job, entry: Entry) -> None:
        """A file that was missed ahead of its reader is not asked for after all, or is announced once more."""
        if entry.counted:
            job.files -= 1
            job.items -= entry.items
            job.bytes -= entry.size
            job.misses -= entry.missed
            job.bytes_read -= entry.read

    def missed(self, record: int, nbytes: int) -> None:
        """`nbytes` of a file were read from the source, for a reader or ahead of it."""
        for reader in self.readers.values() if record in self.wanted else ():
            entry = reader.by_record.get(record)
            if entry is not None:
                self._miss(reader.job, entry, nbytes)
                return

    def _miss(self, job: Job, entry: Entry, nbytes: int) -> None:
        self._count(job, entry)
        job.misses += not entry.missed
        job.bytes_read += nbytes
        entry.missed = True
        entry.read += nbytes

    # -- what follows from it -----------------------------------------------------------------------------------

    def next(self, bound: int) -> Entry | None:
        """The next file to fetch, of the reader whose turn it is, if no more than `bound` bytes are held by it."""
        share = bound // max(1, len(self.readers))
        for key in list(self.readers):
            reader = self.readers[key]
            while (entry := self._next_of(reader, share)) is not None:
                was_read = entry.missed and entry.items == 1  # by who asked for it: a reader faster than the keeper
                if 0 < entry.held <= share // 2 and not was_read:
                    self.readers[key] = self.readers.pop(key)  # the others' turn
                    return entry
        return None

    def _next_of(self, reader: Reader, share: int) -> Entry | None:
        """The next file of a reader; it holds nothing where there is nothing to fetch."""
        if not reader.waiting:
            return None
        if reader.late:
            return self._pass_late(reader)
        entry = reader.waiting[0]
        cost = self._cost(entry.record) if entry.record >= 0 else 0
        if cost > share // 2:
            cost = 0  # too large to be held at all
        if reader.ahead_bytes + cost > share // 2:
            return None
        reader.waiting.popleft()
        reader.ahead.append(entry)
        if cost:
            entry.held = cost
            reader.ahead_bytes += cost
            self.kept.add(entry.record)
        return entry

    def trim(self, bound: int) -> Iterator[int]:
        """Records to let go; whoever stops asking in between may ask anew.

        Where more than half of a reader's share lies behind it, those that it passed longest ago; where more than half
        lies ahead, since the bound or the share has become less, those that it needs last; and what nobody wants.
        """
        share = bound // max(1, len(self.readers))
        for reader in self.readers.values():
            while reader.behind and (reader.behind_bytes > share // 2 or len(reader.behind) > AHEAD):
                entry = reader.behind.popleft()
                reader.behind_bytes -= entry.held
                self._release(reader, entry)
            while reader.ahead and reader.ahead_bytes > share // 2:
                entry = reader.ahead.pop()
                reader.waiting.appendleft(entry)
                reader.ahead_bytes -= entry.held
                held, entry.held = entry.held, 0
                if held and self.wanted[entry.record] == 1:
                    self.kept.discard(entry.record)
                    yield entry.record
        while self.free:
            record = self.free.popleft()
            if record not in self.wanted and record in self.kept:
                self.kept.discard(record)
                yield record

    def _release(self, reader: Reader, entry: Entry) -> None:
        if entry.record < 0:
            return
        if reader.by_record.get(entry.record) is entry:
            del reader.by_record[entry.record]
        self.wanted[entry.record] -= 1
        if self.wanted[entry.record] <= 0:
            del self.wanted[entry.record]
            if entry.record in self.kept:
                self.free.append(entry.record)

    def leave(self, now: float, ended: Callable[[int], bool]) -> None:
        """Forget readers whose process `ended`, or, where that is not known, that were not heard of for long."""
        gone = [
            key
            for key, reader in self.readers.items()
            if (ended(reader.pid) if reader.pid else now - reader.heard > _IDLE)
        ]
        for key in gone:
            reader = self.readers.pop(key)
            for entry in [*reader.behind, *reader.ahead, *reader.waiting]:
                self._release(reader, entry)
        live = {id(reader.job) for reader in self.readers.values()}
        for name in [name for name, job in self.jobs.items() if id(job) not in live]:
            del self.jobs[name]

    @property
    def leader(self) -> Job | None:
        """The job whose epochs are the mount's: the one that has been here longest."""
        return next(iter(self.jobs.values()), None)

    @property
    def held_bytes(self) -> int:
        """Bytes kept for readers, but for what is pinned."""
        return sum(reader.ahead_bytes + reader.behind_bytes for reader in self.readers.values())

    def figures(self) -> list[dict[str, Any]]:
        """Of every job, for `status`."""
        found = []
        for job in self.jobs.values():
            readers = [r for r in self.readers.values() if r.job is job]
            here = [r for r in readers if r.epoch == job.epoch]
            found.append(
                {
                    "job": f"{job.name:016x}",
                    "user": job.uid,
                    "readers": len(readers),
                    "epoch": job.epoch,
                    "files": sum(r.length for r in here),
                    "position": sum(r.position for r in here),
                    "hits": job.hits,
                    "misses": job.misses,
                    "bytes": job.bytes,
                    "bytes_read": job.bytes_read,
                }
            )
        return found
