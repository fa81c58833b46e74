"""What would change the length of an epoch, and what to do: from the model and a simulated page cache. No I/O."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

from coordlfs_tools.analyze.model import TODAY, Change, Job, Prediction, enough_cache, enough_workers, predict
from coordlfs_tools.simulate.run import run
from coordlfs_tools.simulate.traces import random_epochs

WORTH = 0.03  # of an epoch: less than that is no gain
_ITEMS = 2000  # that the page cache is simulated with
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_COUNTS = (1, 2, 3, 4, 6, 8)
_STEPS = 20  # of the cache's size
_BESIDE_BYTES = 1.05  # times the bytes of files is what a disk tier takes for them, about
_SHARE = 0.6  # of the memory that is available may be pinned


@cache
def _simulated() -> tuple[tuple[float, float], ...]:
    trace = random_epochs(_ITEMS, 1000, 4, spread=0.0)
    shares = [step / _STEPS for step in range(_STEPS + 1)]
    return tuple((share, run(trace, "kernel", int(trace.dataset * share)).hit_rate) for share in shares)


def page_cache_hits(share: float) -> float:
    """The hits of the kernel's page cache, 0 to 1, when it has room for a share of the dataset."""
    points = _simulated()
    if share >= 1:
        return 1.0
    at = bisect_left(points, (max(share, 0.0), 0.0))
    (x0, y0), (x1, y1) = list(pairwise(points))[max(at - 1, 0)]
    return y0 + (y1 - y0) * (share - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class Curve:
    """Epochs against something that changes: one line of points (x, prediction) for each name."""

    name: str
    label: str
    today: float
    lines: dict[str, list[tuple[float, Prediction]]]


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do. `cached` is the recommended share of the dataset, and `gain` how much shorter an epoch gets by it:
    today's by the epoch that it would be. `disk_bytes` on a disk that keeps up would make it `with_disk`; 0 and the
    same epoch if that is no gain."""

    today: Prediction
    mounted: Prediction
    cached: float
    cache_bytes: int
    workers: int
    gain: float
    helps: bool
    why: str
    disk_bytes: int
    with_disk: Prediction


def today(job: Job, memory: int) -> Prediction:
    """A steady epoch as it is, with the page cache in `memory` bytes."""
    return predict(job, _hits(job, memory))


def _share(job: Job, memory: float) -> float:
    return min(memory / job.dataset_bytes, 1.0) if job.dataset_bytes else 1.0


def mounted_hits(pinned: float, share: float) -> float:
    """The hits with a share `pinned` of the dataset pinned, when memory has room for `share` of it in all.

    What is not pinned still goes through the page cache, in the memory that is left.
    """
    if pinned >= 1:
        return 1.0
    return pinned + (1 - pinned) * page_cache_hits((share - pinned) / (1 - pinned))


def _hits(job: Job, memory: float) -> float:
    return page_cache_hits(_share(job, memory))


def _changed(field: str, value: Any) -> Change:
    return replace(TODAY, **{field: value})


def curves(job: Job, memory: int) -> list[Curve]:
    """Everything that is asked: cache size, workers, storage, GPU, jobs, nodes."""
    room = _share(job, memory)
    pinned = mounted_hits(_share(job, memory * _SHARE), room)
    kernel = _hits(job, memory)
    shares = [step / _STEPS for step in range(_STEPS + 1)]

    def both(values: tuple[float, ...], field: str) -> dict[str, list[tuple[float, Prediction]]]:
        def line(cached: float) -> list[tuple[float, Prediction]]:
            kind = int if field == "workers" else float
            return [(value, predict(job, cached, _changed(field, kind(value)))) for value in values]

        return {"page cache": line(kernel), "coordlfs": line(pinned)}

    workers = tuple(float(n) for n in range(1, max(2 * job.cores, job.workers, 2) + 1))
    counts = [(float(n), n) for n in _COUNTS]
    return [
        Curve(
            "cache",
            "cache (share of the dataset)",
            _share(job, memory),
            {
                "page cache": [(x, predict(job, page_cache_hits(x))) for x in shares],
                "coordlfs": [(x, predict(job, x)) for x in shares],
            },
        ),
        Curve("workers", "workers", float(job.workers), both(workers, "workers")),
        Curve("storage", "storage speed (times today's)", 1.0, both(_FACTORS, "storage")),
        Curve("gpu", "GPU speed (times today's)", 1.0, both(_FACTORS, "gpu")),
        Curve(
            "jobs",
            "jobs on the same data at once",
            1.0,
            {
                "each prepares for itself": [(x, predict(job, pinned, Change(jobs=n))) for x, n in counts],
                "coordinated prep": [(x, predict(job, pinned, Change(jobs=n, coordinated=True))) for x, n in counts],
            },
        ),
        Curve(
            "nodes",
            "nodes that train one job",
            1.0,
            {
                "each with its own cache": [(x, predict(job, pinned, Change(nodes=n))) for x, n in counts],
                "partitioned cache": [(x, predict(job, pinned, Change(nodes=n, partitioned=True))) for x, n in counts],
            },
        ),
    ]


def advise(job: Job, memory: int) -> Advice:
    """What to do with `memory` bytes available. It never recommends to pin more than 60 % of them."""
    now = today(job, memory)
    room = _share(job, memory)
    cached = enough_cache(job, lambda share: mounted_hits(share, room), _share(job, memory * _SHARE))
    found = mounted_hits(cached, room)
    mounted = predict(job, found)
    gain = now.seconds / mounted.seconds
    workers = enough_workers(job, found, max(2 * job.cores, job.workers, 1))
    if not job.dataset_bytes:
        why = "where the data lies is unknown, and so what fetching it costs"
    elif predict(job, 0.0).fetch_share < WORTH:
        why = "it does not wait for storage even when nothing is cached"
    elif _share(job, memory) >= 1 and gain < 1 + WORTH:
        why = "the dataset fits into memory, where the page cache keeps it as well"
    elif gain < 1 + WORTH and now.fetch_share < WORTH:
        why = f"the page cache finds {_hits(job, memory):.0%} of the bytes, and the job hardly waits for the rest"
    elif gain < 1 + WORTH:
        why = "the memory that is free would hold too little of the dataset to matter"
    else:
        why = f"{found:.0%} of the bytes would be in memory, where the page cache alone finds {_hits(job, memory):.0%}"
    best = min(now, mounted, key=lambda epoch: epoch.seconds)
    on_disk = max(0.0, enough_cache(job, lambda share: share) - cached) if job.dataset_bytes else 0.0
    with_disk = predict(job, min(1.0, cached + on_disk))
    if best.seconds / with_disk.seconds < 1 + WORTH:
        on_disk, with_disk = 0.0, best
    return Advice(
        now,
        mounted,
        cached,
        int(cached * job.dataset_bytes),
        workers,
        gain,
        bool(gain >= 1 + WORTH),
        why,
        int(on_disk * job.dataset_bytes * _BESIDE_BYTES),
        with_disk,
    )
