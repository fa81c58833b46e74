# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The commonest requests, answered in one go: READ of a whole small file, and LOOKUP of a name that is in memory.

What they cost is the GIL, the copies and whom they wake up. So this is what the data loop, the namespace and
the reader do, compiled, for the case in which nothing has to be weighed. Whatever is unusual is left to them: a request
that is not answered here has had nothing done for it.

To take the GIL may mean to wait for a thread that holds it, so this is done once for each request: without it, the last
reply is sent, the next request received, and what it asks for is looked up and copied, since all of that lies in memory
that is only appended to, or in the source. With it, the last reply is accounted for, and whether the next one may be
given is decided, as in any Python code.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, ENODEV, ENOENT, ENOTTY, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memchr, memset, strerror
from posix.fcntl cimport O_NONBLOCK, O_NOCTTY, O_RDONLY
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport close, read, write

from coordlfs.kernel.calls cimport (
    EFD_CLOEXEC,
    EFD_NONBLOCK,
    O_DIRECT,
    O_NOATIME,
    O_PATH,
    RESOLVE_CACHED,
    RWF_NOWAIT,
    aio_context_t,
    attributes,
    cachestat,
    counted,
    end_turn,
    epoll_event,
    epoll_wait,
    eventfd,
    has_ended,
    io_event,
    iovec,
    load,
    open_beneath,
    preadv2,
    set_up,
    store,
    submit,
    take_ended,
    take_turn,
    writev,
)
from coordlfs.kernel.linux cimport (
    FUSE_IOCTL,
    FUSE_IOCTL_DIR,
    FUSE_LOOKUP,
    FUSE_READ,
    fuse_entry_out,
    fuse_in_header,
    fuse_ioctl_in,
    fuse_out_header,
    fuse_read_in,
    statx,
)
from coordlfs.catalogue.records cimport Index, Records, Shown, are_same, is_usual, put_entry, version
from coordlfs.serving.plain_path cimport ABSENT, Flight, PlainPath, Seen, Tally

from coordlfs.cache import items
from coordlfs.cache.admission import Fetched
from coordlfs.catalogue.catalog import LINKED, REGULAR, SERVED
from coordlfs.kernel import fuse, pages
from coordlfs.kernel.pages import PAGE
from coordlfs.catalogue.metrics import NAMES
from coordlfs.serving.reading import Request
from coordlfs.sources.versions import YOUNG_NS

cdef struct Entry:  # the reply to LOOKUP
    fuse_out_header header
    fuse_entry_out entry


cdef enum Kind:
    UNUSUAL, NAME, BYTES, NO_BYTES, WRONG_BYTES  # of a request: to be dispatched; LOOKUP; READ, and what was got for it
    DISK_BYTES  # no request: the disk has read


cdef enum:
    _LONGEST_PATH = 4095
    _KEEPER_THREADS = 64
    _HALF = 1 << 20
    _SLOTS = 64  # for READs that the disk works on
    _AT_ONCE = 8  # requests that may be refused before the GIL is taken again
    _PLAIN_AT_ONCE = 1024  # and answered on the plain path
    _MOMENT = 100  # milliseconds
    _RESTS = 32  # READs that are left to the others after one that went wrong here: more of those will come


cdef struct Found:  # what a request asks for
    Kind kind
    int64_t record  # of the file that is to be read; of the directory of a name
    int fd  # of the file, if it is to be read
    Shown shown
    statx st
    int slot  # whose read has ended
    int64_t n  # bytes that it brought, or an errno below 0
    int path  # where it begins in `text`
    char text[_LONGEST_PATH + 1]


cdef uint64_t _PAGE = PAGE, _LARGEST = fuse.MAX_READ - 1, _MAX_READ = fuse.MAX_READ
cdef uint32_t _REGULAR = REGULAR, _SERVED = SERVED, _LINKED = LINKED
cdef int64_t _YOUNG = YOUNG_NS
cdef uint32_t _READ_SIZE = sizeof(fuse_in_header) + sizeof(fuse_read_in)
cdef int _CHUNK_BITS = items.item_at(1, 0).bit_length() - 1
cdef int _READS = NAMES.index("reads"), _SOURCE_READS = NAMES.index("source_reads")
cdef int _SOURCE_BYTES = NAMES.index("source_bytes"), _SOURCE_FILES = NAMES.index("source_files")
cdef int _DATASET_ITEMS = NAMES.index("dataset_items"), _DATASET_BYTES = NAMES.index("dataset_bytes")
cdef int _TURNS = NAMES.index("turns")
cdef int _LOOKUPS = NAMES.index("lookups"), _IOCTLS = NAMES.index("ioctls")
cdef int _FOR_READING = O_RDONLY | O_NOCTTY | O_NONBLOCK


cdef object item_of(uint64_t record):
    """The item that a small file is."""
    return record << _CHUNK_BITS


cdef class Requests:
    """What one thread receives into and answers from.

    `request` is a buffer for one request, and `into` is page-aligned memory for the bytes of two READs, `MAX_READ` each and
    a page. `unlooked` counts the requests since the thread last looked for other things to do.
    `awaited` is the request for which the thread may have to wait, or 0. Whoever sees to it that others serve meanwhile
    leaves a `wait`, which `end_wait` is called with when that is over.
    """

    cdef public int unlooked
    cdef readonly uint64_t awaited
    cdef readonly uint32_t awaited_by  # a process
    cdef readonly double awaited_since  # as time.monotonic()
    cdef public object wait
    cdef object _request, _into
    cdef unsigned char[::1] _received, _memory
    cdef Py_ssize_t _half  # which begins there is read into; the other one may hold the last answer
    cdef Found _found
    # The index and the keepers' threads, as they were when this thread last held the GIL; if they change, others
    # take their place.
    cdef Index _index
    cdef object _keepers
    cdef uint64_t _keeper_threads[_KEEPER_THREADS]  # what they say, be it the number of a thread or not
    cdef int _n_keeper_threads
    # The answer that is to be sent: `_unique` is 0 if there is none.
    cdef uint64_t _unique
    cdef Entry _entry  # of which READ has the first part only
    cdef iovec _bytes
    cdef Py_buffer _kept  # where they are, if not in `into`
    cdef bint _has_bytes, _is_kept
    cdef int _slot  # they are in the memory of, or -1
    cdef int _to_submit  # the slot that the disk is to read into, or -1
    cdef Seen _seen
    cdef Tally _tally  # of the plain path
    cdef bint _goes_on  # with it: the GIL was taken only since so many were answered
    cdef Whole _given  # the READ that is to be accounted for when its bytes are sent

    def __init__(self, request, into):
        self._request, self._into = request, memoryview(into)
        self._received, self._memory = request, into
        self.unlooked = self._half = self._unique = self._n_keeper_threads = 0
        self._has_bytes = self._is_kept = False
        self.awaited = 0
        self.wait = None
        self._slot = self._to_submit = -1
        self._index, self._keepers, self._seen = Index(), None, Seen()
        memset(&self._tally, 0, sizeof(Tally))
        self._goes_on = False

    cdef void _answer(self, uint64_t unique, const void *data, size_t length, Whole given) noexcept:
        """Have bytes sent, which stay as they are until they are."""
        self._bytes.iov_base, self._bytes.iov_len = <void *>data, length
        self._has_bytes, self._given = True, given
        self._entry.header.len, self._entry.header.error = sizeof(fuse_out_header) + length, 0
        self._unique = self._entry.header.unique = unique

    cdef int _answer_kept(self, uint64_t unique, data) except -1:
        """`_answer` with bytes that are kept somewhere."""
        PyObject_GetBuffer(data, &self._kept, PyBUF_SIMPLE)
        self._is_kept = True
        self._answer(unique, self._kept.buf, self._kept.len, None)
        return 0

    cdef int _send(self, int device) noexcept nogil:
        """Send the answer; the errno."""
        cdef iovec parts[2]
        cdef ssize_t written
        if self._has_bytes:
            parts[0].iov_base, parts[0].iov_len = &self._entry, sizeof(fuse_out_header)
            parts[1] = self._bytes
            written = writev(device, parts, 2)
        else:
            written = write(device, &self._entry, sizeof(Entry))
        return 0 if written >= 0 or errno in (ENOENT, ENODEV) else errno  # the caller gave up; unmounted


cdef class Whole:
    """A READ of a whole file, which is open, and has `size` bytes if no other version of it than the one shown."""

    cdef readonly uint64_t node
    cdef uint64_t _unique, _record
    cdef uint32_t _asked, _pid
    cdef Shown _shown
    cdef object _data
    # While the disk works on it:
    cdef double _since
    cdef bint _is_interrupted

    cdef object _request(self):
        """It, as the others know it."""
        return Request(self.node, 0, min(self._asked, _MAX_READ), self._pid, False)


cdef class FastPath:
    """Answers requests, and what the disk has read for them.

    `fd` is readable when it has read something, which `receive` then sees to; -1 where it is not read in this way.
    `refuse` answers with an error, `read_anew` has a READ answered by somebody else; `end_wait`: see `Requests`. Who
    looks for long waits sets `is_watched` as long as it does; an eventfd, `watch`, is written to when it is to begin.
    `waits`, a `coordlfs.serving.waits.Waits`, holds the numbers of READs that were interrupted before they were begun,
    and is told which the disk works on.
    Thread-safe.
    """

    cdef readonly int fd
    cdef int _device, _root
    cdef aio_context_t _disk
    cdef object _memory
    cdef unsigned char[::1] _slots_memory
    cdef int _free[_SLOTS]
    cdef int _fds[_SLOTS]
    cdef int _n_free
    cdef list _begun  # by slot
    cdef object _source, _admission, _policy, _epochs, _counters, _known_ends, _refuse, _read_anew, _end_wait, _early
    cdef object _admission_lock, _counters_lock
    cdef uint64_t[::1] _counts
    cdef readonly bint answers_reads
    cdef public int is_watched
    cdef int _watch
    cdef bint _answers_names, _answers_plainly
    cdef int _rests, _turn
    cdef Records _records
    cdef PlainPath _plain
    cdef object _tier

    def __init__(self, device, Records records not None, reader, refuse, read_anew, end_wait, watch, waits):
        self._device, self._root = device, reader.source.root
        self._records, self._source, self._admission = records, reader.source, reader.admission
        self._policy, self._epochs = reader.admission.policy, reader.admission.accounts.epochs
        self._counters, self._known_ends = reader.counters, reader.ends.notified_of
        self._counts = reader.counters.words
        self._admission_lock, self._counters_lock = self._admission.lock, reader.counters.lock
        self._refuse, self._read_anew, self._end_wait = refuse, read_anew, end_wait
        self._watch, self.is_watched, self._early = watch, False, waits.early
        self._answers_names = not reader.source.is_remote
        self.answers_reads = self._answers_names and reader.sharing is None
        self._tier = reader.tier
        self.fd, self._disk, self._n_free, self._begun = -1, 0, 0, waits.disk
        self._begun.extend([None] * _SLOTS)
        self._answers_plainly = reader.sharing is None and (self.answers_reads or self._tier is not None)
        if self._answers_plainly:
            self.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.answers_reads and self.fd >= 0 and not set_up(_SLOTS, &self._disk):
            self._memory = pages.huge_buffer(_SLOTS * fuse.MAX_READ)
            self._slots_memory = self._memory
            for slot in range(_SLOTS):
                self._give_slot(slot)
        self._plain = PlainPath(device, records, reader, read_anew, self.fd)
        self._plain.reads_source = self.answers_reads
        waits.is_reading = self._plain.is_reading
        if self._tier is not None and not self._plain.is_possible:
            self.answers_reads = False  # what is on disk would not be found

    def leave_to_others(self):
        """Begin nothing any more: what is looked at with the GIL held may wait for a file system that asks others."""
        self._answers_names = self.answers_reads = self._plain.reads_source = False

    # -- READs that the disk works on, as the data loop asks for them -----------------------------------------------

    def hear(self):
        """`fd` is readable: it is no longer, until the disk has read more than what `receive` then finds."""
        cdef uint64_t n = 0
        read(self.fd, &n, sizeof(n))

    def interrupt(self, unique):
        """Who waits for a READ gives up; False if the disk does not read for it."""
        for whole in self._begun:
            if whole is not None and (<Whole>whole)._unique == unique:
                (<Whole>whole)._is_interrupted = True
                return True
        return self._plain.interrupt(unique)

    def given_up(self, before):
        """The numbers of READs that began `before` then, by `time.monotonic()`, and were given up; each is told once."""
        given_up = self._plain.given_up(before)
        for whole in self._begun:
            if whole is not None and (<Whole>whole)._is_interrupted and (<Whole>whole)._since < before:
                (<Whole>whole)._is_interrupted = False
                given_up.append((<Whole>whole)._unique)
        return given_up

    def hung_in_tier(self, before):
        """Numbers and requests of READs for which the disk tier was asked `before` then, and has not read; each once."""
        return self._plain.hung_in_tier(before)

    def hangs_in_tier(self):
        """Whether the disk tier still has to read what was given away as hung."""
        return self._plain.hangs_in_tier()

    cdef void _give_slot(self, int slot) noexcept:
        self._begun[slot] = None
        self._free[self._n_free] = slot
        self._n_free += 1

    # -- requests ---------------------------------------------------------------------------------------------------

    def receive(self, Requests requests not None, int most, int poller=-1):
        """Answer what there is, until something else has to be done: the length of a request that is to be dispatched.

        `poller` is an epoll that tells of requests, and of all else that the thread sees to: between READs that need no GIL
        it is waited for, too, for a moment. 0 after `most` requests; None if there is no more. Raises OSError if the device is read in vain.
        """
        cdef fuse_in_header *header = <fuse_in_header *>&requests._received[0]
        cdef size_t room = requests._received.shape[0]
        cdef ssize_t n
        cdef int failed, code = 0, unsubmitted, refused
        while True:
            self._update(requests)
            n = failed = refused = 0
            with nogil:
                end_turn(&self._turn)
                if requests._unique:
                    failed = requests._send(self._device)
                unsubmitted = self._submit(header, requests)
                while requests.unlooked < most and requests._tally.answered < _PLAIN_AT_ONCE:
                    if self._plain.finish(&requests._tally):
                        requests._tally.answered += 1
                        continue
                    if self._look_at_disk(requests):
                        n = sizeof(fuse_in_header)
                        break
                    n = read(self._device, header, room)  # never blocks
                    if n < 0:
                        code = errno
                        if code == EAGAIN and self._may_wait(requests) and self._has_more(poller):
                            n = 0
                            continue
                        break
                    if refused < _AT_ONCE and self._refuse_ioctl(header, n):
                        refused += 1
                    elif not self._is_plain(header, n, requests):
                        self._look_up(header, n, requests)
                        break
                    n = 0
                take_turn(&self._turn)
            if refused:
                self._count_ioctls(refused)
            self._counts[_TURNS] += 1
            requests._goes_on = requests._tally.answered >= _PLAIN_AT_ONCE
            if requests._tally.answered or requests._tally.n_left:
                self._plain.settle(&requests._tally)
            if requests._unique:
                self._sent(requests, failed)
            if unsubmitted >= 0:
                close(self._fds[unsubmitted])
                self._rests = _RESTS
                self._leave(unsubmitted)
            if requests.wait is not None:
                wait, requests.wait = requests.wait, None
                self._end_wait(wait)
            if n <= 0:
                self._turn_away()
            if n < 0:
                if code == EAGAIN:
                    return None
                raise OSError(code, strerror(code).decode(), "read")
            if not n:
                return 0
            requests.unlooked += 1
            if requests._found.kind == DISK_BYTES:
                self._answer_from_disk(requests)
                continue
            try:
                if not self._answer(header, requests):
                    self._turn_away()
                    return n
            except Exception as e:
                self._refuse(header.unique, e)

    cdef bint _may_wait(self, Requests requests) noexcept nogil:
        """Whether it is likely that the next request needs no GIL either, and nothing is left to others meanwhile."""
        return (requests._tally.answered or requests._goes_on) and not requests._tally.n_left

    cdef bint _has_more(self, int poller) noexcept nogil:
        """Wait for a moment; whether there is a request, or a disk has read, and nothing else is to be seen to."""
        cdef epoll_event events[4]
        cdef uint64_t n = 0
        cdef bint has_more = False
        cdef int i, found = epoll_wait(poller, events, 4, _MOMENT)
        for i in range(found):
            if events[i].data.fd == self.fd:
                read(self.fd, &n, sizeof(n))
            elif events[i].data.fd != self._device:
                return False
            has_more = True
        return has_more

    def account(self, Requests requests not None):
        """Account for what a thread has answered so far, whatever it is at."""
        self._plain.account(&requests._tally)

    cdef void _turn_away(self) noexcept:
        """A thread has something else to do, which may take its time."""
        cdef uint64_t one = 1
        end_turn(&self._turn)
        if (self._disk and self._n_free < _SLOTS and has_ended(self._disk)) or self._plain.has_ended():
            write(self.fd, &one, sizeof(one))  # for others to hear

    cdef int _update(self, Requests requests) except -1:
        """See to what a thread has to know when it does not hold the GIL."""
        self._records.update(requests._index)
        self._plain.look(requests._seen)
        keepers = self._admission.keeper_threads
        if keepers is not requests._keepers:
            requests._keepers = keepers
            requests._n_keeper_threads = 0
            for thread in list(keepers)[:_KEEPER_THREADS]:
                requests._keeper_threads[requests._n_keeper_threads] = thread
                requests._n_keeper_threads += 1
        return 0

    cdef int _sent(self, Requests requests, int failed) except -1:
        """An answer was sent: account for it."""
        cdef uint64_t unique = requests._unique
        cdef Whole given = requests._given
        requests._unique, requests._given = 0, None
        if requests._is_kept:
            PyBuffer_Release(&requests._kept)
        requests._has_bytes = requests._is_kept = False
        cdef int slot = requests._slot
        requests._slot = -1
        try:
            if failed:
                raise OSError(failed, strerror(failed).decode(), "reply")
            if given is not None:
                self._account(given)
        except Exception as e:
            self._refuse(unique, e)
        finally:
            if slot >= 0:
                self._give_slot(slot)
        return 0

    cdef int _account(self, Whole given) except -1:
        keeps = self._tier is not None and not self._tier.writer.is_full
        fetched = None
        if not self._counts_only(given):
            fetched = Fetched(item_of(given._record), 0, given._data, version(given._shown))
            self._admission.missed(fetched, given._pid, False)
        if keeps:
            self._tier.keep(fetched or Fetched(item_of(given._record), 0, given._data, version(given._shown)))
        return 0

    cdef bint _counts_only(self, Whole given) except -1:
        """Count a miss as `Admission.missed` does, if there is nothing more to it; else False, and nothing was done."""
        admission, policy = self._admission, self._policy
        cdef uint64_t size = given._shown.size
        if policy.used + (size + _PAGE - 1) // _PAGE <= policy.capacity or admission.recovering:
            return False
        if admission.skipped or admission.announced.wanted:
            return False
        cdef uint64_t *words = self._records.words_of(given._record)
        cdef uint64_t epoch, last
        self._admission_lock.acquire()
        try:
            if not self._is_absent(given._record):
                return False
            if not are_same(given._shown, self._records.shown(given._record)):
                return True  # another thread has seen a newer version meanwhile
            current = self._epochs.current
            epoch, last = current.number, words[6]  # of the last miss the epoch, and below 32 bits the page
            if last >> 32 == epoch:
                return False  # the first one of an epoch, or more of the last miss
            current.misses += 1
            current.bytes += size
            words[6] = epoch << 32
            self._counters_lock.acquire()
            if not last:
                self._counts[_DATASET_ITEMS] += 1
                self._counts[_DATASET_BYTES] += size
            self._counts[_SOURCE_FILES] += 1
            self._counters_lock.release()
            return True
        finally:
            self._admission_lock.release()

    cdef bint _is_absent(self, uint64_t record) except -1:
        """As `Admission.is_absent`, of a small file."""
        item = item_of(record)
        return item not in self._policy.taken and item not in self._admission.dropping

    cdef bint _answer(self, fuse_in_header *header, Requests requests) except -1:
        """Decide about a request that was looked up; False if it is to be dispatched."""
        cdef Kind kind = requests._found.kind
        if kind == UNUSUAL:
            return False
        if kind == NAME:
            return self._answer_lookup(header, requests)
        try:
            return self._answer_read(header, requests)
        finally:
            if requests._found.fd >= 0 and requests._to_submit < 0:
                close(requests._found.fd)

    # -- without the GIL --------------------------------------------------------------------------------------------

    cdef bint _is_plain(self, const fuse_in_header *header, ssize_t length, Requests requests) noexcept nogil:
        """Whether a request is answered on the plain path, or is about to be."""
        cdef int i
        if length != _READ_SIZE or header.len != length or header.opcode != FUSE_READ or not self._answers_plainly:
            return False
        for i in range(requests._n_keeper_threads):
            if header.pid == requests._keeper_threads[i]:
                return False
        self._wait_for(header, requests)  # should a disk be able to take no more
        cdef bint is_taken = self._plain.take(
            header, requests._index, requests._seen, requests._found.text, &requests._memory[requests._half], &requests._tally
        )
        requests.awaited = 0
        if is_taken:
            requests._tally.answered += 1
        return is_taken

    cdef void _look_up(self, const fuse_in_header *header, ssize_t length, Requests requests) noexcept nogil:
        """See what a request asks for, and get it if it need not be waited for."""
        cdef Found *found = &requests._found
        found.kind, found.fd = UNUSUAL, -1
        if length < <ssize_t>sizeof(fuse_in_header) or header.len != length:
            return
        if header.opcode == FUSE_READ and self.answers_reads and length == _READ_SIZE:
            self._look_for_bytes(header, requests)
        elif header.opcode == FUSE_LOOKUP and self._answers_names:
            self._look_for_name(header, requests)

    cdef bint _refuse_ioctl(self, const fuse_in_header *header, ssize_t length) noexcept nogil:
        """Whether a request was an ioctl of a file, which it was told that there are none."""
        cdef fuse_out_header reply
        if length < <ssize_t>(sizeof(fuse_in_header) + sizeof(fuse_ioctl_in)) or header.len != length:
            return False
        if header.opcode != FUSE_IOCTL or (<const fuse_ioctl_in *>(header + 1)).flags & FUSE_IOCTL_DIR:
            return False
        reply.len, reply.error, reply.unique = sizeof(reply), -ENOTTY, header.unique
        write(self._device, &reply, sizeof(reply))  # the caller may be gone: nobody is to be told then
        return True

    cdef int _submit(self, const fuse_in_header *header, Requests requests) noexcept nogil:
        """Have the disk read what it is to; the slot of what it was not, or -1."""
        cdef int slot = requests._to_submit
        if slot < 0:
            return -1
        requests._to_submit = -1
        cdef uint64_t npages = (requests._found.shown.size + _PAGE - 1) // _PAGE
        self._wait_for(header, requests)  # should the disk be able to take no more
        cdef int n = submit(self._disk, slot, requests._found.fd, self._memory_of(slot), npages * _PAGE, self.fd)
        requests.awaited = 0
        return -1 if n == 1 else slot

    cdef void _wait_for(self, const fuse_in_header *header, Requests requests) noexcept nogil:
        """This thread may have to wait, until `requests.awaited` is 0 again."""
        cdef timespec now
        cdef uint64_t one = 1
        clock_gettime(CLOCK_MONOTONIC, &now)
        requests.awaited_since, requests.awaited_by = now.tv_sec + now.tv_nsec * 1e-9, header.pid
        store(&requests.awaited, header.unique)
        if not load(&self.is_watched):
            write(self._watch, &one, sizeof(one))

    cdef inline unsigned char *_memory_of(self, int slot) noexcept nogil:
        return &self._slots_memory[slot * _MAX_READ]

    cdef bint _look_at_disk(self, Requests requests) noexcept nogil:
        """Whether the disk has read something."""
        cdef io_event event
        if not self._disk or self._n_free == _SLOTS or take_ended(self._disk, &event) != 1:
            return False
        cdef Found *found = &requests._found
        cdef int fd = self._fds[event.data]
        found.kind, found.slot, found.n = DISK_BYTES, event.data, event.res
        if attributes(fd, &found.st):
            found.n = -1
        close(fd)
        return True

    cdef void _look_for_name(self, const fuse_in_header *header, Requests requests) noexcept nogil:
        cdef Found *found = &requests._found
        cdef const char *name = <const char *>(header + 1)
        cdef size_t length = header.len - sizeof(fuse_in_header)
        if length < 2 or memchr(name, 0, length) != name + length - 1:
            return
        length -= 1
        if memchr(name, c"/", length) or (name[0] == c"." and (length == 1 or (length == 2 and name[1] == c"."))):
            return
        found.record = self._records.find(requests._index, header.nodeid)
        if found.record < 0:
            return
        found.path = self._records.put_path(found.text, _LONGEST_PATH, found.record, name, length)
        if found.path < 0:
            return
        cdef int fd = open_beneath(self._root, &found.text[found.path], O_PATH, RESOLVE_CACHED)
        if fd < 0 and errno == EAGAIN:
            self._wait_for(header, requests)
            fd = open_beneath(self._root, &found.text[found.path], O_PATH, 0)
            requests.awaited = 0
        if fd < 0:
            return
        cdef bint is_known = not attributes(fd, &found.st)
        close(fd)
        if is_known and is_usual(&found.st):
            found.kind = NAME

    cdef void _look_for_bytes(self, const fuse_in_header *header, Requests requests) noexcept nogil:
        cdef Found *found = &requests._found
        cdef const fuse_read_in *asked = <const fuse_read_in *>(header + 1)
        found.record = self._records.find(requests._index, header.nodeid)
        if asked.offset or asked.flags & (O_DIRECT | O_NOATIME) or found.record < 0:
            return
        cdef const uint64_t *words = self._records.words_of(found.record)
        found.shown = self._records.shown(found.record)
        if not words[1] & _REGULAR or not 0 < found.shown.size <= asked.size or found.shown.size > _LARGEST:
            return
        found.kind = NO_BYTES
        cdef int i
        if <uint32_t>words[7]:
            return  # it is pinned
        for i in range(requests._n_keeper_threads):
            if header.pid == requests._keeper_threads[i]:
                return  # it is about to be, mostly
        if words[1] & _LINKED:
            return
        found.path = self._records.put_path(
            found.text, _LONGEST_PATH, words[1] >> 32, self._records.name_of(found.record), words[1] >> 16 & 0xFFFF
        )
        if found.path < 0:
            return
        cdef Flight stored
        if self._plain.has_tier and ABSENT != self._plain.find(
            requests._seen, &found.text[found.path], _LONGEST_PATH - found.path, &found.shown, &stored
        ):
            return
        found.fd = open_beneath(self._root, &found.text[found.path], _FOR_READING, RESOLVE_CACHED)
        if found.fd < 0:
            return
        cdef uint64_t npages = (found.shown.size + _PAGE - 1) // _PAGE
        cdef counted held
        cdef iovec part
        cdef ssize_t copied
        if not cachestat(found.fd, npages * _PAGE, &held) and held.cached == npages:
            part.iov_base, part.iov_len = &requests._memory[requests._half], found.shown.size
            # Should a page be on its way from the disk still, or gone by now, this ends there.
            copied = preadv2(found.fd, &part, 1, 0, RWF_NOWAIT)
            found.kind = BYTES if copied == <ssize_t>found.shown.size else WRONG_BYTES
        if attributes(found.fd, &found.st):
            close(found.fd)
            found.fd = -1

    # -- names ------------------------------------------------------------------------------------------------------

    cdef bint _answer_lookup(self, fuse_in_header *header, Requests requests) except -1:
        cdef Found *found = &requests._found
        path = PyBytes_FromStringAndSize(&found.text[found.path], _LONGEST_PATH - found.path)
        cdef const char *name = <const char *>(header + 1)
        cdef size_t length = header.len - sizeof(fuse_in_header) - 1
        cdef int64_t record = self._records.enter(requests._index, path, found.record, name, length, &found.st)
        if record < 0:
            return False
        self._counters_lock.acquire()
        self._counts[_LOOKUPS] += 1
        self._counters_lock.release()
        cdef Entry *reply = &requests._entry
        memset(reply, 0, sizeof(Entry))
        reply.header.len, reply.header.unique = sizeof(Entry), header.unique
        put_entry(&reply.entry, self._records.words_of(record)[0], &found.st)
        requests._unique = header.unique
        return True

    # -- bytes ------------------------------------------------------------------------------------------------------

    cdef bint _answer_read(self, fuse_in_header *header, Requests requests) except -1:
        cdef Found *found = &requests._found
        if header.nodeid in self._known_ends:
            return False
        if not self._is_absent(found.record):
            return self._answer_kept(header, requests)
        if header.pid in self._admission.keeper_threads:
            return False
        if self._rests > 0:
            self._rests -= 1
            return False
        if found.kind == WRONG_BYTES:
            self._rests = _RESTS
            return False
        if found.fd < 0 or not are_same(found.shown, self._records.shown_by(&found.st)):
            return False  # it might be no file any more
        if not self._records.words_of(found.record)[1] & _SERVED and self._is_young(found):
            return False  # it might be being written to
        cdef Whole whole = Whole()
        whole._unique = header.unique
        whole.node, whole._pid, whole._asked = header.nodeid, header.pid, (<fuse_read_in *>(header + 1)).size
        whole._record, whole._shown = found.record, found.shown
        if found.kind == BYTES:
            return self._serves(whole) and self._give(whole, requests)
        return self._begin(whole, requests)

    cdef bint _is_young(self, Found *found) noexcept:
        """`versions.is_young`."""
        cdef timespec now
        clock_gettime(CLOCK_REALTIME, &now)
        cdef int64_t age = <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec - <int64_t>found.shown.mtime_ns
        return -_YOUNG < age < _YOUNG

    cdef bint _give(self, Whole whole, Requests requests) except -1:
        cdef uint64_t size = whole._shown.size
        self._count_read(size)
        whole._data = requests._into[requests._half : requests._half + <Py_ssize_t>size]
        requests._answer(whole._unique, &requests._memory[requests._half], size, whole)
        requests._half ^= _HALF
        return True

    cdef int _count_ioctls(self, int n) except -1:
        self._counters_lock.acquire()
        self._counts[_IOCTLS] += n
        self._counters_lock.release()
        return 0

    cdef int _count_read(self, uint64_t size) except -1:
        """Count a READ, and as `Counters.count_read` that it went to the source."""
        self._counters_lock.acquire()
        self._counts[_READS] += 1
        self._counts[_SOURCE_READS] += 1
        self._counts[_SOURCE_BYTES] += size
        self._counters_lock.release()
        return 0

    cdef bint _begin(self, Whole whole, Requests requests) except -1:
        """Have the disk read a file; False if that cannot be."""
        cdef timespec now
        try:
            is_possible = self._source.go_direct(requests._found.fd)
            whole._is_interrupted = whole._unique in self._early
        except OSError:
            is_possible = False  # whoever reads it again will say
        if not is_possible or not self._n_free:
            self._rests = _RESTS
            return False
        # No other thread gets the GIL from here on: there is a free slot still.
        clock_gettime(CLOCK_MONOTONIC, &now)
        whole._since = now.tv_sec + now.tv_nsec * 1e-9
        self._n_free -= 1
        requests._to_submit = self._free[self._n_free]
        self._begun[requests._to_submit] = whole
        self._fds[requests._to_submit] = requests._found.fd
        return True

    cdef int _leave(self, int slot) except -1:
        """Leave a READ that the disk did not answer to somebody else."""
        cdef Whole whole = self._begun[slot]
        self._give_slot(slot)
        try:
            self._counters.add("reads")
            self._read_anew(whole._unique, whole._request(), interrupted=whole._is_interrupted)
        except Exception as e:
            self._refuse(whole._unique, e)
        return 0

    cdef int _answer_from_disk(self, Requests requests) except -1:
        cdef Found *found = &requests._found
        cdef Whole whole = self._begun[found.slot]
        cdef uint64_t size = whole._shown.size
        try:
            is_good = found.n >= <int64_t>size and are_same(whole._shown, self._records.shown_by(&found.st)) and self._serves(whole)
        except Exception:
            is_good = False
        if not is_good:
            return self._leave(found.slot)
        self._count_read(size)
        whole._data = memoryview(self._memory)[found.slot * _MAX_READ : found.slot * _MAX_READ + size]
        requests._answer(whole._unique, self._memory_of(found.slot), size, whole)
        requests._slot = found.slot
        return 0

    cdef bint _serves(self, Whole whole) except -1:
        """Whether bytes may be given of the version that was shown: the file has them afterwards."""
        if not self._records.words_of(whole._record)[1] & _SERVED:
            return self._records.catalog.serves(whole._record, version(whole._shown)) and whole.node not in self._known_ends
        return are_same(whole._shown, self._records.shown(whole._record)) and whole.node not in self._known_ends

    cdef bint _answer_kept(self, fuse_in_header *header, Requests requests) except -1:
        """Answer with what need not be read, if that is all of it."""
        admission = self._admission
        cdef uint64_t size = requests._found.shown.size
        parts = admission.stashed(item_of(requests._found.record), 0, size, size, header.pid)
        if len(parts) != 1 or header.nodeid in self._known_ends:
            return False
        data = parts[0]
        if isinstance(data, int) or len(data) != size:
            return False
        self._counters.add("reads")
        self._counters.add(admission.served_from, size)
        requests._answer_kept(header.unique, data)
        return True
