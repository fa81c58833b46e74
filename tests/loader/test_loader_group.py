"""The bookkeeping of a group under any interleaving: each batch once and in order, bounded memory, no wait for ever."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Any

import pytest
from coordlfs_loader.group import DEATHS, SMALL_CREDIT, Deliver, Discard, Drop, Group, Notice, Task, Write
from coordlfs_loader.slots import UNIT, Slots
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

LARGEST = 4 * UNIT
SLOW = HealthCheck.too_slow  # as everything is on a machine with other things to do


class JobModel:
    """What a job knows, and what it must find true."""

    def __init__(self) -> None:
        self.run = 0
        self.epoch: int | None = None
        self.count = 0
        self.start = 0
        self.taken = 0
        self.queue: deque[Deliver] = deque()
        self.held: list[tuple[int, tuple[int, int]]] = []  # slot, and what must lie in it
        self.next_epoch: int | None = None
        self.stopped = False  # as by SIGSTOP: it neither takes nor frees nor begins


class GroupMachine(RuleBasedStateMachine):
    """Jobs and workers that do anything that real ones may do, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.group: Group = Group(1 << 20)
        self.jobs: dict[int, JobModel] = {}
        self.tasks: dict[int, tuple[int, int]] = {}  # worker → what it prepares
        self.wants: set[int] = set()
        self.writes: dict[int, tuple[int, int]] = {}  # worker → slot and its size
        self.reserved: dict[int, tuple[int, int]] = {}
        self.sizes: dict[int, int] = {}
        self.owner: dict[int, int] = {}
        self.retired: set[int] = set()
        self.seconds: dict[int, int] = {}  # worker → its second hand
        self.idle: set[int] = set()
        self.memory: dict[int, tuple[int, int]] = {}  # slot → what was written there
        self.failed: set[tuple[int, int]] = set()
        self.number = 0
        self.now = 0.0
        self.counts: dict[int, int] = {}

    @initialize(pages=st.sampled_from([8, 10, 12, 16, 24, 40, 100]), patience=st.sampled_from([None, 2.0]))
    def make(self, pages: int, patience: float | None) -> None:
        self.group = Group(pages * UNIT, patience)

    def act(self, actions: list[Any]) -> None:
        for a in actions:
            match a:
                case Deliver():
                    job = self.jobs[a.job]
                    assert a.run == job.run
                    position = job.taken + len(job.queue)
                    assert a.epoch == job.epoch
                    assert a.number == (job.start + position) % job.count  # in order, none left out, none twice
                    if a.error is None:
                        assert self.memory[a.slot] == (a.epoch, a.number)
                    else:
                        assert (a.epoch, a.number) in self.failed
                    job.queue.append(a)
                    assert len(job.queue) <= SMALL_CREDIT
                case Task(worker, epoch, number, slot, room):
                    assert worker in self.idle
                    assert worker not in self.retired
                    assert worker not in self.jobs or not self.jobs[worker].queue  # it has better to do
                    self.idle.discard(worker)
                    self.tasks[worker] = (epoch, number)
                    if room:
                        self.may_write(slot)
                        self.reserved[worker] = (slot, room)
                case Write(worker, slot, room):
                    self.wants.discard(worker)
                    self.may_write(slot)
                    self.writes[worker] = (slot, room)
                case Drop(worker):
                    if worker in self.tasks:
                        self.wants.discard(worker)
                        del self.tasks[worker]
                        if worker not in self.inline and worker not in self.retired:
                            self.idle.add(worker)
                case Discard(slot, _):
                    self.memory.pop(slot, None)
                case Notice():
                    pass

    def may_write(self, slot: int) -> None:
        """Nobody else may be reading there, or writing."""
        self.memory.pop(slot, None)
        for job in self.jobs.values():
            assert slot not in [s for s, _ in job.held]
            assert slot not in [d.slot for d in job.queue if not d.copied]
        assert slot not in [s for s, _ in [*self.writes.values(), *self.reserved.values()]]

    @property
    def inline(self) -> set[int]:
        return {w for w in self.owner if w in self.jobs}

    # Jobs

    @precondition(lambda self: len(self.jobs) < 4)
    @rule(workers=st.integers(0, 2))
    def join(self, workers: int) -> None:
        self.number += 1
        job = self.number
        self.jobs[job] = JobModel()
        self.act(self.group.add_job(job))
        if not workers:
            self.owner[job] = job
            self.act(self.group.add_worker(job, job, inline=True))
        for _ in range(workers):
            self.add_worker(job)

    def add_worker(self, job: int) -> None:
        hands = self.number + 1, self.number + 2
        self.number += 2
        self.seconds[hands[0]] = hands[1]
        for hand in hands:
            self.owner[hand] = job
            self.act(self.group.add_worker(hand, job, second=hand == hands[1]))
        for hand in hands:
            self.idle.add(hand)
            self.act(self.group.idle(hand))

    def pick(self, data: st.DataObject, choices: Any) -> int | None:
        choices = sorted(choices)
        return data.draw(st.sampled_from(choices)) if choices else None

    @rule(data=st.data(), clean=st.booleans())
    def die(self, data: st.DataObject, clean: bool) -> None:
        job = self.pick(data, self.jobs)
        if job is None or data.draw(st.integers(0, 3)):
            return
        if clean:
            self.stop_walk(job)
            self.act(self.group.leave(job))
        inline = job in self.owner
        del self.jobs[job]
        for worker in [w for w, j in self.owner.items() if j == job]:
            self.retired.add(worker)
            self.idle.discard(worker)
        self.act(self.group.remove_job(job))
        if inline:
            self.forget_worker(job)
            self.act(self.group.remove_worker(job))

    def forget_worker(self, worker: int) -> None:
        self.owner.pop(worker)
        self.tasks.pop(worker, None)
        self.writes.pop(worker, None)
        self.reserved.pop(worker, None)
        self.wants.discard(worker)
        self.idle.discard(worker)
        self.retired.discard(worker)

    def stop_walk(self, job: int) -> None:
        model = self.jobs[job]
        model.epoch, model.run = None, model.run + 1
        model.queue.clear()

    def begin(self, job: int, epoch: int, at: tuple[int, int] | None) -> None:
        model = self.jobs[job]
        self.stop_walk(job)
        count = self.counts.setdefault(epoch, 3 + epoch % 3 * 4)
        model.epoch, model.count = epoch, count
        model.taken = 0 if at is None else at[1]
        if at is not None:
            model.start = at[0]
        # The broker tells where the sequence starts before it hands anything over.
        actions = self.group.begin(job, model.run, epoch, count, at)
        model.start = self.group.jobs[job].start
        model.next_epoch = epoch + 1
        self.act(actions)

    @rule(data=st.data(), explicit=st.one_of(st.none(), st.integers(0, 3)), resume=st.booleans())
    def begin_epoch(self, data: st.DataObject, explicit: int | None, resume: bool) -> None:
        job = self.pick(data, [j for j, m in self.jobs.items() if not m.stopped])
        if job is None:
            return
        model = self.jobs[job]
        epoch = self.group.enter(job, explicit if explicit is not None else model.next_epoch)
        at = None
        if resume:
            count = self.counts.setdefault(epoch, 3 + epoch % 3 * 4)
            at = data.draw(st.tuples(st.integers(0, count - 1), st.integers(0, count)))
        self.begin(job, epoch, at)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        job = self.pick(data, [j for j, m in self.jobs.items() if m.epoch is not None and not m.stopped])
        if job is not None:
            self.stop_walk(job)
            self.act(self.group.end(job))

    def take_one(self, job: int) -> None:
        model = self.jobs[job]
        d = model.queue.popleft()
        model.taken += 1
        if d.error is None and not d.copied:
            model.held.append((d.slot, (d.epoch, d.number)))
        self.act(self.group.took(job))

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        job = self.pick(data, [j for j, m in self.jobs.items() if m.queue and not m.stopped])
        if job is not None:
            self.take_one(job)

    @rule(data=st.data())
    def let_go_before_it_is_told_as_taken(self, data: st.DataObject) -> None:
        """As threads may."""
        job = self.pick(data, [j for j, m in self.jobs.items() if m.queue and not m.stopped])
        if job is None:
            return
        model, d = self.jobs[job], self.jobs[job].queue[0]
        if not d.copied and d.error is None and d.slot not in [slot for slot, _ in model.held]:
            model.queue[0] = d._replace(copied=True)  # nothing is held any more
            self.act(self.group.took(job, 0, [d.slot]))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        job = self.pick(data, [j for j, m in self.jobs.items() if m.held and not m.stopped])
        if job is not None:
            held = self.jobs[job].held
            slot, _ = held.pop(data.draw(st.integers(0, len(held) - 1)))
            self.act(self.group.took(job, 0, [slot]))

    @rule(data=st.data())
    def stop_or_go_on(self, data: st.DataObject) -> None:
        job = self.pick(data, self.jobs)
        if job is not None:
            self.jobs[job].stopped = not self.jobs[job].stopped

    # Workers

    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        """A job without workers waits for its next batch."""
        able = [
            j
            for j, m in self.jobs.items()
            if j in self.owner and not m.stopped and m.epoch is not None and not m.queue and j not in self.tasks
        ]
        job = self.pick(data, able)
        if job is not None:
            self.idle.add(job)
            self.act(self.group.idle(job))

    @rule(data=st.data(), size=st.sampled_from([1, UNIT, LARGEST]))
    def finish(self, data: st.DataObject, size: int) -> None:
        worker = self.pick(data, [w for w in self.tasks if w not in self.wants and w not in self.writes])
        if worker is not None:
            self.finish_one(worker, size)

    def finish_one(self, worker: int, size: int) -> None:
        self.sizes[worker] = size
        slot, room = self.reserved.pop(worker, (0, 0))
        if size <= room:
            self.writes[worker] = (slot, room)
            return
        self.wants.add(worker)
        if size > self.group.slots.capacity // 2:
            self.failed.add(self.tasks[worker])
        self.act(self.group.wants(worker, size))

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        worker = self.pick(data, self.writes)
        if worker is not None:
            self.write_one(worker)

    def write_one(self, worker: int) -> None:
        slot, _ = self.writes.pop(worker)
        self.memory[slot] = self.tasks.pop(worker)
        actions = self.group.wrote(worker, self.sizes[worker])
        if worker not in self.jobs and worker not in self.retired:
            self.idle.add(worker)
            actions += self.group.idle(worker)
        self.act(actions)

    @rule(data=st.data(), told=st.booleans())
    def worker_dies(self, data: st.DataObject, told: bool) -> None:
        worker = self.pick(data, [w for w in self.owner if w in self.seconds])
        if worker is None:
            return
        task, job = self.tasks.get(worker), self.owner[worker]
        hands = worker, self.seconds.pop(worker)
        for hand in hands:
            self.forget_worker(hand)
        actions = self.group.remove_worker(*hands)
        if task is not None and told and job in self.jobs:
            deaths = len(self.group._deaths.get(task, [])) + 1
            if deaths >= DEATHS:
                self.failed.add(task)
            actions += self.group.killed(task, "of old age")
        self.act(actions)
        if job in self.jobs:
            self.add_worker(job)

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.act(self.group.tick(self.now))

    # What must be true at any time

    @invariant()
    def memory_is_bounded(self) -> None:
        slots = self.group.slots
        assert slots.used + slots.idle <= slots.capacity
        held = {slot for m in self.jobs.values() for slot, _ in m.held}
        held |= {d.slot for m in self.jobs.values() for d in m.queue if not d.copied and d.error is None}
        assert self.group.held_bytes == sum(slots.size(s) for s in held) <= slots.capacity // 2

    @invariant()
    def what_is_held_is_left_alone(self) -> None:
        for model in self.jobs.values():
            for slot, what in model.held:
                assert self.memory[slot] == what

    @invariant()
    def charges_add_up(self) -> None:
        for job in self.group.jobs.values():
            assert job.charge >= 0
            assert set(job.held) == {s for s, _ in self.jobs[job.id].held} | {
                d.slot for d in self.jobs[job.id].queue if not d.copied and d.error is None
            }

    @invariant()
    def what_is_kept_adds_up(self) -> None:
        group = self.group
        kept = {k for k, b in group.batches.items() if b.slot is not None and not b.holders}
        assert set(group._kept) | set(group._owed) <= kept
        assert not set(group._kept) & set(group._owed)
        assert group._owed_bytes == sum(group.slots.size(b.slot or 0) for b in group._owed.values())
        assert group._kept_bytes == sum(group.slots.size(b.slot or 0) for b in group._kept.values())
        assert set(group._fresh) <= {k for k, b in group.batches.items() if b.slot is not None}

    def teardown(self) -> None:
        """Whatever happened: when everybody goes on, everybody gets all that it is owed, without time passing.

        Only what is held for ever stays held.
        """
        for model in self.jobs.values():
            model.stopped = False
        for job in list(self.jobs):
            if not any(owner == job and w not in self.retired for w, owner in self.owner.items()):
                self.add_worker(job)
        for worker in list(self.retired):
            self.forget_worker(worker)
            self.seconds.pop(worker, None)
            self.act(self.group.remove_worker(worker))
        for _ in range(2000):
            moved = False
            for job, model in self.jobs.items():
                if model.queue:
                    self.take_one(job)
                    moved = True
                elif model.epoch is not None and job in self.owner and job not in self.tasks:
                    self.idle.add(job)
                    self.act(self.group.idle(job))
                    moved = moved or job in self.tasks
            for worker in list(self.tasks):
                if worker in self.writes:
                    self.write_one(worker)
                    moved = True
                elif worker in self.tasks and worker not in self.wants:  # others' news may have sent it away
                    self.finish_one(worker, LARGEST)
                    moved = True
            if not moved:
                break
        for job, model in self.jobs.items():
            assert model.epoch is None or model.taken == model.count, (job, vars(model))


def _go_on(machine: GroupMachine, going: set[int]) -> None:
    """All workers, and the jobs that are `going`, do what they can."""
    moved = True
    while moved:
        moved = False
        for worker in list(machine.tasks):
            if worker in machine.writes:
                machine.write_one(worker)
                moved = True
            elif worker in machine.tasks and worker not in machine.wants:
                machine.finish_one(worker, UNIT)
                moved = True
        for job in going:
            if machine.jobs[job].queue:
                machine.take_one(job)
                held = machine.jobs[job].held
                while held:
                    slot, _ = held.pop()
                    machine.act(machine.group.took(job, 0, [slot]))
                moved = True


@pytest.mark.parametrize("patience", [None, 5.0])
def test_a_stopped_job_is_waited_for_as_long_as_is_said(patience: float | None) -> None:
    machine = GroupMachine()
    machine.group = Group(16 * UNIT, patience)
    machine.counts[0] = 100
    for job in (1, 2):
        machine.jobs[job] = JobModel()
        machine.act(machine.group.add_job(job))
        machine.number = 10 * job
        machine.add_worker(job)
        machine.begin(job, 0, None)
    stopped, going = machine.jobs[1], machine.jobs[2]
    _go_on(machine, {2})
    far = going.taken
    assert 10 <= far <= 16  # as far as the stage reaches
    machine.act(machine.group.tick(4.0))
    _go_on(machine, {2})
    assert going.taken == far
    machine.act(machine.group.tick(6.0))
    _go_on(machine, {2})
    assert going.taken == (far if patience is None else 100)
    _go_on(machine, {1, 2})
    assert stopped.taken == going.taken == 100
    assert machine.group.prepared <= 300  # and nothing was prepared again and again


TestGroup = GroupMachine.TestCase
TestGroup.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[SLOW])


class SlotsMachine(RuleBasedStateMachine):
    """Slots of any sizes, taken and given back in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(64 * UNIT)
        self.live: dict[int, int] = {}
        self.known: dict[int, int] = {}  # slots with memory

    @rule(size=st.integers(1, 40 * UNIT))
    def allocate(self, size: int) -> None:
        room = self.slots.room
        found = self.slots.allocate(size)
        rounded = -(-size // UNIT) * UNIT
        if rounded <= room:
            assert found is not None  # no fragmentation
        if found is None:
            return
        offset, discarded = found
        for gone, freed in discarded:
            assert gone not in self.live
            assert self.known.pop(gone) == freed
        self.known[offset] = self.live[offset] = self.slots.size(offset)
        assert self.live[offset] >= size
        spans = sorted((o, o + s) for o, s in self.known.items())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.live:
            offset = data.draw(st.sampled_from(sorted(self.live)))
            del self.live[offset]
            self.slots.release(offset)

    @invariant()
    def bounded(self) -> None:
        assert self.slots.used == sum(self.live.values())
        assert self.slots.used + self.slots.idle == sum(self.known.values()) <= self.slots.capacity


TestSlots = SlotsMachine.TestCase
TestSlots.settings = settings(max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[SLOW])


def test_what_is_evicted_as_a_job_ends_is_gone() -> None:
    """An eviction for want of room among what nobody needs, while the batches of an epoch are sorted out."""
    group = Group(8 * UNIT)
    group.add_job(1)
    for worker in range(10, 14):
        group.add_worker(worker, 1)
        group.idle(worker)
    given = [a for a in group.begin(1, 0, 0, 10, None) if isinstance(a, Task)]
    by_number = {task.number: task.worker for task in given}
    assert set(by_number) == {0, 1, 2, 3}
    group.remove_worker(by_number[0])
    group.add_worker(14, 1)
    [again] = [a for a in group.idle(14) if isinstance(a, Task)]
    assert again.number == 0  # begun after 1, 2 and 3, of which 2 is never done
    for worker in (by_number[3], by_number[1], 14):
        group.wants(worker, UNIT)
        group.wrote(worker, UNIT)
    group.end(1)  # 0 and 1 are kept, then 3, for which 0 has to go
    assert set(group._kept) == {(0, 1), (0, 3)}
    assert set(group._kept) <= set(group.batches)
    assert group.slots.used == group._kept_bytes == 2 * UNIT
