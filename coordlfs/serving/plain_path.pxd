"""What the fast path uses of `plain_path.pyx`."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from coordlfs.catalogue.records cimport Index, Records, Shown
from coordlfs.kernel.calls cimport aio_context_t
from coordlfs.kernel.linux cimport fuse_in_header, statx


cdef enum:
    SLOTS = 64
    MOST_LEFT = 64


cdef struct Left:  # a READ that is to be answered by somebody else
    uint64_t unique, node
    uint32_t asked, pid
    bint is_interrupted


cdef struct Answered:
    int64_t hits, hit_bytes, hit_units, misses, missed_bytes, flown_misses
    double hit_seconds, missed_seconds


cdef struct Tally:  # of one thread, which alone changes it, but for what is settled
    int answered  # since it last held the GIL
    uint64_t epoch
    Answered made  # in all; never less than before, but for a moment
    Answered settled  # of it, what is accounted for
    int n_left
    Left left[MOST_LEFT]


cdef struct Flight:  # a READ that a disk works on
    uint64_t unique, node, record, epoch, length, units, checksum
    int64_t at  # where it is read
    bint is_stored  # in the disk tier
    uint32_t asked, pid
    Shown shown
    int fd  # of a file of the source, which is to be closed; -1: the disk tier's
    double since
    bint is_interrupted, is_under_way, is_given_away


cdef enum Place:
    ABSENT, STORED, UNKNOWN


cdef class Seen:
    """The slots of the disk tier's index as they were when a thread last held the GIL; others may take their place."""

    cdef object _source
    cdef const uint32_t[::1] _slots
    cdef uint64_t _mask


cdef class PlainPath:
    cdef readonly bint is_possible, has_tier
    cdef bint reads_source
    cdef int _device, _root, _data, _index, _events
    cdef uint64_t _seed
    cdef uint64_t (*_hash)(const void *, size_t, uint64_t) noexcept nogil
    cdef aio_context_t _disk
    cdef object _memory, _admission, _policy, _epochs, _counters, _tier, _slots_of, _read_anew
    cdef unsigned char[::1] _bytes
    cdef const unsigned char[::1] _marks
    cdef uint64_t[::1] _counts
    cdef Records _records
    cdef uint64_t _free
    cdef Flight _flights[SLOTS]
    # As the thread that held the GIL last found it:
    cdef bint _is_plain, _keeps
    cdef int64_t _room
    cdef uint64_t _epoch

    cdef int look(self, Seen seen) except -1
    cdef int account(self, Tally *tally) except -1
    cdef int settle(self, Tally *tally) except -1
    cdef bint take(
        self, const fuse_in_header *header, Index index, Seen seen, char *text, unsigned char *into, Tally *tally
    ) noexcept nogil
    cdef bint finish(self, Tally *tally) noexcept nogil
    cdef bint has_ended(self) noexcept nogil
    cdef bint _take_of_source(self, const char *path, Flight *flight, unsigned char *into, Tally *tally) noexcept nogil
    cdef bint _begin(self, Flight *flight, int fd) noexcept nogil
    cdef unsigned char *_memory_of(self, int slot) noexcept nogil
    cdef bint _is_good(self, Flight *flight, int64_t n, const unsigned char *data) noexcept nogil
    cdef bint _reply(self, const Flight *flight, unsigned char *data, Tally *tally) noexcept nogil
    cdef void _leave(self, const Flight *flight, Tally *tally) noexcept nogil
    cdef void _time(self, const Flight *flight, Tally *tally) noexcept nogil
    cdef void _count(self, const Flight *flight, Tally *tally, int times) noexcept nogil
    cdef Place find(self, Seen seen, const char *path, size_t length, const Shown *shown, Flight *flight) noexcept nogil
