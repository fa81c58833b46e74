# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Taking stock of the rows of a store: which are none, which are in the way of others, and what room is free.

Of many millions, while others read: without the GIL, and with a bit for each unit of the store. No I/O here.
"""

from array import array
from bisect import bisect_left

from cpython cimport array as arrays
from libc.stdint cimport int64_t, uint32_t, uint64_t

from coordlfs.disk.layout import BLOCK, ROW, UNIT, is_row
from coordlfs.kernel import xxh3

ctypedef uint64_t (*hash_function)(const void *, size_t, uint64_t) noexcept nogil

cdef enum:
    _WORDS = 8  # of a row
    _UNSUMMED = 56  # bytes of a row before its own checksum
    _AT_ONCE = 1 << 12  # rows

cdef int64_t _BLOCK = BLOCK, _UNIT = UNIT
assert ROW == _WORDS * 8


cdef class Stock:
    """What was found in a store, as it was opened, whose data ends after `units`.

    `used`: only so many rows were ever used, the first ones. `last_name` is the largest place of a name, -1 if there is
    none. `unwanted` are the numbers of rows that are to be erased.
    """

    cdef readonly int64_t rows, bytes, used, last_name
    cdef readonly int64_t bad_rows  # torn, flipped, or in the way of others
    cdef readonly int64_t beyond  # rows of blocks that lie behind the end
    cdef readonly object unwanted
    cdef object _erased, _memory
    cdef uint64_t[::1] _taken  # a bit for each unit
    cdef uint64_t _seed
    cdef int64_t _units
    cdef hash_function _hash

    def __init__(self, seed, units):
        self._seed, self._units, self.last_name = seed, units, -1
        self._memory = bytearray((units // 64 + 1) * 8)
        self._taken = memoryview(self._memory).cast("Q")
        self.unwanted, self._erased = array("I"), array("I")
        cdef uint64_t address = xxh3.address()
        self._hash = <hash_function>address

    def see(self, first, raw):
        """Some more of them, as they lie in the file; the first has the number `first`."""
        for at in range(0, len(raw) // ROW, _AT_ONCE):
            self._see(first + at, raw[at * ROW : (at + _AT_ONCE) * ROW])

    cdef int _see(self, uint32_t first, raw) except -1:
        cdef const uint64_t[::1] words = raw.cast("Q")
        cdef uint32_t[_AT_ONCE] erased, unwanted
        cdef int i, n = words.shape[0] // _WORDS, n_erased = 0, n_unwanted = 0
        cdef unsigned char[::1] are_rows = self._are_rows(words, raw)
        with nogil:
            for i in range(n):
                if not words[i * _WORDS]:
                    erased[n_erased] = first + i
                    n_erased += 1
                    continue
                self.used = <int64_t>first + i + 1
                if not are_rows[i] or not self._keeps(&words[i * _WORDS]):
                    self.bad_rows += not are_rows[i]
                    unwanted[n_unwanted] = first + i
                    n_unwanted += 1
        arrays.extend_buffer(self._erased, <char *>erased, n_erased)
        arrays.extend_buffer(self.unwanted, <char *>unwanted, n_unwanted)
        return 0

    cdef bytearray _are_rows(self, const uint64_t[::1] words, raw):
        """For each of some rows whether it is one, as it was written."""
        cdef Py_ssize_t i, n = words.shape[0] // _WORDS
        found = bytearray(n)
        cdef unsigned char[::1] are_rows = found
        if self._hash == NULL:
            found[:] = bytes(is_row(raw[i * ROW : (i + 1) * ROW], self._seed) for i in range(n))
            return found
        with nogil:
            for i in range(n):
                are_rows[i] = self._hash(&words[i * _WORDS], _UNSUMMED, self._seed) == words[i * _WORDS + 7]
        return found

    cdef bint _keeps(self, const uint64_t *row) noexcept nogil:
        """Count a row and take its units, unless they are behind the end, or another row's."""
        cdef int64_t length = <int64_t>row[2] - <int64_t><uint32_t>row[5] * _BLOCK
        if length > _BLOCK:
            length = _BLOCK
        cdef int64_t unit = row[5] >> 32, end = unit + (length + _UNIT - 1) // _UNIT
        if end > self._units:
            self.beyond += 1
            return False
        if length <= 0 or not self._take(unit, end):
            self.bad_rows += 1
            return False
        self.rows += 1
        self.bytes += length
        self.last_name = max(self.last_name, <int64_t>row[1])
        return True

    cdef bint _take(self, int64_t unit, int64_t end) noexcept nogil:
        """Take units; False if one of them is another row's."""
        cdef int64_t at
        for at in range(unit, end):
            if self._taken[at >> 6] >> (at & 63) & 1:
                return False
        for at in range(unit, end):
            self._taken[at >> 6] |= <uint64_t>1 << (at & 63)
        return True

    def erased(self):
        """The numbers of the rows before `used` that are free."""
        return self._erased[: bisect_left(self._erased, self.used)]

    def free(self):
        """The ranges of units that no row takes: first and how many."""
        ranges = []
        cdef int64_t first, at = 0
        while at < self._units:
            first = self._next(at, False)
            at = self._next(first, True)
            if first < at:
                ranges.append((first, at - first))
        return ranges

    cdef int64_t _next(self, int64_t at, bint is_taken) noexcept nogil:
        """The first unit from `at` on that is taken, or free; the end if there is none."""
        cdef uint64_t word
        while at < self._units:
            word = self._taken[at >> 6] if is_taken else ~self._taken[at >> 6]
            if word >> (at & 63) & 1:
                return at
            at = at + 1 if word >> (at & 63) else (at | 63) + 1
        return self._units
