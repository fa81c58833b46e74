# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What READDIRPLUS is answered with: entries of a directory, each with its attributes, as many as there is room for.

The attributes are asked for some entries at a time, of a directory on a disk without the GIL; then these are entered into the catalogue
and packed. Whatever is unusual (several hard links, another version than was shown) is entered by `Namespace`.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport EIO, ENOENT
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memset
from posix.stat cimport S_IFDIR

from coordlfs.kernel.linux cimport FUSE_NAME_OFFSET_DIRENTPLUS, fuse_direntplus, fuse_entry_out, fuse_out_header, statx
from coordlfs.catalogue.records cimport Index, Records, is_usual, put_entry

from coordlfs.catalogue.catalog import node_of_path
from coordlfs.kernel import fuse
from coordlfs.catalogue.timeouts import NAME_TIMEOUT, attr_timeout

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <sys/stat.h>

    static inline int attributes_of(int directory, const char *name, struct statx *found) {
        return statx(directory, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, STATX_BASIC_STATS, found) ? errno : 0;
    }
    """
    int attributes_of(int directory, const char *name, statx *found) nogil


cdef enum:
    _AT_ONCE = 64  # entries
    _DOTS = 2  # the first two positions
    _TYPE_SHIFT = 12  # of a mode, for what dirents say of it


cdef object _SECOND = 1_000_000_000  # ns


cdef class _Packing:
    """A reply as far as it is written."""

    cdef unsigned char[::1] _into
    cdef size_t _length

    cdef size_t _room(self) noexcept:
        return self._into.shape[0] - self._length

    cdef fuse_direntplus *_add(self, const char *name, size_t length, uint64_t offset) noexcept:
        """An entry for which there is room, and of which nothing but the name is known."""
        cdef size_t size = _size(length)
        cdef fuse_direntplus *entry = <fuse_direntplus *>&self._into[self._length]
        memset(entry, 0, size)
        memcpy(entry.dirent.name, name, length)
        entry.dirent.namelen, entry.dirent.off = length, offset
        self._length += size
        return entry


cdef size_t _size(size_t name_length) noexcept:
    return (FUSE_NAME_OFFSET_DIRENTPLUS + name_length + 7) & ~<size_t>7


cdef int _attributes_in(listing, bytes name, statx *found) except -1:
    """As `attributes_of`, of a listing that has no descriptor to ask."""
    try:
        st = listing.lstat(name)
    except OSError as e:
        return e.errno or EIO
    memset(found, 0, sizeof(statx))
    found.stx_mode, found.stx_nlink, found.stx_uid, found.stx_gid = st.st_mode, st.st_nlink, st.st_uid, st.st_gid
    found.stx_ino, found.stx_size = st.st_ino, st.st_size
    found.stx_blocks, found.stx_blksize = st.st_blocks, st.st_blksize
    found.stx_atime.tv_sec, found.stx_atime.tv_nsec = divmod(st.st_atime_ns, _SECOND)
    found.stx_mtime.tv_sec, found.stx_mtime.tv_nsec = divmod(st.st_mtime_ns, _SECOND)
    found.stx_ctime.tv_sec, found.stx_ctime.tv_nsec = divmod(st.st_ctime_ns, _SECOND)
    return 0


cdef class Entries:
    """Entries of directories. `namespace` enters what is unusual; `counters` counts errors of the source. Thread-safe."""

    cdef Records _records
    cdef object _namespace, _counters

    def __init__(self, Records records not None, namespace, counters):
        self._records, self._namespace, self._counters = records, namespace, counters

    def pack(self, listing, uint64_t directory, uint64_t position, into):
        """Write what READDIRPLUS gives of a listing from `position` on: how many bytes; 0 at the end.

        `directory` is the record of it. Positions 0 and 1 are `.` and `..`; those of `listing.names` follow. A name that
        is gone is left out. One whose attributes the source does not give has none: whoever wants them gets the error.
        """
        cdef list names = listing.names
        cdef uint64_t end = _DOTS + len(names), fit
        cdef _Packing packing = _Packing()
        packing._into = into
        while position < _DOTS:
            if packing._room() < _size(_DOTS):
                return packing._length
            self._put_dots(packing, directory, position)
            position += 1
        path = self._records.catalog.directory_path(directory)
        cdef bytes prefix = path + b"/" if path else b"", name
        cdef Index index = Index()
        cdef statx found[_AT_ONCE]
        cdef const char *wanted[_AT_ONCE]
        cdef int failed[_AT_ONCE]
        cdef int fd = listing.fd, i, n
        while position < end:
            # As many as fit if all are as long as the first of them, and one that shows that no more do.
            fit = 1 + packing._room() // _size(len(names[position - _DOTS]))
            n = min(<uint64_t>_AT_ONCE, end - position, fit)
            for i in range(n):
                wanted[i] = PyBytes_AS_STRING(names[position - _DOTS + i])
            if fd < 0:
                for i in range(n):
                    failed[i] = _attributes_in(listing, names[position - _DOTS + i], &found[i])
            else:
                with nogil:
                    for i in range(n):
                        failed[i] = attributes_of(fd, wanted[i], &found[i])
            for i in range(n):
                name = names[position - _DOTS]
                if packing._room() < _size(len(name)):
                    return packing._length
                position += 1
                if failed[i] != ENOENT:
                    self._put(packing, index, listing, directory, prefix, name, position, failed[i], &found[i])
        return packing._length

    cdef int _put_dots(self, _Packing packing, uint64_t directory, uint64_t position) except -1:
        """Add `.` or `..`, of which the kernel takes no attributes."""
        cdef uint64_t offset = position + 1, record = directory
        if position:
            record = self._records.words_of(directory)[1] >> 32
        cdef fuse_direntplus *entry = packing._add(b"..", offset, offset)  # so many dots
        entry.dirent.ino, entry.dirent.type = self._records.words_of(record)[0], S_IFDIR >> _TYPE_SHIFT
        return 0

    cdef int _put(
        self,
        _Packing packing,
        Index index,
        listing,
        uint64_t directory,
        bytes prefix,
        bytes name,
        uint64_t offset,
        int failed,
        const statx *found,
    ) except -1:
        """Add a name, unless it is gone."""
        cdef fuse_entry_out known
        cdef int64_t record = -1
        memset(&known, 0, sizeof(known))
        try:
            if not failed and is_usual(found):
                record = self._records.enter(index, prefix + name, directory, name, len(name), found)
            if record >= 0:
                put_entry(&known, self._records.words_of(record)[0], found)
            elif not self._put_unusual(&known, listing, directory, name):
                return 0
        except OSError:
            pass  # the name is there all the same
        cdef fuse_direntplus *entry = packing._add(name, len(name), offset)
        entry.entry_out = known
        entry.dirent.ino, entry.dirent.type = known.attr.ino, known.attr.mode >> _TYPE_SHIFT
        if not known.nodeid:
            entry.dirent.ino = node_of_path(prefix + name)
        return 0

    cdef bint _put_unusual(self, fuse_entry_out *known, listing, uint64_t directory, bytes name) except -1:
        """See what the Python code makes of a name; False if it is gone. Raises OSError."""
        try:
            st = listing.lstat(name)
        except FileNotFoundError:
            return False
        except OSError:
            self._counters.add("source_errors")
            raise
        node = self._namespace.node(self._namespace.enter(directory, name, st))
        cdef bytes reply = fuse.entry_reply(0, node, st, NAME_TIMEOUT, attr_timeout(st))
        memcpy(known, PyBytes_AS_STRING(reply) + sizeof(fuse_out_header), sizeof(fuse_entry_out))
        return True
