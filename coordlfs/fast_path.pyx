# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The commonest messages, answered in one go: READ of a whole small file, and LOOKUP of a name that is in memory.

What they cost is the interpreter, the copies and whom they wake up. So this is what the byte lane, the namespace and
the reader do, compiled, for the case in which nothing has to be weighed. Whatever is unusual is left to them: a message
that is not answered here has had nothing done for it. The interpreter is held throughout, but while bytes are copied,
so that all that holds for Python code as it is, is true here too.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, ENODEV, ENOENT, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy, memset, strerror
from posix.fcntl cimport O_NONBLOCK, O_NOCTTY, O_RDONLY
from posix.stat cimport S_ISDIR, S_ISREG
from posix.unistd cimport close, read, write

from xxhash import xxh3_64_intdigest

from coordlfs import items
from coordlfs.admission import Fetched
from coordlfs.catalog import DIRECTORY, HEADER_WORDS, LINKED, RECORD_WORDS, REGULAR, SERVED, SUPERSEDED
from coordlfs.kernel import fuse
from coordlfs.kernel.pages import PAGE
from coordlfs.namespace import EMPTY_TIMEOUT, NAME_TIMEOUT
from coordlfs.reading import Request
from coordlfs.versions import GROUP_FACTOR, OWNER_FACTOR, Version

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <fcntl.h>
    #include <linux/fuse.h>
    #include <linux/openat2.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>

    #ifndef SYS_cachestat
    #define SYS_cachestat 451
    #endif

    struct counted { uint64_t cached, dirty, writeback, evicted, recently_evicted; };

    static inline int open_beneath(int directory, const char *path, int flags) {
        struct open_how how = {
            .flags = flags | O_CLOEXEC | O_NOFOLLOW,
            .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_CACHED,
        };
        return syscall(SYS_openat2, directory, path, &how, sizeof how);
    }

    static inline int cachestat(int fd, uint64_t length, struct counted *found) {
        uint64_t range[2] = {0, length};
        return syscall(SYS_cachestat, fd, range, found, 0);
    }

    static inline int attributes(int fd, struct statx *found) {
        return statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, found);
    }
    """
    const int O_DIRECT, O_NOATIME, O_PATH, RWF_NOWAIT

    struct iovec:
        void *iov_base
        size_t iov_len

    ssize_t preadv2(int fd, const iovec *vectors, int count, int64_t offset, int flags) nogil
    ssize_t writev(int fd, const iovec *vectors, int count) nogil

    struct fuse_in_header:
        uint32_t len, opcode
        uint64_t unique, nodeid
        uint32_t uid, gid, pid

    struct fuse_read_in:
        uint64_t offset
        uint32_t size, flags

    struct fuse_out_header:
        uint32_t len
        int error
        uint64_t unique

    struct fuse_attr:
        uint64_t ino, size, blocks, atime, mtime, ctime
        uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags

    struct fuse_entry_out:
        uint64_t nodeid, generation, entry_valid, attr_valid
        fuse_attr attr

    const uint32_t FUSE_LOOKUP, FUSE_READ

    struct statx_timestamp:
        int64_t tv_sec
        uint32_t tv_nsec

    struct statx:
        uint32_t stx_blksize, stx_nlink, stx_uid, stx_gid
        uint16_t stx_mode
        uint64_t stx_ino, stx_size, stx_blocks
        statx_timestamp stx_atime, stx_mtime, stx_ctime

    struct counted:
        uint64_t cached

    int open_beneath(int directory, const char *path, int flags)
    int cachestat(int fd, uint64_t length, counted *found)
    int attributes(int fd, statx *found)


cdef struct Entry:  # the reply to LOOKUP
    fuse_out_header header
    fuse_entry_out entry


cdef struct Shown:  # as `Version`
    uint64_t size, mtime_ns, inode, access


cdef enum Outcome:  # of a READ
    WRONG, ANSWERED, BEGUN, LEFT


cdef enum:
    _LONGEST_PATH = 4095
    _RESTS = 32  # READs that are left to the others after one that went wrong here: more of those will come

cdef uint64_t _PAGE = PAGE, _LARGEST = fuse.MAX_READ - 1, _MAX_READ = fuse.MAX_READ
cdef uint64_t _HEADER_WORDS = HEADER_WORDS, _RECORD_WORDS = RECORD_WORDS
cdef uint32_t _REGULAR = REGULAR, _SERVED = SERVED, _LINKED = LINKED, _DIRECTORY = DIRECTORY, _SUPERSEDED = SUPERSEDED
cdef uint64_t _NAME_TIMEOUT = NAME_TIMEOUT, _EMPTY_TIMEOUT = EMPTY_TIMEOUT
cdef uint32_t _READ_SIZE = sizeof(fuse_in_header) + sizeof(fuse_read_in)
cdef uint64_t _OWNER_FACTOR = OWNER_FACTOR, _GROUP_FACTOR = GROUP_FACTOR
cdef int _FOR_READING = O_RDONLY | O_NOCTTY | O_NONBLOCK


cdef inline uint64_t access(const statx *st) noexcept:
    """As `versions.access`."""
    cdef uint64_t owners = st.stx_uid * _OWNER_FACTOR ^ st.stx_gid * _GROUP_FACTOR
    return <uint64_t>(st.stx_mode & 0xFFF) << 20 | owners >> 12 & 0xFFFFF


cdef inline bint shows(const Shown *shown, const statx *st) noexcept:
    """Whether attributes are those that the kernel was shown."""
    return (
        st.stx_size == shown.size
        and mtime_ns(st) == shown.mtime_ns
        and st.stx_ino == shown.inode
        and access(st) == shown.access
    )


cdef inline uint64_t mtime_ns(const statx *st) noexcept:
    return <uint64_t>st.stx_mtime.tv_sec * 1000000000 + st.stx_mtime.tv_nsec


cdef object version(const Shown *shown):
    return Version(shown.size, <int64_t>shown.mtime_ns, shown.inode, shown.access)


cdef class Messages:
    """What one thread receives and reads into: `request`, a message, and `into`, page-aligned memory for bytes.

    `unlooked` counts the messages since the thread last looked for other things to do.
    """

    cdef object _request, _into
    cdef unsigned char[::1] _message, _memory
    cdef public int unlooked

    def __init__(self, request, into):
        self._request, self._into = request, memoryview(into)
        self._message, self._memory = request, into
        self.unlooked = 0


cdef class Whole:
    """A READ of a whole file, which is open, and has `size` bytes of no other version than the one that was shown."""

    cdef readonly uint64_t unique
    cdef readonly int fd
    cdef uint64_t _record
    cdef uint32_t _asked, _pid
    cdef uint64_t _node
    cdef Shown _shown

    @property
    def size(self):
        return self._shown.size

    @property
    def request(self):
        """It, as the others know it."""
        return Request(self._node, 0, min(self._asked, _MAX_READ), self._pid, False)


cdef class FastPath:
    """`begin` has the disk read, and says False where it cannot; `refuse` answers with an error. Thread-safe."""

    cdef int _device, _root
    cdef object _reader, _catalog, _admission, _counters, _ends, _begin, _refuse, _index
    cdef bint _answers_reads, _answers_names
    cdef int _rests
    cdef uint64_t _node_mask, _slot_mask
    cdef const uint64_t[::1] _words
    cdef const unsigned char[::1] _names
    cdef const uint32_t[::1] _slots

    def __init__(self, device, reader, begin, refuse):
        self._device, self._root = device, reader.source.root
        self._reader, self._catalog, self._admission = reader, reader.catalog, reader.admission
        self._counters, self._ends = reader.counters, reader.ends
        self._begin, self._refuse = begin, refuse
        self._answers_names = not reader.source.is_remote
        self._answers_reads = self._answers_names and reader.sharing is None
        self._node_mask = self._catalog.id_mask
        self._words, self._names = self._catalog.words, self._catalog.names
        self._take_index()

    # -- the catalogue, which is read as it lies in memory ---------------------------------------------------------

    cdef int _take_index(self) except -1:
        self._index = self._catalog.index
        self._slots, self._slot_mask = self._index
        return 0

    cdef int64_t _find(self, uint64_t node) except -2:
        """The record of a node, or -1."""
        if self._catalog.index is not self._index:  # it has grown
            self._take_index()
        cdef uint64_t at = node & self._slot_mask
        cdef uint32_t slot
        while True:
            slot = self._slots[at]
            if not slot:
                return -1
            if self._words[_HEADER_WORDS + (slot - 1) * _RECORD_WORDS] == node:
                return slot - 1
            at = (at + 1) & self._slot_mask

    cdef inline const uint64_t *_record(self, uint64_t record) noexcept:
        return &self._words[_HEADER_WORDS + record * _RECORD_WORDS]

    cdef inline Shown _shown(self, uint64_t record) noexcept:
        cdef const uint64_t *words = self._record(record)
        cdef Shown shown
        shown.size, shown.mtime_ns, shown.inode, shown.access = words[3], words[4], words[5], words[7] >> 32
        return shown

    cdef object _path(self, uint64_t record):
        cdef const uint64_t *words = self._record(record)
        if words[1] & _LINKED:
            return self._catalog.path(record)
        return self._join(words[1] >> 32, <const char *>&self._names[words[2]], words[1] >> 16 & 0xFFFF)

    cdef object _join(self, uint64_t parent, const char *name, size_t length):
        """The path of a name in a directory."""
        cdef bytes directory = self._catalog.directory_path(parent)
        cdef size_t before = PyBytes_GET_SIZE(directory)
        if not before:
            return PyBytes_FromStringAndSize(name, length)
        path = PyBytes_FromStringAndSize(NULL, before + 1 + length)
        cdef char *into = PyBytes_AS_STRING(path)
        memcpy(into, PyBytes_AS_STRING(directory), before)
        into[before] = c"/"
        memcpy(into + before + 1, name, length)
        return path

    # -- messages ---------------------------------------------------------------------------------------------------

    def receive(self, Messages messages not None, int most):
        """Answer what there is, until something else has to be done: the length of a message that is to be dispatched.

        0 after `most` messages; None if there is no more. Raises OSError if the device is read in vain.
        """
        cdef fuse_in_header *header = <fuse_in_header *>&messages._message[0]
        cdef size_t room = messages._message.shape[0]
        cdef ssize_t n
        while messages.unlooked < most:
            n = read(self._device, header, room)  # never blocks
            if n < 0:
                if errno == EAGAIN:
                    return None
                raise OSError(errno, strerror(errno).decode(), "read")
            messages.unlooked += 1
            if n < <ssize_t>sizeof(fuse_in_header) or header.len != n:
                return n
            try:
                if not self._answer(header, messages):
                    return n
            except Exception as e:
                self._refuse(header.unique, e)
        return 0

    cdef bint _answer(self, fuse_in_header *header, Messages messages) except -1:
        if header.opcode == FUSE_READ:
            return self._answers_reads and header.len == _READ_SIZE and self._answer_read(header, messages)
        if header.opcode == FUSE_LOOKUP:
            return self._answers_names and self._answer_lookup(header)
        return False

    cdef int _reply(self, uint64_t unique, const void *data, size_t length) except -1:
        cdef fuse_out_header header
        cdef iovec parts[2]
        cdef ssize_t written
        cdef int code
        header.len, header.error, header.unique = sizeof(header) + length, 0, unique
        parts[0].iov_base, parts[0].iov_len = &header, sizeof(header)
        parts[1].iov_base, parts[1].iov_len = <void *>data, length
        with nogil:
            written = writev(self._device, parts, 2)
            code = errno
        if written < 0 and code not in (ENOENT, ENODEV):  # the caller gave up; unmounted
            raise OSError(code, strerror(code).decode(), "reply")
        return 0

    # -- names ------------------------------------------------------------------------------------------------------

    cdef bint _answer_lookup(self, fuse_in_header *header) except -1:
        cdef const char *name = <const char *>(header + 1)
        cdef size_t length = header.len - sizeof(fuse_in_header)
        cdef int64_t parent = self._find(header.nodeid)
        cdef statx st
        if parent < 0 or length < 2 or memchr(name, 0, length) != name + length - 1:
            return False
        length -= 1
        if memchr(name, c"/", length) or (name[0] == c"." and (length == 1 or (length == 2 and name[1] == c"."))):
            return False
        path = self._join(parent, name, length)
        if not self._lstat(path, &st):
            return False
        cdef int64_t record = self._enter(parent, name, length, path, &st)
        if record < 0:
            return False
        self._counters.add("lookups")
        cdef Entry reply
        memset(&reply, 0, sizeof(reply))
        reply.header.len, reply.header.unique = sizeof(reply), header.unique
        reply.entry.nodeid = self._record(record)[0]
        reply.entry.entry_valid = _NAME_TIMEOUT
        reply.entry.attr_valid = _EMPTY_TIMEOUT if S_ISREG(st.stx_mode) and not st.stx_size else _NAME_TIMEOUT
        self._fill(&reply.entry.attr, reply.entry.nodeid, &st)
        if write(self._device, &reply, sizeof(reply)) < 0 and errno not in (ENOENT, ENODEV):
            raise OSError(errno, strerror(errno).decode(), "reply")
        return True

    cdef bint _lstat(self, bytes path, statx *st) noexcept:
        """The attributes of a file or directory with one name; False if they cannot be had without waiting."""
        if PyBytes_GET_SIZE(path) > _LONGEST_PATH:
            return False
        cdef int fd = open_beneath(self._root, PyBytes_AS_STRING(path), O_PATH)
        if fd < 0:
            return False
        cdef int failed = attributes(fd, st)
        close(fd)
        return not failed and ((S_ISREG(st.stx_mode) and st.stx_nlink == 1) or S_ISDIR(st.stx_mode))

    cdef int64_t _enter(self, uint64_t parent, const char *name, size_t length, bytes path, statx *st) except -2:
        """The record of a directory entry, made if it is new; -1 if it is anything but the one that was shown."""
        cdef uint64_t node = max(<uint64_t>xxh3_64_intdigest(path) & self._node_mask, 2)
        cdef int64_t record = self._find(node)
        cdef const uint64_t *words
        cdef Shown now
        if record < 0:
            now.size, now.mtime_ns, now.inode, now.access = st.stx_size, mtime_ns(st), st.stx_ino, access(st)
            kind = REGULAR if S_ISREG(st.stx_mode) else DIRECTORY
            made = self._catalog.add(node, parent, PyBytes_FromStringAndSize(name, length), kind, version(&now))
            return -1 if made is None else made
        words = self._record(record)
        now = self._shown(record)
        if words[1] & (_LINKED | _SUPERSEDED) or words[1] >> 32 != parent or (words[1] >> 16 & 0xFFFF) != length:
            return -1
        if memcmp(&self._names[words[2]], name, length) or not shows(&now, st):
            return -1
        return record

    cdef void _fill(self, fuse_attr *attr, uint64_t node, const statx *st) noexcept:
        attr.ino, attr.size, attr.blocks = node, st.stx_size, st.stx_blocks
        attr.atime, attr.mtime, attr.ctime = st.stx_atime.tv_sec, st.stx_mtime.tv_sec, st.stx_ctime.tv_sec
        attr.atimensec, attr.mtimensec = st.stx_atime.tv_nsec, st.stx_mtime.tv_nsec
        attr.ctimensec = st.stx_ctime.tv_nsec
        attr.mode, attr.nlink, attr.uid, attr.gid = st.stx_mode, st.stx_nlink, st.stx_uid, st.stx_gid
        attr.blksize = st.stx_blksize

    # -- bytes ------------------------------------------------------------------------------------------------------

    cdef bint _answer_read(self, fuse_in_header *header, Messages messages) except -1:
        cdef const fuse_read_in *asked = <const fuse_read_in *>(header + 1)
        cdef int64_t record = self._find(header.nodeid)
        if asked.offset or asked.flags & (O_DIRECT | O_NOATIME) or record < 0 or self._ends.knows(header.nodeid):
            return False
        cdef Shown shown = self._shown(record)
        if not self._record(record)[1] & _REGULAR or not 0 < shown.size <= asked.size or shown.size > _LARGEST:
            return False
        if not self._admission.is_absent(items.item_at(record, 0)):
            return self._answer_kept(header, record, shown.size)
        if header.pid in self._admission.keeper_threads:
            return False
        if self._rests > 0:
            self._rests -= 1
            return False
        cdef bytes path = self._path(record)
        if PyBytes_GET_SIZE(path) > _LONGEST_PATH:
            return False
        cdef Whole whole = Whole()
        whole.fd = open_beneath(self._root, PyBytes_AS_STRING(path), _FOR_READING)
        if whole.fd < 0:
            return False
        whole.unique, whole._node, whole._pid = header.unique, header.nodeid, header.pid
        whole._record, whole._shown, whole._asked = record, shown, asked.size
        cdef Outcome outcome = WRONG
        try:
            outcome = self._read(whole, messages)
        except OSError:
            pass  # whoever reads it again will say
        finally:
            if outcome != BEGUN:
                close(whole.fd)
        if outcome == WRONG:
            self._rests = _RESTS
        return outcome == ANSWERED or outcome == BEGUN

    cdef Outcome _read(self, Whole whole, Messages messages) except? WRONG:
        cdef uint64_t size = whole._shown.size, npages = (size + _PAGE - 1) // _PAGE
        cdef counted held
        cdef statx st
        cdef iovec part
        cdef ssize_t n
        if not cachestat(whole.fd, npages * _PAGE, &held) and held.cached == npages:
            part.iov_base, part.iov_len = &messages._memory[0], size
            with nogil:
                # Should a page be on its way from the disk still, or gone by now, this ends there.
                n = preadv2(whole.fd, &part, 1, 0, RWF_NOWAIT)
            if n != <ssize_t>size:
                return WRONG
            return ANSWERED if self._give(whole, messages._into[:size]) else LEFT
        if attributes(whole.fd, &st) or not shows(&whole._shown, &st):
            return LEFT  # it might be no file any more
        return BEGUN if self._reader.source.go_direct(whole.fd) and self._begin(whole) else WRONG

    def finish(self, Whole whole not None, Py_ssize_t n, data):
        """Answer a READ with `n` bytes that the disk has read; False if `Reader.read` is to be called.

        Closes the file.
        """
        try:
            return n >= <Py_ssize_t>whole._shown.size and self._give(whole, data[: whole._shown.size])
        except OSError:
            return False
        finally:
            close(whole.fd)

    cdef bint _give(self, Whole whole, data) except -1:
        """Answer with `data`, if it is certain to be of the version that is shown: the file has it afterwards."""
        cdef statx st
        if attributes(whole.fd, &st) or not shows(&whole._shown, &st):
            return False
        # That bytes are handed out is recorded before it is seen again which version is shown: see `Catalog.serves`.
        if not self._record(whole._record)[1] & _SERVED:
            if not self._still_shows(whole):
                return False
            self._catalog.set_served(whole._record)
        if not self._still_shows(whole) or self._ends.knows(whole._node):
            return False
        self._counters.count_whole_read(whole._shown.size)
        self._send(whole.unique, data)
        item = items.item_at(whole._record, 0)
        self._admission.missed(Fetched(item, 0, data, version(&whole._shown)), whole._pid, False)
        return True

    cdef inline bint _still_shows(self, Whole whole) noexcept:
        cdef Shown now = self._shown(whole._record)
        return memcmp(&now, &whole._shown, sizeof(now)) == 0

    cdef bint _answer_kept(self, fuse_in_header *header, uint64_t record, uint64_t size) except -1:
        """Answer with what need not be read, if that is all of it."""
        admission = self._admission
        parts = admission.stashed(items.item_at(record, 0), 0, size, size, header.pid)
        data = parts[0]
        if len(parts) != 1 or isinstance(data, int) or len(data) != size or self._ends.knows(header.nodeid):
            return False
        self._counters.add("reads")
        self._counters.add(admission.served_from, size)
        self._send(header.unique, data)
        return True

    cdef int _send(self, uint64_t unique, data) except -1:
        cdef Py_buffer bytes_of
        PyObject_GetBuffer(data, &bytes_of, PyBUF_SIMPLE)
        try:
            return self._reply(unique, bytes_of.buf, bytes_of.len)
        finally:
            PyBuffer_Release(&bytes_of)
