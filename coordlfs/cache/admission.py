"""Admission: how an item that missed comes to be pinned, and is let go again.

    absent ── a READ misses, MinIO has room ──> collecting (its bytes go to the stash)
           ── all of it read, or idle a while ──> asked (a keeper pins it, READing the stash) ──> pinned

The keeper says BUSY while a reader still uses the pages: it is asked again later, at last after the kernel was told to
take them even out of a job's mappings. A job's READ that comes while the keeper works would leave pages charged to the
job, so such an item is pinned once more. Data loop threads call in with what they read, and listen to the keepers as
they look for messages: a thread that woke up for each answer would take the interpreter from them. One thread of this
module watches the clock.
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import random
import select
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from coordlfs.cache import items
from coordlfs.cache.epochs import Epochs
from coordlfs.cache.interfaces import Announced, Owners
from coordlfs.cache.keeper_protocol import MAX_PACKET, REQUEST, How, Outcome, Verb, parse_reply
from coordlfs.cache.minio import MinIO, State
from coordlfs.cache.stash import Stash
from coordlfs.catalogue.catalog import OTHER_CGROUP, SUPERSEDED, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import cgroups, fuse, pages
from coordlfs.kernel.libc import quick_reader, quick_write
from coordlfs.kernel.timer import Timer
from coordlfs.sources.versions import Version

if TYPE_CHECKING:
    from coordlfs.cache.store import Store
    from coordlfs.kernel.notifier import Notifier

log = logging.getLogger(__name__)

_WINDOW = 64  # requests that a keeper has not answered
# To wake a process for one item costs more than to pin it: PIN requests wait for each other, though not for long.
_TOGETHER, _GATHERS = 16, 0.002
_AT_ONCE = 16  # answers of one keeper that are taken before who serves looks for messages again
IDLE = 0.05  # seconds without a READ after which an item that was read in part is pinned whole
RETRY = (0.002, 0.02, 0.2, 1.0, 4.0)  # seconds between attempts while somebody uses the pages
_ENOUGH = 48  # of them, and items on their way, above which nothing is fetched ahead
_PENDING = 256
_UNKNOWN, _NEVER_MISSED = (0, 0), (0, 0xFFFFFFFF)  # instead of the epoch and page of a last miss
_CGROUP_KNOWN = 1.0  # seconds that a process is believed to stay in its cgroup
_AWAITED = 0.1, 100  # seconds after which it is seen again whether an item can be asked for, and how often
_ONE = (1).to_bytes(8, sys.byteorder)  # what wakes whoever waits for an eventfd
_FORCE_FROM = 2  # the attempt from which pages are dropped even where a job maps them


class Fetched(NamedTuple):
    """Bytes that the source gave for a READ."""

    item: int
    offset: int  # in the file
    data: memoryview
    version: Version  # of the file, which the bytes belong to


@dataclass(slots=True)
class Pending:
    """An item on its way to be pinned."""

    due: float = 0.0  # when it is asked for, while it is not with a keeper
    keeper: int | None = None  # who is asked
    contended: bool = False  # a job READ it since
    cancelled: bool = False
    missed: bool = False  # a job's READ began it
    same_cgroup: bool = False  # every READ of it came from the keeper's own memory cgroup
    attempts: int = 0
    awaited: int = 0  # how often it was put off, since a READ was at the source
    flags: int = 0


@dataclass(slots=True)
class Link:
    """One keeper, as the server sees it."""

    index: int
    pid: int
    sock: socket.socket
    packet: bytearray  # what `receive` received last
    receive: Callable[[], int | None]
    asked: int = 0
    full: bool = False
    threads: set[int] = field(default_factory=set)  # of the process, that read as well as its first
    backlog: deque[bytes] = field(default_factory=deque)
    delayed: bool = False  # the backlog waits for answers


class Admission:
    """The cache's books. Every method may be called from any thread; `run` is the thread of its own.

    `receive` is to be called when `fd` is readable, and every so often while nobody has time to wait for that.
    """

    served_from = "stash_bytes"  # the counter of bytes that `stashed` finds
    hits_ask_nobody = True  # else each is a READ
    _verb = Verb.PIN  # what keepers are asked to do with an item

    def __init__(
        self,
        catalog: Catalog,
        policy: MinIO,
        stash: Stash | Store,
        epochs: Epochs,
        counters: Counters,
        more_keepers: Callable[[], None],
    ) -> None:
        self.catalog = catalog
        self.policy = policy
        self.stash = stash
        self.epochs = epochs
        self.counters = counters
        self.links: dict[int, Link] = {}
        self._links_by_fd: dict[int, Link] = {}
        self.keeper_pids: frozenset[int] = frozenset()
        self.keeper_threads: frozenset[int] = frozenset()  # by which the kernel names who reads
        self._more_keepers = more_keepers
        self.lock = threading.RLock()
        self._pending: dict[int, Pending] = {}
        self._clock: list[tuple[float, int]] = []  # when items are due; stale where `due` says otherwise
        self._chunk_misses: dict[int, tuple[int, int]] = {}  # of files of several items
        self.skipped: set[int] = set()  # items without room in the stash, until they miss anew
        self.dropping: set[int] = set()
        self._waiting: deque[int] = deque()  # for a keeper with room
        self._asked_for_keeper = False
        self.recovering: set[int] = set()  # keepers that have not yet told what they hold
        self._orphans: dict[int, int] = {}  # records with pages that the last server knew to be pinned
        self._keeper_cgroups: set[bytes | None] = set()
        self._job_cgroups: dict[int, tuple[bytes | None, float]] = {}  # by pid; and until when that is believed
        self._gathering = Timer()  # ends when requests that wait for others have waited long enough
        self._is_gathering = False
        self._events = select.epoll()
        self._events.register(self._gathering.fd, select.EPOLLIN | select.EPOLLET)
        self.fd = self._events.fileno()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self.sharing: Owners | None = None  # with other nodes, each of which caches what it owns
        self.ahead: Announced | None = None  # of readers that say what they will read
        self.notifier: Notifier | None = None
        self.is_awaited: Callable[[int, int], bool] = lambda node, offset: False  # whether a job waits for bytes there

    # -- called by the data loop --------------------------------------------------------------------------------

    def stashed(self, item: int, offset: int, size: int, end: int, pid: int) -> list[memoryview | int]:
        """`Stash.parts` of an item of a file that ends at `end`, for process `pid`: it need not be read again."""
        if item not in self._pending:
            return [size]
        with self.lock:
            pending = self._pending.get(item)
            if pending is not None and pid not in self.keeper_threads:
                pending.same_cgroup = self._is_same_cgroup(items.record_of(item), pid)
                pending.contended = not pending.same_cgroup
            return self.stash.parts(item, offset, min(size, end - offset))

    def missed(self, fetched: Fetched, pid: int, direct: bool, *, for_peer: bool = False) -> None:
        """A READ of job `pid` was answered from the source.

        Counts it, and admits its item if there is room. `direct`: the READ went around the page cache. `for_peer`: it
        was another node that wanted it, and no epoch of this one.
        """
        item, offset, data, version = fetched
        record, file_size = items.record_of(item), version.size
        with self.lock:
            if not self.catalog.shows(record, version):
                return  # another thread has seen a newer version meanwhile
            if direct:
                self._know(record, file_size)
                return  # it fills no cache, and may read a page many times an epoch
            if not for_peer:
                self._count_miss(record, item, offset, len(data), file_size)
            if self.recovering:
                return
            state = self.policy.state(item)
            if state is State.PINNED:
                self._missed_though_pinned(item)
            elif item not in self.dropping:
                self._take(item, offset, data, file_size, pid, for_peer=for_peer)

    def _missed_though_pinned(self, item: int) -> None:
        self.drop([item])  # the kernel dropped pages of it, as it does when a file changes: pin it anew

    def _take(self, item: int, offset: int, data: memoryview, file_size: int, pid: int, *, for_peer: bool) -> None:
        """Take on an item that is absent and has room, or add to one that is on its way."""
        record, length = items.record_of(item), items.length(item, file_size)
        pending = self._pending.get(item)
        if pending is None:
            if not length or item in self.skipped or not self._admits(item, pages.count(length)):
                return
            same_cgroup = self._is_same_cgroup(record, pid)
            if same_cgroup and len(data) == length:
                self._ask(item, self._pending.setdefault(item, Pending(missed=not for_peer, same_cgroup=True)))
                return
            if not self.stash.reserve(item, length):
                self.policy.release(item)
                self.counters.add("not_admitted")
                if len(data) < length:
                    self.skipped.add(item)  # admitted with the next READ, it would have this one read again
                return
            pending = self._pending[item] = Pending(missed=not for_peer, same_cgroup=same_cgroup)
            self.stash.put(item, offset, data)
        else:
            pending.same_cgroup = self._is_same_cgroup(record, pid)
            pending.awaited = 0
            self.stash.put(item, offset, data)
            if pending.keeper is not None:
                pending.contended = not pending.same_cgroup
                return
            if pending.attempts:
                return
        if self.stash.held(item) < length:
            self._later(item, IDLE)
            return
        self._ask(item, pending)

    def shared(self, item: int, offset: int, nbytes: int, direct: bool) -> None:
        """A READ brought bytes from another node: count them as read in this epoch, though not from the source."""
        record = items.record_of(item)
        with self.lock:
            file_size = self.catalog.size(record)
            if direct:
                self._know(record, file_size)
            else:
                self._count_miss(record, item, offset, 0, file_size)
                self.epochs.current.peer_bytes += nbytes

    def has_room(self, npages: int) -> bool:
        """Whether so much more could be admitted now. If not, what belongs to other nodes begins to give way."""
        with self.lock:
            if self.policy.used + npages <= self.policy.capacity:
                return True
            self._give_way(npages)
            return False

    def _admits(self, item: int, npages: int) -> bool:
        """Take room for an item, if it is for this node to cache, and its name still leads to it."""
        if self.catalog.flags(items.record_of(item)) & SUPERSEDED:
            return False
        if self.sharing is not None and not self.sharing.owns(item):
            return False
        if self.policy.admit(item, npages):
            return True
        self._give_way(npages)
        return False

    def _give_way(self, npages: int) -> None:
        if self.sharing is not None and npages <= self.policy.capacity:
            self.drop(self.sharing.displaced(npages))

    def keep(self, fetched: Fetched) -> None:
        """The keeper's READ was answered from the source: should the item have to be pinned again, its bytes are here.

        Ahead of a reader it is that reader's miss.
        """
        item, offset, data, version = fetched
        record = items.record_of(item)
        with self.lock:
            if not self.catalog.shows(record, version):
                return
            pending = self._pending.get(item)
            if self.ahead is not None and self.ahead.wants(record):
                self._count_miss(record, item, offset, len(data), version.size)
            elif pending is not None and pending.missed:
                self.epochs.current.bytes += len(data)  # the rest of what a reader began with
            if pending is not None:
                self._add(item, offset, data)

    def _add(self, item: int, offset: int, data: memoryview) -> None:
        self.stash.put(item, offset, data)

    def _is_same_cgroup(self, record: int, pid: int) -> bool:
        """Whether every process that has read of the file so far, `pid` too, is charged where the keepers are."""
        if not self._shares_cgroup(pid):
            self.catalog.set_other_cgroup(record)
        return not self.catalog.flags(record) & OTHER_CGROUP

    def _shares_cgroup(self, pid: int) -> bool:
        """Whether a job is charged for memory where every keeper is; remembered for a moment."""
        now = time.monotonic()
        known = self._job_cgroups.get(pid)
        if known is None or known[1] < now:
            if len(self._job_cgroups) > 1000:
                self._job_cgroups.clear()
            known = self._job_cgroups[pid] = (cgroups.of_memory(pid), now + _CGROUP_KNOWN)
        return known[0] is not None and self._keeper_cgroups == {known[0]}

    def _count_miss(self, record: int, item: int, offset: int, nbytes: int, file_size: int) -> None:
        of_file = self._know(record, file_size)
        if self.ahead is not None:
            self.ahead.missed(record, nbytes)
        whole = file_size <= items.CHUNK
        last = of_file if whole else self._chunk_misses.get(item, _NEVER_MISSED)
        remember = self.epochs.miss(last, offset // pages.PAGE, nbytes, self.unpinned)
        if remember is None:
            return
        self.skipped.discard(item)
        if nbytes and of_file[0] != remember[0]:
            self.counters.add("source_files")
        if not whole:
            self._chunk_misses[item] = remember
        self.catalog.set_last_miss(record, *remember)  # of a large file: when any of it missed

    def _know(self, record: int, file_size: int) -> tuple[int, int]:
        """From the first read on, a file counts as part of the dataset; its last miss."""
        last = self.catalog.last_miss(record)
        if last != _UNKNOWN:
            return last
        self.catalog.set_last_miss(record, *_NEVER_MISSED)
        self.counters.add("dataset_items", len(items.items_of(record, file_size)))
        self.counters.add("dataset_bytes", file_size)
        return _NEVER_MISSED

    def unpinned(self) -> int:
        """Bytes that were ever read and are not pinned: what an epoch that begins now will read."""
        return max(0, self.counters["dataset_bytes"] - self.policy.pinned_pages * pages.PAGE)

    # -- called by whoever wants items in or out ----------------------------------------------------------------

    def admit(self, wanted: Iterable[int]) -> int:
        """Have items pinned that nobody has read; how many were taken on. What does not fit is left out."""
        taken = 0
        with self.lock:
            for item in wanted:
                size = self.catalog.size(items.record_of(item))
                room = pages.count(items.length(item, size))
                if item not in self.dropping and self._admits(item, room):
                    self._know(items.record_of(item), size)
                    self.stash.reserve(item, items.length(item, size))  # for `keep`; without room it goes without
                    self._ask_unless_awaited(item, self._pending.setdefault(item, Pending()))
                    taken += 1
        return taken

    def flush(self) -> None:
        """Ask the keepers now for what waits for more of the same."""
        with self.lock:
            self._is_gathering = False  # if the timer ends all the same, there is nothing to send
            for link in self.links.values():
                self._flush(link)

    def drop(self, unwanted: Iterable[int]) -> int:
        """Have items let go, pinned or on their way; how many there were."""
        dropped = 0
        with self.lock:
            for item in unwanted:
                if item in self.dropping or self.policy.state(item) is State.ABSENT:
                    continue
                dropped += 1
                pending = self._pending.get(item)
                holder = self.policy.holder(item)
                if pending is not None and pending.keeper is not None:
                    pending.cancelled = True  # the keeper's answer brings it back here
                    self.stash.remove(item)
                elif holder is not None and holder in self.links:
                    self.dropping.add(item)
                    self.catalog.add_pinned_pages(items.record_of(item), -self.policy.unpin(item))
                    self._send(self.links[holder], Verb.DROP, item, 0)
                else:
                    self._forget(item)
        return dropped

    def held_pages(self) -> int:
        """Pages that are pinned, those included that are being let go: their memory is not available yet."""
        with self.lock:
            return self.policy.pinned_pages + sum(map(self.policy.pages, self.dropping))

    def limit(self, capacity: int) -> int:
        """Have no more than `capacity` pages from now on; how many are let go for it, of items drawn at random."""
        with self.lock:
            self.policy.capacity = capacity
            if self.policy.used <= capacity:
                return 0
            leaving = self.dropping | {item for item, pending in self._pending.items() if pending.cancelled}
            excess = self.policy.used - capacity - sum(map(self.policy.pages, leaving))
            candidates = [item for item in self.policy.items() if item not in leaving]
            random.shuffle(candidates)
            given = 0
            while given < excess and candidates:
                item = candidates.pop()
                given += self.policy.pages(item)
                self.drop([item])
            return given

    def drop_file(self, record: int, size: int) -> int:
        """`drop` every item of a file that had `size` bytes."""
        if not self.catalog.pinned_pages(record) and not self._pending:
            return 0
        with self.lock:
            return self.drop(self.held(items.items_of(record, size)))

    def held(self, wanted: range) -> Iterable[int]:
        """Those of some items that may be pinned or on their way, found in a time that no file's size has a part in."""
        with self.lock:
            few = len(wanted) <= len(self.policy.taken)
            return wanted if few else [item for item in self.policy.taken if item in wanted]

    def drop_past(self, record: int) -> None:
        """`drop` a file of which there is a newer version, and count it no longer as part of the dataset."""
        with self.lock:
            size = self.catalog.size(record)
            self.drop_file(record, size)
            if self.catalog.last_miss(record) != _UNKNOWN:
                self.catalog.set_last_miss(record, *_UNKNOWN)
                self.counters.add("dataset_items", -len(items.items_of(record, size)))
                self.counters.add("dataset_bytes", -size)

    def is_absent(self, item: int) -> bool:
        """Whether an item is neither pinned nor on its way in or out."""
        return not self.policy.pages(item) and item not in self.dropping

    def is_pending(self, item: int) -> bool:
        """Whether an item is on its way to be pinned."""
        return item in self._pending

    def settled(self, wanted: Iterable[int]) -> bool:
        """Whether none of the items is on its way in or out."""
        return not any(item in self._pending or item in self.dropping for item in wanted)

    def is_busy(self) -> bool:
        """Whether the keepers have enough to do for now, or there is none (then one is asked for)."""
        with self.lock:
            if not self.links:
                self._want_keeper()
            asked = sum(link.asked + len(link.backlog) for link in self.links.values())
            enough = asked >= _ENOUGH or len(self._pending) >= _PENDING
            return not self.links or bool(self.recovering) or enough or not self.stash.has_room(items.CHUNK)

    def fetch(self, item: int) -> None:
        """Have a keeper read an item that is not to be pinned into the page cache."""
        with self.lock:
            self._send(next(iter(self.links.values())), Verb.FETCH, item, 0)

    def release(self, item: int) -> None:
        """Have what is resident of an item dropped, unless it is pinned."""
        with self.lock:
            if self.links:
                self._send(next(iter(self.links.values())), Verb.RELEASE, item, 0)

    # -- keepers ------------------------------------------------------------------------------------------------

    def add_keeper(self, index: int, pid: int, sock: socket.socket) -> None:
        """A keeper joins, a new one or one that a server before this one had."""
        sock.setblocking(False)
        with self.lock:
            packet, fd = bytearray(MAX_PACKET), sock.fileno()
            self.links[index] = self._links_by_fd[fd] = Link(index, pid, sock, packet, quick_reader(fd, packet))
            self._events.register(fd, select.EPOLLIN)
            self.keeper_pids |= {pid}
            self.keeper_threads |= {pid}
            self.look_at_cgroups()
            self._asked_for_keeper = False
            self._ask_waiting()

    def look_at_cgroups(self) -> dict[bytes | None, int]:
        """See where the keepers are charged for memory, as somebody may have moved them; one of each such cgroup."""
        with self.lock:
            found = {cgroups.of_memory(pid): pid for pid in self.keeper_pids}
            self._keeper_cgroups = set(found)
            return found

    def lose_keeper(self, index: int) -> None:
        """A keeper died, and its pins with it. What it held is pinned again as it is, as long as it is resident."""
        with self.lock:
            link = self.links.pop(index, None)
            if link is None:
                return
            self.keeper_pids -= {link.pid}
            self.keeper_threads -= {link.pid, *link.threads}
            # Closing would not end it, since the supervisor has the same socket.
            self._events.unregister(link.sock)
            del self._links_by_fd[link.sock.fileno()]
            link.sock.close()
            self._asked_for_keeper = True  # the supervisor is about to replace it
            for item in self.policy.held_by(index):
                self.catalog.add_pinned_pages(items.record_of(item), -self.policy.unpin(item))
                self._pending[item] = Pending(flags=How.KEEP)
                self._waiting.append(item)
            for item, pending in self._pending.items():
                if pending.keeper == index:
                    pending.keeper = None
                    self._waiting.append(item)
            for item in [i for i in self.dropping if self.policy.holder(i) is None]:
                self._forget(item)
            self._recovered(index)
            self._ask_waiting()

    def recover(self) -> None:
        """Ask the keepers what they hold: for a server that takes over from one that died."""
        with self.lock:
            self._orphans = self.catalog.clear_pinned_pages()
            for link in self.links.values():
                self.recovering.add(link.index)
                self._send(link, Verb.LIST, 0, 0)
            if not self.links:
                # They died with the last server, and their successors will be told; or there was none without a cache.
                self._asked_for_keeper = self.policy.capacity > 0
                self._adopt_orphans()

    def receive(self) -> None:
        """Take what the keepers have said, and ask them for what has waited for more of the same."""
        for fd, _ in self._events.poll(0):
            if fd == self._gathering.fd:
                self.flush()
            elif link := self._links_by_fd.get(fd):
                self._receive(link)

    def run(self) -> None:
        """Watch the clock, until `close`."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        while not self._closing:
            with self.lock:
                timeout = self._run_due()
            if poll.poll(timeout):
                os.eventfd_read(self._wake_fd)

    def close(self) -> None:
        """End `run`."""
        self._closing = True
        self._wake()

    # -- inside; all with the lock held -------------------------------------------------------------------------

    def _wake(self) -> None:
        quick_write(self._wake_fd, _ONE)

    def _later(self, item: int, delay: float) -> None:
        due = self._pending[item].due = time.monotonic() + delay
        heapq.heappush(self._clock, (due, item))
        if self._clock[0] == (due, item):
            self._wake()

    def _run_due(self) -> int | None:
        """Ask for what is due; milliseconds until something else is."""
        now = time.monotonic()
        while self._clock and self._clock[0][0] <= now:
            due, item = heapq.heappop(self._clock)
            pending = self._pending.get(item)
            if pending is not None and pending.due == due:
                self._ask_unless_awaited(item, pending)
        return max(1, int((self._clock[0][0] - now) * 1000)) if self._clock else None

    def _ask_unless_awaited(self, item: int, pending: Pending) -> None:
        """Ask for an item of which not all was read, unless a job's READ of it is at the source.

        The keeper would wait for that one, for ever if the source hangs, and all that it is asked would wait with it.
        """
        record = items.record_of(item)
        if self.is_awaited(self.catalog.node(record), items.span(item, self.catalog.size(record))[0]):
            self._ask_later(item, pending)
        else:
            self._ask(item, pending)

    def _ask_later(self, item: int, pending: Pending) -> None:
        """See again in a while, but not for ever."""
        delay, often = _AWAITED
        if pending.awaited < often:
            pending.awaited += 1
            self._later(item, delay)
        else:
            self._failed(item, errno.ETIMEDOUT)

    def _ask(self, item: int, pending: Pending) -> None:
        pending.due = 0.0
        if self.catalog.flags(items.record_of(item)) & SUPERSEDED:
            self._forget(item)
        elif pending.attempts >= _FORCE_FROM and not pending.same_cgroup:
            self._force(item, pending)
        else:
            self._ask_keeper(item, pending, 0)

    def _force(self, item: int, pending: Pending) -> None:
        """Have pages dropped that a job uses, then ask for the item.

        Not by the keeper: it would wait for a page that is being read, which a hung source may never give.
        """
        record = items.record_of(item)
        offset, length = items.span(item, self.catalog.size(record))

        def dropped() -> None:
            with self.lock:
                if self._pending.get(item) is pending and pending.keeper is None:
                    self._ask_keeper(item, pending, How.FORCE)

        message = fuse.invalidate_inode(self.catalog.node(record), offset, length)
        if self.notifier is None or not self.notifier.send_alone(message, dropped):
            self.counters.add("not_admitted")
            self._forget(item)

    def _want_keeper(self) -> None:
        if not self._asked_for_keeper:
            self._asked_for_keeper = True
            self._more_keepers()

    def _ask_keeper(self, item: int, pending: Pending, flags: int) -> None:
        link = next((link for link in self.links.values() if not link.full), None)
        if link is None:
            self._waiting.append(item)
            self._want_keeper()
            return
        pending.keeper = link.index
        pending.contended = False
        flags |= pending.flags
        if pending.same_cgroup:
            # Every page was allocated by a READ that was charged where the keeper is: they are pinned as they are.
            flags |= How.KEEP
        self._send(link, self._verb, item, flags)

    def _ask_waiting(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for item in waiting:
            pending = self._pending.get(item)
            if pending is not None and pending.keeper is None:
                self._ask_unless_awaited(item, pending)

    def _send(self, link: Link, verb: Verb, item: int, flags: int) -> None:
        record = items.record_of(item)
        offset, length = items.span(item, self.catalog.size(record))
        packet = REQUEST.pack(verb, flags, item, self.catalog.node(record), offset, length)
        link.backlog.append(packet + self.catalog.path(record))
        if verb != Verb.PIN or len(link.backlog) >= _TOGETHER:
            self._flush(link)
        else:
            self._flush_in(_GATHERS)

    def _flush_in(self, seconds: float) -> None:
        """Have `receive` send what waits then, if it is not to do so already."""
        if not self._is_gathering:
            self._is_gathering = True
            self._gathering.start(seconds)

    def _flush(self, link: Link) -> None:
        while link.backlog and link.asked < _WINDOW:
            try:
                quick_write(link.sock.fileno(), link.backlog[0])
            except (BlockingIOError, OSError):  # full, or dying: the supervisor will say so
                if not link.asked:  # no answer will come that has it tried again
                    self._flush_in(RETRY[1])
                break
            link.backlog.popleft()
            link.asked += 1
        link.delayed = bool(link.backlog)

    def _receive(self, link: Link) -> None:
        for _ in range(_AT_ONCE):
            with self.lock:
                if not self._receive_one(link):
                    return

    def _receive_one(self, link: Link) -> bool:
        """Take what a keeper says; False if that is nothing more."""
        if self.links.get(link.index) is not link:
            return False  # and its descriptor's number may be another one's by now
        try:
            n = link.receive()
        except OSError:
            return False
        if n is None:
            return False
        if not n:
            self.lose_keeper(link.index)
            return False
        try:
            outcome, code, item, pins = parse_reply(bytes(link.packet[:n]))
        except ValueError as e:
            log.warning("keeper %d: %s", link.pid, e)
            return True
        if outcome == Outcome.LISTED:
            self._learn(link, pins)
            if not pins:
                link.asked = max(0, link.asked - 1)
                self._recovered(link.index)
        elif outcome == Outcome.WATCHED:
            self.epochs.watch(item)
        elif outcome == Outcome.THREAD:
            link.threads.add(item)
            self.keeper_threads |= {item}
        elif outcome == Outcome.OPENED:
            self.epochs.opened(item, time.monotonic(), self.unpinned())
        else:
            link.asked = max(0, link.asked - 1)
            if link.delayed:
                self._flush(link)
            if outcome not in (Outcome.FETCHED, Outcome.GONE):
                self._answered(link, outcome, code, item)
            if self.ahead is not None:
                self.ahead.go_on()
        return True

    def _recovered(self, index: int) -> None:
        """A keeper has told what it holds, or will not."""
        if index in self.recovering:
            self.recovering.discard(index)
            if not self.recovering:
                self._adopt_orphans()

    def _adopt_orphans(self) -> None:
        """Pin again what a keeper held that died with the last server: whole files, as they are."""
        orphans, self._orphans = self._orphans, {}
        for record, pinned in orphans.items():
            wanted = items.items_of(record, self.catalog.size(record))
            if pinned != pages.count(self.catalog.size(record)):
                continue  # which of its chunks it was is not known
            if self.catalog.flags(record) & SUPERSEDED:
                continue
            for item in wanted:
                room = pages.count(items.length(item, self.catalog.size(record)))
                if item not in self.dropping and self.policy.admit(item, room):
                    self._pending[item] = Pending(flags=How.KEEP)
                    self._waiting.append(item)
        self._ask_waiting()

    def _learn(self, link: Link, pins: list[tuple[int, int]]) -> None:
        for item, length in pins:
            record = items.record_of(item)
            if record >= len(self.catalog) or not 0 < length <= items.CHUNK or self.policy.holder(item) == link.index:
                continue
            if not self.policy.admit(item, pages.count(length), is_held=True):
                self._send(link, Verb.DROP, item, 0)  # another keeper holds it, or is about to
            elif self.catalog.flags(record) & SUPERSEDED:
                self.dropping.add(item)
                self._send(link, Verb.DROP, item, 0)
            else:
                self._pinned(link.index, item)

    def _pinned(self, holder: int, item: int) -> None:
        self.policy.pin(item, holder)
        self.catalog.add_pinned_pages(items.record_of(item), self.policy.pages(item))

    def _answered(self, link: Link, outcome: Outcome, code: int, item: int) -> None:
        if outcome is Outcome.DROPPED:
            self.dropping.discard(item)
            link.full = False
            if item not in self._pending and self.policy.holder(item) in (None, link.index):
                self._forget(item)
            return
        pending = self._pending.get(item)
        if pending is None or pending.keeper != link.index:
            return
        pending.keeper = None
        if pending.cancelled:
            self._abandon(link, item)
        elif outcome is Outcome.FULL:
            link.full = True
            self._ask(item, pending)
        elif outcome is Outcome.PINNED and not pending.contended:
            del self._pending[item]
            self.stash.remove(item)
            self._pinned(link.index, item)
        elif outcome is Outcome.FAILED:
            self._failed(item, code)
        elif pending.attempts >= len(RETRY):
            self.counters.add("not_admitted")
            self._abandon(link, item)
        else:
            # Pages of it are, or may be, charged to a job: not now.
            self.counters.add("pin_retries")
            pending.flags &= ~How.KEEP
            self._later(item, RETRY[pending.attempts])
            pending.attempts += 1

    def _failed(self, item: int, code: int) -> None:
        self.counters.add("pin_errors")
        errors = self.counters["pin_errors"]
        if errors & errors - 1 == 0:  # the first, the second, the fourth …
            log.warning("%d not cached, last %s: %s", errors, self._name(item), os.strerror(code))
        self._forget(item)

    def _abandon(self, link: Link, item: int) -> None:
        """Give up on an item that the keeper may have pinned."""
        self._pending.pop(item, None)
        self.stash.remove(item)
        self.dropping.add(item)
        self._send(link, Verb.DROP, item, 0)

    def _forget(self, item: int) -> None:
        self._pending.pop(item, None)
        self.dropping.discard(item)
        self.stash.remove(item)
        self.epochs.unwatch(item)
        pinned = self.policy.release(item)
        if pinned:
            self.catalog.add_pinned_pages(items.record_of(item), -pinned)

    def _name(self, item: int) -> str:
        return os.fsdecode(self.catalog.path(items.record_of(item)))

    def outcomes(self) -> Counter[str]:
        """How many items are in which state, for `status`."""
        with self.lock:
            return Counter(pinned=len(self.policy), on_their_way=len(self._pending))
