"""A worker: a process of a job that prepares batches for its whole group.

It is told what to prepare, and does not know who needs it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import torch
from coordlfs_loader import order, payload, stage, wire
from coordlfs_loader.client import keep_order, slot_of
from coordlfs_loader.randomness import Seeded
from coordlfs_loader.room import Room, stack
from torch._utils import ExceptionWrapper
from torch.utils.data import default_collate
from torch.utils.data._utils import worker as torch_worker
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

log = logging.getLogger("coordlfs_loader")

HANDS = 2  # tasks that a worker may be given: one, and one ahead
_RETRY = 0.02  # seconds between looks for a broker that the job is to start


class Preparer:
    """Prepares batches as a DataLoader does: samples of a dataset, put together by `collate`, or one sample alone."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], batched: bool, seed: int) -> None:
        self._dataset = Seeded(dataset, seed)
        self._collate = collate
        self._batched = batched

    def prepare(
        self, fd: int, epoch: int, number: int, where: str, room: Room | None = None
    ) -> tuple[int, list[payload.Buffer]]:
        """The payload of a batch, or of the exception that preparing it raised: its size and buffers.

        It may lie in `room`. What a collate function of the user's returns does not: it may be kept.
        """
        try:
            self._dataset.set_epoch(epoch)
            wanted = order.indices(fd, number)
            found = self._dataset.__getitems__(wanted) if self._batched else self._dataset[wanted]
            if room is None or self._collate is not default_collate:
                return payload.encode(self._collate(found))
            return payload.encode(room.collate(found), room)
        except Exception:
            failure = ExceptionWrapper(where=where)
        try:
            return payload.encode(failure)
        except Exception:  # of a class that cannot be pickled
            failure.exc_type = RuntimeError
            return payload.encode(failure)


def main(
    preparer: Preparer,
    dataset: Any,
    init: Callable[[int], None] | None,
    number: int,
    workers: int,
    seed: int,
    path: Path,
    name: str,
    job: int,
    pipe: Pipe,
) -> None:
    """Prepare batches until the job says stop or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the job decides what becomes of it
    torch.set_num_threads(1)
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed & 0xFFFFFFFF)
    if default_collate_fn_map.get(torch.Tensor) is collate_tensor_fn:
        default_collate_fn_map[torch.Tensor] = stack
    torch_worker._worker_info = torch_worker.WorkerInfo(id=number, num_workers=workers, seed=seed, dataset=dataset)
    try:
        pipe.send("begun")
        if init is not None:
            init(number)
    except Exception:
        failure = ExceptionWrapper(where=f"in CoordinatedLoader worker process {number}")
        try:
            pipe.send(failure)
        except Exception:
            failure.exc_type = RuntimeError
            pipe.send(failure)
        return
    try:
        parent = os.pidfd_open(job)
    except ProcessLookupError:
        return
    except OSError as e:  # a seccomp filter of a container
        log.debug("pidfd_open: %s", e)
        begun_by = multiprocessing.parent_process()
        assert begun_by is not None
        parent = begun_by.sentinel  # a pipe's end, which others that were forked later keep open as well
    where = f"in CoordinatedLoader worker process {number} (pid {os.getpid()})"
    try:
        with suppress(EOFError):
            _Worker(preparer, where, parent, pipe).run(path, name)
    except wire.NoDescriptors:
        pipe.send(ExceptionWrapper(where=where))


class _Worker:
    """Takes tasks from one broker after the other. Raises EOFError when the job has ended or says stop."""

    def __init__(self, preparer: Preparer, where: str, parent: int, pipe: Pipe) -> None:
        self._preparer = preparer
        self._where = where
        self._stops = (parent, pipe.fileno())

    def run(self, path: Path, name: str) -> None:
        """Work for whichever broker is there."""
        while True:
            with suppress(OSError, ValueError), wire.descriptors(), wire.connect(path) as sock:
                self._work(sock, name)
            self._pause()

    def _pause(self) -> None:
        poll = select.poll()
        for fd in self._stops:
            poll.register(fd, select.POLLIN)
        if poll.poll(_RETRY * 1000):
            raise EOFError
        time.sleep(0)

    def _work(self, sock: socket.socket, name: str) -> None:
        poll = select.poll()
        for fd in (sock.fileno(), *self._stops):
            poll.register(fd, select.POLLIN)

        def receive(*, wait: bool = True) -> tuple[wire.Message, int | None] | None:
            ready = {fd for fd, _ in poll.poll(None if wait else 0)}
            if ready.intersection(self._stops):
                raise EOFError
            if not ready:
                return None
            received = wire.receive(sock)
            if received is None:
                raise ConnectionResetError
            return received

        wire.send(sock, {"verb": "work", "name": name})
        answer = receive()
        assert answer is not None
        message, area = answer
        if message["verb"] != "joined" or area is None:
            return
        hands = _Hands(sock, self._preparer, self._where, area)
        try:
            for hand in range(HANDS):
                wire.send(sock, {"verb": "idle", "hand": hand})
            while True:
                # What is told comes first, what is to be done is done one by one.
                if (received := receive(wait=not hands.tasks)) is not None:
                    hands.told(*received)
                else:
                    hands.prepare()
        finally:
            hands.close()


class _Hands:
    """What a worker was given to do: a task, another one ahead, and payloads that wait for room."""

    def __init__(self, sock: socket.socket, preparer: Preparer, where: str, area: int) -> None:
        self.tasks: deque[wire.Message] = deque()
        self._sock = sock
        self._preparer = preparer
        self._where = where
        self._area = area
        self._writer = stage.Writer(area)
        self._orders: dict[int, int] = {}
        self._waiting: dict[int, tuple[int, list[payload.Buffer]]] = {}  # hand → size and buffers

    def told(self, message: wire.Message, fd: int | None) -> None:
        """Take notice of what the broker says. Raises ValueError for what it should not say."""
        match message["verb"]:
            case "task":
                if fd is not None:
                    keep_order(self._orders, wire.integer(message, "order"), fd)
                self.tasks.append(message)
            case "write":
                self._write(message, *self._waiting.pop(wire.integer(message, "hand")))
            case "drop":
                hand = wire.integer(message, "hand")
                self._waiting.pop(hand, None)
                self.tasks = deque(task for task in self.tasks if task["hand"] != hand)
            case verb:
                raise ValueError(f"the broker said {verb!r}")

    def prepare(self) -> None:
        """Do the first of the tasks."""
        task = self.tasks.popleft()
        given = task.get("room", 0)
        room = Room(self._writer.memory(slot_of(task))) if given else None
        order, epoch, number = (wire.integer(task, key) for key in ("order", "epoch", "number"))
        size, buffers = self._preparer.prepare(self._orders[order], epoch, number, self._where, room)
        if size <= given:
            self._write(task, size, buffers)
            return
        if room is not None:  # which is not ours any longer with what we say now
            buffers = [bytes(buffer) for buffer in buffers]
        hand = wire.integer(task, "hand")
        self._waiting[hand] = size, buffers
        wire.send(self._sock, {"verb": "wants", "hand": hand, "size": size})

    def _write(self, message: wire.Message, size: int, buffers: list[payload.Buffer]) -> None:
        self._writer.write(slot_of(message), buffers)
        buffers.clear()
        wire.send(self._sock, {"verb": "wrote", "hand": wire.integer(message, "hand"), "size": size, "idle": True})

    def close(self) -> None:
        """Nothing is to be done any more."""
        self._writer.close()
        for fd in (self._area, *self._orders.values()):
            os.close(fd)
