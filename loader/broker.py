"""The broker of a group: a process that keeps account of it and hands batches from workers to jobs.

The first job starts it (`python -m coordlfs_loader.broker SOCKET GROUP`), and it ends a moment after the last has left.
It holds the staging area's memfd and never touches a batch's bytes. Who holds the lock file is the broker; whoever
finds none starts one. Should it be killed, the jobs start another and tell it where they are: it keeps nothing else.
A connection that breaks is a process that died. Whatever a client sends, it ends its own connection only.
"""

from __future__ import annotations

import os
import resource
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from itertools import count, groupby
from pathlib import Path
from typing import Any

from coordlfs_loader import area, wire
from coordlfs_loader.group import Action, Deliver, Discard, Drop, Group, Notice, Task, Write
from coordlfs_loader.profile import differences
from coordlfs_loader.wire import Message, integer, text

LINGER = 1.0  # seconds without a job after which the broker ends; it waits longer for the first
_FIRST = 30.0
_TICK = 0.25  # seconds between looks at the clock while jobs are there
_ORDERS = 4  # descriptors of orders that a worker keeps
_RATE_WINDOW = 2.0
_NEWS = 256  # batches taken and slots freed that a job tells of at once


class Client:
    """A connection: of a job, of a worker, or of somebody who looks on."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.id = number
        self.pid, self.uid = wire.peer(sock)
        self.pidfd: int | None = None
        self.role: str | None = None
        self.name = ""
        self.hands: tuple[int, ...] = ()  # of a worker, as `Group` knows them
        self.given: dict[int, tuple[int, int]] = {}  # what they were given and have not prepared, the first first
        self.orders: OrderedDict[int, None] = OrderedDict()  # which it has, oldest first
        self.workers = 0  # of a job, as it says
        self.left = False
        self.joined = time.time()
        self.inline = False


class Epoch:
    """The order of an epoch, as the first job to begin it drew it."""

    def __init__(self, serial: int, batches: int, digest: str, fd: int, samples: int) -> None:
        self.serial = serial
        self.count = batches
        self.digest = digest
        self.fd = fd
        self.samples = samples


class Broker:
    """Serves a listening socket until no job is left."""

    def __init__(self, listener: socket.socket, name: str) -> None:
        self._listener = listener
        self._name = name
        self._selector = selectors.DefaultSelector()
        self._clients: dict[int, Client] = {}
        self._hands: dict[int, Client] = {}  # who is to be told
        self._numbers = count(1)
        self._group: Group | None = None
        self._profile: Message = {}
        self._stage = -1
        self._length = 0  # bytes of the stage's file
        self._epochs: dict[int, Epoch] = {}
        self._dead: dict[str, tuple[int, int]] = {}  # worker → what it died of, until its job says how
        self._causes: dict[str, str] = {}  # the other way round
        self._delivered = 0  # batches, to jobs that have gone
        self._rate = 0.0
        self._mark = (time.monotonic(), 0)
        self._verbs: dict[tuple[str | None, str], Callable[[Client, Message, int | None], None]] = {
            (None, "join"): self._join,
            (None, "work"): self._work,
            (None, "stats"): self._stats,
            ("viewer", "stats"): self._stats,
            ("job", "enter"): self._enter,
            ("job", "begin"): self._begin,
            ("job", "took"): self._took,
            ("job", "end"): self._end,
            ("job", "leave"): self._leave,
            ("job", "lost"): self._lost,
            ("job", "idle"): self._idle,
            ("job", "wants"): self._wants,
            ("job", "wrote"): self._wrote,
            ("worker", "idle"): self._idle,
            ("worker", "wants"): self._wants,
            ("worker", "wrote"): self._wrote,
        }

    def run(self) -> None:
        """Serve until the last job has left."""
        try:
            self._run()
        except area.TooLarge as e:  # another broker could do no better
            for client in [c for c in self._clients.values() if c.role == "job"]:
                self._send(client, {"verb": "refused", "why": str(e)})

    def _run(self) -> None:
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        alone_since, patience = time.monotonic(), _FIRST
        ticked = alone_since
        while True:
            ready = self._selector.select(_TICK)
            if self._group is not None:
                self._group.gather()
            for key, _ in ready:
                if key.data is None:
                    self._accept()
                elif key.data.id not in self._clients:
                    continue
                elif key.fd == key.data.pidfd:
                    self._close(key.data)
                else:
                    self._serve(key.data)
            if self._group is not None:
                self._act(self._group.settle())
            now = time.monotonic()
            if now - ticked >= _TICK:
                ticked = now
                if self._group is not None:
                    self._act(self._group.tick(now))
                self._measure(now)
            if any(c.role == "job" and not c.left for c in self._clients.values()):
                alone_since, patience = now, LINGER
            elif now - alone_since > patience:
                return

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        client = Client(sock, next(self._numbers))
        if client.uid not in (0, os.geteuid()):
            sock.close()
            return
        self._clients[client.id] = client
        self._selector.register(sock, selectors.EVENT_READ, client)

    def _serve(self, client: Client) -> None:
        """Receive a message and do what it says. If there is another, it is the others' turn first."""
        try:
            received = wire.receive(client.sock)
        except BlockingIOError:
            return
        except wire.NoDescriptors as e:
            self._send(client, {"verb": "refused", "why": f"the broker: {e}"})
            received = None
        except (OSError, ValueError):
            received = None
        if received is None:
            self._close(client)
            return
        message, fd = received
        try:
            verb = self._verbs.get((client.role, message["verb"]))
            if verb is None:
                raise ValueError(f"a message that is not for now: {message['verb']!r}")
            if self._group is not None:
                self._group.now = time.monotonic()
            verb(client, message, fd)
        except wire.Refused as e:
            self._send(client, {"verb": "refused", "why": str(e)})
        except ValueError as e:
            self._send(client, {"verb": "refused", "why": f"the broker did not understand: {e}"})
            self._close(client)
        finally:
            if fd is not None:
                os.close(fd)

    def _send(self, client: Client, message: Message, fd: int | None = None) -> None:
        # One that does not read has had its credit long before the socket is full; if it goes wrong, its end is seen.
        with suppress(OSError):
            wire.send(client.sock, message, fd)

    def _close(self, client: Client) -> None:
        """A client has gone."""
        del self._clients[client.id]
        for hand in client.hands:
            del self._hands[hand]
        self._selector.unregister(client.sock)
        client.sock.close()
        if client.pidfd is not None:
            self._selector.unregister(client.pidfd)
            os.close(client.pidfd)
        group = self._group
        if group is None:
            return
        if client.role == "job":
            for worker in [c for c in self._clients.values() if c.role == "worker" and c.name.startswith(client.name)]:
                with suppress(OSError):
                    worker.sock.shutdown(socket.SHUT_WR)  # it ends, or looks for its job anew
            self._delivered += group.jobs[client.id].delivered
            actions = group.remove_job(client.id)
            if client.inline:
                actions += group.remove_worker(client.id)
            self._act(actions)
            self._forget_epochs()
            if not group.jobs:
                self._reset()
        elif client.role == "worker":
            task = next(iter(client.given.values()), None)
            actions = group.remove_worker(*client.hands)
            if task is not None:
                if client.name in self._causes:
                    actions += group.killed(task, self._causes.pop(client.name))
                else:
                    self._dead[client.name] = task
            self._act(actions)

    def _reset(self) -> None:
        """The next job may come with another profile. Workers that are still here have no job any more."""
        os.close(self._stage)
        self._group, self._stage, self._profile = None, -1, {}
        for worker in [c for c in self._clients.values() if c.role == "worker"]:
            self._close(worker)
        self._delivered = 0
        self._dead.clear()
        self._causes.clear()

    # What clients say

    def _join(self, client: Client, message: Message, fd: int | None) -> None:
        profile = message.get("profile")
        if not isinstance(profile, dict):
            raise ValueError("a job without a profile")
        stage_bytes = integer(profile, "stage_bytes", wire.LEAST_STAGE)
        patience = profile.get("patience")
        if patience is not None and not (isinstance(patience, int | float) and patience >= 0):
            raise ValueError("patience is no time")
        name, workers = text(message, "name"), integer(message, "workers", 0, 1 << 16)
        if self._group is None:
            self._group = Group(stage_bytes, patience)
            self._group.now = time.monotonic()
            self._profile, self._stage, self._length = profile, area.create("coordlfs-stage"), 0
        different = differences(profile, self._profile)
        if different:
            vouch = (
                "" if profile.get("identity") else ", or, if the samples are the same all the same, equal identity=…"
            )
            raise wire.Refused(
                f"group {self._name!r} has jobs that this one does not agree with: {'; '.join(different)}. "
                f"Give it another group, or the same settings{vouch}"
            )
        client.role, client.name, client.workers = "job", name, workers
        client.inline = not workers
        with suppress(OSError):  # of another PID namespace
            client.pidfd = os.pidfd_open(client.pid)
            self._selector.register(client.pidfd, selectors.EVENT_READ, client)
        self._act(self._group.add_job(client.id))
        if client.inline:
            client.hands = (client.id,)
            self._hands[client.id] = client
            self._act(self._group.add_worker(client.id, client.id, inline=True))
        self._send(client, {"verb": "joined"}, self._stage)

    def _work(self, client: Client, message: Message, fd: int | None) -> None:
        name = text(message, "name")
        owner = next((c for c in self._clients.values() if c.role == "job" and name.startswith(c.name)), None)
        if owner is None or self._group is None:
            raise ValueError("a worker of no job")
        client.role, client.name = "worker", name
        client.hands = client.id, next(self._numbers)
        for hand in client.hands:
            self._hands[hand] = client
            self._act(self._group.add_worker(hand, owner.id, second=hand != client.id))
        self._send(client, {"verb": "joined"}, self._stage)

    def _enter(self, client: Client, message: Message, fd: int | None) -> None:
        assert self._group is not None
        wanted = None if message.get("epoch") is None else integer(message, "epoch")
        self._send(client, {"verb": "epoch", "epoch": self._group.enter(client.id, wanted)})

    def _begin(self, client: Client, message: Message, fd: int | None) -> None:
        assert self._group is not None
        number, batches = integer(message, "epoch"), integer(message, "count")
        run, digest, samples = integer(message, "run"), text(message, "digest"), integer(message, "samples")
        at = None if message.get("start") is None else (integer(message, "start"), integer(message, "done"))
        if fd is None:
            raise ValueError("an epoch without an order")
        known = self._epochs.get(number)
        if known is not None and (known.count, known.digest) != (batches, digest):
            raise wire.Refused(
                f"the order of epoch {number} ({batches} batches) is not the one that the other jobs of group "
                f"{self._name!r} have ({known.count} batches): the jobs must have equal samplers, which draw from "
                "nothing but the generators that the loader seeds"
            )
        if known is None:
            self._epochs[number] = Epoch(next(self._numbers), batches, digest, os.dup(fd), samples)
        actions = self._group.begin(client.id, run, number, batches, at)
        self._send(client, {"verb": "begun", "start": self._group.jobs[client.id].start})
        self._forget_epochs()
        self._act(actions)

    def _took(self, client: Client, message: Message, fd: int | None) -> None:
        assert self._group is not None
        taken, freed = integer(message, "taken", 0, _NEWS), message.get("freed")
        if not isinstance(freed, list) or len(freed) > _NEWS or any(type(slot) is not int for slot in freed):
            raise ValueError("what was freed is no list of slots")
        self._act(self._group.took(client.id, taken, freed))

    def _end(self, client: Client, message: Message, fd: int | None) -> None:
        assert self._group is not None
        self._act(self._group.end(client.id))
        self._forget_epochs()

    def _leave(self, client: Client, message: Message, fd: int | None) -> None:
        assert self._group is not None
        client.left = True
        self._act(self._group.leave(client.id))
        self._forget_epochs()

    def _lost(self, client: Client, message: Message, fd: int | None) -> None:
        assert self._group is not None
        name, why = text(message, "name"), text(message, "why")[:1000]
        worker = next((c for c in self._clients.values() if c.role == "worker" and c.name == name), None)
        if not name.startswith(client.name):
            raise ValueError("another job's worker")
        if worker is not None:
            self._causes[name] = why
        elif name in self._dead:
            self._act(self._group.killed(self._dead.pop(name), why))

    def _hand(self, client: Client, message: Message) -> int:
        """Which of a worker's hands it speaks of."""
        return client.hands[integer(message, "hand", 0, len(client.hands) - 1)]

    def _idle(self, client: Client, message: Message, fd: int | None) -> None:
        assert self._group is not None
        self._act(self._group.idle(self._hand(client, message)))

    def _wants(self, client: Client, message: Message, fd: int | None) -> None:
        assert self._group is not None
        hand = self._hand(client, message)
        client.given.pop(hand, None)
        self._act(self._group.wants(hand, integer(message, "size", 1)))

    def _wrote(self, client: Client, message: Message, fd: int | None) -> None:
        assert self._group is not None
        hand = self._hand(client, message)
        client.given.pop(hand, None)
        self._act(self._group.wrote(hand, integer(message, "size"), idle=message.get("idle") is True))

    def _batch_samples(self) -> int:
        return int(self._profile.get("batch_size") or 1)

    # What is to be done

    def _act(self, actions: list[Action]) -> None:
        for job, some in groupby(actions, lambda a: a.job if isinstance(a, Deliver) and not a.copied else None):
            if job is None:
                for action in some:
                    self._do(action)
            else:  # batches for the same job go in one message
                first, *more = (_batch(d) for d in some if isinstance(d, Deliver))
                self._send(self._clients[job], first | {"more": more} if more else first)

    def _do(self, action: Action) -> None:
        match action:
            case Deliver():
                copy = area.copy(self._stage, action.slot, action.size)
                self._send(self._clients[action.job], _batch(action), copy)
                os.close(copy)
            case Task():
                self._give_task(action)
            case Write(worker, slot, room):
                self._extend(slot + room)
                client = self._hands[worker]
                message = {"verb": "write", "hand": client.hands.index(worker), "slot": slot, "room": room}
                self._send(client, message)
            case Drop(worker) if worker in self._hands:
                client = self._hands[worker]
                client.given.pop(worker, None)
                self._send(client, {"verb": "drop", "hand": client.hands.index(worker)})
            case Discard(slot, size):
                area.discard(self._stage, slot, size)
            case Notice(job, said):
                self._send(self._clients[job], {"verb": "notice", "text": said})

    def _extend(self, length: int) -> None:
        if length > self._length:
            self._length = length
            area.extend(self._stage, length)

    def _give_task(self, task: Task) -> None:
        client, order = self._hands[task.worker], self._epochs[task.epoch]
        client.given[task.worker] = task.epoch, task.number
        has = order.serial in client.orders
        if not has:
            client.orders[order.serial] = None
            if len(client.orders) > _ORDERS:
                client.orders.popitem(last=False)
        hand = client.hands.index(task.worker)
        message = {"verb": "task", "hand": hand, "epoch": task.epoch, "number": task.number, "order": order.serial}
        if task.room:
            self._extend(task.slot + task.room)
            message |= {"slot": task.slot, "room": task.room}
        self._send(client, message, None if has else order.fd)

    def _forget_epochs(self) -> None:
        """Orders that no job walks through any more."""
        assert self._group is not None
        in_use = {j.epoch for j in self._group.jobs.values() if j.epoch is not None}
        in_use |= {j.latest for j in self._group.jobs.values() if j.latest is not None}
        for number in [n for n in self._epochs if n not in in_use]:
            os.close(self._epochs.pop(number).fd)

    # Figures

    def _measure(self, now: float) -> None:
        then, before = self._mark
        prepared = self._group.prepared if self._group is not None else 0
        if now - then >= _RATE_WINDOW:
            self._rate = max(0, prepared - before) * self._batch_samples() / (now - then)
            self._mark = (now, prepared)

    def _stats(self, client: Client, message: Message, fd: int | None) -> None:
        client.role = "viewer"
        self._send(client, {"verb": "stats", "stats": self.figures()})

    def figures(self) -> dict[str, Any]:
        """What is going on, as plain values: counts, bytes, samples and seconds."""
        found: dict[str, Any] = {"group": self._name, "pid": os.getpid(), "jobs": []}
        group = self._group
        if group is None:
            return found
        size = self._batch_samples()
        delivered = self._delivered + sum(j.delivered for j in group.jobs.values())
        furthest = max((j.progress[:2] for j in group.jobs.values() if j.active), default=(0, 0))
        for client in [c for c in self._clients.values() if c.role == "job"]:
            job = group.jobs[client.id]
            behind = furthest[1] - job.pushed if job.active and job.epoch == furthest[0] else None
            found["jobs"].append(
                {
                    "pid": client.pid,
                    "workers": client.workers,
                    "epoch": job.epoch,
                    "batches": job.count if job.epoch is not None else None,
                    "taken": job.pushed - len(job.untaken) if job.epoch is not None else None,
                    "start": job.start,
                    "lag": behind,
                    "held_bytes": job.charge,
                    "waits": job.starving,
                    "fallen_out": job.fallen,
                    "left": client.left,
                    "joined": client.joined,
                }
            )
        return found | {
            "stage": {
                "bytes": group.slots.capacity,
                "used_bytes": group.slots.used,
                "held_bytes": group.held_bytes,
                "idle_bytes": group.slots.idle,
                "batches": sum(b.slot is not None for b in group.batches.values()),
            },
            "workers": group.hands,
            "preparing": sum(w.task is not None for w in group.workers.values()),
            "samples_prepared": group.prepared * size,
            "samples_delivered": delivered * size,
            "samples_saved": max(0, delivered - group.prepared) * size,
            "samples_per_second": round(self._rate, 1),
            "batches_copied": group.copied,
            "batches_evicted": group.evicted,
        }


def _batch(d: Deliver) -> Message:
    """What a job is told of a batch."""
    message: Message = {"verb": "batch", "run": d.run, "number": d.number, "size": d.size}
    if not d.copied:
        message |= {"slot": d.slot, "room": d.room}
    if d.error is not None:
        message["error"] = d.error
    return message


def main(path: str, name: str) -> None:
    """Be the broker of a group, unless somebody is."""
    lock = wire.lock(path)
    if lock is None:
        return
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):  # it serves others than the job that started it
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (hard, hard))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    new = f"{path}.new"
    with suppress(FileNotFoundError):
        os.unlink(new)
    with wire.address(Path(new)) as address:
        listener.bind(address)
    listener.listen(128)
    os.rename(new, path)  # whoever finds it is answered
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # by way of the end, where the socket is removed
    os.chdir("/")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    # Nobody's child: Ray, for one, ends all that a trial started when the trial ends, and others need the broker.
    if os.fork():
        os._exit(0)
    listener.listen(128)  # once more: peers are told the process that called it last
    try:
        Broker(listener, name).run()
    except Exception:
        with open(f"{path}.log", "a") as file:  # the jobs start another broker; somebody should know why
            traceback.print_exc(file=file)
        raise
    finally:
        wire.unlink(path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
