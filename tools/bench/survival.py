"""What jobs that share their prep survive, found by doing it: a job killed, a late one, the one that feeds them killed.

Samples are numbers, so that it can be told of every job which of them it got, in which epoch, and how often.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

from coordlfs_tools.bench.jobs import Job, Message, Node
from coordlfs_tools.bench.loader_job import CONSUMER, COORDINATED, NUMBERED, Spec
from coordlfs_tools.bench.loader_runs import LIMIT, MODULE, begun, specs_of
from coordlfs_tools.lab.processes import words
from rich import box
from rich.table import Table

_JOBS = 3
_EPOCHS = 3
_BATCHES = 60
_SPEC = Spec("", NUMBERED, samples=8 * _BATCHES, batch=8, workers=1, prep=0.01, epochs=_EPOCHS, tell=True)
_HANGING = 15.0  # seconds without a batch that are taken for ever
_SIDES = {COORDINATED: "coordlfs loader", CONSUMER: "TensorSocket"}

# What happens to a node and its jobs; gives the jobs that are expected to get everything.
_Event = Callable[[Node, Sequence[Spec], Sequence[Job]], Sequence[Job]]


def table() -> Table:
    """A line for each event, a column for each side, in words."""
    result = Table(title="what the other jobs get", title_justify="left", box=box.MARKDOWN)
    for column in ("", *_SIDES.values()):
        result.add_column(column, overflow="fold")
    for name, event in _EVENTS.items():
        result.add_row(name, *(_found(side, event) for side in _SIDES))
    return result


def _found(side: str, event: _Event) -> str:
    specs = specs_of(side, _SPEC, _JOBS)
    with begun(specs) as (here, jobs, _):
        _wait_for_batch(jobs[-1], _BATCHES // 3)
        expected = event(here, specs, jobs)
        _wait_for_ends(expected)
        return "; ".join(Counter(map(_fate, expected)))


def _nothing(_: Node, __: Sequence[Spec], jobs: Sequence[Job]) -> Sequence[Job]:
    return jobs[-_JOBS:]


def _one_killed(_: Node, __: Sequence[Spec], jobs: Sequence[Job]) -> Sequence[Job]:
    jobs[-_JOBS].kill()
    return jobs[-_JOBS + 1 :]


def _one_late(here: Node, specs: Sequence[Spec], _: Sequence[Job]) -> Sequence[Job]:
    late = here.start(MODULE, specs[-1].json())
    late.wait("ready", LIMIT)
    late.say("go")
    return [late]


def _feeder_killed(here: Node, specs: Sequence[Spec], jobs: Sequence[Job]) -> Sequence[Job]:
    if len(jobs) > _JOBS:
        jobs[0].kill()
    else:
        for pid in here.pids():
            if any("broker" in word for word in words(pid)):
                os.kill(pid, signal.SIGKILL)
    return jobs[-_JOBS:]


def _workers_killed(here: Node, _: Sequence[Spec], jobs: Sequence[Job]) -> Sequence[Job]:
    """The workers of the first job; with TensorSocket of the producer, which is the one that has them."""
    for pid in here.below(jobs[0].pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return jobs[-_JOBS:]


_EVENTS: dict[str, _Event] = {
    "nothing happens": _nothing,
    "a job is killed": _one_killed,
    "a job comes late: what it gets itself": _one_late,
    "the broker, the producer is killed": _feeder_killed,
    "the workers of a job, the producer's are killed": _workers_killed,
}


def _wait_for_batch(job: Job, number: int) -> None:
    job.wait_until(lambda said: said[number + 1] if len(said) > number + 1 else None, LIMIT, f"batch {number}")


def _wait_for_ends(jobs: Sequence[Job]) -> None:
    """Until each of the jobs is done, has ended, or seems to hang."""
    last, heard = 0, time.monotonic()
    while not all(job.messages[-1]["event"] in ("done", "ended") for job in jobs):
        if (so_far := sum(len(job.messages) for job in jobs)) != last:
            last, heard = so_far, time.monotonic()
        if time.monotonic() - heard > _HANGING:
            return
        time.sleep(0.1)


def _fate(job: Job) -> str:
    """What a job got, in words."""
    batches = [message for message in job.messages if message["event"] == "batch"]
    epochs = [Counter(_numbers(batches, epoch)) for epoch in range(_EPOCHS)]
    missing = sum(_SPEC.samples - len(epoch) for epoch in epochs)
    repeated = sum(epoch.total() - len(epoch) for epoch in epochs)
    wait = max((b["at"] - a["at"] for a, b in pairwise(batches)), default=0.0)
    end = {"done": "done", "ended": "failed"}.get(job.messages[-1]["event"], "hangs")
    if end == "done" and not missing and not repeated:
        return f"all of {_EPOCHS} epochs once, longest wait {wait:.1f} s"
    return f"{end}: {missing} of {_EPOCHS * _SPEC.samples} samples missing, {repeated} repeated"


def _numbers(batches: Sequence[Message], epoch: int) -> list[int]:
    return [number for batch in batches if batch["epoch"] == epoch for number in batch["samples"]]
