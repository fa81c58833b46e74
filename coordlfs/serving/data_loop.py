"""The data loop: threads that read /dev/fuse, answer READ, LOOKUP, GETATTR and READDIRPLUS, and hand on the rest.

OPEN, OPENDIR, FLUSH, RELEASE and ACCESS are refused with ENOSYS, after which the kernel never sends them again: to
open a file that it knows costs no request ("zero-request open"). It does not know which bytes may be given (`reading`
does), or what is cached.

One or two threads compete for the GIL. A local disk reads while they go on (AIO), and other nodes
answer. Whatever else has to be waited for is a blocking call, and another thread takes the place of one that waits, so
that hundreds of READs may wait and none of those that need not wait does: at once where the source is on a network, and
after milliseconds on a local disk, most of whose waits for names are over sooner than a thread wakes up. What is over
at once is done without releasing the GIL, which would cost more to get back. A source that never answers
holds the threads that wait for it, and nobody else: a caller who is killed or interrupted meanwhile gets EINTR.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

from coordlfs.cache import hints
from coordlfs.cache.disk_tier import Stored
from coordlfs.cache.fetch_ahead import FetchAhead
from coordlfs.catalogue.catalog import DIRECTORY, REGULAR
from coordlfs.catalogue.metrics import Counters
from coordlfs.catalogue.records import Records
from coordlfs.catalogue.timeouts import NAME_TIMEOUT, attr_timeout
from coordlfs.kernel import aio, fuse, pages, threads
from coordlfs.kernel.libc import quick_write
from coordlfs.kernel.process import is_called_off
from coordlfs.serving.fast_path import FastPath, Requests
from coordlfs.serving.listings import Listings
from coordlfs.serving.namespace import Namespace
from coordlfs.serving.reading import Answer, Begun, Reader, Request
from coordlfs.serving.waits import Part, Wait, Waits
from coordlfs.sources.directory import pread_all

log = logging.getLogger(__name__)

# Threads that compete for the GIL: two that pass it back and forth serve less than one, unless there is a
# processor for each while the job has another, or they are mostly without it, as on the fast path.
_RUNNING = 1 if len(os.sched_getaffinity(0)) <= 2 else 2
_RUNNING_ON_FAST_PATH = 2
_RUNNING_WITH_TIER = (
    4  # hits of which take no GIL: 1.08 of bindfs's files/s with four, and 0.73 with two (2 processors)
)
_DISK_READS = 64  # under way; more of them are blocking calls
# Threads that are woken up for what other nodes and keepers answer; the others look for it every so many seconds. The
# kernel allows for 500 ways to wake somebody, and those of servers that cannot end, since the source hangs, count too.
_LOOKING, _LOOK_AGAIN = 16, 0.02
_LOOK_EVERY = 8  # requests after which that and ended reads are looked for, even if there are more requests
# Seconds between looks for waits for a local disk that take longer, so that another thread serves: more where none has
# taken long of late, since who looks takes the GIL from those who serve.
_BRIEF, _LONGEST_BRIEF = 0.001, 0.008
_RESTS_AFTER = 1.0  # seconds without a wait after which nobody looks for those that take longer
_NO_THREAD_FOR = 0.1  # seconds until a thread that was not to be had is tried again
_THREADS = 1024  # so many may wait for a source, be it for ever
_EARLY_FOR = 10.0  # seconds that an interrupt waits for its request to be seen to wait
_GIVEN_UP_AFTER = 1.0  # seconds that a request waits before a caller who gave up is told so
_TIER_WAITS = 2.0  # seconds that a READ waits for the disk tier before the source is asked
_KEEPER_WAITS = 10.0  # seconds that a keeper waits for the source, since all of its pins wait with it
_REFUSED = frozenset(
    {fuse.OPEN, fuse.OPENDIR, fuse.FLUSH, fuse.RELEASE, fuse.RELEASEDIR, fuse.ACCESS, fuse.FSYNC, fuse.FSYNCDIR}
)
_NAMES = frozenset(
    {fuse.READLINK, fuse.STATFS, fuse.GETXATTR, fuse.LISTXATTR}
)  # what the namespace loop answers; a mount that is read-only is asked nothing else that can be answered
_SILENT = frozenset({fuse.FORGET, fuse.BATCH_FORGET})
_LAST_OFFSET = (1 << 63) - 1 - fuse.MAX_READ
_SIZE_BITS = 0x3FFF << 16  # of an ioctl's number
_XATTR_NAME = fuse.IN_HEADER.size + fuse.XATTR_IN.size  # where it begins, in a request
_HANDLE = struct.Struct("=Q")
_NOBODY_WAITS = frozenset({errno.ENOENT, errno.ENODEV})  # the caller gave up; unmounted


@contextmanager
def _waiting_for(
    device: int, others: list[int], timeout: float | None
) -> Iterator[tuple[Callable[[], list[int]], int]]:
    """How to wait for one of them, and which are readable then, none after `timeout` seconds; and the epoll, or -1.

    By epoll, which wakes one thread a request. Where no descriptor is left, by poll for the device alone, which refuses
    more descriptors than the process may have.
    """
    try:
        readable = select.epoll(1 + len(others))
    except OSError:
        poll = select.poll()
        poll.register(device, select.POLLIN)
        yield lambda: [fd for fd, _ in poll.poll(_LOOK_AGAIN * 1000)], -1
        return
    with readable:
        readable.register(device, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        for fd in others:
            try:
                readable.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            except OSError:
                try:
                    readable.register(fd, select.EPOLLIN)  # it is an epoll itself
                except OSError as e:
                    log.warning("a thread looks every so often for what it cannot wait for: %s", e.strerror)
                    timeout = _LOOK_AGAIN
        yield lambda: [fd for fd, _ in readable.poll(timeout)], readable.fileno()


def _disk() -> aio.Reads | None:
    """For reads that block no thread; None where the kernel does not allow for them."""
    try:
        return aio.Reads(_DISK_READS, fuse.MAX_READ)
    except OSError as e:
        log.info("reads of the disk are blocking calls: %s", e.strerror)
        return None


class DataLoop:
    """The threads that serve one FUSE device until it is unmounted."""

    def __init__(
        self,
        device: int,
        names: socket.socket,
        records: Records,
        reader: Reader,
        namespace: Namespace,
        listings: Listings,
        ahead: FetchAhead,
        counters: Counters,
        waits: Waits,
    ) -> None:
        self.on_end: Callable[[], None] = lambda: None
        self._device = device
        os.set_blocking(device, False)  # a request that is there is read at once
        self._names = names
        self._reader = reader
        self._namespace = namespace
        self._listings = listings
        self._ahead = ahead
        self._counters = counters
        self._lock = threading.Lock()
        self._total = 0
        self._waiting = 0  # for the source
        # Of each thread that rests, what wakes it up and nobody else; who rested last comes first. (An eventfd for all
        # wakes all of them.)
        self._parked: list[threading.Lock] = []
        self._waits = waits
        self._returned: deque[tuple[int, Request, bool]] = deque()  # READs that are to block a thread; interrupted?
        self._disk = None if reader.source.is_remote and reader.tier is None else _disk()
        self._called = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self._no_thread_until = 0.0
        self._watch = os.eventfd(0, os.EFD_CLOEXEC)  # written to when somebody is to look for long waits
        self._fast_path = FastPath(
            *(device, records, reader, self._refuse, self._return, self._end_fast_wait), self._watch, waits
        )
        self._requests: list[Requests] = []  # of the threads
        counters.tallies.append(self._account)
        is_fast = self._fast_path.answers_reads and reader.admission.hits_ask_nobody
        self._running = _RUNNING_ON_FAST_PATH if is_fast else _RUNNING
        if reader.tier is not None:
            self._running = _RUNNING_WITH_TIER if is_fast else _RUNNING_ON_FAST_PATH
        self._begun: dict[int, tuple[int, Begun, Wait]] = {}  # READs that the disk works on, by slot
        # What to call when a descriptor is readable: READs that nobody waits for can be answered, or a keeper has.
        self._finishers: dict[int, Callable[[], None]] = {
            reader.admission.fd: ahead.receive,
            self._called: self._hear_call,
        }
        if self._disk is not None:
            self._finishers[self._disk.fd] = self._finish_begun
        if self._fast_path.fd >= 0:
            self._finishers[self._fast_path.fd] = self._fast_path.hear
        self._disk_fds = {self._fast_path.fd, -1 if self._disk is None else self._disk.fd} - {-1}
        if reader.sharing is not None:
            self._finishers[reader.sharing.receiver.fd] = reader.sharing.receiver.receive
        self.ended = threading.Event()

    def start(self) -> None:
        """Start the first threads."""
        for _ in range(self._running):
            if not self._spawn() and not self._total:
                raise OSError(errno.EAGAIN, "no thread to be had")
        if not self._reader.source.is_remote:
            threading.Thread(target=self._watch_waits, name="loop watch", daemon=True).start()

    def expect_waits(self) -> None:
        """Take the source for one that may never answer, from now on."""
        self._reader.source.is_remote = True
        self._fast_path.leave_to_others()

    def _spawn(self) -> bool:
        """Start a thread; False if there is none to be had: `look_at_waits` tries again."""
        if time.monotonic() < self._no_thread_until:
            return False
        hears_all = self._total < _LOOKING
        try:
            into = pages.buffer(2 * fuse.MAX_READ + pages.PAGE)
        except (OSError, MemoryError):
            into = None
        # Daemons: one that waits for a source which never answers must not keep the process.
        thread = threading.Thread(target=self._run, args=(hears_all, into), name="data loop", daemon=True)
        if into is None or not threads.start(thread):
            self._no_thread_until = time.monotonic() + _NO_THREAD_FOR
            return False
        self._total += 1
        return True

    # -- how many threads run -----------------------------------------------------------------------------------

    @property
    def _serving(self) -> int:
        return self._total - self._waiting - len(self._parked)

    def _replace(self, wait: Wait) -> None:
        """See that others serve while a thread waits for the source."""
        with self._lock:
            if wait.is_over or wait.is_replaced or not wait.holds_thread:
                return
            wait.is_replaced = True
            self._waiting += 1
            if self._serving >= self._running:
                return
            if self._parked:
                self._parked.pop().release()
            elif self._total < _THREADS and not self._spawn():
                wait.is_replaced = False  # it is tried again while it waits
                self._waiting -= 1

    def _hold_no_thread(self, wait: Wait) -> None:
        """What is waited for goes on without this thread."""
        with self._lock:
            wait.holds_thread = False
            if wait.is_replaced and not wait.is_over:
                wait.is_replaced = False
                self._waiting -= 1

    def _end_wait(self, unique: int, wait: Wait) -> None:
        if self._waits.by_request.get(unique) is wait:  # else it goes on in another way
            del self._waits.by_request[unique]
        self._waits.hung.discard(wait.bytes_of)
        with self._lock:
            wait.is_over = True
            if wait.is_replaced:
                self._waiting -= 1

    def _end_fast_wait(self, wait: Wait) -> None:
        self._end_wait(wait.unique, wait)

    def _watch_waits(self) -> None:
        """Have other threads take the place of those that wait for a local disk for longer than most."""
        path = self._fast_path
        while not self.ended.is_set():
            path.is_watched = False
            if not self._held():  # else it was taken for watched before it was not
                os.eventfd_read(self._watch)
            path.is_watched = True
            rests_at, pause = time.monotonic() + _RESTS_AFTER, _BRIEF
            while (now := time.monotonic()) < rests_at and not self.ended.is_set():
                time.sleep(pause)
                held = self._held(now)
                long = [wait for wait in held if now > wait.since]
                pause = _BRIEF if long else min(2 * pause, _LONGEST_BRIEF)
                if held:
                    rests_at = now + _RESTS_AFTER
                for wait in long:
                    self._replace(wait)

    def _account(self) -> None:
        for requests in list(self._requests):
            self._fast_path.account(requests)

    def _have_watched(self) -> None:
        if not self._fast_path.is_watched:
            os.eventfd_write(self._watch, 1)

    def _held(self, before: float = math.inf) -> list[Wait]:
        """The waits that block a thread whose place none has taken; on the fast path those that began `before`."""
        for requests in list(self._requests):
            if requests.awaited_since < before:
                self._wait_of(requests, requests.awaited)
        return [wait for wait in list(self._waits.by_request.values()) if wait.holds_thread and not wait.is_replaced]

    def _wait_of(self, requests: Requests, unique: int) -> None:
        """See to it that the wait of a thread on the fast path is known, if it is for this request."""
        before: Wait | None = requests.wait  # that the disk took a read, perhaps: after which it waits for a name
        if not unique or requests.awaited != unique or (before is not None and before.unique == unique):
            return
        is_keepers = requests.awaited_by in self._reader.admission.keeper_threads
        wait = Wait(requests.awaited_since, is_keepers, unique in self._waits.early, holds_thread=True, unique=unique)
        with self._lock:
            # The thread sees to it when it holds the GIL, which nothing releases between these lines.
            if requests.awaited != unique or requests.wait is not before or unique in self._waits.by_request:
                return
            requests.wait = self._waits.by_request[unique] = wait
        if before is not None:
            self._end_fast_wait(before)

    def _park_if_many(self) -> bool:
        """Rest until a thread is missed, if there are enough without this one; whether it did."""
        with self._lock:
            if self._serving <= self._running or self._returned or self.ended.is_set():
                return False
            missed = threading.Lock()
            missed.acquire()
            self._parked.append(missed)
        missed.acquire()
        return True

    def _return(self, unique: int, asked: Request, *, interrupted: bool = False) -> None:
        """Have a thread read from the source what another node did not answer, or what went wrong."""
        with self._lock:
            self._returned.append((unique, asked, interrupted))
            if self._parked:
                self._parked.pop().release()
            elif self._total >= _THREADS or not self._spawn():
                os.eventfd_write(self._called, 1)  # whoever serves does it, and all else waits

    # -- serving ------------------------------------------------------------------------------------------------

    def _run(self, hears_all: bool, into: pages.Buffer) -> None:
        request = bytearray(fuse.REQUEST_BUFFER)
        view = memoryview(request)
        requests, receive = Requests(request, into), self._fast_path.receive
        self._requests.append(requests)
        others = list(self._finishers if hears_all else self._disk_fds)
        with _waiting_for(self._device, others, None if hears_all else _LOOK_AGAIN) as (wait, poller):
            had_to_wait = True
            while not self.ended.is_set():
                if requests.unlooked >= _LOOK_EVERY:
                    requests.unlooked = 0
                    self._look()
                while self._returned:
                    self._read_alone(into)
                if not had_to_wait and self._serving > self._running:
                    self._park_if_many()
                    continue
                had_to_wait = has_finished = False
                try:
                    while (n := receive(requests, _LOOK_EVERY, poller)) is None and not self._returned:
                        if has_finished:
                            # Only now: had it been woken up for a request as well, nobody else would be for that one.
                            has_finished = False
                            if self._park_if_many():
                                continue
                        had_to_wait = True
                        ready = wait()
                        for fd in ready:
                            if fd != self._device:
                                has_finished = True
                                requests.unlooked = 0
                                self._finish(fd)
                        if not ready:
                            has_finished = True
                            self._look()
                except OSError as e:
                    if e.errno in (errno.EINTR, errno.ENOENT):
                        continue
                    if e.errno == errno.ENODEV:
                        self._end()  # unmounted
                        return
                    raise
                if n:
                    self._dispatch(request, view[:n], into)

    def _look(self) -> None:
        """Do what there is to do beside requests, whether or not somebody was woken up for it."""
        for fd in self._finishers:
            if fd not in self._disk_fds or (self._begun and fd != self._fast_path.fd):
                self._finish(fd)

    def _hear_call(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._called)

    def _finish(self, fd: int) -> None:
        try:
            self._finishers[fd]()
        except OSError as e:  # which is none of the device, and must not be taken for one
            raise RuntimeError("what was awaited beside requests went wrong") from e

    def _end(self) -> None:
        self.ended.set()
        self.on_end()
        os.eventfd_write(self._watch, 1)
        with self._lock:
            while self._parked:
                self._parked.pop().release()

    def _dispatch(self, buffer: bytearray, request: memoryview, into: pages.Buffer) -> None:
        if len(request) < fuse.IN_HEADER.size:
            return  # nobody to answer
        length, opcode, unique, node, uid, _, pid, _, _ = fuse.IN_HEADER.unpack_from(buffer)
        if not fuse.is_whole(request, length, opcode):
            log.warning("a request of kind %d is not whole", opcode)
            self._reply(fuse.error_reply(unique, errno.EINVAL))
        elif opcode == fuse.READ:
            self._counters.add("reads")
            _, offset, size, _, _, flags = fuse.READ_IN.unpack_from(buffer, fuse.IN_HEADER.size)
            direct, leaves_no_trace = bool(flags & os.O_DIRECT), bool(flags & os.O_NOATIME)
            asked = Request(node, offset, min(size, fuse.MAX_READ), pid, direct, leaves_no_trace)
            self._answer(unique, pid, self._read, unique, asked, into, reads=asked)
        elif opcode == fuse.LOOKUP:
            self._counters.add("lookups")
            self._answer(unique, pid, self._lookup, unique, node, bytes(request[fuse.IN_HEADER.size : -1]))
        elif opcode == fuse.GETATTR:
            self._counters.add("lookups")
            self._answer(unique, pid, self._getattr, unique, node)
        elif opcode in _REFUSED:
            self._counters.add("direct_opens")
            self._reply(fuse.error_reply(unique, errno.ENOSYS))
        elif opcode == fuse.IOCTL:
            _, flags, command, _, size, _ = fuse.IOCTL_IN.unpack_from(buffer, fuse.IN_HEADER.size)
            if flags & fuse.IOCTL_DIR and command & ~_SIZE_BITS == hints.COMMAND:
                body = request[fuse.IN_HEADER.size + fuse.IOCTL_IN.size :]
                self._answer(unique, pid, self._hint, unique, body[:size], uid, pid)
                return
            # Python before 3.14 asks of every file that it opens whether it is a terminal, and the kernel passes it on.
            self._counters.add("ioctls")
            self._reply(fuse.error_reply(unique, errno.ENOTTY))
        elif opcode == fuse.INTERRUPT:
            [interrupted] = _HANDLE.unpack_from(buffer, fuse.IN_HEADER.size)
            for requests in list(self._requests):
                self._wait_of(requests, interrupted)
            is_reading = self._fast_path.interrupt(interrupted)  # though it may be about to be, and have a wait as well
            wait = self._waits.by_request.get(interrupted)
            if wait is not None:
                wait.interrupted = True
            elif not is_reading:
                self._waits.early[interrupted] = time.monotonic()
        elif opcode == fuse.READDIRPLUS:
            self._counters.add("name_requests")
            _, position, size, _, _, _ = fuse.READ_IN.unpack_from(buffer, fuse.IN_HEADER.size)
            self._answer(unique, pid, self._list, unique, node, position, memoryview(into)[: min(size, fuse.MAX_READ)])
        elif opcode == fuse.GETXATTR and hints.is_hint(name := bytes(request[_XATTR_NAME:-1])):
            [size, _] = fuse.XATTR_IN.unpack_from(buffer, fuse.IN_HEADER.size)
            self._answer(unique, pid, self._hint_by_name, unique, node, name, size, uid, pid)
        elif opcode in _NAMES:
            self._counters.add("name_requests")
            self._waits.by_request[unique] = Wait(time.monotonic(), False, unique in self._waits.early)
            self._names.send(request)
        elif opcode not in _SILENT:
            self._counters.add("direct_opens")
            self._reply(fuse.error_reply(unique, errno.ENOSYS))

    def _hold(self, unique: int, pid: int, reads: Request | None, *, interrupted: bool = False) -> Wait:
        """A request that may have to wait for the source, and so far holds this thread."""
        is_keepers = pid in self._reader.admission.keeper_threads
        interrupted = interrupted or unique in self._waits.early
        wait = self._waits.by_request[unique] = Wait(time.monotonic(), is_keepers, interrupted, holds_thread=True)
        wait.thread, wait.asked = threading.get_ident(), reads
        if reads is not None:
            wait.bytes_of = Part.at(reads.node, reads.offset)
            wait.untold = reads.pid if reads.direct else 0
        return wait

    def _answer(
        self,
        unique: int,
        pid: int,
        method: Callable[..., None],
        *arguments: object,
        reads: Request | None = None,
        interrupted: bool = False,
    ) -> None:
        """Call `method` with a way to say that it is about to wait; its error is the answer, if it raises one."""
        wait: Wait | None = None

        def before_wait() -> None:
            nonlocal wait
            if wait is None:
                wait = self._hold(unique, pid, reads, interrupted=interrupted)
                if self._reader.source.is_remote:
                    self._replace(wait)
                else:
                    self._have_watched()

        try:
            method(*arguments, before_wait)
        except Exception as e:
            self._refuse(unique, e)
        finally:
            if wait is not None:
                self._end_wait(unique, wait)

    def _refuse(self, unique: int, error: Exception) -> None:
        """Answer with an error: that of the source, or for a mistake of our own, which is logged, EIO."""
        code = error.errno if isinstance(error, OSError) else errno.ENOMEM if isinstance(error, MemoryError) else None
        if not isinstance(error, OSError):
            log.exception("a request failed")
        self._reply(fuse.error_reply(unique, code or errno.EIO))

    def name_answered(self, unique: int) -> None:
        """The namespace loop has answered a request."""
        self._waits.by_request.pop(unique, None)

    def look_at_waits(self) -> None:
        """Answer, in place of the source, what has waited for it for too long. Called every so often.

        The kernel takes no second answer: that of the source, should it come, goes nowhere.
        """
        now = time.monotonic()
        self._look_at_tier(now)
        is_given_up = functools.cache(is_called_off)
        for requests in list(self._requests):
            self._wait_of(requests, requests.awaited)
        for unique in [unique for unique, since in list(self._waits.early.items()) if now - since > _EARLY_FOR]:
            del self._waits.early[unique]
        for unique in self._fast_path.given_up(now - _GIVEN_UP_AFTER):
            self._give_up(unique)
        for unique, wait in self._waits.by_request.copy().items():
            waited = now - wait.since
            if wait.holds_thread and waited > _BRIEF:
                self._replace(wait)
            if waited > _GIVEN_UP_AFTER and (wait.interrupted or (wait.untold and is_given_up(wait.untold))):
                wait.interrupted, wait.untold = False, 0
                self._give_up(unique)
            elif wait.is_keepers and waited > _KEEPER_WAITS:
                wait.is_keepers = False
                self._waits.hung.add(wait.bytes_of)
                self._reply(fuse.error_reply(unique, errno.EIO))

    def _look_at_tier(self, now: float) -> None:
        """Have READs that wait for the disk tier for too long answered by the source, and the next ones as well.

        As long as the disk owes any of them it is asked nothing more: each would take up what there is to wait with.
        """
        tier = self._reader.tier
        if tier is None:
            return
        tier.look_at_pace()
        late = now - _TIER_WAITS
        hung = {thread for thread, since in list(tier.blocked.items()) if since < late}
        given_away = self._fast_path.hung_in_tier(late)
        for unique, wait in list(self._waits.by_request.items()):
            if wait.thread in hung and wait.holds_thread and not wait.is_given_away and isinstance(wait.asked, Request):
                wait.is_given_away = True
                given_away.append((unique, wait.asked))
        for unique, begun, wait in list(self._begun.values()):
            if isinstance(begun.file, Stored) and wait.since < late and not wait.is_given_away:
                wait.is_given_away = True
                given_away.append((unique, begun.answer.request))
        is_owed = hung or any(wait.is_given_away for _, _, wait in list(self._begun.values()))
        if given_away or is_owed or self._fast_path.hangs_in_tier():
            tier.leave_alone(f"it has not answered for {_TIER_WAITS:.0f} s")
        for unique, asked in given_away:
            self._return(unique, asked)

    def _give_up(self, unique: int) -> None:
        self._counters.add("interrupted")
        self._reply(fuse.error_reply(unique, errno.EINTR))

    def _lookup(self, unique: int, parent: int, name: bytes, before_wait: Callable[[], None]) -> None:
        record, st = self._namespace.lookup(self._namespace.record_of(parent), name, before_wait)
        self._reply(fuse.entry_reply(unique, self._namespace.node(record), st, NAME_TIMEOUT, attr_timeout(st)))

    def _getattr(self, unique: int, node: int, before_wait: Callable[[], None]) -> None:
        st = self._namespace.attributes(self._namespace.record_of(node), before_wait)
        self._reply(fuse.attributes_reply(unique, node, st, attr_timeout(st)))

    def _list(self, unique: int, node: int, position: int, into: memoryview, before_wait: Callable[[], None]) -> None:
        before_wait()
        n = self._listings.pack(node, position, into)
        self._reply(fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + n, 0, unique), into[:n])

    def _hint(self, unique: int, body: memoryview, uid: int, pid: int, before_wait: Callable[[], None]) -> None:
        self._ahead.take(hints.parse, body, uid, pid, time.monotonic())
        self._reply(fuse.ioctl_reply(unique))

    def _hint_by_name(
        self, unique: int, node: int, name: bytes, size: int, uid: int, pid: int, before_wait: Callable[[], None]
    ) -> None:
        is_of_one_file = name == hints.OF_ONE_FILE
        record, now = self._namespace.record_of(node), time.monotonic()
        if self._namespace.kind(record) != (REGULAR if is_of_one_file else DIRECTORY):
            raise OSError(errno.ENODATA, "no such attribute")
        if not size:  # many ask for it first, as getfattr does, and then again: only that is the hint
            answer = fuse.XATTR_OUT.pack(hints.MOST_ANSWER, 0)
        elif size < hints.MOST_ANSWER:
            raise OSError(errno.ERANGE, "no room for the answer")
        elif is_of_one_file:
            answer = self._ahead.ask(record, uid, now)
        else:
            answer = self._ahead.take(hints.parse_name, name, uid, pid, now)
        self._reply(fuse.reply(unique, answer))

    def _read(self, unique: int, asked: Request, into: pages.Buffer, before_wait: Callable[[], None]) -> None:
        if asked.offset > _LAST_OFFSET:
            raise OSError(errno.EINVAL, "no file is so long")
        if self._waits.hung and self._hangs_for_keeper(asked):
            raise OSError(errno.EIO, "it hangs, and the keeper has more to do")
        if self._reader.sharing is not None:
            wait = self._waits.by_request[unique] = Wait(time.monotonic(), False, unique in self._waits.early)
            if self._reader.ask(asked, functools.partial(self._shared, unique, asked, wait), before_wait):
                return  # it is answered when the other node has
            self._end_wait(unique, wait)
        begun = self._reader.begin(asked, memoryview(into))
        if begun is None:
            self._finish_read(unique, self._reader.read(asked, into, before_wait))
        elif isinstance(begun, Answer):
            self._finish_read(unique, begun)
        elif not self._begin_read(unique, begun):
            before_wait()
            self._read_begun(unique, begun, into)

    def _hangs_for_keeper(self, asked: Request) -> bool:
        is_keepers = asked.pid in self._reader.admission.keeper_threads
        return is_keepers and Part.at(asked.node, asked.offset) in self._waits.hung

    def _read_begun(self, unique: int, begun: Begun, into: pages.Buffer) -> None:
        file, tier = begun.file, self._reader.tier
        is_seen = tier.seen_waiting() if tier is not None and isinstance(file, Stored) else nullcontext()
        try:
            with is_seen:
                n = pread_all(file.fd, memoryview(into)[: pages.count(file.length) * pages.PAGE], file.offset)
        except OSError:
            n = 0
        self._answer_begun(unique, begun, n, memoryview(into))

    def _answer_begun(self, unique: int, begun: Begun, n: int, data: memoryview, *, interrupted: bool = False) -> None:
        """Answer with the `n` bytes that were read; if something was wrong, `Reader.read` finds out what."""
        answer = None
        if n < begun.file.length:
            self._reader.failed(begun)
        else:
            answer = self._reader.fetched(begun, data[: begun.file.length])
        if answer is None:
            self._return(unique, begun.answer.request, interrupted=interrupted)
        else:
            self._finish_read(unique, answer)

    def _begin_read(self, unique: int, begun: Begun) -> bool:
        """Have the disk read while this thread goes on; False if that cannot be."""
        file, disk, asked = begun.file, self._disk, begun.answer.request
        with self._lock:
            slot = None if disk is None else disk.take()
        if disk is None or slot is None:
            return False
        wait = self._hold(unique, asked.pid, asked)
        self._have_watched()  # should the disk be able to take no more
        self._begun[slot] = unique, begun, wait
        try:
            disk.submit(slot, file.fd, file.offset, pages.count(file.length) * pages.PAGE)
        except OSError:
            del self._begun[slot]
            disk.give(slot)
            self._end_wait(unique, wait)
            return False
        self._hold_no_thread(wait)
        return True

    def _finish_begun(self) -> None:
        """Answer the READs for which the disk has read."""
        disk = self._disk
        assert disk is not None
        with self._lock:
            ended = disk.ended()
        for slot, n in ended:
            unique, begun, wait = self._begun.pop(slot)
            self._end_wait(unique, wait)
            if wait.is_given_away:
                disk.give(slot)
                continue
            self._reader.took(begun, time.monotonic() - wait.since)
            try:
                self._answer_begun(unique, begun, n, disk.buffers[slot], interrupted=wait.interrupted)
            except Exception as e:
                self._refuse(unique, e)
            finally:
                disk.give(slot)

    def _shared(self, unique: int, asked: Request, wait: Wait, data: memoryview | None) -> None:
        """Another node has answered a READ, or has not; called by whatever thread."""
        self._end_wait(unique, wait)
        if data is None:
            self._return(unique, asked, interrupted=wait.interrupted)
            return
        try:
            self._reader.check_end(asked, len(data))
        except OSError as e:
            self._refuse(unique, e)
            return
        self._reply(fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + len(data), 0, unique), data)
        self._reader.account_shared(asked, len(data))

    def _read_alone(self, into: pages.Buffer) -> None:
        try:
            unique, asked, interrupted = self._returned.popleft()
        except IndexError:
            return

        def read(before_wait: Callable[[], None]) -> None:
            self._finish_read(unique, self._reader.read(asked, into, before_wait))

        self._answer(unique, asked.pid, read, reads=asked, interrupted=interrupted)

    def _finish_read(self, unique: int, answer: Answer) -> None:
        length = sum(map(len, answer.data))
        if not length and answer.request.offset and not answer.request.direct:
            # The page cache asks for nothing behind the end of a file that it knows: the file was truncated meanwhile.
            # It would take an empty reply for the new end, and show zeros up to there.
            raise OSError(errno.ESTALE, "truncated while it was read")
        self._reply(fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + length, 0, unique), *answer.data)
        self._reader.account(answer)

    def _reply(self, head: bytes, *data: memoryview) -> None:
        try:
            if data:
                os.writev(self._device, (head, *data))
            else:
                quick_write(self._device, head)
        except OSError as e:
            if e.errno not in _NOBODY_WAITS:
                raise
