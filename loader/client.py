"""A job's connection to the broker: where the job is, what it is handed, and what follows when the broker dies.

It does not know what a batch is made of.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from coordlfs_loader import stage, wire
from coordlfs_loader.group import SMALL
from coordlfs_loader.order import Order
from coordlfs_loader.wire import Message

T = TypeVar("T")
log = logging.getLogger("coordlfs_loader")

_BROKERS = 5  # that may die without having handed over a batch
_HANDSHAKE = 30.0  # seconds
_HURRY = 0.005  # seconds within which several batches are told of at once
_NEWS = 256  # slots that are told with one message


class Connection:
    """A socket to the broker, and the slots that are held by it: open as long as anything refers to it.

    That a batch was taken is told with what is let go next, which is mostly the batch before, and a moment later.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.later = False  # whether what is let go may be told with the next
        self._told = 0.0  # when
        self._taken: deque[None] = deque()  # one for each batch, and not told yet
        self._freed: deque[int] = deque()  # slots, and not told yet
        _open.add(self)

    def send(self, message: Message, fd: int | None = None) -> None:
        """Send a message, after what is not told yet. Raises OSError."""
        self.tell()
        wire.send(self.sock, message, fd)

    def take(self, later: bool) -> None:
        """A batch was taken: to be told with what is let go next, or `later`, by a job that is in a hurry."""
        self.later = later and len(self._taken) < 3 and time.monotonic() - self._told < _HURRY
        self._taken.append(None)

    def free(self, slot: int) -> None:
        """Say that a slot is held no longer. From a finalizer: it waits for nothing and raises nothing."""
        self._freed.append(slot)
        if not self.later:
            with suppress(OSError):  # the broker has gone, and what it knew with it
                self.tell(socket.MSG_DONTWAIT)

    def tell(self, flags: int = 0) -> None:
        """Say what was taken and freed. Raises OSError."""
        self._told = time.monotonic()
        while self._taken or self._freed:
            # In any thread, and as finalizers are, in the middle of this: what one has popped no other says.
            taken, freed = _pop(self._taken), _pop(self._freed)
            try:
                wire.send(self.sock, {"verb": "took", "taken": len(taken), "freed": freed}, flags=flags)
            except BlockingIOError:  # it goes with the next
                self._taken.extend(taken)
                self._freed.extend(freed)
                return

    def close_in_child(self) -> None:
        """The connection is the parent's."""
        self.sock.close()

    def __del__(self) -> None:
        self.sock.close()


def _pop(queue: deque[T]) -> list[T]:
    found: list[T] = []
    with suppress(IndexError):
        while len(found) < _NEWS:
            found.append(queue.popleft())
    return found


_open: weakref.WeakSet[Connection | Client] = weakref.WeakSet()


def _close_in_child() -> None:
    # A job's death is seen by its connection's end: no child may keep it open.
    for each in list(_open):
        each.close_in_child()


os.register_at_fork(after_in_child=_close_in_child)


@dataclass(slots=True)
class Handed:
    """A batch that was handed over, of the stage that it lies in: not another broker's."""

    message: Message
    copy: int | None  # descriptor of a copy
    connection: Connection
    reader: stage.Reader


@dataclass(slots=True)
class Place:
    """Where a job is in an epoch: what a new broker is told."""

    order: Order
    samples: int
    run: int
    start: int | None = None
    received: int = 0  # handed over
    taken: int = 0
    queue: deque[Handed] = field(default_factory=deque)

    def clear(self) -> None:
        """Nothing of what was handed over is wanted."""
        while self.queue:
            handed = self.queue.popleft()
            if handed.copy is not None:
                os.close(handed.copy)


class Client:
    """Joins a group, and walks through epochs. Used by one thread at a time.

    `on_task` is called with a descriptor of the order, epoch and number when a job without workers is to prepare a
    batch while it waits; it returns the payload's size and buffers.
    """

    def __init__(
        self,
        group: str,
        profile: Message,
        workers: int,
        on_task: Callable[[int, int, int], tuple[int, list[Any]]] | None = None,
        pins: stage.Pins | None = None,
    ) -> None:
        self.group = group
        self.name = secrets.token_hex(8)
        self._profile = profile
        self._workers = workers
        self._on_task = on_task
        self._pins = pins
        self._connection: Connection | None = None
        self._stage = -1
        self._reader: stage.Reader | None = None
        self._writer = stage.Writer(-1)
        self._orders: dict[int, int] = {}
        self._place: Place | None = None
        self._runs = 0
        self._payload: list[Any] | None = None  # prepared, and waits for room
        self._size = 0  # bytes of it
        self._asked = False  # for a task
        self._died = 0  # brokers, since the last batch
        _open.add(self)
        self._join()

    # The connection

    def _join(self) -> None:
        while True:
            connection = Connection(wire.connect_or_start(self.group))
            connection.sock.settimeout(_HANDSHAKE)
            try:
                message = {"verb": "join", "name": self.name, "profile": self._profile, "workers": self._workers}
                connection.send(message)
                _, fd = self._answer(connection, "joined")
            except TimeoutError:
                raise RuntimeError(f"the broker of group {self.group!r} does not answer") from None
            except OSError:
                continue  # it was about to end
            connection.sock.settimeout(None)
            assert fd is not None
            self._close_files()
            self._stage, self._reader, self._writer = fd, stage.Reader(fd, self._pins), stage.Writer(fd)
            self._connection = connection
            return

    def _answer(self, connection: Connection, verb: str) -> tuple[Message, int | None]:
        """Wait for the answer to a question; what is handed over before it is kept."""
        while True:
            received = wire.receive(connection.sock)
            if received is None:
                raise ConnectionResetError("the broker has gone")
            message, fd = received
            if message["verb"] == "refused":
                raise wire.Refused(str(message.get("why")))
            if message["verb"] == verb:
                return message, fd
            self._receive(message, fd)

    def _again(self) -> None:
        """The broker has died: find or start another, and tell it where this job is."""
        self._died += 1
        if self._died > _BROKERS:
            raise RuntimeError(f"{self._died} brokers of group {self.group!r} died, one after another")
        log.info("the broker of group %r has gone; going on with another", self.group)
        self._asked, self._payload = False, None
        while True:
            self._join()
            try:
                if self._place is not None:
                    self._begin(self._place)
                return
            except OSError:
                continue

    def _send(self, message: Message, fd: int | None = None) -> None:
        assert self._connection is not None
        try:
            self._connection.send(message, fd)
        except OSError:
            self._drain()
            self._again()

    def tell(self) -> None:
        """Tell the broker what it should know before this job waits."""
        assert self._connection is not None
        try:
            self._connection.tell()
        except OSError:
            self._drain()
            self._again()

    def _drain(self) -> None:
        """Take what a dead broker had still sent."""
        assert self._connection is not None
        with suppress(OSError, ValueError):
            while (received := wire.receive(self._connection.sock)) is not None:
                if received[0]["verb"] == "batch":
                    self._receive(*received)
                elif received[1] is not None:
                    os.close(received[1])

    def _close_files(self) -> None:
        for fd in (self._stage, *self._orders.values()):
            if fd >= 0:
                os.close(fd)
        self._writer.close()
        self._reader = None
        self._stage = -1
        self._orders.clear()

    def close_in_child(self) -> None:
        """The stage is the parent's."""
        self._close_files()

    # Epochs

    def enter(self, epoch: int | None) -> int:
        """The epoch to begin: the one given, or else the one that the group is at."""
        while True:
            assert self._connection is not None
            try:
                self._connection.send({"verb": "enter", "epoch": epoch})
                return wire.integer(self._answer(self._connection, "epoch")[0], "epoch")
            except OSError:
                self._again()

    def begin(self, order: Order, samples: int, at: tuple[int, int] | None = None) -> Place:
        """Begin an epoch, or go on in its midst: where the sequence starts, and how much of it was taken."""
        self._runs += 1
        place = Place(order, samples, self._runs)
        if at is not None:
            place.start, place.taken = at
            place.received = place.taken
        self._place = place
        assert self._connection is not None
        try:
            self._begin(place)
        except OSError:
            self._again()
        except BaseException:
            self._place = None
            raise
        return place

    def _begin(self, place: Place) -> None:
        assert self._connection is not None
        message = {
            "verb": "begin",
            "run": place.run,
            "epoch": place.order.epoch,
            "count": place.order.count,
            "digest": place.order.digest,
            "samples": place.samples,
            "start": place.start,
            "done": place.received,
        }
        self._connection.send(message, place.order.fd)
        place.start = wire.integer(self._answer(self._connection, "begun")[0], "start")

    def end(self) -> None:
        """No more of this epoch is wanted."""
        if self._place is None:
            return
        self._place.clear()
        self._place = None
        if self._connection is not None:
            with suppress(OSError):
                self._connection.send({"verb": "end"})

    def close(self) -> None:
        """Leave the group. What was handed over stays valid."""
        self.end()
        if self._connection is not None:
            try:
                self._connection.send({"verb": "leave"})
            except OSError:
                wire.sweep(self.group)
        self._connection = None  # and ends when the last slot is let go
        self._close_files()

    def lost(self, name: str, why: str) -> None:
        """Tell of what a worker died."""
        self._send({"verb": "lost", "name": name, "why": why})

    # Batches

    def fileno(self) -> int:
        """Of the connection, to wait for."""
        assert self._connection is not None
        return self._connection.sock.fileno()

    @property
    def waiting(self) -> bool:
        """Whether nothing can be taken yet; what this job prepared meanwhile is to be got rid of first."""
        return self._place is None or not self._place.queue or self._payload is not None

    def settle(self) -> bool:
        """Let go what a device has copied by now; whether it is still copying."""
        if self._pins is None or self._reader is None:
            return False
        self._reader.trim()
        return self._reader.fenced

    def work(self) -> None:
        """Offer to prepare a batch, for a job without workers that has nothing to do but wait."""
        if self._on_task is not None and not self._asked:
            self._asked = True
            self._send({"verb": "idle", "hand": 0})

    def advance(self) -> None:
        """Receive one message and act upon it. Called when there is one."""
        assert self._connection is not None
        try:
            received = wire.receive(self._connection.sock)
        except OSError:
            received = None
        if received is None:
            self._again()
        else:
            self._receive(*received)

    def _receive(self, message: Message, fd: int | None) -> None:
        match message["verb"]:
            case "batch":
                place = self._place
                if place is None or message.get("run") != place.run:  # of an epoch that was given up
                    if fd is not None:
                        os.close(fd)
                    return
                if self._payload is None:
                    self._asked = False  # the broker counts on nobody who has something better to do
                assert self._connection is not None
                assert self._reader is not None
                for one in (message, *message.get("more", ())):
                    place.received += 1
                    place.queue.append(Handed(one, fd, self._connection, self._reader))
                self._died = 0
            case "task":
                self._prepare(message, fd)
            case "write":
                self._write(message)
            case "drop":
                self._payload, self._asked = None, False
            case "notice":
                log.warning("%s", wire.text(message, "text"))
            case "refused":
                raise wire.Refused(str(message.get("why")))
            case verb:
                raise RuntimeError(f"the broker said {verb!r}, which means nothing here")

    def _prepare(self, message: Message, fd: int | None) -> None:
        assert self._on_task is not None
        if fd is not None:
            keep_order(self._orders, wire.integer(message, "order"), fd)
        order = self._orders[wire.integer(message, "order")]
        size, self._payload = self._on_task(order, wire.integer(message, "epoch"), wire.integer(message, "number"))
        self._size = size
        if size <= message.get("room", 0):
            self._write(message)
        else:
            self._send({"verb": "wants", "hand": 0, "size": size})

    def _write(self, message: Message) -> None:
        assert self._payload is not None
        self._writer.write(slot_of(message), self._payload)
        self._payload, self._asked = None, False
        self._send({"verb": "wrote", "hand": 0, "size": self._size})

    def take(self) -> tuple[int, memoryview | None, str | None]:
        """The next batch that was handed over: its number, its payload, or why it cannot be had."""
        place = self._place
        assert place is not None
        handed = place.queue.popleft()
        place.taken += 1
        message, fd = handed.message, handed.copy
        number, size = wire.integer(message, "number"), wire.integer(message, "size")
        if handed.connection is self._connection:  # another broker did not hand it over
            last = place.taken == place.order.count
            handed.connection.take(later=bool(place.queue) and message.get("room", 0) <= SMALL and not last)
            if fd is not None or message.get("error") is not None or last:
                self.tell()
        if message.get("error") is not None:
            return number, None, wire.text(message, "error")
        if fd is None:
            slot = slot_of(message)
            handed.reader.trim()
            return number, handed.reader.view(slot, partial(handed.connection.free, slot[0]))[:size], None
        try:
            payload = memoryview(bytearray(size))
            stage.read(fd, payload)
        finally:
            os.close(fd)
        return number, payload, None


def slot_of(message: Message) -> stage.Slot:
    """The slot that a message tells of."""
    return wire.integer(message, "slot"), wire.integer(message, "room", 1)


def keep_order(orders: dict[int, int], serial: int, fd: int) -> None:
    """Keep a descriptor of an order, and as many as the broker expects, and tasks that wait."""
    if serial in orders:
        os.close(orders.pop(serial))
    orders[serial] = fd
    if len(orders) > 8:
        os.close(orders.pop(next(iter(orders))))
