"""Answering READ: from the stash, or from the source, and never with bytes of two versions.

The kernel shows a file as it was when it was listed. If the source holds another version by now, what happens depends
on what a reader may have got already:
  * nothing: the node takes the new version, as if it had been listed later, and the kernel is told before it gets any;
  * bytes: ESTALE, as on NFS, however the file changed. The name leads to a new node, which whoever opens it gets;
    whoever has the old one open must not mix the two.
So all bytes that the kernel ever gets for a node are of one version.

It does not know how a request arrives, or how the reply goes out.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from coordlfs.cache import items
from coordlfs.cache.admission import Admission, Fetched
from coordlfs.cache.disk_tier import DiskTier, Stored
from coordlfs.catalogue.catalog import DIRECTORY, LINKED, SERVED, STALE, SUPERSEDED, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import fuse, pages
from coordlfs.kernel.notifier import Notifier
from coordlfs.serving.ends import Ends
from coordlfs.serving.links import use_other_name
from coordlfs.sources.contract import Opened, Part, Source
from coordlfs.sources.versions import Version

if TYPE_CHECKING:
    from coordlfs.disk.store import Found
    from coordlfs.peers.sharing import Sharing

_ATTEMPTS = 2  # at reading what was of another version: another thread may have had the node take the newer one
_FEW_ITEMS = 1 << 16  # 1 TiB; a record of a larger file is not used again


class Request(NamedTuple):
    """A READ: `direct` if it goes around the page cache, `marked` if the file was opened with O_NOATIME."""

    node: int
    offset: int
    size: int
    pid: int
    direct: bool
    marked: bool = False


@dataclass(slots=True)
class Answer:
    """What to reply to a READ, and what of it came from the source and may be cached."""

    record: int
    request: Request
    for_peer: bool = False
    asks: bool = False  # other nodes, before the source is read
    data: list[memoryview] = field(default_factory=list)
    fetched: list[Fetched] = field(default_factory=list)
    on_disk: list[Fetched] = field(default_factory=list)  # from this node's disk tier
    shared: list[tuple[int, int, int]] = field(default_factory=list)  # from a peer: item, offset in the file, length


class Begun(NamedTuple):
    """A READ of one item for which a disk has to be read, the source's or the tier's; see `Reader.begin`."""

    answer: Answer
    item: int
    file: Opened | Stored


def _still_there(n: int, offset: int, st: os.stat_result) -> int:
    """How many of `n` bytes that were read at `offset` a file has by now.

    Of one that was truncated meanwhile the rest may be zeros, which are of no version.
    """
    return max(0, min(n, st.st_size - offset))


class Reader:
    """What the data loop's threads share. Thread-safe."""

    def __init__(
        self,
        catalog: Catalog,
        source: Source,
        admission: Admission,
        counters: Counters,
        notifier: Notifier,
        sharing: Sharing | None = None,
        tier: DiskTier | None = None,
    ) -> None:
        self.catalog = catalog
        self.source = source
        self.admission = admission
        self.counters = counters
        self.notifier = notifier
        self.sharing = sharing
        self.tier = tier
        self.ends = Ends()
        self._past: dict[tuple[int, bytes], set[int]] = {}  # by parent and name, records of versions that are known yet
        self._past_lock = threading.Lock()

    def read(self, request: Request, into: pages.Buffer, before_wait: Callable[[], None]) -> Answer:
        """The bytes that a READ asks for: from the stash what is there, and the rest from the source.

        `into` is page-aligned memory with room for them, which the answer may refer to. `before_wait` is called if the
        source's disk has to be waited for. Other nodes are asked for parts of several items, whom it waits for; of one
        item, `ask` does it. Raises OSError: ESTALE for an unknown node, else what the source does.
        """
        record = self.catalog.find(request.node)
        if record is None:
            raise OSError(errno.ESTALE, "unknown node")
        answer = self._put_together(record, request, into, before_wait)
        self.check_end(request, sum(map(len, answer.data)))
        return answer

    def _put_together(
        self, record: int, request: Request, into: pages.Buffer, before_wait: Callable[[], None]
    ) -> Answer:
        offset = request.offset
        answer = Answer(record, request, self._is_for_peer(request))
        at, end = offset, self.catalog.size(record)
        several = items.item_at(record, offset) != items.item_at(record, offset + request.size - 1)
        answer.asks = several and not answer.for_peer
        for item, start, length in items.cut(record, offset, request.size):
            for part in self.admission.stashed(item, start, length, end, request.pid):
                if isinstance(part, int):
                    view = memoryview(into)[at - offset :]
                    n = self._get(answer, item, at, part, view, before_wait)
                    if n < part:
                        return answer  # the file ends here
                    at += n
                else:
                    self.counters.add(self.admission.served_from, len(part))
                    answer.data.append(part)
                    at += len(part)
        return answer

    def _is_for_peer(self, request: Request) -> bool:
        sharing = self.sharing
        return sharing is not None and (request.marked or not sharing.marks) and sharing.is_peer_server(request.pid)

    def begin(self, request: Request, into: memoryview) -> Answer | Begun | None:
        """Read what is in one item and wholly from the source, without waiting: into `into`, see `read`.

        If the disk has to be waited for, the caller reads the bytes of `Begun.file`, and calls `fetched`. It replies,
        and calls `account`. None if `read` is to be called, whatever the reason. Raises OSError if no answer must be
        given.
        """
        if self.tier is None and self.source.is_remote:
            return None  # which has to be waited for
        catalog, offset = self.catalog, request.offset
        record = catalog.find(request.node)
        if record is None or offset % pages.PAGE:
            return None
        item, shown = items.item_at(record, offset), catalog.version(record)
        size = min(request.size, shown.size - offset)
        if size <= 0 or offset % items.CHUNK + size > items.CHUNK:
            return None
        if self.admission.stashed(item, offset, size, shown.size, request.pid) != [size]:
            return None
        if self.tier is not None:
            spans = self.tier.spans(record, shown, offset, size)
            if spans != [(size, [])]:
                return self._begin_on_disk(request, record, shown, spans)
        found = self.source.begin(self._part(record, offset, size), into)
        if found is None:
            return None
        if isinstance(found, Opened):
            return Begun(Answer(record, request, self._is_for_peer(request)), item, found)
        if found != shown or not catalog.serves(record, shown):
            return None  # written to meanwhile, perhaps, though another thread has recorded the new version already
        self.counters.count_read(size)
        data = into[:size]
        fetched = Fetched(item, offset, data, found)
        return self._checked(Answer(record, request, self._is_for_peer(request), False, [data], [fetched]), size)

    def _begin_on_disk(
        self, request: Request, record: int, shown: Version, spans: list[tuple[int, list[Found]]]
    ) -> Answer | Begun | None:
        """`begin` for what is in the disk tier, in part at least."""
        assert self.tier is not None
        if len(spans) > 1 or len(spans[0][1]) > 1:
            return None
        [(size, [found])] = spans
        stored = self.tier.begin(found, record, shown, request.offset, size)
        if stored is None:
            return None
        answer, item = Answer(record, request, self._is_for_peer(request)), items.item_at(record, request.offset)
        if isinstance(stored, Stored):
            return Begun(answer, item, stored)
        return self._give_stored(answer, item, request.offset, stored, shown)

    def _part(self, record: int, offset: int, size: int) -> Part:
        return Part(record, self.catalog.path(record), offset, size, not self.catalog.flags(record) & SERVED)

    def fetched(self, begun: Begun, data: memoryview) -> Answer | None:
        """The answer with `data`, all that was begun; None if `read` is to be called after all.

        Raises OSError if it must not be given.
        """
        file, answer = begun.file, begun.answer
        if isinstance(file, Stored):
            assert self.tier is not None
            proved = self.tier.proved(file, data)
            if proved is None:
                return None
            return self._give_stored(answer, begun.item, answer.request.offset, proved, file.shown)
        st = self.source.end(file)
        if st is None or not self.catalog.shows_bytes(answer.record, st):
            return None
        self._took(answer, begun.item, file.offset, file.length, data, st)
        answer.data.append(data)
        return self._checked(answer, file.length)

    def took(self, begun: Begun, seconds: float) -> None:
        """A disk has read what was begun, in so many seconds."""
        if self.tier is not None:
            (self.tier.pace if isinstance(begun.file, Stored) else self.tier.pace_of_source).took(seconds)

    def failed(self, begun: Begun) -> None:
        """The disk did not read what was begun."""
        if isinstance(begun.file, Opened):
            self.source.end(begun.file)
        elif self.tier is not None:
            self.tier.proved(begun.file, memoryview(b""))

    def _give_stored(self, answer: Answer, item: int, offset: int, data: memoryview, version: Version) -> Answer | None:
        answer.data.append(data)
        answer.on_disk.append(Fetched(item, offset, data, version))
        return self._checked(answer, len(data))

    def _checked(self, answer: Answer, length: int) -> Answer | None:
        self.check_end(answer.request, length)
        return answer

    def check_end(self, request: Request, length: int) -> None:
        """Raise ESTALE if the kernel might not take an answer of `length` bytes for the end of the file, as it is."""
        node, offset, size, _, direct, _ = request
        if length < size and not direct and self.ends.refuses(node, offset, size, offset + length):
            raise OSError(errno.ESTALE, "its end is new")

    def ask(self, request: Request, done: Callable[[memoryview | None], None], before_wait: Callable[[], None]) -> bool:
        """Ask the node that owns all that a READ wants; False if there is no such, and `read` is to be called.

        `done` is called once, within seconds and by whatever thread: with the bytes, which are good until it returns
        and to be seen through `check_end` and `account_shared`, or with None if the source is to be read.
        """
        sharing, record = self.sharing, self.catalog.find(request.node)
        if sharing is None or record is None:
            return False
        offset, size = request.offset, min(request.size, self.catalog.size(record) - request.offset)
        item = items.item_at(record, offset)
        if size <= 0 or offset % items.CHUNK + size > items.CHUNK or not self.admission.is_absent(item):
            return False
        if (request.marked or not sharing.marks) and sharing.is_peer_server(request.pid):
            return False
        if self.tier is not None and self.tier.spans(record, self.catalog.version(record), offset, size) != [
            (size, [])
        ]:
            return False  # it is on this node's disk, which may have changed hands since
        return sharing.ask(item, offset, size, done, before_wait)

    def account_shared(self, request: Request, nbytes: int) -> None:
        """`account` for what `ask` brought."""
        record = self.catalog.find(request.node)
        if record is not None:
            self.admission.shared(items.item_at(record, request.offset), request.offset, nbytes, request.direct)

    def _get(
        self, answer: Answer, item: int, offset: int, size: int, into: memoryview, before_wait: Callable[[], None]
    ) -> int:
        """Add bytes to an answer; how many. `into` is room for them."""
        if self.tier is None:
            return self._fetch(answer, item, offset, size, into, before_wait)
        shown, at = self.catalog.version(answer.record), 0
        known = min(size, shown.size - offset)
        if known <= 0:
            return self._fetch(answer, item, offset, size, into, before_wait)
        for length, blocks in self.tier.spans(answer.record, shown, offset, known):
            view = into[at : at + length]
            if blocks and self.tier.read(answer.record, shown, offset + at, view, blocks, before_wait):
                answer.on_disk.append(Fetched(item, offset + at, view, shown))
                answer.data.append(view)
            else:
                asked = size - at if at + length == known else length  # the file may be longer by now
                n = self._fetch(answer, item, offset + at, asked, into[at:], before_wait)
                if n < length or asked > length:
                    return at + n
            at += length
        return at

    def _fetch(
        self, answer: Answer, item: int, offset: int, size: int, into: memoryview, before_wait: Callable[[], None]
    ) -> int:
        """`_get` from the peer that owns the item, else from the source."""
        record = answer.record
        pinning = answer.request.pid in self.admission.keeper_threads and self.admission.is_pending(item)
        if self.sharing is not None and answer.asks and not pinning:
            n = self.sharing.fetch(item, offset, into[:size], before_wait)
            if n:
                answer.shared.append((item, offset, n))
                answer.data.append(into[:n])
                return n
        for attempt in range(_ATTEMPTS):
            try:
                began = time.monotonic()
                data, st = self.source.fetch(self._part(record, offset, size), into, before_wait)
                if self.tier is not None:
                    self.tier.pace_of_source.took(time.monotonic() - began)
            except OSError as e:
                if e.errno == errno.ENOENT and self.use_other_name(record):
                    return self._fetch(answer, item, offset, size, into, before_wait)
                self.counters.add("source_errors")
                self.source.forget(record)
                if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    # To open a file is no request: whoever had bytes of it has it open, as far as can be told.
                    code = errno.ESTALE if self.catalog.flags(record) & SERVED else errno.ENOENT
                    self.vanished(record)
                    self.notifier.call(lambda: self.lead_elsewhere(record))
                    raise OSError(code, "vanished") from e
                raise
            if attempt or self.catalog.shows_bytes(record, st) or not self.catalog.flags(record) & SERVED:
                break
            self.source.forget(record)
            self.use_other_name(record)
        n = _still_there(len(data), offset, st)
        self._took(answer, item, offset, n, data[:n], st)
        answer.data.append(data[:n])
        return n

    def _took(self, answer: Answer, item: int, offset: int, n: int, data: memoryview, st: os.stat_result) -> None:
        """The source gave `n` bytes of a file that has attributes `st`. Raises ESTALE if they must not be given."""
        self.counters.count_read(n)
        version = Version.of(st)
        is_shown = self.catalog.shows_file(answer.record, st)  # may ask the source, so not under the catalogue's lock
        if not (is_shown and self.catalog.serves(answer.record, version)):
            self._changed(answer.record, offset, st)
        elif n:
            answer.fetched.append(Fetched(item, offset, data, version))

    def account(self, answer: Answer) -> None:
        """What follows once a READ is answered: count what was missed, and admit it if there is room."""
        pid, direct = answer.request.pid, answer.request.direct
        for fetched in answer.fetched:
            if pid in self.admission.keeper_threads:
                self.admission.keep(fetched)
            else:
                self.admission.missed(fetched, pid, direct, for_peer=answer.for_peer)
            if self.tier is not None and not direct:
                self.tier.keep(fetched)
        for fetched in answer.on_disk:
            if pid in self.admission.keeper_threads:
                self.admission.keep(fetched, on_disk=True)
            else:
                self.admission.missed(fetched, pid, direct, for_peer=answer.for_peer, on_disk=True)
        for item, offset, length in answer.shared:
            self.admission.shared(item, offset, length, direct)

    def use_other_name(self, record: int) -> bool:
        """Have a file whose name is gone read by another hard link of it; False if none is known."""
        return use_other_name(self.catalog, self.source, record)

    def vanished(self, record: int) -> None:
        """The name of a file is gone from the source; `lead_elsewhere` is to follow."""
        if self.catalog.flags(record) & SERVED:
            self.catalog.supersede(record)
        self.admission.drop_file(record, self.catalog.size(record))

    def _changed(self, record: int, offset: int, st: os.stat_result) -> None:
        """The source gave bytes of a version that the kernel may not have been shown: raise ESTALE, or give them."""
        staleness = self.catalog.staleness(record)
        shown, node = self.catalog.version(record), self.catalog.node(record)
        self.source.forget(record)
        if st.st_size > shown.size:
            # read(2) asks for the new length at the old end, sendfile(2) and all that splices does not: it ends there.
            self._supersede(record)
        if self.supersedes(record, st):
            raise OSError(errno.ESTALE, "changed while it was read")
        self.counters.add("changed_files")
        if self.catalog.is_stricter(record, st):
            # Whether this reader may read it is for the kernel to say, when it has the new attributes.
            self.admission.drop_file(record, shown.size)
            self.notifier.send_now(fuse.invalidate_inode(node, -1, 0))
            raise OSError(errno.ESTALE, "its mode or owner changed")
        if st.st_size < shown.size:
            self.ends.notified(node, shown.size)
        # Before the first byte: who has got that sees these attributes, and at the old end of the file asks for them.
        self.notifier.send_now(fuse.invalidate_inode(node, -1, 0))
        if not self.catalog.shows_bytes(record, st):
            self.admission.drop_file(record, shown.size)
        if offset and offset >= st.st_size:
            # The kernel would take an empty reply for the end, and what lies before it for zeros.
            raise OSError(errno.ESTALE, "truncated while it was read")
        if self.catalog.take(record, Version.of(st), staleness):
            self.catalog.set_access(record, st)
        else:
            self._changed(record, offset, st)

    def supersedes(self, record: int, st: os.stat_result) -> bool:
        """Whether `st`, another version than the one shown, is another node's: the name is made to lead there then."""
        was_superseded = self.catalog.flags(record) & SUPERSEDED
        if not self.catalog.supersedes(record, st):
            return False
        if not was_superseded:
            self.replaced(record)
        return True

    def modified(self, record: int, st: os.stat_result) -> bool:
        """The attributes of a file show another version, and the kernel is about to be told them.

        False if that is another node's.
        """
        if self.catalog.shows_bytes(record, st):
            self.catalog.set_access(record, st)
            return True
        shown = self.catalog.version(record)
        self.counters.add("changed_files")
        self.source.forget(record)
        if st.st_size < shown.size:
            self.ends.notified(self.catalog.node(record), shown.size)
        if not self.catalog.renew(record, Version.of(st)):  # bytes were handed out a moment ago
            return not self.supersedes(record, st)
        self.admission.drop_file(record, shown.size)
        return True

    def recover(self) -> None:
        """Tell the kernel what a server before this one had not yet when it was killed."""
        for record in self.catalog.stale():
            if self.catalog.flags(record) & SUPERSEDED:
                self.notifier.call(partial(self._settle, record))
            else:
                self.ends.notified(self.catalog.node(record), fuse.LARGEST_FILE)

    def _supersede(self, record: int) -> None:
        """Have the name lead to another node, though this one's bytes were never handed out."""
        if not self.catalog.flags(record) & SUPERSEDED:
            self.catalog.supersede(record)
            self.replaced(record)

    def replaced(self, record: int) -> None:
        """The name of a file leads to another node, and to the old one nobody any more, in a moment."""
        self.counters.add("changed_files")
        self.source.forget(record)
        self.admission.drop_past(record)
        self.notifier.call(lambda: self._settle(record))

    def _settle(self, record: int) -> None:
        if self.catalog.flags(record) & STALE:  # else somebody who could not wait has done it
            self.lead_elsewhere(record)

    def lead_elsewhere(self, record: int) -> None:
        """Have the kernel look the names of a record up anew, whatever it believes: it does so when this returns.

        That blocks while somebody looks a name up beside them: not for the threads that answer.
        """
        staleness = self.catalog.staleness(record)
        for parent, name in {self.catalog.entry(record), *self.catalog.other_names(record)}:
            self.notifier.send_now(fuse.invalidate_entry(self.catalog.node(parent), name))
        if self.catalog.flags(record) & LINKED and self.counters["server_starts"] > 1:
            self.notifier.send_now(fuse.invalidate_all_entries())  # an earlier server may have known more names
        if self.catalog.flags(record) & (SUPERSEDED | SERVED):  # else there are attributes to be told
            self.catalog.set_fresh(record, staleness)
        if self.catalog.flags(record) & SUPERSEDED:
            self._give_back(record)

    def _give_back(self, record: int) -> None:
        """Have the records of past versions of a name used again, so that one that changes for ever takes up a few."""
        place = self.catalog.entry(record)
        with self._past_lock:
            past = self._past.setdefault(place, set())
            past.add(record)
            for each in list(past):
                staleness, flags = self.catalog.staleness(each), self.catalog.flags(each)
                if not flags & SUPERSEDED:
                    past.discard(each)  # its name leads to it again
                elif not flags & STALE and self._is_forgotten(each):
                    past.discard(each)
                    self.catalog.give_back(each, staleness)
            if not past:
                del self._past[place]

    def _is_forgotten(self, record: int) -> bool:
        wanted = items.items_of(record, self.catalog.size(record))
        if len(wanted) > _FEW_ITEMS or self.catalog.pinned_pages(record):
            return False
        return all(map(self.admission.is_absent, wanted)) and not self.notifier.is_known(self.catalog.node(record))

    def announce(self, record: int) -> None:
        """Have the kernel ask for the attributes of a record anew, and for what it keeps of a directory."""
        is_directory = self.catalog.flags(record) & DIRECTORY
        self.notifier.send_now(fuse.invalidate_inode(self.catalog.node(record), 0 if is_directory else -1, 0))
