"""Hints: the order in which a loader is about to read files, and what that order tells about epochs. No I/O here.

A reader (one sampler in one process) hands over the numbers (`st_ino`) of the files that it will ask for next, in
windows, and says how far it has come. Readers of one job, as the ranks of a distributed one, share its epochs. What a
reader has been promised and has not passed is `ahead`; what it passed stays a while `behind`, since a loader hands
out indices before its workers read the files. The protocol is described in docs/hints.md.
"""

from __future__ import annotations

import binascii
import errno
import struct
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

COMMAND = 1 << 30 | 0xC1 << 8 | 1  # _IOC(_IOC_WRITE, 0xC1, 1, size of the message), less the size
MAGIC = b"CLH1"
HEADER = struct.Struct("<4sIQQQQQQ")  # magic count job reader epoch length position start; numbers of 8 bytes follow
MOST_BYTES = (1 << 14) - 1  # of a message: as many as an ioctl takes
MOST_NUMBERS = (MOST_BYTES - HEADER.size) // 8
_FIELDS = struct.Struct("<QQQQQQ")  # of the header, from the job on
_AFTER_COUNT = HEADER.size - _FIELDS.size

VERSION = 1
PREFIX = b"user.coordl.hint."  # of the attributes whose names are hints
OF_ONE_FILE = b"user.coordl.ahead"  # the attribute of a file that is asked for to have it read ahead
MOST_IN_NAME = 16  # numbers: a name has 255 bytes at most
MOST_ANSWER = 64  # bytes: the value of both
_FROM_URLS = bytes.maketrans(b"-_+/=", b"+/\0\0\0")  # to the alphabet of `binascii`; NUL is in neither

_UPCOMING = 512  # files of a reader's order that a source is told of, beyond those that keepers have
AHEAD = 8192  # files that a reader may announce before it asks for them
READERS, READERS_OF_A_USER = 256, 64
_LONGEST = 1 << 40  # files of an epoch
_BY_ITSELF = -1  # instead of the name of a reader: the files that a user asked for one by one
_SOON = 60.0  # seconds that room is kept for each of these
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
    """The hint in the message of an ioctl. Raises HintError (EINVAL) for what is no hint."""
    if not HEADER.size <= len(message) <= MOST_BYTES:
        raise HintError(errno.EINVAL, f"{len(message)} bytes are no hint")
    magic, count, *_ = HEADER.unpack_from(message)
    if magic != MAGIC:
        raise HintError(errno.EINVAL, f"a hint begins with {MAGIC!r}, not {magic!r}")
    if len(message) != HEADER.size + 8 * count:
        raise HintError(errno.EINVAL, f"{len(message)} bytes do not hold {count} numbers")
    return _hint(bytes(message[_AFTER_COUNT:]))


def is_hint(name: bytes) -> bool:
    """Whether to ask for an attribute of this name is a hint."""
    return name.startswith(PREFIX) or name == OF_ONE_FILE


def parse_name(name: bytes) -> Hint:
    """The hint in a name: PREFIX, version, a dot, and the message without magic and count in base64url, unpadded.

    Raises HintError: EPROTONOSUPPORT for a version that is not known, EINVAL for what is no hint.
    """
    version, _, text = name[len(PREFIX) :].partition(b".")
    if not version.isdigit():
        raise HintError(errno.EINVAL, f"a hint is {PREFIX.decode()}{VERSION}.…, not {name!r}")
    if int(version) != VERSION:
        raise HintError(errno.EPROTONOSUPPORT, f"of hints version {VERSION} is known, and not {int(version)}")
    try:
        body = binascii.a2b_base64(text.translate(_FROM_URLS) + b"=" * (-len(text) % 4), strict_mode=True)
    except binascii.Error as e:
        raise HintError(errno.EINVAL, f"a hint is not in base64url: {e}") from e
    if len(body) < _FIELDS.size or len(body) % 8:
        raise HintError(errno.EINVAL, f"{len(body)} bytes are no hint, but {_FIELDS.size} and 8 for each number")
    return _hint(body)


def _hint(body: bytes) -> Hint:
    """The hint in a message without magic and count."""
    job, reader, epoch, length, position, start = _FIELDS.unpack_from(body)
    numbers = array("Q", body[_FIELDS.size :])
    if not position <= start <= start + len(numbers) <= length <= _LONGEST:
        raise HintError(
            errno.EINVAL,
            f"position {position} ≤ start {start} ≤ start + {len(numbers)} ≤ length {length} does not hold",
        )
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
    asked: float = 0.0  # when, if it was by itself
    fetched: int = 0  # items that a keeper has read, or found in memory
    upcoming: bool = False  # was given as such


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

    @property
    def announced(self) -> int:
        """Files that it has announced and not asked for."""
        return len(self.ahead) + len(self.waiting) - self.late


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
        self.wanted: dict[int, int] = {}  # how many readers wait for, or hold, a record
        self.kept: set[int] = set()  # records that were fetched, or read, and not let go since
        self.free: deque[int] = deque()  # of those, records that nobody wants any more
        self.ignored = 0  # numbers of no file that is known

    # -- what readers say ---------------------------------------------------------------------------------------

    def take(self, hint: Hint, uid: int, pid: int, now: float) -> Reader:
        """A reader of user `uid` in process `pid` (0: not known) says `hint`. Raises HintError (EBUSY, ENOBUFS).

        Its job's `begun` is False if an epoch begins with this.
        """
        key = (uid, hint.reader)
        reader = self.readers.get(key)
        if reader is None:
            reader = self._admit(key, hint, pid, now)
        follows = hint.epoch == reader.epoch and hint.start == reader.end and hint.position >= reader.position
        if follows:
            passed = hint.position - reader.position
            left = reader.announced - max(0, passed - reader.unknown)
            if left + len(hint.numbers) > AHEAD:
                raise HintError(errno.ENOBUFS, f"more than {AHEAD} files announced before they are asked for")
            self._pass(reader, passed)
        else:
            self._restart(reader, hint)
        reader.heard, reader.pid = now, pid or reader.pid
        reader.length = hint.length
        reader.end = hint.start
        self._announce(reader, hint.numbers)
        return reader

    def ask(self, number: int, uid: int, now: float, bound: int) -> Entry | None:
        """User `uid` will read a file soon: it is fetched as if it were next in an order. None without room for it.

        Room is kept for a minute, since nobody says when such a file was read, and longer while the user asks for more.
        """
        found, reader = self._find(number), self._by_itself(uid, now)
        if found is None or reader is None:
            return None
        while reader.ahead and now - reader.ahead[0].asked > _SOON:
            self._pass(reader, 1)
        while reader.waiting and now - reader.waiting[0].asked > _SOON:
            late = reader.waiting.popleft()
            reader.ahead_bytes -= late.held
            self._release(reader, late)
        entry = reader.by_record.get(found[0])
        if entry is not None and (entry.fetched or now - entry.asked <= _SOON):
            return entry
        cost = self._cost(found[0])
        if reader.ahead_bytes + cost > bound // len(self.readers) // 2 or reader.announced >= AHEAD:
            return None
        self._announce(reader, [number])
        entry = reader.waiting[-1]
        entry.asked, entry.held = now, cost
        reader.ahead_bytes += cost
        return entry

    def _by_itself(self, uid: int, now: float) -> Reader | None:
        """The files that a user asked for one by one, as an order; None for one user too many. Its job is no job."""
        key = (uid, _BY_ITSELF)
        if key not in self.readers and self._has_place(uid):
            self.readers[key] = Reader(Job(*key, 0), 0, 0, 0, 0, 0, now)
        reader = self.readers.get(key)
        if reader is not None:
            reader.heard = now
        return reader

    def fetched(self, record: int) -> None:
        """An item of a file was read into memory, or was there."""
        for (_, name), reader in self.readers.items() if record in self.wanted else ():
            entry = reader.by_record.get(record) if name == _BY_ITSELF else None
            if entry is not None:
                entry.fetched += 1

    def _has_place(self, uid: int) -> bool:
        return len(self.readers) < READERS and sum(who == uid for who, _ in self.readers) < READERS_OF_A_USER

    def _admit(self, key: tuple[int, int], hint: Hint, pid: int, now: float) -> Reader:
        uid = key[0]
        if not self._has_place(uid):
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

    def _announce(self, reader: Reader, numbers: Sequence[int]) -> None:
        reader.end += len(numbers)
        for number in numbers:
            found = self._find(number)
            if found is None:
                self.ignored += 1
                # Nothing to fetch, but a place in the order all the same.
                reader.waiting.append(Entry(-1, 0, 0))
                continue
            record, size, items = found
            entry = Entry(record, size, items)
            reader.waiting.append(entry)
            reader.by_record[record] = entry
            self.wanted[record] = self.wanted.get(record, 0) + 1
            if self._was_missed(reader.job, record):
                self._miss(reader.job, entry, size)

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
        for (_, name), reader in self.readers.items() if record in self.wanted else ():
            entry = reader.by_record.get(record)
            if entry is not None:
                self._miss(reader.job, entry, nbytes)
                if name != _BY_ITSELF:
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
        more = cost - entry.held  # room was made for a file that was asked for by itself
        if reader.ahead_bytes + more > share // 2:
            return None
        reader.waiting.popleft()
        reader.ahead.append(entry)
        entry.held = cost
        reader.ahead_bytes += more
        if cost:
            self.kept.add(entry.record)
        return entry

    def upcoming(self) -> Iterator[Entry]:
        """The next files that wait, of each reader, which were not given before."""
        for reader in self.readers.values():
            for entry in islice(reader.waiting, reader.late, reader.late + _UPCOMING):
                if not entry.upcoming and entry.record >= 0:
                    entry.upcoming = True
                    if not entry.missed:  # else its reader was faster
                        yield entry

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
                held, entry.held, entry.fetched = entry.held, 0, 0
                if held and self.wanted[entry.record] == 1:
                    self.kept.discard(entry.record)
                    yield entry.record
            if reader.ahead_bytes > share // 2:  # room that was made for files which wait
                reader.ahead_bytes = 0
                for entry in reader.waiting:
                    entry.held = 0
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
        others = self.wanted.pop(entry.record) - 1
        if others:
            self.wanted[entry.record] = others
        elif entry.record in self.kept:
            self.free.append(entry.record)

    def leave(self, now: float, ended: Callable[[int], bool]) -> None:
        """Forget readers whose process `ended`, or, where that is not known, that were not heard of for long."""
        gone = [
            key
            for key, reader in self.readers.items()
            if (ended(reader.pid) if reader.pid else now - reader.heard > (_SOON if key[1] == _BY_ITSELF else _IDLE))
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
