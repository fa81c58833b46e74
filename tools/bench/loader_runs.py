"""Runs of the loader's benchmarks: jobs started together, each with a loader of one side, and what they took when.

Every job takes batches as fast as it gets them. What is measured begins when a job has had its first batches, so that
no side's start counts: a training has many epochs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count, pairwise

from coordlfs_tools.bench.jobs import CpuClock, Job, Message, Node, node
from coordlfs_tools.bench.loader_job import CONSUMER, COORDINATED, PLAIN, PRODUCER, Spec
from coordlfs_tools.lab.errors import LabError

MODULE = "coordlfs_tools.bench.loader_job"
LIMIT = 200.0  # seconds that a run may take
_BEGINNING = 60.0  # seconds until every job has its first batch
_TRIES = 3  # to begin
_groups = count(1)


@dataclass(frozen=True, slots=True)
class Run:
    """What all jobs of a run took, after each had its first `skip` batches."""

    taken: Sequence[Sequence[Message]]  # of each job, every batch
    clock: CpuClock
    batch: int
    skip: int

    def batches_per_second(self) -> list[float]:
        """Of each job."""
        return [(len(job) - self.skip) / (job[-1]["at"] - job[self.skip - 1]["at"]) for job in self.taken]

    def samples_per_second(self) -> float:
        """Summed over the jobs."""
        return float(self.batch * sum(self.batches_per_second()))

    def cpu_per_sample(self) -> float:
        """Seconds of CPU for each sample that a job got, while all of them were at work."""
        start = max(job[self.skip - 1]["at"] for job in self.taken)
        end = min(job[-1]["at"] for job in self.taken)
        delivered = sum(start < batch["at"] <= end for job in self.taken for batch in job)
        return float(self.clock.between(start, end) / (self.batch * delivered))

    def longest_wait(self) -> float:
        """Seconds between two batches of a job, the longest of all jobs'."""
        waits: Iterator[float] = (b["at"] - a["at"] for job in self.taken for a, b in pairwise(job[self.skip - 1 :]))
        return max(waits)


@contextmanager
def started(specs: Sequence[Spec]) -> Iterator[tuple[Node, list[Job], CpuClock]]:
    """The jobs of these, told to go. In the end nothing of them is left."""
    with node() as here:
        jobs = [here.start(MODULE, spec.json()) for spec in specs]
        for job in jobs:
            job.wait("ready", LIMIT)
        with CpuClock(here) as clock:
            for job in jobs:
                job.say("go")
            yield here, jobs, clock


def takers(specs: Sequence[Spec], jobs: Sequence[Job]) -> list[Job]:
    """The jobs that train: all but a producer."""
    return [job for job, spec in zip(jobs, specs, strict=True) if spec.side != PRODUCER]


@contextmanager
def begun(specs: Sequence[Spec]) -> Iterator[tuple[Node, list[Job], CpuClock]]:
    """`started`, when every job has had a batch.

    A TensorSocket consumer may miss what the producer says once, and then waits for ever: it is given three tries.
    """
    for number in range(_TRIES):
        with started(specs) as (here, jobs, clock):
            try:
                for job in takers(specs, jobs):
                    job.wait("first", _BEGINNING)
            except LabError:
                if number + 1 == _TRIES or specs[0].side != PRODUCER:
                    raise
                continue
            yield here, jobs, clock
            return


def run(specs: Sequence[Spec], skip: int) -> Run:
    """Let the jobs take all that they have to take. Raises LabError if one fails."""
    with begun(specs) as (_, jobs, clock):
        taken = [job.wait("done", LIMIT)["taken"] for job in takers(specs, jobs)]
    return Run(taken, clock, specs[0].batch, skip)


def specs_of(side: str, spec: Spec, jobs: int) -> list[Spec]:
    """`jobs` jobs with `spec.workers` workers each; with TensorSocket a producer that has as many workers as all."""
    if side == PLAIN:
        return [replace(spec, side=PLAIN)] * jobs
    if side == COORDINATED:
        return [replace(spec, side=COORDINATED, group=f"bench-{os.getpid()}-{next(_groups)}")] * jobs
    ports = _free_ports(4)
    producer = replace(spec, side=PRODUCER, ports=ports, workers=spec.workers * jobs, consumers=jobs)
    return [producer, *[replace(spec, side=CONSUMER, ports=ports)] * jobs]


def _free_ports(number: int) -> tuple[int, ...]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return tuple(each.getsockname()[1] for each in sockets)
