"""Real jobs in real processes that are killed, stopped, late and slow: everybody else gets each batch once."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from coordlfs_loader import groups
from coordlfs_tools.lab.processes import is_alive
from loader_jobs import Job, broker_pid, eventually, workers_of
from mounts import Cgroup

MakeJob = Callable[..., Job]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, in which afterwards nothing is."""
    path = tmp_path / "run"
    monkeypatch.setenv("COORDLFS_RUNTIME_DIR", str(path))
    yield path
    eventually(lambda: not path.exists() or list(path.iterdir()) == [])


@pytest.fixture
def job() -> Iterator[MakeJob]:
    """Starts jobs, and ends them; afterwards nothing of them is in /dev/shm."""
    pids = []
    with ExitStack() as stack:

        def make(**arguments: object) -> Job:
            made = Job("test", **arguments)
            pids.append(made.pid)
            stack.callback(made.end)
            return made

        yield make
    assert not [name for name in os.listdir("/dev/shm") for pid in pids if str(pid) in re.findall(r"\d+", name)]


def test_jobs_share_their_epochs(job: MakeJob) -> None:
    jobs = [job(epochs=3, num_workers=n, prepare=0.001) for n in (0, 1, 2)]
    for j in jobs:
        j.finish()
    for j in jobs:
        j.check(*j.batches)
        assert len(j.batches) == 3


def test_a_job_may_write_into_its_tensors_and_keep_them(job: MakeJob) -> None:
    """What one does is seen by no other, also when slots are used again and again."""
    arguments = {"epochs": 3, "num_workers": 1, "side": 64, "stage_bytes": 4 << 20}
    jobs = [job(**arguments, spoil=True), job(**arguments, keep=True), job(**arguments, spoil=True, keep=True)]
    for j in jobs:
        j.finish()
        j.check(*j.batches)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_killed_job_holds_nobody_up(job: MakeJob, after: int) -> None:
    arguments = {"epochs": 2, "num_workers": 1, "prepare": 0.002, "stage_bytes": 1 << 20}
    victim, *others = job(**arguments, keep=True), job(**arguments), job(**arguments)
    victim.until("batch", 1 + after)
    workers = workers_of(victim.pid)
    victim.kill()
    for j in others:
        j.finish()
        j.check(*j.batches)
    eventually(lambda: not any(map(is_alive, workers)))


@pytest.mark.parametrize("whose", ["one", "all", "again"])
def test_killed_workers_are_replaced(job: MakeJob, whose: str) -> None:
    jobs = [job(epochs=2, num_workers=2, prepare=0.01, step=True) for _ in range(2)]
    for j in jobs:
        j.until("begin")
        j.go_on(2)
        j.until("batch", 2)
    for _ in range(2 if whose == "again" else 1):  # a third time, and the batch is given up
        pids = [pid for j in jobs for pid in workers_of(j.pid)]
        for pid in pids[:1] if whose == "one" else pids:
            os.kill(pid, signal.SIGKILL)
        jobs[0].go_on()
        jobs[0].until("batch")
    for j in jobs:
        j.go_on(1000)
    said = [j.finish() for j in jobs]
    assert "was killed by signal: Killed; another takes its place" in said[0]
    for j in jobs:
        j.check(*j.batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_brokers_are_replaced(job: MakeJob, workers: int) -> None:
    jobs = [job(epochs=2, num_workers=workers, prepare=0.005, keep=True, step=True) for _ in range(3)]
    for j in jobs:
        j.until("begin")
    for batches in (1, 3, 6):
        for j in jobs:
            j.go_on(batches)
            j.until("batch", batches)
        os.kill(eventually(lambda: broker_pid("test")), signal.SIGKILL)
    for j in jobs:
        j.go_on(1000)
    for j in jobs:
        j.finish()
        j.check(*j.batches)


def test_everything_killed_at_once(job: MakeJob) -> None:
    """Broker, workers and a job: the one that is left goes on."""
    arguments = {"epochs": 2, "num_workers": 1, "prepare": 0.005, "step": True}
    victim, survivor = job(**arguments), job(**arguments)
    for j in (victim, survivor):
        j.until("begin")
        j.go_on(3)
        j.until("batch", 3)
    broker = eventually(lambda: broker_pid("test"))
    for doomed in (broker, victim.pid, *workers_of(victim.pid), *workers_of(survivor.pid)):
        os.kill(doomed, signal.SIGKILL)
    survivor.go_on(1000)
    survivor.finish()
    survivor.check(*survivor.batches)


def test_a_late_job_takes_part_and_gets_the_rest_afterwards(job: MakeJob) -> None:
    arguments = {"num_workers": 1, "length": 200, "epochs": 2, "stage_bytes": 1 << 16}
    first = job(**arguments, step=True)
    first.until("begin")
    first.go_on(20)
    first.until("batch", 20)
    late = job(**arguments)
    late.until("batch")
    first.go_on(1000)
    late.finish()
    first.finish()
    late.check(0, 1)
    first.check(0, 1)
    assert first.batches[0] != late.batches[0]  # it began in the midst


def test_a_job_that_stops_early_leaves(job: MakeJob) -> None:
    arguments = {"num_workers": 1, "length": 200, "stage_bytes": 1 << 16}
    first, second = job(**arguments, step=True), job(**arguments)
    first.until("begin")
    first.go_on(3)
    first.until("batch", 3)
    first.kill(signal.SIGTERM)
    second.finish()
    second.check(0)


def test_others_wait_for_a_stopped_job(job: MakeJob) -> None:
    arguments = {"num_workers": 1, "length": 400, "stage_bytes": 1 << 17}
    stopped, other = job(**arguments, step=True), job(**arguments, step=True)
    for j in (stopped, other):
        j.until("begin")
        j.go_on(2)
        j.until("batch", 2)
    stopped.kill(signal.SIGSTOP)
    other.go_on(1000)
    time.sleep(1)
    stopped.kill(signal.SIGCONT)
    stopped.go_on(1000)
    for j in (stopped, other):
        j.finish()
        j.check(0)


def test_others_do_not_wait_for_ever_if_told(job: MakeJob) -> None:
    arguments = {"num_workers": 1, "length": 400, "stage_bytes": 1 << 17, "patience": 0.5}
    stopped, other = job(**arguments, step=True), job(**arguments, step=True)
    for j in (stopped, other):
        j.until("begin")
        j.go_on(2)
        j.until("batch", 2)
    stopped.kill(signal.SIGSTOP)
    other.go_on(1000)
    other.finish()
    other.check(0)
    stopped.kill(signal.SIGCONT)
    stopped.go_on(1000)
    assert "waits no longer" in stopped.finish()
    stopped.check(0)


def test_a_stopped_worker_holds_nobody_up_for_long(job: MakeJob) -> None:
    jobs = [job(num_workers=1, length=200, prepare=0.002, step=True) for _ in range(2)]
    for j in jobs:
        j.until("begin")
    eventually(lambda: groups.figures()[0]["workers"] == 2)
    (stopped,) = workers_of(jobs[1].pid)
    os.kill(stopped, signal.SIGSTOP)
    for j in jobs:
        j.go_on(1000)
    for j in jobs:
        j.until("batch", 50)
    os.kill(stopped, signal.SIGCONT)
    for j in jobs:
        j.finish()
        j.check(0)


def test_the_stage_is_as_small_as_it_may_be(job: MakeJob) -> None:
    """Room for two batches, and every job keeps every tensor."""
    jobs = [job(epochs=2, num_workers=1, side=32, stage_bytes=2 * 53248, keep=True) for _ in range(3)]
    for j in jobs:
        j.finish()
        j.check(*j.batches)


def _begin_together(jobs: list[Job]) -> None:
    """Have jobs that `step` run once all are in the first epoch: who comes when that is over begins another."""
    for j in jobs:
        j.until("begin")
    for j in jobs:
        j.go_on(1000)


def test_an_exception_reaches_every_job(job: MakeJob) -> None:
    jobs = [job(num_workers=n, bad={7: "raise"}, step=True) for n in (0, 1)]
    _begin_together(jobs)
    for j in jobs:
        j.finish()
        raised = [e for e in j.events if e["event"] == "raised"]
        assert len(raised) == 1
        assert raised[0]["type"] == "LookupError"
        assert "sample 7 is rotten" in raised[0]["text"]
        assert "in __getitem__" in raised[0]["text"]
        assert len(j.batches[0]) == 14


def test_a_batch_that_kills_its_workers_is_given_up(job: MakeJob) -> None:
    jobs = [job(num_workers=1, bad={7: "die"}, step=True) for _ in range(2)]
    _begin_together(jobs)
    for j in jobs:
        j.finish()
        (raised,) = [e for e in j.events if e["event"] == "raised"]
        assert "3 workers died while they prepared this batch" in raised["text"]
        assert "was killed by signal: Killed" in raised["text"]
        assert len(j.batches[0]) == 14


def test_the_oom_killer_is_named(job: MakeJob, cgroup: Callable[[int], Cgroup]) -> None:
    """In a real memory cgroup, by a sample that takes up more than it allows."""
    outside = job(num_workers=0, step=True)
    outside.until("begin")  # and prepares nothing before it is told to go on
    inside = job(num_workers=1, bad={7: "eat"}, cgroup=str(cgroup(300 << 20).path))
    said = inside.finish()
    outside.go_on(1000)
    outside.finish()
    assert "was killed by the OOM killer: the memory limit of its cgroup was reached; another takes its place" in said
    for j in (inside, outside):
        raised = [e["text"] for e in j.events if e["event"] == "raised"]
        assert len(j.batches[0]) == 14
        assert len(raised) == 1
        assert raised[0].count("was killed by the OOM killer") == 3
    eventually(lambda: broker_pid("test") is None)  # before the cgroup is taken down, which it may be in


def test_a_stage_that_is_too_small_says_what_it_needs(job: MakeJob) -> None:
    j = job(num_workers=1, side=128, stage_bytes=1 << 16)
    j.finish()
    raised = [e for e in j.events if e["event"] == "raised"]
    assert len(raised) == 15
    assert "stage_bytes=65536 is too small" in raised[0]["text"]
    needed = int(raised[0]["text"].split("at least ")[1])
    other = job(num_workers=1, side=128, stage_bytes=needed)
    other.finish()
    other.check(0)
