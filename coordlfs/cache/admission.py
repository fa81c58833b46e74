"""Admission: how an item that missed comes to be pinned, and is dropped again.

    absent ── a READ misses, MinIO has room ──> collecting (its bytes go to the stash)
           ── all of it read, or idle a while ──> asked (a keeper pins it, READing the stash) ──> pinned

The keeper says BUSY while a reader still uses the pages: it is asked again later, at last after the kernel was told to
take them even out of a job's mappings. A job's READ that comes while the keeper works would leave pages charged to the
job, so such an item is pinned once more. Data loop threads call in with what they read, and listen to the keepers as
they look for requests: a thread that woke up for each answer would take the GIL from them. One thread of this module
watches the clock.

Here it is decided what is cached. What is on its way is kept in `pending`, keepers are talked to by `keepers`, misses
are counted by `accounting`; whose the items are, what readers announced and what they wait for is asked of others, as
`interfaces` says. It knows neither the requests of the kernel nor the source.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from coordlfs.cache import items
from coordlfs.cache.accounting import Accounts
from coordlfs.cache.epochs import Epochs
from coordlfs.cache.interfaces import Announced, Awaited, Disk, Invalidator, Owners
from coordlfs.cache.keeper_protocol import How, Outcome, Reply, Verb
from coordlfs.cache.keepers import Keepers, Link
from coordlfs.cache.memory_cgroups import MemoryCgroups
from coordlfs.cache.minio import MinIO, State
from coordlfs.cache.pending import Pending, PendingItems
from coordlfs.cache.stash import Stash
from coordlfs.catalogue.catalog import OTHER_CGROUP, SUPERSEDED, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import pages
from coordlfs.kernel.libc import quick_write
from coordlfs.sources.versions import Version

if TYPE_CHECKING:
    from coordlfs.cache.store import Store

log = logging.getLogger(__name__)

_AT_ONCE = 16  # answers of one keeper that are taken before who serves looks for requests again
IDLE = 0.05  # seconds without a READ after which an item that was read in part is pinned whole
RETRY = (0.002, 0.02, 0.2, 1.0, 4.0)  # seconds between attempts while somebody uses the pages
_ENOUGH = 48  # of them, and items on their way, above which nothing is fetched ahead
_PENDING = 256
_AWAITED = 0.1, 100  # seconds after which it is seen again whether an item can be asked for, and how often
_ONE = (1).to_bytes(8, sys.byteorder)  # what wakes whoever waits for an eventfd
_FORCE_FROM = 2  # the attempt from which pages are dropped even where a job maps them


class Fetched(NamedTuple):
    """Bytes that the source gave for a READ."""

    item: int
    offset: int  # in the file
    data: memoryview
    version: Version  # of the file, which the bytes belong to


class Admission:
    """Which items are cached, and which are on their way there. Every method may be called from any thread.

    `run` is the thread of its own. `receive` is to be called when `fd` is readable, and every so often while nobody has
    time to wait for that.
    """

    served_from = "stash_bytes"  # the counter of bytes that `stashed` finds
    hits_ask_nobody = True  # else each is a READ
    _verb = Verb.PIN  # what keepers are asked to do with an item
    _how = 0  # with pages that are there, beside what is known of an item

    def __init__(
        self,
        catalog: Catalog,
        policy: MinIO,
        stash: Stash | Store,
        epochs: Epochs,
        counters: Counters,
        more_keepers: Callable[[], None],
        *,
        announced: Announced,
        awaited: Awaited,
        invalidator: Invalidator,
        owners: Owners | None = None,
        disk: Disk | None = None,
    ) -> None:
        """`more_keepers` asks the supervisor for another keeper. `owners`: None if this node shares with no other."""
        self.catalog = catalog
        self.policy = policy
        self.stash = stash
        self.counters = counters
        self.announced = announced
        self.accounts = Accounts(catalog, policy, epochs, counters, announced)
        self._awaited = awaited
        self._invalidator = invalidator
        self._owners = owners
        self._disk = disk
        self._keepers = Keepers(catalog, more_keepers, self._inode)
        self._cgroups = MemoryCgroups()
        self.fd = self._keepers.fd
        self.lock = threading.RLock()
        self._pending = PendingItems()
        self.skipped: set[int] = set()  # items without room in the stash, until they miss anew
        self.dropping: set[int] = set()
        self.recovering: set[int] = set()  # keepers that have not yet told what they hold
        self._orphans: dict[int, int] = {}  # records with pages that the last server knew to be pinned
        # Items to be pinned again: the catalogue counts them as pinned, for a server that takes over meanwhile.
        self._again: set[int] = set()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False

    def _inode(self, record: int) -> int:
        """The number that keepers find a file under, in the directory that they work from."""
        return self.catalog.node(record)

    @property
    def keeper_pids(self) -> frozenset[int]:
        """The processes that pin, or read, what is cached."""
        return self._keepers.pids

    @property
    def keeper_threads(self) -> frozenset[int]:
        """All threads of them, by which the kernel names who reads."""
        return self._keepers.threads

    # -- called by the data loop --------------------------------------------------------------------------------

    def stashed(self, item: int, offset: int, size: int, end: int, pid: int) -> list[memoryview | int]:
        """`Stash.parts` of an item of a file that ends at `end`, for process `pid`: it need not be read again."""
        if item not in self._pending.by_item:
            return [size]
        with self.lock:
            pending = self._pending.by_item.get(item)
            if pending is not None and pid not in self.keeper_threads:
                pending.same_cgroup = self._is_same_cgroup(items.record_of(item), pid)
                pending.contended = not pending.same_cgroup
            return self.stash.parts(item, offset, min(size, end - offset))

    def missed(
        self, fetched: Fetched, pid: int, direct: bool, *, for_peer: bool = False, on_disk: bool = False
    ) -> None:
        """A READ of job `pid` was answered from the source, or, `on_disk`, from this node's disk.

        Counts it, and admits its item if there is room. `direct`: the READ went around the page cache. `for_peer`: it
        was another node that wanted it, and no epoch of this one.
        """
        item, offset, data, version = fetched
        record, file_size = items.record_of(item), version.size
        with self.lock:
            if not self.catalog.shows(record, version):
                return  # another thread has seen a newer version meanwhile
            if direct:
                self.accounts.know(record, file_size)
                return  # it fills no cache, and may read a page many times an epoch
            if not for_peer:
                self._count_miss(item, offset, len(data), file_size, on_disk=on_disk)
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
        """Admit an item that is absent and has room, or add to one that is on its way."""
        record, length = items.record_of(item), items.length(item, file_size)
        pending = self._pending.by_item.get(item)
        if pending is None:
            if not length or item in self.skipped or not self._admits(item, pages.count(length)):
                return
            same_cgroup = self._is_same_cgroup(record, pid)
            if same_cgroup and len(data) == length:
                self._ask(item, self._pending.by_item.setdefault(item, Pending(missed=not for_peer, same_cgroup=True)))
                return
            if not self.stash.reserve(item, length):
                self.policy.release(item)
                self.counters.add("not_admitted")
                if len(data) < length:
                    self.skipped.add(item)  # admitted with the next READ, it would have this one read again
                return
            pending = self._pending.by_item[item] = Pending(missed=not for_peer, same_cgroup=same_cgroup)
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
                self.accounts.know(record, file_size)
            else:
                self._count_miss(item, offset, 0, file_size)
                self.accounts.given_by_peer(nbytes)

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
        if self._owners is not None and not self._owners.owns(item):
            return False
        if self.policy.admit(item, npages):
            return True
        self._give_way(npages)
        return False

    def _give_way(self, npages: int) -> None:
        if self._owners is not None and npages <= self.policy.capacity:
            self.drop(self._owners.displaced(npages))

    def keep(self, fetched: Fetched, *, on_disk: bool = False) -> None:
        """The keeper's READ was answered from the source: should the item have to be pinned again, its bytes are here.

        Ahead of a reader it is that reader's miss.
        """
        item, offset, data, version = fetched
        record = items.record_of(item)
        with self.lock:
            if not self.catalog.shows(record, version):
                return
            pending = self._pending.by_item.get(item)
            if record in self.announced.wanted:
                self._count_miss(item, offset, len(data), version.size, on_disk=on_disk)
            elif pending is not None and pending.missed and not on_disk:
                self.accounts.continue_miss(len(data))
            if pending is not None:
                self._add(item, offset, data)

    def completed(self, nbytes: int) -> None:
        """So many bytes were read from the source for the rest of a block on disk, of which a reader had a part."""
        with self.lock:
            self.accounts.continue_miss(nbytes)

    def _add(self, item: int, offset: int, data: memoryview) -> None:
        self.stash.put(item, offset, data)

    def _is_same_cgroup(self, record: int, pid: int) -> bool:
        """Whether every process that has read of the file so far, `pid` too, is charged where the keepers are."""
        if not self._cgroups.is_keepers(pid):
            self.catalog.set_other_cgroup(record)
        return not self.catalog.flags(record) & OTHER_CGROUP

    def _count_miss(self, item: int, offset: int, nbytes: int, file_size: int, *, on_disk: bool = False) -> None:
        is_new = self.accounts.miss(item, offset, 0 if on_disk else nbytes, file_size)
        if is_new:
            self.skipped.discard(item)
        if on_disk:
            self.accounts.given_by_disk(nbytes, is_new=is_new)

    # -- called by whoever wants items in or out ----------------------------------------------------------------

    def admit(self, wanted: Iterable[int]) -> int:
        """Have items pinned that nobody has read; how many were admitted. What does not fit is left out."""
        taken = 0
        with self.lock:
            for item in wanted:
                size = self.catalog.size(items.record_of(item))
                room = pages.count(items.length(item, size))
                if item not in self.dropping and self._admits(item, room):
                    self.accounts.know(items.record_of(item), size)
                    self.stash.reserve(item, items.length(item, size))  # for `keep`; without room it goes without
                    self._ask_unless_awaited(item, self._pending.by_item.setdefault(item, Pending()))
                    taken += 1
        return taken

    def flush(self) -> None:
        """Ask the keepers now for what waits for more of the same."""
        with self.lock:
            self._keepers.flush()

    def drop(self, unwanted: Iterable[int]) -> int:
        """Have items dropped, pinned or on their way; how many there were."""
        dropped = 0
        with self.lock:
            for item in unwanted:
                if item in self.dropping or self.policy.state(item) is State.ABSENT:
                    continue
                dropped += 1
                pending = self._pending.by_item.get(item)
                holder = self.policy.holder(item)
                if pending is not None and pending.keeper is not None:
                    pending.cancelled = True  # the keeper's answer brings it back here
                    self.stash.remove(item)
                elif holder is not None and holder in self._keepers.links:
                    self.dropping.add(item)
                    self.catalog.add_pinned_pages(items.record_of(item), -self.policy.unpin(item))
                    self._keepers.ask(self._keepers.links[holder], Verb.DROP, item)
                else:
                    self._forget(item)
        return dropped

    def held_pages(self) -> int:
        """Pages that are pinned, those included that are being dropped: their memory is not available yet."""
        with self.lock:
            return self.policy.pinned_pages + sum(map(self.policy.pages, self.dropping))

    def limit(self, capacity: int) -> int:
        """Have no more than `capacity` pages from now on; how many are dropped for it, of items drawn at random."""
        with self.lock:
            self.policy.capacity = capacity
            if self.policy.used <= capacity:
                return 0
            leaving = self.dropping | {item for item, pending in self._pending.by_item.items() if pending.cancelled}
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
        if self._disk is not None:
            self._disk.release(record, size)
        if not self.catalog.pinned_pages(record) and not self._pending.by_item:
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
            self.accounts.forget(record, size)

    def is_absent(self, item: int) -> bool:
        """Whether an item is neither pinned nor on its way in or out."""
        return not self.policy.pages(item) and item not in self.dropping

    def is_pending(self, item: int) -> bool:
        """Whether an item is on its way to be pinned."""
        return item in self._pending.by_item

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is on its way in or out, or waits to be tried anew."""
        return not (self._pending.by_item or self.dropping or self.recovering or self.skipped)

    def settled(self, wanted: Iterable[int]) -> bool:
        """Whether none of the items is on its way in or out."""
        return not any(item in self._pending.by_item or item in self.dropping for item in wanted)

    def is_busy(self) -> bool:
        """Whether the keepers have enough to do for now, or there is none (then one is asked for)."""
        with self.lock:
            if not self._keepers.links:
                self._keepers.want()
                return True
            enough = self._keepers.load() >= _ENOUGH or len(self._pending.by_item) >= _PENDING
            return enough or bool(self.recovering) or not self.stash.has_room(items.CHUNK)

    def fetch(self, item: int) -> None:
        """Have a keeper read an item that is not to be pinned into the page cache."""
        with self.lock:
            self._ask_any(Verb.FETCH, item)

    def release(self, item: int) -> None:
        """Have what is resident of an item dropped, unless it is pinned."""
        with self.lock:
            self._ask_any(Verb.RELEASE, item)

    def _ask_any(self, verb: Verb, item: int) -> None:
        link = self._keepers.first()
        if link is not None:
            self._keepers.ask(link, verb, item)

    # -- keepers ------------------------------------------------------------------------------------------------

    def add_keeper(self, index: int, pid: int, sock: socket.socket) -> None:
        """A keeper joins, a new one or one that a server before this one had."""
        with self.lock:
            self._keepers.add(index, pid, sock)
            self.look_at_cgroups()
            self._ask_waiting()

    def look_at_cgroups(self) -> dict[bytes | None, int]:
        """See where the keepers are charged for memory, as somebody may have moved them; one of each such cgroup."""
        with self.lock:
            return self._cgroups.look(self._keepers.pids)

    def lose_keeper(self, index: int) -> None:
        """A keeper died, and its pins with it. What it held is pinned again as it is, as long as it is resident."""
        with self.lock:
            if not self._keepers.remove(index):
                return
            for item in self.policy.held_by(index):
                self.policy.unpin(item)
                self._pin_again(item)
            self._pending.lose_keeper(index)
            for item in [i for i in self.dropping if self.policy.holder(i) is None]:
                self._forget(item)
            self._recovered(index)
            self._ask_waiting()

    def _pin_again(self, item: int) -> None:
        """Have an item pinned whose pages are resident, as they are, and that the catalogue counts as pinned."""
        self._again.add(item)
        self._pending.by_item[item] = Pending(flags=How.KEEP)
        self._pending.wait_for_keeper(item)

    def recover(self) -> None:
        """Ask the keepers what they hold: for a server that takes over from one that died."""
        with self.lock:
            self._orphans = self.catalog.clear_pinned_pages()
            for link in self._keepers.links.values():
                self.recovering.add(link.index)
                self._keepers.ask(link, Verb.LIST)
            if not self._keepers.links:
                # They died with the last server, and their successors will be told; or there was none without a cache.
                if self.policy.capacity > 0:
                    self._keepers.expect()
                self._adopt_orphans()

    def receive(self) -> bool:
        """Take what the keepers have said, and ask them for what has waited for more of the same.

        Whether they said anything.
        """
        spoke = False
        for link in self._keepers.spoke():
            if link is None:
                self.flush()
            else:
                spoke = True
                self._receive(link)
        return spoke

    def _receive(self, link: Link) -> None:
        for _ in range(_AT_ONCE):
            with self.lock:
                try:
                    reply = self._keepers.hear(link)
                except EOFError:
                    self.lose_keeper(link.index)
                    return
                if reply is None:
                    return
                self._take_reply(link, reply)

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
        if self._pending.postpone(item, time.monotonic() + delay):
            self._wake()

    def _run_due(self) -> int | None:
        """Ask for what is due; milliseconds until something else is."""
        now = time.monotonic()
        for item in self._pending.due(now):
            self._ask_unless_awaited(item, self._pending.by_item[item])
        due = self._pending.next_due()
        return None if due is None else max(1, int((due - now) * 1000))

    def _ask_unless_awaited(self, item: int, pending: Pending) -> None:
        """Ask for an item of which not all was read, unless a job's READ of it is at the source.

        The keeper would wait for that one, for ever if the source hangs, and all that it is asked would wait with it.
        """
        record = items.record_of(item)
        if self._awaited.is_awaited(self.catalog.node(record), items.span(item, self.catalog.size(record))[0]):
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
        pending.due = None
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
                if self._pending.by_item.get(item) is pending and pending.keeper is None:
                    self._ask_keeper(item, pending, How.FORCE)

        if not self._invalidator.drop_pages(self.catalog.node(record), offset, length, dropped):
            self.counters.add("not_admitted")
            self._forget(item)

    def _ask_keeper(self, item: int, pending: Pending, flags: int) -> None:
        link = self._keepers.with_room()
        if link is None:
            self._pending.wait_for_keeper(item)
            self._keepers.want()
            return
        pending.keeper = link.index
        pending.contended = False
        flags |= pending.flags | self._how
        if pending.same_cgroup:
            # Every page was allocated by a READ that was charged where the keeper is: they are pinned as they are.
            flags |= How.KEEP
        self._keepers.ask(link, self._verb, item, flags)

    def _ask_waiting(self) -> None:
        for item in self._pending.take_waiting():
            self._ask_unless_awaited(item, self._pending.by_item[item])

    def _take_reply(self, link: Link, reply: Reply) -> None:
        match reply.outcome:
            case Outcome.LISTED:
                self._learn(link, reply.pins)
                if not reply.pins:
                    self._recovered(link.index)
            case Outcome.WATCHED:
                self.accounts.epochs.watch(reply.item)
            case Outcome.OPENED:
                self.accounts.epochs.opened(reply.item, time.monotonic(), self.accounts.unpinned())
            case Outcome.FETCHED if not reply.code:
                self.announced.fetched(items.record_of(reply.item))
            case Outcome.THREAD | Outcome.FETCHED | Outcome.GONE | Outcome.SEEN:
                pass
            case _:
                self._answered(link, reply.outcome, reply.code, reply.item)

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
                    self.catalog.add_pinned_pages(record, room)
                    self._pin_again(item)
        self._ask_waiting()

    def _learn(self, link: Link, pins: list[tuple[int, int]]) -> None:
        for item, length in pins:
            record = items.record_of(item)
            if record >= len(self.catalog) or not 0 < length <= items.CHUNK or self.policy.holder(item) == link.index:
                continue
            if not self.policy.admit(item, pages.count(length), is_held=True):
                self._keepers.ask(link, Verb.DROP, item)  # another keeper holds it, or is about to
            elif self.catalog.flags(record) & SUPERSEDED:
                self.dropping.add(item)
                self._keepers.ask(link, Verb.DROP, item)
            else:
                self._pinned(link.index, item)

    def _pinned(self, holder: int, item: int) -> None:
        self.policy.pin(item, holder)
        if self._disk is not None:
            self._disk.pinned(item)
        if item in self._again:
            self._again.discard(item)
        else:
            self.catalog.add_pinned_pages(items.record_of(item), self.policy.pages(item))

    def _answered(self, link: Link, outcome: Outcome, code: int, item: int) -> None:
        if outcome is Outcome.DROPPED:
            self.dropping.discard(item)
            if item not in self._pending.by_item and self.policy.holder(item) in (None, link.index):
                self._forget(item)
            return
        pending = self._pending.by_item.get(item)
        if pending is None or pending.keeper != link.index:
            return
        pending.keeper = None
        if pending.cancelled:
            self._abandon(link, item)
        elif outcome is Outcome.FULL:
            self._ask(item, pending)
        elif outcome is Outcome.PINNED and not pending.contended:
            del self._pending.by_item[item]
            self.stash.remove(item)
            self._pinned(link.index, item)
        elif outcome is Outcome.FAILED:
            self._failed(item, code)
        elif outcome is Outcome.LEFT:
            self._forget(item)
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
        self._forget(item)
        if code == errno.ENOENT:  # its file is gone, as files may
            return
        self.counters.add("pin_errors")
        errors = self.counters["pin_errors"]
        if errors & errors - 1 == 0:  # the first, the second, the fourth …
            log.warning("%d not cached, last %s: %s", errors, self._name(item), os.strerror(code))

    def _abandon(self, link: Link, item: int) -> None:
        """Give up on an item that the keeper may have pinned."""
        self._pending.by_item.pop(item, None)
        self.stash.remove(item)
        self.dropping.add(item)
        self._keepers.ask(link, Verb.DROP, item)

    def _forget(self, item: int) -> None:
        self._pending.by_item.pop(item, None)
        self.dropping.discard(item)
        self.stash.remove(item)
        self.accounts.epochs.unwatch(item)
        room = self.policy.pages(item)
        pinned = self.policy.release(item)
        if item in self._again:
            self._again.discard(item)
            self.catalog.add_pinned_pages(items.record_of(item), -room)
        elif pinned:
            self.catalog.add_pinned_pages(items.record_of(item), -pinned)

    def _name(self, item: int) -> str:
        return os.fsdecode(self.catalog.path(items.record_of(item)))

    def outcomes(self) -> Counter[str]:
        """How many items are in which state, for `status`."""
        with self.lock:
            return Counter(pinned=len(self.policy), on_their_way=len(self._pending.by_item))
