"""What other compiled modules may use of `records.pyx`: they find records and enter them, and know no table."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.stat cimport S_ISDIR, S_ISREG

from coordlfs.kernel.linux cimport fuse_entry_out, statx


cdef struct Shown:  # as `Version`
    uint64_t size, mtime_ns, inode, access


cdef inline bint are_same(Shown a, Shown b) noexcept nogil:
    return a.size == b.size and a.mtime_ns == b.mtime_ns and a.inode == b.inode and a.access == b.access


cdef inline bint is_usual(const statx *st) noexcept nogil:
    """What has several names, and what is no file, is not."""
    return (S_ISREG(st.stx_mode) and st.stx_nlink == 1) or S_ISDIR(st.stx_mode)


cdef object version(Shown shown)
cdef void put_entry(fuse_entry_out *entry, uint64_t node, const statx *st) noexcept nogil


cdef class Index:
    """The catalogue's index as it was at the last `Records.update`; should it change, another takes its place."""

    cdef object _source
    cdef uint32_t[::1] _slots
    cdef uint64_t _mask


cdef class Records:
    cdef readonly object catalog
    cdef object _lock
    cdef uint64_t[::1] _words
    cdef unsigned char[::1] _names
    cdef uint64_t *_first
    cdef uint64_t _stride, _node_mask
    cdef uint64_t _owners, _uid, _gid  # what `access` makes of the last ones that were seen

    cdef int update(self, Index index) except -1
    cdef int64_t find(self, Index index, uint64_t node) noexcept nogil
    cdef uint64_t *words_of(self, uint64_t record) noexcept nogil
    cdef const char *name_of(self, uint64_t record) noexcept nogil
    cdef Shown shown(self, uint64_t record) noexcept nogil
    cdef bint is_of(self, const statx *st, Shown shown) noexcept nogil
    cdef Shown shown_by(self, const statx *st) except *
    cdef int put_path(self, char *text, int end, uint64_t directory, const char *name, size_t length) noexcept nogil
    cdef int64_t enter(
        self, Index index, path, uint64_t parent, const char *name, size_t length, const statx *st
    ) except -2
    cdef int64_t _add(
        self, Index index, uint64_t node, uint64_t parent, const char *name, size_t length, const statx *st, Shown now
    ) except -2
