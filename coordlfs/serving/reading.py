"""Answering READ: from the stash, or from the source, and never with bytes of two versions.

The kernel shows a file as it was when it was listed. If the source holds another version by now, what happens depends
on what a reader may have got already:
  * nothing: it gets the new version, as if it had been listed later;
  * bytes of a file that was since changed in place: it gets the new bytes, as in the source itself;
  * bytes of a file that was since replaced: ESTALE, as on NFS. The name leads to a new node, which whoever opens it
    gets; whoever has the old one open must not mix the two.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from coordlfs.cache import items
from coordlfs.cache.admission import Admission, Fetched
from coordlfs.catalogue.catalog import SERVED, STALE, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import fuse, pages
from coordlfs.kernel.notifier import Notifier
from coordlfs.serving.ends import Ends
from coordlfs.sources.directory import Opened, Source
from coordlfs.sources.versions import Version

if TYPE_CHECKING:
    from coordlfs.peers.sharing import Sharing

# Seconds in which the kernel forgets the pages of a file that changed: should keepers keep dying, it is a while until
# there is one that sees to it.
_RELEASED_WITHIN = 10.0
_LOOK_AFTER, _LOOK_EVERY = 0.002, 0.05  # seconds
_ATTEMPTS = 4  # at putting together a READ of a file that changes meanwhile


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
    shared: list[tuple[int, int, int]] = field(default_factory=list)  # from a peer: item, offset in the file, length


class Begun(NamedTuple):
    """A READ of one item for which the disk has to be read, and its file; see `Reader.begin`."""

    answer: Answer
    item: int
    file: Opened


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
    ) -> None:
        self.catalog = catalog
        self.source = source
        self.admission = admission
        self.counters = counters
        self.notifier = notifier
        self.sharing: Sharing | None = None
        self.ends = Ends()

    def read(self, request: Request, into: pages.Buffer, before_wait: Callable[[], None]) -> Answer:
        """The bytes that a READ asks for: from the stash what is there, and the rest from the source.

        `into` is page-aligned memory with room for them, which the answer refers to. `before_wait` is called if the
        source's disk has to be waited for. Other nodes are asked for parts of several items, whom it waits for; of one
        item, `ask` does it. Raises OSError: ESTALE for an unknown node, else what the source does.
        """
        record = self.catalog.find(request.node)
        if record is None:
            raise OSError(errno.ESTALE, "unknown node")
        for _ in range(_ATTEMPTS):
            shown = self.catalog.size_and_mtime(record)
            answer = self._put_together(record, request, into, before_wait)
            if len(answer.data) == 1 or self.catalog.size_and_mtime(record) == shown:
                break  # else the parts may be of two versions
        self.check_end(request, sum(map(len, answer.data)), before_wait)
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
                    n = self._fetch(answer, item, at, part, view, before_wait)
                    answer.data.append(view[:n])
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
        found = self.source.begin(record, catalog.path(record), into, offset, size)
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

    def fetched(self, begun: Begun, data: memoryview) -> Answer | None:
        """The answer with `data`, all that was begun; None if `read` is to be called after all.

        Raises OSError if it must not be given.
        """
        file, answer = begun.file, begun.answer
        st = self.source.end(file)
        if st is None:
            return None
        self._took(answer, begun.item, file.offset, file.length, data, st)
        answer.data.append(data)
        return self._checked(answer, file.length)

    def _checked(self, answer: Answer, length: int) -> Answer | None:
        request = answer.request
        if request.direct and self._is_stale(request.node):
            return None
        self.check_end(request, length)
        return answer

    def check_end(self, request: Request, length: int, before_wait: Callable[[], None] | None = None) -> None:
        """See that the kernel takes an answer of `length` bytes for the end of the file if it is short.

        Of a READ around the page cache it takes from there what is missing, should it take the file for longer: that
        is waited for until it is gone, if there is a `before_wait`. Raises ESTALE where it would go wrong.
        """
        node, offset, size, _, direct, _ = request
        if length == size:
            return
        if not direct:
            if self.ends.refuses(node, offset, size, offset + length):
                raise OSError(errno.ESTALE, "its end is new")
        elif self._is_stale(node):
            until, pause = 0.0, _LOOK_AFTER
            if before_wait is not None:
                before_wait()
                until = time.monotonic() + _RELEASED_WITHIN
            while self._is_stale(node):
                if time.monotonic() > until:
                    raise OSError(errno.ESTALE, "truncated while it was read")
                time.sleep(pause)
                pause = min(2 * pause, _LOOK_EVERY)

    def _is_stale(self, node: int) -> bool:
        record = self.catalog.find(node)
        return record is not None and bool(self.catalog.flags(record) & STALE)

    def ask(self, request: Request, done: Callable[[memoryview | None], None], before_wait: Callable[[], None]) -> bool:
        """Ask the node that owns all that a READ wants; False if there is no such, and `read` is to be called.

        `done` is called once, within seconds and by whatever thread: with the bytes, which are good until it returns
        and to be seen through `check_end` and `account_shared`, or with None if the source is to be read.
        """
        sharing, record = self.sharing, self.catalog.find(request.node)
        if sharing is None or record is None or (request.direct and self._is_stale(request.node)):
            return False
        offset, size = request.offset, min(request.size, self.catalog.size(record) - request.offset)
        item = items.item_at(record, offset)
        if size <= 0 or offset % items.CHUNK + size > items.CHUNK or not self.admission.is_absent(item):
            return False
        if (request.marked or not sharing.marks) and sharing.is_peer_server(request.pid):
            return False
        return sharing.ask(item, offset, size, done, before_wait)

    def account_shared(self, request: Request, nbytes: int) -> None:
        """`account` for what `ask` brought."""
        record = self.catalog.find(request.node)
        if record is not None:
            self.admission.shared(items.item_at(record, request.offset), request.offset, nbytes, request.direct)

    def _fetch(
        self, answer: Answer, item: int, offset: int, size: int, into: memoryview, before_wait: Callable[[], None]
    ) -> int:
        """Read from the peer that owns the item, else from the source, into `into`; how many bytes."""
        record = answer.record
        pinning = answer.request.pid in self.admission.keeper_threads and self.admission.is_pending(item)
        if self.sharing is not None and answer.asks and not pinning:
            n = self.sharing.fetch(item, offset, into[:size], before_wait)
            if n:
                answer.shared.append((item, offset, n))
                return n
        try:
            n, st = self.source.read(record, self.catalog.path(record), into, offset, size, before_wait)
        except OSError as e:
            if e.errno == errno.ENOENT and self.use_other_name(record):
                return self._fetch(answer, item, offset, size, into, before_wait)
            self.counters.add("source_errors")
            self.source.forget(record)
            if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                self.vanished(record)
                raise OSError(errno.ENOENT, "vanished") from e
            raise
        n = _still_there(n, offset, st)
        self._took(answer, item, offset, n, into[:n], st)
        return n

    def _took(self, answer: Answer, item: int, offset: int, n: int, data: memoryview, st: os.stat_result) -> None:
        """The source gave `n` bytes of a file that has attributes `st`."""
        self.counters.count_read(n)
        version = Version.of(st)
        if self.catalog.serves_if(answer.record, lambda: self.catalog.shows_file(answer.record, st)):
            if n:
                answer.fetched.append(Fetched(item, offset, data, version))
        else:
            self._changed(answer.record, offset, st)

    def account(self, answer: Answer) -> None:
        """What follows once a READ is answered: count what was missed, and admit it if there is room."""
        pid, direct = answer.request.pid, answer.request.direct
        for fetched in answer.fetched:
            if pid in self.admission.keeper_threads:
                self.admission.keep(fetched)
            else:
                self.admission.missed(fetched, pid, direct, for_peer=answer.for_peer)
        for item, offset, length in answer.shared:
            self.admission.shared(item, offset, length, direct)

    def use_other_name(self, record: int) -> bool:
        """Have a file whose name is gone read by another hard link of it; False if none is known."""
        inode = self.catalog.version(record).inode
        for parent, name in self.catalog.other_names(record):
            directory = self.catalog.directory_path(parent)
            with suppress(OSError):
                if self.source.lstat(directory + b"/" + name if directory else name).st_ino == inode:
                    self.catalog.move(record, parent, name)
                    return True
        return False

    def vanished(self, record: int) -> None:
        """The name of a file is gone from the source."""
        self.catalog.supersede(record)
        self.admission.drop_file(record, self.catalog.size(record))
        parent, name = self.catalog.entry(record)
        self.notifier.send(fuse.invalidate_entry(self.catalog.node(parent), name))

    def _changed(self, record: int, offset: int, st: os.stat_result) -> None:
        self.counters.add("changed_files")
        self.source.forget(record)
        shown = self.catalog.version(record)
        served = self.catalog.flags(record) & SERVED  # before it is asked whether another file takes its place
        node = self.catalog.node(record)
        if self.supersedes(record, st):
            self.replaced(record)
            raise OSError(errno.ESTALE, "replaced while it was read")
        if self.catalog.is_stricter(record, st):
            # Whether this reader may read it is for the kernel to say, when it has the new attributes.
            self.admission.drop_file(record, shown.size)
            self.notifier.send_now(fuse.invalidate_inode(node, -1, 0))
            raise OSError(errno.ESTALE, "its mode or owner changed")
        if self.catalog.shows_bytes(record, st):
            self.catalog.set_access(record, st)
            self.notifier.send_now(fuse.invalidate_inode(node, -1, 0))
            return
        if st.st_size < shown.size:
            # A short reply tells the kernel where the file ends now, unless the READ begins behind it: what lies before
            # it would be zeros. Nor does the kernel listen if it was told of older attributes meanwhile.
            self.ends.notified(node, shown.size)
            self.notifier.send_now(fuse.invalidate_inode(node, -1, 0))  # who has got the new bytes sees the new version
            self.drop_pages(record)
            if offset and (served or offset >= st.st_size):
                self.admission.drop_file(record, shown.size)
                raise OSError(errno.ESTALE, "truncated while it was read")
        else:
            # Before the reply: at the old end of the file the reader asks for the attributes, and must get new ones.
            self.notifier.send_now(fuse.invalidate_inode(node, -1, 0))
            self.drop_pages(record)  # what this reply shows as well, should it be of the time before
        # The version first: what another thread read of the old one is then kept out of the cache.
        if not self.catalog.change_version(record, Version.of(st), served):
            self._changed(record, offset, st)
            return
        self.catalog.set_served(record)
        self.admission.drop_file(record, shown.size)

    def supersedes(self, record: int, st: os.stat_result) -> bool:
        """Whether `st`, another version than the one shown, is another file in the place of one that was read.

        Be it with the inode number of the one that was deleted for it.
        """
        is_another = (
            bool(self.catalog.flags(record) & SERVED)
            and not self.catalog.shows_bytes(record, st)
            and self.source.is_younger(self.catalog.path(record), self.catalog.version(record).mtime_ns)
        )
        return self.catalog.supersedes(record, st, is_another=is_another)

    def modified(self, record: int, st: os.stat_result, *, announce: bool) -> None:
        """The attributes of a file show another version: the kernel is about to be told, and drops what it has.

        `announce` tells it, where it did not ask.
        """
        if self.catalog.shows_bytes(record, st):
            self.catalog.set_access(record, st)
            return
        served = self.catalog.flags(record) & SERVED  # before it is asked whether another file takes its place
        if self.supersedes(record, st):  # bytes were handed out a moment ago
            self.replaced(record)
            raise OSError(errno.ESTALE, "replaced")
        self.counters.add("changed_files")
        self.source.forget(record)
        size = self.catalog.size(record)
        if announce or served:
            self.drop_pages(record)
        if not self.catalog.change_version(record, Version.of(st), served):
            self.modified(record, st, announce=announce)
            return
        self.admission.drop_file(record, size)

    def recover(self) -> None:
        """Do what a server before this one had begun when it was killed: nothing of a version past may stay."""
        for record in self.catalog.stale():
            parent, name = self.catalog.entry(record)
            self.ends.notified(self.catalog.node(record), fuse.LARGEST_FILE)
            if record:
                self.notifier.send(fuse.invalidate_entry(self.catalog.node(parent), name))
            self.drop_pages(record)

    def drop_pages(self, record: int) -> None:
        """Have the kernel forget the pages and attributes of what changed, in a moment; to be called before it is said.

        Should this server not live to see that moment, the next one does it.
        """
        node, size = self.catalog.node(record), self.catalog.size(record)
        self.admission.stale(record)
        self.catalog.set_other_cgroup(record)
        self.notifier.call(lambda: self.ends.notified(node, size))
        self.notifier.send(fuse.invalidate_inode(node, 0, 0))
        self.notifier.call(lambda: self.admission.purge(record))

    def replaced(self, record: int) -> None:
        """The name of a file leads to another one, which has a record of its own."""
        self.counters.add("changed_files")
        self.admission.stale(record)
        self.source.forget(record)
        self.admission.drop_file(record, self.catalog.size(record))
        parent, name = self.catalog.entry(record)
        self.notifier.send(fuse.invalidate_entry(self.catalog.node(parent), name))
        self.notifier.call(lambda: self.admission.purge(record))
