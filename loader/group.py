"""The bookkeeping of a group: who is owed which batch, who prepares it, what is staged. Pure: no I/O and no clock.

What happened goes in by the methods of `Group`; what is to be done comes out as a list of actions: of each of them, or
of `settle`, for who knows of several things that happened.

Each job walks through its epoch in a fixed sequence: the sampler's order, for a late job rotated, so that it takes part
at once and gets what it missed afterwards. A position in the sequence is thus all that says what a job is still owed.
Workers, whoever's they are, are given the batch that is needed soonest. Three rules keep everything going:

* What jobs hold may fill half of the stage, fairly shared; what is beyond is given to them as a copy of their own.
* Room for the batch that a starving job needs is made at the expense of what nobody needs, of what was prepared ahead,
  and, for the job that lags most, of anything that is not held. What a slower job still needs is otherwise left alone:
  the faster ones wait for it, unless their patience is limited: after so long it leaves the group until its next epoch.
* A worker that waits for room is sent away where a job starves and nobody else is free to help it.

Where batches take so little time that a worker would wait for its next task for about as long, it has a second hand,
which is given a task ahead, to be begun when the first is done. Else a slow worker would only keep others from it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from coordlfs_loader.slots import UNIT, Slots

CREDIT = 2  # batches that are handed to a job before it takes them
SMALL, SMALL_CREDIT = 4 << 20, 8  # bytes of a batch that costs more in messages than in memory, and its credit
QUICK = 0.005  # seconds that a batch may take for workers to be given a second one ahead
DEATHS = 3  # workers that may die of a batch before it is given up
_JOINING = 10.0  # seconds after a job joined within which others are likely to
_STUCK, _STUCK_TIMES = (
    5.0,
    10.0,
)  # seconds, and times the usual, after which a batch is prepared by somebody else as well


class Deliver(NamedTuple):
    """Hand a batch to a job: its slot, or a copy that the job may keep, or why it cannot be had."""

    job: int
    run: int
    epoch: int
    number: int
    slot: int
    room: int  # the slot's size
    size: int  # the batch's
    copied: bool
    error: str | None


class Task(NamedTuple):
    """Have a worker prepare a batch, and write it where there is room already (0: nowhere), if it fits in there."""

    worker: int
    epoch: int
    number: int
    slot: int
    room: int


class Write(NamedTuple):
    """Have a worker write what it prepared there."""

    worker: int
    slot: int
    room: int


class Drop(NamedTuple):
    """Have a worker throw away what it prepared."""

    worker: int


class Discard(NamedTuple):
    """Give the memory of a slot back."""

    slot: int
    size: int


class Notice(NamedTuple):
    """Say something to a job, for its log."""

    job: int
    text: str


Action = Deliver | Task | Write | Drop | Discard | Notice


@dataclass(eq=False, slots=True)
class Batch:
    """A batch that is being prepared, is staged, or has failed."""

    epoch: int
    number: int
    worker: int | None = None  # who prepares it
    since: float = 0.0
    size: int = 0
    slot: int | None = None
    error: str | None = None
    fresh: bool = True  # nobody has received it yet
    holders: dict[int, int] = field(default_factory=dict)  # job → how often it was handed the slot

    @property
    def key(self) -> tuple[int, int]:
        """What it is known by."""
        return self.epoch, self.number

    @property
    def ready(self) -> bool:
        """Whether it can be handed over."""
        return self.slot is not None or self.error is not None


@dataclass(eq=False, slots=True)
class Job:
    """A job: where it is, and what it holds."""

    id: int
    latest: int | None = None  # the newest epoch that it entered
    entered: bool = False  # and has not begun yet
    epoch: int | None = None  # the one that it walks through
    run: int = 0
    count: int = 0
    start: int = 0
    pushed: int = 0  # how much of its sequence was handed over
    scan: int = 0  # up to where in its sequence everything is at least being prepared
    untaken: deque[Batch | None] = field(default_factory=deque)  # handed over, not taken; None is a copy
    held: dict[int, Batch] = field(default_factory=dict)  # by slot
    charge: int = 0  # bytes: its part of what it holds
    fallen: bool = False  # out: nobody waits for it
    blocked_since: float | None = None  # it starves, and the stage has no room for what it needs
    delivered: int = 0

    @property
    def active(self) -> bool:
        """Whether it is owed something."""
        return self.epoch is not None and self.pushed < self.count

    @property
    def starving(self) -> bool:
        """Whether it has taken all that it was handed, and is owed more."""
        return self.active and not self.untaken

    @property
    def progress(self) -> tuple[int, int, int]:
        """Smaller for those that lag."""
        return self.epoch or 0, self.pushed, self.id

    def number(self, position: int) -> int:
        """The batch at a position of its sequence."""
        return (self.start + position) % self.count

    def distance(self, batch: Batch) -> int:
        """How many batches it is owed before this one; negative if it is not owed this one."""
        if self.epoch != batch.epoch or batch.number >= self.count:
            return -1
        return (batch.number - self.start) % self.count - self.pushed


@dataclass(eq=False, slots=True)
class Worker:
    """A worker, or a job without workers while it waits (`inline`), or the second hand of a worker (`second`)."""

    id: int
    job: int
    inline: bool = False
    second: bool = False
    retired: bool = False  # its job has gone, and so will it
    task: tuple[int, int] | None = None
    size: int | None = None  # bytes that it wants to write, and waits for room
    slot: int | None = None  # where it writes
    reserved: int = 0  # bytes of that slot, if it was given with the task


class Group:
    """The state machine. Its methods return what is to be done, in order.

    Raises ValueError for what a well-behaved job or worker does not say. `now` is in seconds of any one clock.
    """

    def __init__(self, stage_bytes: int, patience: float | None = None) -> None:
        self.slots = Slots(stage_bytes // (2 * UNIT) * 2 * UNIT)
        self.patience = patience
        self.jobs: dict[int, Job] = {}
        self.workers: dict[int, Worker] = {}
        self.batches: dict[tuple[int, int], Batch] = {}
        self.hands = 0  # workers, without second hands
        self.held_bytes = 0
        self.now = 0.0
        self.prepared = self.delivered = self.copied = self.evicted = 0
        self._kept: dict[tuple[int, int], Batch] = {}  # staged, not held, and nobody needs them: the first to go
        self._owed: dict[tuple[int, int], Batch] = {}  # the same, but jobs that have left need them: the next to go
        self._fresh: dict[tuple[int, int], Batch] = {}  # staged, and nobody has received them
        self._idle: dict[int, Worker] = {}
        self._seconds: dict[int, Worker] = {}  # second hands that are idle
        self._wanting: dict[int, Worker] = {}  # workers that wait for room
        self._kept_bytes = self._owed_bytes = 0
        self._joined = 0.0  # when the last job did
        self._reserved = 0
        self._largest = 0
        self._usual = 0.0  # seconds that a batch takes
        self._deaths: dict[tuple[int, int], list[str]] = {}
        self._actions: list[Action] = []
        self._gathering = False

    def gather(self) -> None:
        """Several things happened: what is to be done is not thought about before `settle`."""
        self._gathering = True

    def settle(self) -> list[Action]:
        """What is to be done about what happened since `gather`."""
        self._gathering = False
        return self._advance()

    # Jobs

    def add_job(self, job: int) -> list[Action]:
        """A job joined."""
        self.jobs[job] = Job(job)
        self._joined = self.now
        return self._advance()

    def remove_job(self, job: int) -> list[Action]:
        """It has died. Its workers will as well: until one has, it may write where it was told to."""
        for worker in [w for w in self.workers.values() if w.job == job]:
            worker.retired = True
            self._rest_no_longer(worker)
            batch = self._mine(worker)
            if batch is not None:
                self._remove(batch)
        leaver = self.jobs[job]
        self._stop(leaver)
        for batch in list(leaver.held.values()):
            batch.holders[job] = 1
            self._let_go(leaver, batch)
        del self.jobs[job]
        return self._advance()

    def enter(self, job: int, epoch: int | None) -> int:
        """The epoch that the job is to begin: the one it asks for, or else the running one."""
        if epoch is None:
            newest = max((j.latest for j in self.jobs.values() if j.latest is not None), default=-1)
            running = any(j.latest == newest and (j.entered or j.active or j.untaken) for j in self.jobs.values())
            epoch = newest if running else newest + 1
        enterer = self.jobs[job]
        enterer.latest, enterer.entered = epoch, True
        return epoch

    def leave(self, job: int) -> list[Action]:
        """It wants nothing any more, and may hold slots for a while."""
        leaver = self.jobs[job]
        leaver.latest, leaver.entered = None, False
        return self.end(job)

    def begin(self, job: int, run: int, epoch: int, count: int, at: tuple[int, int] | None) -> list[Action]:
        """It begins an epoch of `count` batches, or goes on `at` (where its sequence starts, how much it has had)."""
        beginner = self.jobs[job]
        self._stop(beginner)
        if at is not None and not (0 <= at[0] < max(1, count) and 0 <= at[1] <= count):
            raise ValueError(f"there is no place {at} in an epoch of {count} batches")
        beginner.start, beginner.pushed = at if at is not None else (self._joining(epoch, count), 0)
        beginner.run, beginner.count, beginner.epoch = run, count, epoch
        beginner.latest, beginner.entered = epoch, False
        beginner.scan, beginner.fallen, beginner.blocked_since = beginner.pushed, False, None
        self._sort_out(epoch)
        return self._advance()

    def end(self, job: int) -> list[Action]:
        """It wants no more of its epoch; what it has not taken counts as let go."""
        self._stop(self.jobs[job])
        return self._advance()

    def took(self, job: int, taken: int = 1, freed: Iterable[int] = ()) -> list[Action]:
        """It took so many of what it was handed, the first ones, and holds some slots no longer."""
        taker = self.jobs[job]
        if taken > len(taker.untaken):
            raise ValueError("a job took what it was not given")
        for _ in range(taken):
            taker.untaken.popleft()
        for slot in freed:
            if slot not in taker.held:
                raise ValueError("a job let go of what it does not hold")
            self._let_go(taker, taker.held[slot])
        return self._advance()

    # Workers

    def add_worker(self, worker: int, job: int, *, inline: bool = False, second: bool = False) -> list[Action]:
        """A worker of a job is there, or its second hand; it is given tasks when it is `idle`."""
        if job not in self.jobs:
            raise ValueError("a worker of no job")
        self.workers[worker] = Worker(worker, job, inline, second)
        self.hands += not second
        return []

    def idle(self, worker: int) -> list[Action]:
        """It can take a task."""
        one = self.workers[worker]
        if one.task is not None:
            raise ValueError("a worker has a task and wants another")
        self._rest(one)
        return self._advance()

    def wants(self, worker: int, size: int) -> list[Action]:
        """It has prepared its batch, and wants room for so many bytes."""
        one = self.workers[worker]
        if one.task is None or one.size is not None or (one.slot is not None and not one.reserved) or size < 0:
            raise ValueError("a worker wants room out of turn")
        self._give_back(one)
        one.size = size
        batch = self._mine(one)
        if batch is not None and size > self.slots.capacity // 2:
            least = -(-size // UNIT) * UNIT * 2
            self._fail(batch, f"stage_bytes={self.slots.capacity} is too small for it: it must be at least {least}")
        self._wanting[worker] = one
        return self._advance()

    def wrote(self, worker: int, size: int, *, idle: bool = False) -> list[Action]:
        """It has written its batch of so many bytes, and is not idle before it says so, now or later."""
        one = self.workers[worker]
        if one.slot is None or not 0 < size <= self.slots.size(one.slot):
            raise ValueError("a worker wrote what it was not asked to")
        batch, slot = self._mine(one), one.slot
        self._reserved -= one.reserved
        one.task = one.size = one.slot = None
        one.reserved = 0
        if batch is None:
            self.slots.release(slot)
        else:
            batch.worker, batch.slot, batch.size = None, slot, size
            self._largest = max(self._largest, size)
            self._usual += ((self.now - batch.since) - self._usual) / (10 if self.prepared else 1)
            self.prepared += 1
            self._fresh[batch.key] = batch
            self._classify(batch)
        if idle:
            self._rest(one)
        return self._advance()

    def remove_worker(self, *hands: int) -> list[Action]:
        """It ended or died, with all its hands."""
        for hand in hands:
            self._forget_worker(self.workers[hand])
        return self._advance()

    def killed(self, task: tuple[int, int], why: str) -> list[Action]:
        """A worker died of this task, says its job. After `DEATHS` of them the batch is given up."""
        deaths = self._deaths.setdefault(task, [])
        deaths.append(why)
        batch = self.batches.get(task)
        if len(deaths) >= DEATHS and (batch is None or not batch.ready):
            if batch is None:
                batch = self.batches[task] = Batch(*task)
            self._fail(batch, f"{len(deaths)} workers died while they prepared this batch: " + "; ".join(deaths))
            del self._deaths[task]
            self._classify(batch)
        return self._advance()

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        self.now = now
        for batch in [b for b in self._kept.values() if not self._may_keep(b.epoch)]:
            self._evict(batch)
        return self._advance()

    # What follows from what

    def _advance(self) -> list[Action]:
        if self._gathering:
            return []
        while self._deliver() or self._grant() or self._assign() or self._unblock() or self._lose_patience():
            pass
        actions, self._actions = self._actions, []
        return actions

    def _deliver(self) -> bool:
        done = False
        credit = SMALL_CREDIT if self._largest <= SMALL else CREDIT
        for job in self.jobs.values():
            while len(job.untaken) < credit and job.active:
                batch = self.batches.get((job.epoch or 0, job.number(job.pushed)))
                if batch is None or not batch.ready:
                    break
                if batch.slot is not None and not self._may_hold(job, batch) and not job.starving:
                    break
                self._hand_over(job, batch)
                done = True
        return done

    def _may_hold(self, job: Job, batch: Batch) -> bool:
        """Whether the job may hold the slot and not a copy."""
        assert batch.slot is not None
        size, holders = self.slots.size(batch.slot), len(batch.holders)
        if job.id in batch.holders:
            return True
        half = self.slots.capacity // 2
        fits = self.held_bytes + (0 if holders else size) <= half
        return fits and job.charge + size // (holders + 1) <= half // len(self.jobs)

    def _hand_over(self, job: Job, batch: Batch) -> None:
        copied = batch.slot is not None and not self._may_hold(job, batch)
        if batch.slot is not None and not copied:
            self._hold(job, batch)
        job.untaken.append(batch if batch.slot is not None and not copied else None)
        job.pushed += 1
        job.blocked_since = None
        job.delivered += 1
        self.delivered += 1
        self.copied += copied
        batch.fresh = False
        self._fresh.pop(batch.key, None)
        slot, room = (-1, 0) if batch.slot is None else (batch.slot, self.slots.size(batch.slot))
        what = (slot, room, batch.size, copied, batch.error)
        self._actions.append(Deliver(job.id, job.run, batch.epoch, batch.number, *what))
        self._classify(batch)

    def _hold(self, job: Job, batch: Batch) -> None:
        assert batch.slot is not None
        if job.id in batch.holders:
            batch.holders[job.id] += 1
            return
        self._charge(batch, -1)
        self.held_bytes += 0 if batch.holders else self.slots.size(batch.slot)
        batch.holders[job.id] = 1
        self._charge(batch, 1)
        job.held[batch.slot] = batch

    def _let_go(self, job: Job, batch: Batch) -> None:
        assert batch.slot is not None
        batch.holders[job.id] -= 1
        if batch.holders[job.id]:
            return
        self._charge(batch, -1)
        del batch.holders[job.id], job.held[batch.slot]
        self._charge(batch, 1)
        self.held_bytes -= 0 if batch.holders else self.slots.size(batch.slot)
        self._classify(batch)

    def _charge(self, batch: Batch, sign: int) -> None:
        """Its holders share its bytes."""
        assert batch.slot is not None
        for holder in batch.holders:
            self.jobs[holder].charge += sign * (self.slots.size(batch.slot) // len(batch.holders))

    def _grant(self) -> bool:
        """Give room to workers that wait for it, the most urgent first."""
        done = False
        if not self._wanting:
            return done
        for worker in sorted(self._wanting.values(), key=self._urgency):
            batch = self._mine(worker)
            needed = [] if batch is None else [j for j in self.jobs.values() if j.active and j.distance(batch) >= 0]
            if batch is None or not needed or batch.error is not None or self._owner_waits(worker):
                self._send_away(worker)
                done = True
                continue
            assert worker.size is not None
            starving = [j for j in needed if j.starving and j.distance(batch) == 0]
            if not self._make_room(worker.size, starving, all(j.fallen for j in needed)):
                for job in starving:
                    job.blocked_since = self.now if job.blocked_since is None else job.blocked_since
                continue
            allocated = self.slots.allocate(worker.size)
            if allocated is None:
                continue
            worker.slot, discarded = allocated
            self._actions += [Discard(*slot) for slot in discarded]
            self._actions.append(Write(worker.id, worker.slot, self.slots.size(worker.slot)))
            del self._wanting[worker.id]
            done = True
        return done

    def _urgency(self, worker: Worker) -> tuple[int, tuple[int, int, int]]:
        batch = self._mine(worker)
        if batch is not None:
            wanted = [(d, j.progress) for j in self.jobs.values() if j.active and (d := j.distance(batch)) >= 0]
            if wanted:
                return min(wanted)
        return -1, (0, 0, worker.id)  # to be sent away at once

    def _owner_waits(self, worker: Worker) -> bool:
        """Whether a job that works while it waits has something better to do."""
        return worker.inline and worker.job in self.jobs and bool(self.jobs[worker.job].untaken)

    def _send_away(self, worker: Worker) -> None:
        batch = self._mine(worker)
        if batch is not None and batch.error is None:
            self._remove(batch)
        worker.task = worker.size = None
        if not worker.inline:
            self._rest(worker)
        self._wanting.pop(worker.id, None)
        self._actions.append(Drop(worker.id))

    def _make_room(self, size: int, starving: list[Job], fallen: bool) -> bool:
        """Evict what may be evicted for these jobs until a slot of this size can be had.

        Jobs that have left do not evict what such jobs need: they would prepare it again, and evict what comes next.
        """
        size = max(1, -(-size // UNIT)) * UNIT
        while self.slots.room < size:
            victim = self._victim(starving, fallen)
            if victim is None:
                return False
            self.evicted += victim.key not in self._kept
            self._evict(victim)
        return True

    def _victim(self, starving: list[Job], fallen: bool) -> Batch | None:
        if self._kept:
            return next(iter(self._kept.values()))
        if self._owed and not fallen:
            return next(iter(self._owed.values()))
        if not starving:
            return None
        ahead = [(d, b.key) for b in self._fresh.values() if (d := self._nearest(b)) > 0]
        if ahead:
            return self._fresh[max(ahead)[1]]
        last = min((j for j in self.jobs.values() if j.active), key=lambda j: (j.fallen, j.progress))
        if last not in starving:
            return None
        staged = [b for b in self.batches.values() if b.slot is not None and not b.holders]
        return max(staged, key=lambda b: (self._nearest(b), b.key), default=None)

    def _nearest(self, batch: Batch) -> int:
        """How soon somebody needs it, in batches."""
        wanting = [(d + len(j.untaken)) for j in self.jobs.values() if j.active and (d := j.distance(batch)) >= 0]
        return min(wanting, default=1 << 62)

    def _assign(self) -> bool:
        """Give tasks to idle workers, the most urgent first."""
        done = False
        alike = all(not j.fallen for j in self.jobs.values())  # what one worker may have, any may
        exhausted = False
        quick = bool(self.prepared) and self._usual < QUICK
        for worker in [*self._idle.values(), *(self._seconds.values() if quick else ())]:
            if worker.inline and not self.jobs[worker.job].starving:
                del self._idle[worker.id]
                continue
            task = None if exhausted or (worker.second and not self._ample()) else self._most_urgent(worker)
            if task is None:
                exhausted = alike
                continue
            old = self.batches.get(task)
            if old is None:
                self.batches[task] = Batch(*task, worker=worker.id, since=self.now)
            else:  # whoever had it is stuck
                old.worker, old.since = worker.id, self.now
            worker.task = task
            self._rest_no_longer(worker)
            self._reserve(worker)
            slot = -1 if worker.slot is None else worker.slot
            self._actions.append(Task(worker.id, *task, slot, worker.reserved))
            done = True
        return done

    def _ample(self) -> bool:
        """Whether there is so much room that some may be reserved."""
        return bool(self._largest) and self._reserved + 2 * self._largest <= self.slots.capacity // 4

    def _reserve(self, worker: Worker) -> None:
        """Where there is ample room, a worker need not ask for it."""
        if not self._ample():
            return
        allocated = self.slots.allocate(self._largest) if self._make_room(self._largest, [], True) else None
        if allocated is not None:
            worker.slot, discarded = allocated
            worker.reserved = self.slots.size(worker.slot)
            self._reserved += worker.reserved
            self._actions += [Discard(*slot) for slot in discarded]

    def _give_back(self, worker: Worker) -> None:
        """What was reserved is not needed, or not enough."""
        if worker.slot is not None:
            self.slots.release(worker.slot)
        self._reserved -= worker.reserved
        worker.slot, worker.reserved = None, 0

    def _most_urgent(self, worker: Worker) -> tuple[int, int] | None:
        depth = 2 * self.hands + CREDIT
        best: tuple[int, tuple[int, int, int]] | None = None
        found = None
        for job in self.jobs.values():
            if not job.active or (job.fallen and worker.job != job.id):
                continue
            stuck = self._stuck(job)
            position = job.pushed if stuck else self._first_missing(job)
            distance = position - job.pushed
            if position >= job.count or distance > depth or (distance and not self._may_prefetch(job)):
                continue
            if best is None or (distance, job.progress) < best:
                best = distance, job.progress
                found = (job.epoch or 0, job.number(position))
        return found

    def _first_missing(self, job: Job) -> int:
        position = max(job.scan, job.pushed)
        while position < job.count and (job.epoch or 0, job.number(position)) in self.batches:
            position += 1
        job.scan = position
        return position

    def _may_prefetch(self, job: Job) -> bool:
        """Whether one more batch is likely to find room."""
        room = self.slots.room + self._kept_bytes + (0 if job.fallen else self._owed_bytes)
        under_way = sum(1 for w in self.workers.values() if w.task is not None and w.slot is None)
        return room >= self._largest * (under_way + 1)

    def _stuck(self, job: Job) -> bool:
        """Whether a job starves for a batch whose worker has had it for too long: it may be stopped."""
        batch = self.batches.get((job.epoch or 0, job.number(job.pushed)))
        return (
            job.starving
            and batch is not None
            and not batch.ready
            and batch.worker not in self._wanting
            and self.now - batch.since > max(_STUCK, _STUCK_TIMES * self._usual)
        )

    def _unblock(self) -> bool:
        """Send a worker away that waits for room, if a job starves and nobody is free to help it."""
        if not self._wanting:
            return False
        for job in self.jobs.values():
            if not job.starving or (job.epoch or 0, job.number(job.pushed)) in self.batches:
                continue
            helpers = [w for w in self._wanting.values() if not job.fallen or w.job == job.id]
            if not helpers or any(not job.fallen or w.job == job.id for w in self._idle.values()):
                continue
            least = max(helpers, key=self._urgency)
            if self._urgency(least) > (0, job.progress):
                self._send_away(least)
                return True
        return False

    def _lose_patience(self) -> bool:
        """Whether the slowest job leaves now, because a faster one has waited for long enough."""
        if self.patience is None:
            return False
        for job in self.jobs.values():
            if job.blocked_since is None or self.now - job.blocked_since < self.patience:
                continue
            slower = [
                j
                for j in self.jobs.values()
                if j.active and not j.fallen and j is not job and j.progress < job.progress
            ]
            if slower:
                slowest = min(slower, key=lambda j: j.progress)
                slowest.fallen = True
                self._actions.append(
                    Notice(slowest.id, f"the group waited for this job for {self.patience:g} s, and waits no longer")
                )
                assert slowest.epoch is not None
                self._sort_out(slowest.epoch)
                job.blocked_since = None
                return True
        return False

    # Bookkeeping

    def _joining(self, epoch: int, count: int) -> int:
        """Where a job that begins an epoch now starts: so early that all from there to the others is still here."""
        first = max(
            (j for j in self.jobs.values() if j.epoch == epoch and j.count == count and j.pushed),
            key=lambda j: (j.active, j.pushed),
            default=None,
        )
        if first is None or not first.active:
            return 0
        position = first.pushed
        while position > 0 and (epoch, first.number(position - 1)) in self.batches:
            position -= 1
        return first.number(position)

    def _stop(self, job: Job) -> None:
        epoch, job.epoch, job.blocked_since = job.epoch, None, None
        while job.untaken:
            batch = job.untaken.popleft()
            if batch is not None and job.id in batch.holders:  # threads may let go of it before it is told as taken
                self._let_go(job, batch)
        if epoch is not None:
            self._sort_out(epoch)

    def _sort_out(self, epoch: int) -> None:
        for batch in [b for b in self.batches.values() if b.epoch == epoch]:
            if self.batches.get(batch.key) is batch:  # else it was evicted for one before it
                self._classify(batch)

    def _classify(self, batch: Batch) -> None:
        """Whether it is still needed, and by whom."""
        needing = [j.fallen for j in self.jobs.values() if j.active and j.distance(batch) >= 0]
        if batch.error is not None:
            if not needing:
                self._remove(batch)
            return
        self._keep_no_longer(batch)
        if batch.slot is None or batch.holders or not all(needing):
            return
        if needing:
            self._owed[batch.key] = batch
            self._owed_bytes += self.slots.size(batch.slot)
        elif not self._may_keep(batch.epoch):
            self._evict(batch)
        else:
            self._kept[batch.key] = batch
            self._kept_bytes += self.slots.size(batch.slot)
            while self._kept_bytes > self.slots.capacity // 4:
                self._evict(next(iter(self._kept.values())))

    def _may_keep(self, epoch: int) -> bool:
        """Whether somebody is likely to begin this epoch yet. Otherwise the fewer slots, the warmer they are."""
        late = (j.latest is not None and (j.latest < epoch or j.entered) for j in self.jobs.values())
        return self.now - self._joined < _JOINING or any(late)

    def _keep_no_longer(self, batch: Batch) -> None:
        if self._kept.pop(batch.key, None) is not None and batch.slot is not None:
            self._kept_bytes -= self.slots.size(batch.slot)
        if self._owed.pop(batch.key, None) is not None and batch.slot is not None:
            self._owed_bytes -= self.slots.size(batch.slot)

    def _evict(self, batch: Batch) -> None:
        assert batch.slot is not None
        assert not batch.holders
        self.slots.release(batch.slot)
        self._remove(batch)

    def _remove(self, batch: Batch) -> None:
        if self.batches.get(batch.key) is batch:
            del self.batches[batch.key]
        self._keep_no_longer(batch)
        self._fresh.pop(batch.key, None)
        for job in self.jobs.values():
            distance = job.distance(batch)
            if distance >= 0:
                job.scan = min(job.scan, job.pushed + distance)

    def _fail(self, batch: Batch, why: str) -> None:
        batch.error, batch.worker = why, None

    def _mine(self, worker: Worker) -> Batch | None:
        """The batch that a worker prepares, unless somebody else does by now."""
        if worker.task is None:
            return None
        batch = self.batches.get(worker.task)
        return batch if batch is not None and batch.worker == worker.id else None

    def _forget_worker(self, worker: Worker) -> None:
        batch = self._mine(worker)
        if batch is not None:
            self._remove(batch)
        self._give_back(worker)
        self._wanting.pop(worker.id, None)
        self._rest_no_longer(worker)
        self.hands -= not worker.second
        del self.workers[worker.id]

    def _rest(self, worker: Worker) -> None:
        if not worker.retired:
            (self._seconds if worker.second else self._idle)[worker.id] = worker

    def _rest_no_longer(self, worker: Worker) -> None:
        self._idle.pop(worker.id, None)
        self._seconds.pop(worker.id, None)
