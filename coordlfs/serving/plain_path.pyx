# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""READs about which nothing is to be decided, answered without the GIL: neither the interpreter nor a lock is taken.

Such a READ wants a whole small file, of which bytes were handed out before, so that its node stands for one version for
ever. It is the file's first in this epoch. Nothing is on its way into memory or out of it, and memory has no room for the
file. It is on this node's disk; or the source is local, and the disk has no room either. What is found without the GIL may be
some milliseconds old: then a chance to cache an item is missed, and no byte is wrong. Everything else, and whatever
goes wrong, is left to `fast_path` and to Python, which begin anew.

A thread keeps a tally of what it answered, and settles it when it holds the GIL again; whoever wants the figures before
accounts for it in its place.
"""

from libc.errno cimport ENODEV, ENOENT, errno
from libc.string cimport memcmp, memset
from posix.fcntl cimport O_NOCTTY, O_NONBLOCK, O_RDONLY, F_SETFL, fcntl
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close

from coordlfs.catalogue.records cimport are_same
from coordlfs.kernel.calls cimport (
    O_DIRECT,
    O_NOATIME,
    RESOLVE_CACHED,
    RWF_NOWAIT,
    attributes,
    cachestat,
    counted,
    give_bit,
    has_ended,
    io_event,
    iovec,
    open_beneath,
    preadv2,
    set_up,
    submit_at,
    take_bit,
    take_ended,
    writev,
)
from coordlfs.kernel.linux cimport FUSE_READ, fuse_out_header, fuse_read_in

from coordlfs.catalogue.catalog import LINKED, REGULAR, SERVED, STALE, SUPERSEDED
from coordlfs.catalogue.metrics import NAMES
from coordlfs.disk.layout import HEADER, ROW, UNIT
from coordlfs.kernel import fuse, pages, xxh3
from coordlfs.kernel.pages import PAGE
from coordlfs.serving.reading import Request

ctypedef uint64_t (*hash_function)(const void *, size_t, uint64_t) noexcept nogil


cdef enum:
    _LONGEST_PATH = 4095
    _ROW_WORDS = 8
    _UNSUMMED = 56  # bytes of a row before its own checksum


cdef uint64_t _PAGE = PAGE, _LARGEST = fuse.MAX_READ - 1, _MAX_READ = fuse.MAX_READ
cdef uint64_t _USUAL = REGULAR | SERVED, _UNUSUAL = LINKED | STALE | SUPERSEDED
cdef uint64_t _UNIT = UNIT, _ROWS_AT = HEADER
cdef uint32_t _READ_SIZE = sizeof(fuse_in_header) + sizeof(fuse_read_in)
cdef int _FOR_READING = O_RDONLY | O_NOCTTY | O_NONBLOCK
cdef int _READS = NAMES.index("reads")
cdef int _SOURCE_READS = NAMES.index("source_reads"), _SOURCE_BYTES = NAMES.index("source_bytes")
cdef int _SOURCE_FILES = NAMES.index("source_files")
cdef int _DISK_READS = NAMES.index("disk_reads"), _DISK_BYTES = NAMES.index("disk_bytes")
cdef int _DISK_READ_BYTES = NAMES.index("disk_read_bytes")


cdef class Seen:
    def __init__(self):
        self._source = None


cdef class PlainPath:
    """For one mount. `read_anew` has a READ answered by somebody else; `events`, an eventfd, is told of ended reads.

    Thread-safe.
    """

    def __init__(self, device, Records records not None, reader, read_anew, events):
        self._device, self._root, self._records = device, reader.source.root, records
        self._admission, self._policy = reader.admission, reader.admission.policy
        self._epochs, self._counters = reader.admission.accounts.epochs, reader.counters
        self._counts, self._marks = reader.counters.words, reader.ends.marks
        self._read_anew, self._events = read_anew, events
        self._tier = reader.tier
        self.has_tier, self.reads_source = self._tier is not None, False
        self._is_plain, self._free, self._disk = False, 0, 0
        address = xxh3.address() if self.has_tier else 0
        cdef uint64_t pointer = address
        self._hash = <hash_function>pointer
        if self.has_tier:
            store = self._tier.store
            self._data, self._index, self._seed, self._slots_of = store.data, store.index.fd, store.seed, store.index
        is_known = not self.has_tier or (address and self._tier.store.is_direct and ROW == _ROW_WORDS * 8)
        self.is_possible = bool(is_known) and events >= 0 and not set_up(SLOTS, &self._disk)
        if self.is_possible:
            self._memory = pages.huge_buffer(SLOTS * fuse.MAX_READ)
            self._bytes = self._memory
            self._free = <uint64_t>-1
        memset(self._flights, 0, sizeof(self._flights))

    # -- with the GIL -----------------------------------------------------------------------------------------------

    cdef int look(self, Seen seen) except -1:
        """See what a thread has to know when it does not hold the GIL."""
        policy, admission = self._policy, self._admission
        self._room = policy.capacity - policy.used
        self._epoch = self._epochs.current.number
        self._keeps = self.has_tier and not self._tier.writer.is_full
        rests = self.has_tier and self._tier.is_resting
        self._is_plain = not rests and self.is_possible and self._epoch and admission.is_at_rest and not admission.announced.wanted
        if self.has_tier:
            slots = self._slots_of.slots
            if slots is not seen._source:
                seen._source = slots
                seen._slots, seen._mask = slots
        return 0

    cdef int account(self, Tally *tally) except -1:
        """Account for what any thread has answered, be it without the GIL at this moment."""
        cdef Answered made = tally.made, before = tally.settled
        if not memcmp(&made, &before, sizeof(Answered)):
            return 0
        tally.settled = made  # before anything here gives up the GIL
        cdef int64_t hits = made.hits - before.hits, misses = made.misses - before.misses
        cdef int64_t hit_bytes = made.hit_bytes - before.hit_bytes, missed_bytes = made.missed_bytes - before.missed_bytes
        cdef int64_t hit_units = made.hit_units - before.hit_units, flown_misses = made.flown_misses - before.flown_misses
        cdef double hit_seconds = made.hit_seconds - before.hit_seconds
        cdef double missed_seconds = made.missed_seconds - before.missed_seconds
        with self._counters.lock:
            self._counts[_READS] += hits + misses
            self._counts[_DISK_READS] += hits
            self._counts[_DISK_BYTES] += hit_bytes
            self._counts[_DISK_READ_BYTES] += hit_units * _UNIT
            self._counts[_SOURCE_READS] += misses
            self._counts[_SOURCE_FILES] += misses
            self._counts[_SOURCE_BYTES] += missed_bytes
        with self._admission.lock:
            epoch = self._epochs.numbered(tally.epoch)
            epoch.misses += hits + misses
            epoch.bytes += missed_bytes
            epoch.disk_items += hits
            epoch.disk_bytes += hit_bytes
        if self.has_tier:
            self._tier.pace.took(hit_seconds, hits)
            self._tier.pace_of_source.took(missed_seconds, flown_misses)
        return 0

    cdef int settle(self, Tally *tally) except -1:
        """Account for what this thread has answered, and have others answer what it left to them."""
        cdef int i
        self.account(tally)
        tally.answered = 0
        n_left, tally.n_left = tally.n_left, 0
        for i in range(n_left):
            left = tally.left[i]
            asked = Request(left.node, 0, min(left.asked, _MAX_READ), left.pid, False)
            self._counters.add("reads")
            self._read_anew(left.unique, asked, interrupted=left.is_interrupted)
        return 0

    def interrupt(self, unique):
        """Who waits for a READ gives up; False if no disk reads for it here."""
        for slot in range(SLOTS):
            if self._flights[slot].is_under_way and self._flights[slot].unique == unique:
                self._flights[slot].is_interrupted = True
                return True
        return False

    def given_up(self, before):
        """As `FastPath.given_up`."""
        found = []
        for slot in range(SLOTS):
            if self._flights[slot].is_under_way and self._flights[slot].is_interrupted and self._flights[slot].since < before:
                self._flights[slot].is_interrupted = False
                found.append(self._flights[slot].unique)
        return found

    def hung_in_tier(self, before):
        """As `FastPath.hung_in_tier`: whatever is read of them in the end comes too late for the kernel."""
        cdef Flight *flight
        found = []
        for slot in range(SLOTS):
            flight = &self._flights[slot]
            if flight.is_under_way and flight.is_stored and not flight.is_given_away and flight.since < before:
                flight.is_given_away = True
                found.append((flight.unique, Request(flight.node, 0, min(flight.asked, _MAX_READ), flight.pid, False)))
        return found

    def hangs_in_tier(self):
        """As `FastPath.hangs_in_tier`."""
        for slot in range(SLOTS):
            if self._flights[slot].is_under_way and self._flights[slot].is_given_away:
                return True
        return False

    def is_reading(self, node):
        """Whether a disk works on a READ of this file."""
        for slot in range(SLOTS):
            if self._flights[slot].is_under_way and self._flights[slot].node == node:
                return True
        return False

    # -- without it -------------------------------------------------------------------------------------------------

    cdef bint has_ended(self) noexcept nogil:
        """Whether a disk has read something."""
        return self._disk and self._free != <uint64_t>-1 and has_ended(self._disk)

    cdef bint take(
        self, const fuse_in_header *header, Index index, Seen seen, char *text, unsigned char *into, Tally *tally
    ) noexcept nogil:
        """Begin to answer a request, or answer it; False if it is to be seen to by others, and nothing was done for it.

        `text` has room for a path, and `into` is page-aligned and has room for a READ.
        """
        if not self._is_plain or header.opcode != FUSE_READ or header.len != _READ_SIZE:
            return False
        cdef const fuse_read_in *asked = <const fuse_read_in *>(header + 1)
        cdef int64_t record = self._records.find(index, header.nodeid)
        if asked.offset or asked.flags & (O_DIRECT | O_NOATIME) or record < 0:
            return False
        cdef const uint64_t *words = self._records.words_of(record)
        cdef Flight flight
        flight.shown = self._records.shown(record)
        cdef uint64_t size = flight.shown.size
        if words[1] & (_USUAL | _UNUSUAL) != _USUAL or not 0 < size <= asked.size or size > _LARGEST:
            return False
        if <uint32_t>words[7] or <int64_t>((size + _PAGE - 1) // _PAGE) <= self._room:
            return False  # it is pinned, or may be about to be
        if not words[6] or words[6] >> 32 == self._epoch or self._marks[header.nodeid >> 3 & 0x1FFF] & 1 << (header.nodeid & 7):
            return False
        cdef int path = self._records.put_path(
            text, _LONGEST_PATH, words[1] >> 32, self._records.name_of(record), words[1] >> 16 & 0xFFFF
        )
        if path < 0:
            return False
        flight.unique, flight.node, flight.record = header.unique, header.nodeid, record
        flight.asked, flight.pid, flight.length, flight.fd = asked.size, header.pid, size, -1
        flight.units, flight.epoch, flight.is_stored = (size + _UNIT - 1) // _UNIT, self._epoch, False
        cdef Place place = ABSENT
        if self.has_tier:
            place = self.find(seen, &text[path], _LONGEST_PATH - path, &flight.shown, &flight)
            if place == STORED:
                flight.is_stored = True
                return self._begin(&flight, self._data)
        if place == UNKNOWN or self._keeps or not self.reads_source:
            return False
        return self._take_of_source(&text[path], &flight, into, tally)

    cdef Place find(self, Seen seen, const char *path, size_t length, const Shown *shown, Flight *flight) noexcept nogil:
        """Find the first block of a file in the disk tier, of the version that is shown; where it is goes to `flight`."""
        cdef uint64_t row[_ROW_WORDS]
        cdef iovec part
        cdef uint64_t key = self._hash(path, length, 0)
        if not key:
            key = 1
        cdef uint64_t at = key & seen._mask
        part.iov_base, part.iov_len = row, sizeof(row)
        while seen._slots[at]:
            if preadv2(self._index, &part, 1, _ROWS_AT + (<uint64_t>seen._slots[at] - 1) * sizeof(row), RWF_NOWAIT) != sizeof(row):
                return UNKNOWN
            if row[0] == key and not <uint32_t>row[5] and self._hash(row, _UNSUMMED, self._seed) == row[7]:
                if row[2] != shown.size or row[3] != shown.mtime_ns or row[4] != shown.inode:
                    return ABSENT
                flight.checksum, flight.at = row[6], (row[5] >> 32) * _UNIT
                return STORED
            at = (at + 1) & seen._mask
        return ABSENT

    cdef bint _take_of_source(
        self, const char *path, Flight *flight, unsigned char *into, Tally *tally
    ) noexcept nogil:
        cdef counted held
        cdef iovec part
        cdef statx st
        cdef bint is_taken = False
        cdef int fd = open_beneath(self._root, path, _FOR_READING, RESOLVE_CACHED)
        if fd < 0:
            return False
        cdef uint64_t npages = (flight.length + _PAGE - 1) // _PAGE
        if not cachestat(fd, npages * _PAGE, &held) and held.cached == npages:
            part.iov_base, part.iov_len = into, flight.length
            # Should a page be on its way from the disk still, or gone by now, this ends there.
            if preadv2(fd, &part, 1, 0, RWF_NOWAIT) == <ssize_t>flight.length and not attributes(fd, &st):
                is_taken = self._records.is_of(&st, flight.shown) and self._reply(flight, into, tally)
        elif not attributes(fd, &st) and self._records.is_of(&st, flight.shown) and not fcntl(fd, F_SETFL, O_DIRECT):
            flight.fd, flight.at = fd, 0
            if self._begin(flight, fd):
                return True  # it is closed in the end
        close(fd)
        return is_taken

    cdef bint _begin(self, Flight *flight, int fd) noexcept nogil:
        """Have a disk read; False if it cannot."""
        cdef timespec now
        cdef int slot = take_bit(&self._free)
        if slot < 0:
            return False
        clock_gettime(CLOCK_MONOTONIC, &now)
        flight.since, flight.is_under_way = now.tv_sec + now.tv_nsec * 1e-9, True
        flight.is_interrupted = flight.is_given_away = False
        self._flights[slot] = flight[0]
        if submit_at(self._disk, slot, fd, self._memory_of(slot), flight.units * _UNIT, flight.at, self._events) == 1:
            return True
        self._flights[slot].is_under_way = False
        give_bit(&self._free, slot)
        return False

    cdef inline unsigned char *_memory_of(self, int slot) noexcept nogil:
        return &self._bytes[slot * _MAX_READ]

    cdef bint finish(self, Tally *tally) noexcept nogil:
        """Answer a READ for which a disk has read; False if there is none, or no more can be left to others."""
        cdef io_event event
        if tally.n_left == MOST_LEFT or not self.has_ended() or take_ended(self._disk, &event) != 1:
            return False
        cdef int slot = event.data
        cdef Flight *flight = &self._flights[slot]
        if flight.is_given_away:
            pass
        elif self._is_good(flight, event.res, self._memory_of(slot)) and self._reply(flight, self._memory_of(slot), tally):
            self._time(flight, tally)
        else:
            self._leave(flight, tally)
        flight.is_under_way = False
        give_bit(&self._free, slot)
        return True

    cdef bint _is_good(self, Flight *flight, int64_t n, const unsigned char *data) noexcept nogil:
        """Whether what was read is the bytes of the version that the node stands for. Closes the file."""
        cdef statx st
        cdef bint is_good = n >= <int64_t>flight.length
        if flight.fd >= 0:
            is_good = is_good and not attributes(flight.fd, &st) and self._records.is_of(&st, flight.shown)
            close(flight.fd)
        else:
            is_good = is_good and self._hash(data, flight.length, 0) == flight.checksum
        cdef uint64_t flags = self._records.words_of(flight.record)[1]
        return is_good and flags & _USUAL == _USUAL and are_same(flight.shown, self._records.shown(flight.record))

    cdef bint _reply(self, const Flight *flight, unsigned char *data, Tally *tally) noexcept nogil:
        """Answer, and count it: before, so that who has the bytes finds them in the figures."""
        cdef fuse_out_header header
        cdef iovec parts[2]
        header.len, header.error, header.unique = sizeof(header) + flight.length, 0, flight.unique
        parts[0].iov_base, parts[0].iov_len = &header, sizeof(header)
        parts[1].iov_base, parts[1].iov_len = data, flight.length
        self._count(flight, tally, 1)
        if writev(self._device, parts, 2) < 0 and errno not in (ENOENT, ENODEV):  # the caller gave up; unmounted
            self._count(flight, tally, -1)
            return False
        self._records.words_of(flight.record)[6] = flight.epoch << 32
        return True

    cdef void _leave(self, const Flight *flight, Tally *tally) noexcept nogil:
        cdef Left *left = &tally.left[tally.n_left]
        left.unique, left.node, left.asked, left.pid = flight.unique, flight.node, flight.asked, flight.pid
        left.is_interrupted = flight.is_interrupted
        tally.n_left += 1

    cdef void _time(self, const Flight *flight, Tally *tally) noexcept nogil:
        cdef timespec now
        clock_gettime(CLOCK_MONOTONIC, &now)
        cdef double seconds = now.tv_sec + now.tv_nsec * 1e-9 - flight.since
        if flight.is_stored:
            tally.made.hit_seconds += seconds
        else:
            tally.made.missed_seconds += seconds
            tally.made.flown_misses += 1

    cdef void _count(self, const Flight *flight, Tally *tally, int times) noexcept nogil:
        tally.epoch = flight.epoch
        if flight.is_stored:
            tally.made.hits += times
            tally.made.hit_bytes += times * <int64_t>flight.length
            tally.made.hit_units += times * <int64_t>flight.units
        else:
            tally.made.misses += times
            tally.made.missed_bytes += times * <int64_t>flight.length
