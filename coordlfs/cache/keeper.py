"""The keeper: a client of the mount that holds its cached pages in memory.

It pins an item by dropping the pages that are there (a job's READ filled them, so they are charged to the job's memory
cgroup), mapping the file and locking the mapping, which faults the pages in again, charged to this process. It must
not be the process that answers the READs, nor hold /dev/fuse: should all processes of the mount be killed while this
one waits for an answer, it is that nobody holds the device any more which ends the wait. It works from a detached copy
of the mount, so that `umount` is not busy.
What a loader is about to read it reads ahead, and lets go when it is told to.

Where a directory is pinned without a mount it works from the directory itself, and pins pages that are charged to its
own memory cgroup as they are (`coordlfs.cache.owned_pages`).

Where the cache is in private memory the keeper pins nothing: it reads what jobs read in part only, and holds the memory
for a server that takes over.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from math import ceil

from coordlfs.cache.keeper_protocol import MAX_PACKET, PINS, REPLY, How, Outcome, Verb, parse_request
from coordlfs.cache.owned_pages import OwnedPages
from coordlfs.kernel import fuse, pages, paths, process
from coordlfs.kernel.inotify import OpenWatch

_BATCH = 32  # items whose reading is started before the first is waited for
_SENTINELS = 15  # files that are watched for being opened
_PAUSE = 0.025  # seconds until it is looked again whether one was: short epochs would wake both processes for each
_SPARE_MAPPINGS = 1000  # of vm.max_map_count, for the interpreter
_FILLERS = 8  # threads that read items for a cache in private memory
_FILL = 4 << 20  # bytes that one of them asks for at a time


class _Request:
    """One item to pin or drop, and the descriptor of its file meanwhile."""

    __slots__ = ("fd", "flags", "item", "length", "node", "offset", "path", "verb")

    def __init__(self, packet: bytes) -> None:
        self.verb, self.flags, self.item, self.node, self.offset, self.length, self.path = parse_request(packet)
        self.fd = -1

    def reply(self, outcome: Outcome, code: int = 0) -> bytes:
        """The answer to this request."""
        return REPLY.pack(outcome, 0, code, self.item)


class Keeper:
    """The pins of one process: item → address and length of its mapping.

    `limit`: how many mappings it may have; `lockable`: how many bytes it may lock, None if there is no limit.
    """

    def __init__(
        self,
        sock: socket.socket,
        tree: int,
        limit: int,
        readahead: int,
        lockable: int | None = None,
    ) -> None:
        self.sock = sock
        self.tree = tree
        self.limit = limit
        self.readahead = readahead
        self.lockable = lockable
        self.fillers: Fillers | None = None  # where the cache is in private memory
        self.owned = OwnedPages()
        self.threads: set[int] = set()  # of the fillers
        self.nowhere = memoryview(pages.buffer(_FILL))  # where they all put what only the server is to have
        self.pins: dict[int, tuple[int, int]] = {}
        self.locked = 0  # bytes
        self.fetching: deque[_Request] = deque()
        self.replies: list[bytes] = []  # to PIN, sent when all of a batch are there: each might wake the server
        self.watch: OpenWatch | None = None
        with suppress(OSError):  # a user who may have no more of them: epochs are told from misses alone
            self.watch = OpenWatch()
        self.sentinels: dict[int, int] = {}  # watch → item

    def run(self) -> None:
        """Serve until the other end is closed."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        watch = -1 if self.watch is None else self.watch.fd
        if watch >= 0:
            poll.register(watch, select.POLLIN)
        paused_until = 0.0  # the watch is, if that is not 0
        while True:
            pause = max(0.0, paused_until - time.monotonic())
            if paused_until and not pause:
                poll.register(watch, select.POLLIN)
                paused_until = 0.0
            ready = {fd for fd, _ in poll.poll(0 if self.fetching else ceil(pause * 1000) if paused_until else None)}
            if watch in ready:
                self._report_opened()
                poll.unregister(watch)
                paused_until = time.monotonic() + _PAUSE
            if self.sock.fileno() not in ready:
                if self.fetching:
                    self._end_fetch(self.fetching.popleft())
                continue
            packet = self.sock.recv(MAX_PACKET)
            if not packet:
                return
            packets = [packet]
            with suppress(BlockingIOError):
                while len(packets) < _BATCH and (packet := self.sock.recv(MAX_PACKET, socket.MSG_DONTWAIT)):
                    packets.append(packet)
            batch = []
            for packet in packets:
                with suppress(ValueError):  # what is no request is nobody's to be answered
                    batch.append(_Request(packet))
            self._serve(batch)

    def _serve(self, batch: list[_Request]) -> None:
        pinning: list[_Request] = []
        for request in batch:
            if request.verb == Verb.PIN:
                if self._begin(request):
                    pinning.append(request)
            elif request.verb == Verb.DROP:
                self._drop(request)
            elif request.verb == Verb.FILL and self.fillers is not None:
                self.fillers.submit(request)
            elif request.verb == Verb.WATCH:
                self._look(request)
            elif request.verb == Verb.FETCH:
                self._begin_fetch(request)
            elif request.verb == Verb.RELEASE:
                if request.item not in self.pins:
                    self._drop_pages(request)
                self.sock.send(request.reply(Outcome.GONE))
            elif request.verb == Verb.LIST:
                self._finish_all(pinning)
                self._list()
        self._finish_all(pinning)

    def _finish_all(self, pinning: list[_Request]) -> None:
        for request in pinning:
            self._finish(request)
        pinning.clear()
        for reply in self.replies:
            self.sock.send(reply)
        self.replies.clear()

    def _begin(self, request: _Request) -> bool:
        """Open the file, drop what is resident, start reading; False if the request is answered already."""
        try:
            self._unpin(request.item)
            if len(self.pins) >= self.limit or not self._may_lock(request.length):
                self.sock.send(request.reply(Outcome.FULL if self.pins else Outcome.FAILED, errno.ENOMEM))
                return False
            request.fd = fd = self._open(request)
            refusal = self._see_to_resident(request)
            if refusal is not None:
                os.close(fd)
                self.sock.send(request.reply(refusal))
                return False
            pages.prefetch(fd, request.offset, request.length, self.readahead)
        except OSError as e:
            if request.fd >= 0:
                os.close(request.fd)
            self.sock.send(request.reply(Outcome.FAILED, e.errno or 0))
            return False
        return True

    def _see_to_resident(self, request: _Request) -> Outcome | None:
        """See to the pages of an item that are there; what is to be answered if it cannot be pinned now."""
        if request.flags & How.KEEP:
            return None
        if request.flags & How.OWN:
            return self.owned.settle(request.fd, request.offset, request.length, request.flags)
        return None if self._make_absent(request) else Outcome.BUSY

    def _open(self, request: _Request, flags: int = 0) -> int:
        """Open the file of a request. Raises ESTALE if its name leads to another node: a newer version of it."""
        fd = paths.open_beneath(self.tree, request.path, os.O_RDONLY | flags)
        if request.node and os.fstat(fd).st_ino != request.node:
            os.close(fd)
            raise OSError(errno.ESTALE, "it changed")
        return fd

    def _may_lock(self, length: int) -> bool:
        return self.lockable is None or self.locked + pages.count(length) * pages.PAGE <= self.lockable

    def _make_absent(self, request: _Request) -> bool:
        pages.drop(request.fd, request.offset, request.length)
        if request.flags & How.FORCE:
            os.fstat(request.fd)  # ask for the attributes now, and not when a job needs them
        return not pages.resident(request.fd, request.offset, request.length)

    def _begin_fetch(self, request: _Request) -> None:
        """Start reading. It is waited for when nothing else is asked, so that the source always has something to do."""
        with suppress(OSError):  # whoever reads it gets the error
            request.fd = self._open(request)
            pages.prefetch(request.fd, request.offset, request.length, self.readahead)
        self.fetching.append(request)

    def _end_fetch(self, request: _Request) -> None:
        code = errno.EIO
        if request.fd >= 0:
            with suppress(OSError):
                pages.wait_fetched(request.fd, request.offset, request.length, fuse.MAX_READ)
                code = 0
            os.close(request.fd)
        self.sock.send(request.reply(Outcome.FETCHED, code))

    def _finish(self, request: _Request) -> None:
        if not self._may_lock(request.length):  # others of the batch took it
            os.close(request.fd)
            self.replies.append(request.reply(Outcome.FULL))
            return
        try:
            address = pages.map_file(request.fd, request.offset, request.length)
        except OSError as e:
            os.close(request.fd)
            full = e.errno == errno.ENOMEM and self.pins
            self.replies.append(request.reply(Outcome.FULL if full else Outcome.FAILED, e.errno or 0))
            return
        try:
            pages.lock(address, request.length)
        except OSError as e:
            pages.unmap(address, request.length)
            self.replies.append(request.reply(Outcome.FAILED, e.errno or 0))
        else:
            if (
                request.flags & How.OWN
                and not request.flags & How.KEEP
                and not self.owned.are_own(address, request.length)
            ):
                # A job has read it again since they were dropped.
                pages.unmap(address, request.length)
                self.replies.append(request.reply(Outcome.BUSY))
                return
            self.pins[request.item] = (address, request.length)
            self.locked += pages.count(request.length) * pages.PAGE
            self.replies.append(request.reply(Outcome.PINNED))
            self._watch(request)
        finally:
            os.close(request.fd)

    def fill(self, request: _Request) -> None:
        """Read an item, and so have the server read it; by a filler.

        By way of the page cache, so that a job which wants the same just now waits for the same READ; the pages stay
        there with How.KEEP, for a job that is about to read them. Around it with How.FORCE: what is resident did not
        come by the server.
        """
        around = request.flags & How.FORCE
        try:
            fd = self._open(request, os.O_DIRECT if around else 0)
            try:
                if around:
                    self._read_around(fd, request.offset, request.offset + request.length)
                else:
                    pages.drop(fd, request.offset, request.length)
                    pages.prefetch(fd, request.offset, request.length, self.readahead)
                    pages.wait_fetched(fd, request.offset, request.length, fuse.MAX_READ)
                    if not request.flags & How.KEEP:
                        pages.drop(fd, request.offset, request.length)
            finally:
                os.close(fd)
        except OSError as e:
            self.sock.send(request.reply(Outcome.FAILED, e.errno or 0))
        else:
            self.sock.send(request.reply(Outcome.FILLED))

    def _read_around(self, fd: int, at: int, end: int) -> None:
        while at < end and (n := os.preadv(fd, [self.nowhere[: end - at]], at)):
            at += n

    def introduce(self) -> None:
        """Tell that the calling thread reads as well."""
        self.threads.add(threading.get_native_id())
        self._tell_thread(threading.get_native_id())

    def _tell_thread(self, thread: int) -> None:
        self.sock.send(REPLY.pack(Outcome.THREAD, 0, 0, thread))

    def _look(self, request: _Request) -> None:
        with suppress(OSError):
            request.fd = self._open(request)
            try:
                self._watch(request)
            finally:
                os.close(request.fd)
        self.sock.send(request.reply(Outcome.SEEN))

    def _watch(self, request: _Request) -> None:
        """Make one of the first pinned files a sentinel, from which epochs are told where nothing misses."""
        if self.watch is None or len(self.sentinels) >= _SENTINELS:
            return
        with suppress(OSError):  # without rights or room for watches, likewise
            if os.fstat(request.fd).st_size != request.length:
                return  # a chunk: pinning the others opens the same file
            self.sentinels[self.watch.add(request.fd)] = request.item
            self.replies.append(request.reply(Outcome.WATCHED))

    def _report_opened(self) -> None:
        assert self.watch is not None
        for watch in set(self.watch.opened()):
            if watch in self.sentinels:
                self.sock.send(REPLY.pack(Outcome.OPENED, 0, 0, self.sentinels[watch]))

    def _unpin(self, item: int) -> None:
        pin = self.pins.pop(item, None)
        if pin is not None:
            pages.unmap(*pin)
            self.locked -= pages.count(pin[1]) * pages.PAGE
        for watch in [w for w, sentinel in self.sentinels.items() if sentinel == item]:
            assert self.watch is not None
            del self.sentinels[watch]
            self.watch.remove(watch)

    def _drop(self, request: _Request) -> None:
        self._unpin(request.item)
        self._drop_pages(request)
        self.sock.send(request.reply(Outcome.DROPPED))

    def _drop_pages(self, request: _Request) -> None:
        with suppress(OSError):
            fd = self._open(request)
            try:
                pages.drop(fd, request.offset, request.length)
            finally:
                os.close(fd)

    def _list(self) -> None:
        for thread in self.threads.copy():
            self._tell_thread(thread)
        pins = [PINS.pack(item, length) for item, (_, length) in self.pins.items()]
        for start in range(0, len(pins), 2000):
            part = pins[start : start + 2000]
            self.sock.send(REPLY.pack(Outcome.LISTED, 0, 0, 0) + b"".join(part))
        self.sock.send(REPLY.pack(Outcome.LISTED, 0, 0, 0))  # an empty part is the end


class Fillers:
    """The threads of a keeper that read items: started as they are needed, as many as there may be."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._count = 0

    def submit(self, request: _Request) -> None:
        """Have an item read: by this thread, where there is no other to be had."""
        if self._count < _FILLERS:
            try:
                threading.Thread(target=self._run, name="filler", daemon=True).start()
                self._count += 1
            except RuntimeError:
                if not self._count:
                    self._keeper.fill(request)
                    return
        self._requests.put(request)

    def _run(self) -> None:
        self._keeper.introduce()
        while True:
            self._keeper.fill(self._requests.get())


def main() -> None:
    """`python -m coordlfs.cache.keeper JSON`, started by the supervisor, with the descriptors that the JSON names."""
    config = json.loads(sys.argv[1])
    process.end_with_parent(config["parent"], signal.SIGKILL)
    process.set_name(config.get("name", "coordlfs-keeper"))
    process.be_killed_first()
    process.raise_limits()
    with open("/proc/sys/vm/max_map_count") as f:
        limit = max(1, int(f.read()) - _SPARE_MAPPINGS)
    os.chdir("/")
    sock = socket.socket(fileno=config["socket"])
    keeper = Keeper(sock, config["tree"], limit, config["readahead"], process.lockable())
    if config.get("gives_way"):
        process.give_way()
    if not config["in_memory"]:
        keeper.run()
        return
    keeper.fillers = Fillers(keeper)
    keeper.run()


if __name__ == "__main__":
    main()
