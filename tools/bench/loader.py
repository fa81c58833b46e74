"""The companion loader in a search that is bound by prep: jobs that share it against as many that each do their own.

One job alone shows what the loader costs where there is nothing to share, a killed one what the others notice of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

from coordlfs_tools.bench import dataset
from coordlfs_tools.bench.loader_job import COORDINATED, PHOTOS, PLAIN, Spec
from coordlfs_tools.bench.loader_runs import LIMIT, Run, run, specs_of, started
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios

_PHOTOS = 400
_BATCH = 64
_JOBS = (2, 4, 8)
_BATCHES = 64  # of an epoch of jobs that share; each of J independent ones takes the J-th part
_ROUNDS = 3
_KILLED = 4  # jobs, of which one is killed


def measure(context: Context) -> list[Figure]:
    """Samples a second of 2, 4 and 8 jobs, of one alone, and the longest wait when one of four is killed."""
    photos = dataset.photographs(context.directory, 60 if context.quick else _PHOTOS)
    spec = Spec("", PHOTOS, samples=0, batch=8 if context.quick else _BATCH, workers=1, root=str(photos))
    figures = [figure for jobs in _JOBS for figure in _prep_bound(context, spec, jobs)]
    return [*figures, _alone(context, spec), *_killed(context, spec)]


def epoch_of(spec: Spec, batches: int, *, quick: bool, least: int) -> Spec:
    """`spec` with an epoch of so many batches, of `least` in a quick run, and in no run of fewer."""
    return replace(spec, samples=spec.batch * max(least, 0 if quick else batches))


def measured(side: str, spec: Spec, jobs: int, skip: int, cpu: list[float]) -> Callable[[int], float]:
    """A side for `alternate`: samples a second summed over the jobs; the CPU seconds per sample are added to `cpu`."""

    def once(_: int) -> float:
        taken = run(specs_of(side, spec, jobs), skip)
        cpu.append(taken.cpu_per_sample())
        return taken.samples_per_second()

    return once


def milliseconds(cpu: list[float]) -> str:
    """The median of CPU seconds per sample, in words."""
    return f"{1000 * median(cpu):.2f} ms of CPU"


def _prep_bound(context: Context, spec: Spec, jobs: int) -> list[Figure]:
    skip = jobs  # a batch of each worker: then all are at work
    cpu: dict[str, list[float]] = {COORDINATED: [], PLAIN: []}
    batches = {COORDINATED: _BATCHES, PLAIN: _BATCHES // jobs}
    rates = alternate(
        context,
        context.rounds(_ROUNDS),
        {
            side: measured(
                side, epoch_of(spec, batches[side], quick=context.quick, least=3 * skip), jobs, skip, cpu[side]
            )
            for side in cpu
        },
    )
    ours, theirs = rates[COORDINATED], rates[PLAIN]
    return [
        Figure(
            f"{jobs} jobs, 1 worker each: samples/s, shared ÷ each its own",
            ratios(ours, theirs),
            Bound(0.9 * jobs, at_least=True),
            f"{median(ours):,.0f} ÷ {median(theirs):,.0f} samples/s",
        ),
        Figure(
            "… CPU seconds per delivered sample, shared ÷ each its own",
            ratios(cpu[COORDINATED], cpu[PLAIN]),
            sides=f"{milliseconds(cpu[COORDINATED])} ÷ {milliseconds(cpu[PLAIN])}",
        ),
    ]


def _alone(context: Context, spec: Spec) -> Figure:
    alone = epoch_of(replace(spec, workers=2), _BATCHES, quick=context.quick, least=6)
    cpu: dict[str, list[float]] = {COORDINATED: [], PLAIN: []}
    sides = {side: measured(side, alone, 1, 4, cpu[side]) for side in cpu}
    rates = alternate(context, context.rounds(_ROUNDS), sides)
    ours, theirs = rates[COORDINATED], rates[PLAIN]
    return Figure(
        "one job alone, 2 workers: samples/s ÷ a plain DataLoader's",
        ratios(ours, theirs),
        Bound(0.95, at_least=True),
        f"{median(ours):,.0f} ÷ {median(theirs):,.0f} samples/s, {milliseconds(cpu[COORDINATED])} ÷ "
        f"{milliseconds(cpu[PLAIN])}",
    )


def _killed(context: Context, spec: Spec) -> list[Figure]:
    shared = epoch_of(replace(spec, tell=True), _BATCHES // 2, quick=context.quick, least=3 * _KILLED)
    waits = alternate(
        context,
        context.rounds(_ROUNDS),
        {
            "one killed": lambda _: _run_with_a_kill(shared, kill=True).longest_wait(),
            "none killed": lambda _: _run_with_a_kill(shared, kill=False).longest_wait(),
        },
    )
    more = [killed - usual for killed, usual in zip(waits["one killed"], waits["none killed"], strict=True)]
    return [
        Figure(
            f"one of {_KILLED} jobs killed mid-epoch: longest wait of the others, s more than without",
            more,
            Bound(1),
            f"{median(waits['one killed']):.2f} − {median(waits['none killed']):.2f} s",
        )
    ]


def _run_with_a_kill(spec: Spec, *, kill: bool) -> Run:
    """A run in which the first of the jobs is killed in the middle of the epoch, if `kill`; what the others took."""
    middle = spec.samples // spec.batch // 2
    with started(specs_of(COORDINATED, spec, _KILLED)) as (_, (first, *others), clock):
        first.wait_until(lambda said: said[middle] if len(said) > middle else None, LIMIT, f"batch {middle}")
        if kill:
            first.kill()
        for job in others:
            job.wait("done", LIMIT)
        taken = [[message for message in job.messages if message["event"] == "batch"] for job in others]
    return Run(taken, clock, spec.batch, skip=_KILLED)
