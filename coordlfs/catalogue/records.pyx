# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The catalogue's records as they lie in memory, for compiled code: found, shown, and entered as `Catalog` would.

What is read here without the GIL is only appended to (records, names), or may be seen too old and has to be seen
again with it (versions, flags).
"""

from libc.string cimport memcmp, memcpy

from coordlfs.kernel.linux cimport fuse_attr

from xxhash import xxh3_64_intdigest

from coordlfs.catalogue.catalog import COUNT, DIRECTORY, HEADER_WORDS, LINKED, NAMES_USED, RECORD_WORDS, REGULAR, SUPERSEDED
from coordlfs.kernel.fuse import MAX_READ, MOST_PREFERRED
from coordlfs.catalogue.timeouts import EMPTY_TIMEOUT, NAME_TIMEOUT
from coordlfs.sources.versions import Version, access

cdef extern from *:
    """
    // Only now does a record exist: a server that is killed at any moment leaves whole ones.
    static inline void publish(uint64_t *count, uint64_t n) {
        __atomic_store_n(count, n, __ATOMIC_RELEASE);
    }
    """
    void publish(uint64_t *count, uint64_t n)

cdef uint32_t _REGULAR = REGULAR, _LINKED = LINKED, _DIRECTORY = DIRECTORY, _SUPERSEDED = SUPERSEDED
cdef uint64_t _HEADER_WORDS = HEADER_WORDS, _MAX_READ = MAX_READ, _MOST_PREFERRED = MOST_PREFERRED
cdef uint64_t _NAME_TIMEOUT = NAME_TIMEOUT, _EMPTY_TIMEOUT = EMPTY_TIMEOUT
cdef int _COUNT = COUNT, _NAMES_USED = NAMES_USED


cdef object version(Shown shown):
    return Version(shown.size, <int64_t>shown.mtime_ns, shown.inode, shown.access)


cdef uint32_t _preferred_size(const statx *st) noexcept nogil:
    """As `fuse.preferred_size`."""
    cdef uint32_t size = 1
    if not S_ISREG(st.stx_mode) or not st.stx_blksize < st.stx_size < _MAX_READ:
        return st.stx_blksize
    while size < st.stx_size and size < _MOST_PREFERRED:
        size <<= 1
    return size


cdef void put_entry(fuse_entry_out *entry, uint64_t node, const statx *st) noexcept nogil:
    """Write what the kernel is told of a name that `is_usual`, over zeros."""
    cdef fuse_attr *attr = &entry.attr
    entry.nodeid = attr.ino = node
    entry.entry_valid = _NAME_TIMEOUT
    entry.attr_valid = _EMPTY_TIMEOUT if S_ISREG(st.stx_mode) and not st.stx_size else _NAME_TIMEOUT
    attr.size, attr.blocks, attr.blksize = st.stx_size, st.stx_blocks, _preferred_size(st)
    attr.atime, attr.atimensec = st.stx_atime.tv_sec, st.stx_atime.tv_nsec
    attr.mtime, attr.mtimensec = st.stx_mtime.tv_sec, st.stx_mtime.tv_nsec
    attr.ctime, attr.ctimensec = st.stx_ctime.tv_sec, st.stx_ctime.tv_nsec
    attr.mode, attr.nlink, attr.uid, attr.gid = st.stx_mode, st.stx_nlink, st.stx_uid, st.stx_gid


def fill_index(uint32_t[::1] slots, const uint64_t[::1] words, Py_ssize_t count):
    """Enter `count` records into a hash index that is empty and large enough: open addressing with linear probing."""
    cdef uint64_t mask = slots.shape[0] - 1, at
    cdef Py_ssize_t record, stride = RECORD_WORDS, first = HEADER_WORDS
    with nogil:
        for record in range(count):
            at = words[first + record * stride] & mask
            while slots[at]:
                at = (at + 1) & mask
            slots[at] = record + 1


cdef class Index:
    def __init__(self):
        self._source = None


cdef class Records:
    """The records of a `Catalog`. Thread-safe."""

    def __init__(self, catalog):
        self.catalog, self._lock = catalog, catalog.lock
        self._words, self._names, self._node_mask = catalog.words, catalog.names, catalog.id_mask
        self._first, self._stride = &self._words[_HEADER_WORDS], RECORD_WORDS
        self._uid = self._gid = <uint64_t>-1

    cdef int update(self, Index index) except -1:
        """See to it that everything can be found that is known now."""
        if self.catalog.index is not index._source:
            index._source = self.catalog.index
            index._slots, index._mask = index._source
        return 0

    cdef int64_t find(self, Index index, uint64_t node) noexcept nogil:
        """The record of a node, or -1."""
        cdef uint64_t at = node & index._mask
        cdef uint32_t slot
        while True:
            slot = index._slots[at]
            if not slot:
                return -1
            if self.words_of(slot - 1)[0] == node:
                return slot - 1
            at = (at + 1) & index._mask

    cdef uint64_t *words_of(self, uint64_t record) noexcept nogil:
        """node; parent, length of the name and flags; name; size, mtime, inode; last miss; access and pinned pages."""
        return &self._first[record * self._stride]

    cdef const char *name_of(self, uint64_t record) noexcept nogil:
        return <const char *>&self._names[self.words_of(record)[2]]

    cdef Shown shown(self, uint64_t record) noexcept nogil:
        cdef const uint64_t *words = self.words_of(record)
        cdef Shown shown
        shown.size, shown.mtime_ns, shown.inode, shown.access = words[3], words[4], words[5], words[7] >> 32
        return shown

    cdef Shown shown_by(self, const statx *st) except *:
        """As `Version.of`."""
        cdef Shown shown
        if st.stx_uid != self._uid or st.stx_gid != self._gid:  # as those of the last one
            self._owners = access(0, st.stx_uid, st.stx_gid)
            self._uid, self._gid = st.stx_uid, st.stx_gid
        shown.size, shown.inode = st.stx_size, st.stx_ino
        shown.mtime_ns = <uint64_t>st.stx_mtime.tv_sec * 1000000000 + st.stx_mtime.tv_nsec
        shown.access = <uint64_t>(st.stx_mode & 0xFFF) << 20 | self._owners
        return shown

    cdef bint is_of(self, const statx *st, Shown shown) noexcept nogil:
        """Whether these attributes are those of a version; without the GIL it cannot be told of a rare owner's file."""
        return (
            st.stx_size == shown.size
            and st.stx_ino == shown.inode
            and <uint64_t>st.stx_mtime.tv_sec * 1000000000 + st.stx_mtime.tv_nsec == shown.mtime_ns
            and st.stx_uid == self._uid
            and st.stx_gid == self._gid
            and shown.access == (<uint64_t>(st.stx_mode & 0xFFF) << 20 | self._owners)
        )

    cdef int put_path(self, char *text, int end, uint64_t directory, const char *name, size_t length) noexcept nogil:
        """Write the path of a name in a directory, and a NUL at `end`: where it begins, or -1 if it is too long."""
        text[end] = 0
        while True:
            if <size_t>end < length + 1:
                return -1
            end -= length
            memcpy(&text[end], name, length)
            if not directory:
                return end
            end -= 1
            text[end] = c"/"
            name, length = self.name_of(directory), self.words_of(directory)[1] >> 16 & 0xFFFF
            directory = self.words_of(directory)[1] >> 32

    cdef int64_t enter(
        self, Index index, path, uint64_t parent, const char *name, size_t length, const statx *st
    ) except -2:
        """The record of a directory entry that `is_usual`, made if it is new; -1 if `Namespace.enter` has to see to it."""
        cdef Shown now = self.shown_by(st)
        cdef uint64_t node = max(<uint64_t>xxh3_64_intdigest(path) & self._node_mask, 2)
        self.update(index)
        cdef int64_t record = self.find(index, node)
        if record < 0:
            return self._add(index, node, parent, name, length, st, now)
        cdef const uint64_t *words = self.words_of(record)
        if (
            words[1] & (_LINKED | _SUPERSEDED)
            or words[1] >> 32 != parent
            or (words[1] >> 16 & 0xFFFF) != length
            or memcmp(self.name_of(record), name, length)
            or not are_same(self.shown(record), now)
        ):
            return -1
        return record

    cdef int64_t _add(
        self, Index index, uint64_t node, uint64_t parent, const char *name, size_t length, const statx *st, Shown now
    ) except -2:
        """The record of a new directory entry, as `Catalog.add` makes it; -1 if somebody else just did."""
        cdef uint64_t kind = _REGULAR if S_ISREG(st.stx_mode) else _DIRECTORY
        cdef uint64_t record, used, at
        cdef uint64_t *words
        self._lock.acquire()
        try:
            self.update(index)
            if self.find(index, node) >= 0:
                return -1
            record, used = self._words[_COUNT], self._words[_NAMES_USED]
            if (
                (record + 1) * 2 > index._mask + 1
                or used + length > <uint64_t>self._names.shape[0]
                or _HEADER_WORDS + (record + 2) * self._stride > <uint64_t>self._words.shape[0]
            ):
                return self.catalog.add(node, parent, name[:length], kind, version(now))
            memcpy(&self._names[used], name, length)
            self._words[_NAMES_USED] = used + length
            words = self.words_of(record)
            words[0], words[1], words[2] = node, parent << 32 | length << 16 | kind, used
            words[3], words[4], words[5], words[6], words[7] = now.size, now.mtime_ns, now.inode, 0, now.access << 32
            publish(&self._words[_COUNT], record + 1)
            at = node & index._mask
            while index._slots[at]:
                at = (at + 1) & index._mask
            index._slots[at] = record + 1
            return record
        finally:
            self._lock.release()
