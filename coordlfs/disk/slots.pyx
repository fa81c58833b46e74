# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The hash index over rows, in flat memory: open addressing with linear probing; a slot holds a row's number plus one.

For rows of 64 bytes whose first word is their key, 0 for none. It does not know what else is in them.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    _WORDS = 8  # of a row


def enter(uint32_t[::1] slots, const uint64_t[::1] rows, uint32_t first):
    """Enter all of some rows, the first of which has the number `first`, into slots that have room; how many."""
    cdef uint64_t mask = slots.shape[0] - 1, at, key
    cdef Py_ssize_t i
    cdef uint32_t entered = 0
    with nogil:
        for i in range(rows.shape[0] // _WORDS):
            key = rows[i * _WORDS]
            if not key:
                continue
            at = key & mask
            while slots[at]:
                at = (at + 1) & mask
            slots[at] = first + i + 1
            entered += 1
    return entered
