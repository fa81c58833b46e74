"""Handing batches over, prep costing nothing: the companion loader's bandwidth against one memcpy, and its latency."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
from coordlfs_tools.bench.loader_job import COORDINATED, PLAIN, PREBUILT, STAMPED, Spec
from coordlfs_tools.bench.loader_runs import run, specs_of
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios

_ROUNDS = 5
_JOBS = 4
_LARGE = 64 * 3 * 224 * 224 * 4  # bytes: 38 MB
_SMALL = 1_000_000
_SKIP = 16
_COPIES = 20


def measure(context: Context) -> list[Figure]:
    """Bandwidth with 4 jobs; what a small batch costs in a stream, and how late it comes when it is waited for."""
    return [_bandwidth(context), *(_per_batch(context, jobs) for jobs in (1, _JOBS)), _latency(context)]


def _spec(context: Context, nbytes: int, batches: int, work: str = PREBUILT) -> Spec:
    samples = 3 * _SKIP if context.quick else batches
    return Spec("", work, samples=samples, batch=1, workers=1, batch_bytes=nbytes)


def _memcpy() -> float:
    """Bytes a second that one thread copies from one large batch to another, the median of several."""
    source, target = np.ones(_LARGE, np.uint8), np.zeros(_LARGE, np.uint8)
    seconds = []
    for _ in range(_COPIES):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return _LARGE / median(seconds)


def _bandwidth(context: Context) -> Figure:
    spec = _spec(context, _LARGE, 400)
    rates = alternate(
        context,
        context.rounds(_ROUNDS),
        {
            "loader": lambda _: _LARGE * min(run(specs_of(COORDINATED, spec, _JOBS), _SKIP).batches_per_second()),
            "memcpy": lambda _: _memcpy(),
        },
    )
    ours, theirs = rates["loader"], rates["memcpy"]
    return Figure(
        f"{_JOBS} jobs, batches of 38 MB: bytes/s of the slowest job ÷ one memcpy's",
        ratios(ours, theirs),
        Bound(0.5, at_least=True),
        f"{median(ours) / 1e9:.1f} ÷ {median(theirs) / 1e9:.1f} GB/s",
    )


def _both(context: Context, measured: Callable[[str], float]) -> dict[str, list[float]]:
    sides = {COORDINATED: lambda _: measured(COORDINATED), PLAIN: lambda _: measured(PLAIN)}
    return alternate(context, context.rounds(_ROUNDS), sides)


def _per_batch(context: Context, jobs: int) -> Figure:
    spec = _spec(context, _SMALL, 2000)

    def each(side: str) -> float:
        return 1000 / min(run(specs_of(side, spec, jobs), _SKIP).batches_per_second())

    times = _both(context, each)
    return Figure(
        f"{jobs} job{'s' if jobs > 1 else ''}, batches of 1 MB in a stream: ms a batch, of the slowest job",
        times[COORDINATED],
        Bound(0.5),
        f"{median(times[COORDINATED]):.2f}; a plain DataLoader each: {median(times[PLAIN]):.2f}",
    )


def _latency(context: Context) -> Figure:
    spec = _spec(context, _SMALL, 200, STAMPED)

    def late(side: str) -> float:
        taken = run(specs_of(side, spec, _JOBS), _SKIP).taken
        lates: list[float] = [batch["late"] for job in taken for batch in job[_SKIP:]]
        return 1000 * median(lates)

    times = _both(context, late)
    return Figure(
        f"{_JOBS} jobs that wait for batches of 1 MB: ms from prepared to received, the median",
        times[COORDINATED],
        Bound(0.5),
        f"{median(times[COORDINATED]):.2f}; a plain DataLoader each: {median(times[PLAIN]):.2f}",
    )
