"""What a training job's speed would be if something were different: pure arithmetic on measured rates.

The model is the one of DS-Analyzer (Mohan et al., VLDB 2021, section 3.4): a pipeline is as fast as its slowest stage,
min(G, P, F), and with a share x of the dataset cached, fetching takes (1 − x) / S of a sample's bytes; what the rest
takes from memory, at the rate C, is in P, which is measured with all data cached. Two things are added, because without
them it misses measured jobs by more than it may. A worker fetches and prepares one after the other, so that few workers
do not overlap the two; and the stages share one machine. What both cost is taken from the measurements, so that at
today's point the model says what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

_BUSY = 0.9  # of the cores: the loader's workers wait for each other
_NEAR = 1.01  # times the best epoch: nobody would pay for the rest


@dataclass(frozen=True, slots=True)
class Job:
    """A measured job. Rates are what one of its `processes` on this machine (torchrun's ranks) has for itself.

    `ingestion`, `prep` and `fetch` are samples/s: with minibatches at hand; drained from warm memory; drained from cold
    storage. `storage` is bytes/s under the loader's pattern with its concurrency, `storage_most` with many readers (0:
    unknown); `latency` is how long one sample takes from storage that has nothing else to do, in seconds.
    `seconds_cold` and `seconds_warm` are for one sample, as the job runs, nothing cached and everything cached.
    `cpu_seconds` is what the loader computes for one sample. `workers` 0: the loop loads by itself.
    """

    ingestion: float
    prep: float
    fetch: float
    storage: float
    storage_most: float
    latency: float
    seconds_cold: float
    seconds_warm: float
    sample_bytes: float
    samples: int  # in one epoch
    workers: int
    cpu_seconds: float = 0.0
    cores: int = 1
    processes: int = 1

    @property
    def dataset_bytes(self) -> float:
        """What one epoch reads."""
        return self.samples * self.sample_bytes


@dataclass(frozen=True, slots=True)
class Change:
    """What is different from today. Speeds are factors; `workers` None: as it is.

    `jobs` concurrent jobs train on the same data, each with a GPU of its own, and share CPU, cache and storage;
    `coordinated`: each sample is fetched and prepared once for all of them. `nodes` train one job together, and
    read from each other's caches at `network` bytes/s if `partitioned`.
    """

    workers: int | None = None
    storage: float = 1.0
    gpu: float = 1.0
    jobs: int = 1
    coordinated: bool = False
    nodes: int = 1
    partitioned: bool = False
    network: float = 1.25e9


TODAY = Change()


@dataclass(frozen=True, slots=True)
class Prediction:
    """One epoch: its length, and how much of that is waiting for prep and for fetching (0 to 1)."""

    seconds: float
    throughput: float  # samples/s, of each job
    prep_share: float
    fetch_share: float

    @property
    def stall_share(self) -> float:
        """What of the epoch is waiting."""
        return self.prep_share + self.fetch_share


def _own(job: Job) -> float:
    """Seconds that one worker needs to prepare one sample when it does not wait for a core."""
    workers = max(job.workers, 1)
    saturated = job.cpu_seconds * job.prep * job.processes > _BUSY * job.cores
    return job.cpu_seconds if saturated else workers / job.prep


def _miss(job: Job) -> tuple[float, float]:
    """What a sample that is not cached costs: seconds that its worker waits for it, and that storage is busy with it.

    Both as measured apart, or, where the drained loader shows that it is other in the job, so that they explain that.
    """
    workers = max(job.workers, 1)
    waited = max(workers / job.fetch - _own(job), 0.0)
    latency, busy = min(job.latency, waited), min(job.sample_bytes / job.storage, 1 / job.fetch)
    found = [known for known in ((waited, latency), (1 / job.fetch, busy)) if known[1] > 0]
    scale = max(min((measured / known for measured, known in found), default=1.0), 1.0)
    return latency * scale, busy * scale


def _loader_seconds(job: Job, cached: float, change: Change) -> float:
    """Seconds for each sample that the loader delivers at best: the slowest of workers, storage and cores."""
    today = max(job.workers, 1)
    workers = today if change.workers is None else max(change.workers, 1)
    sharing = 1 if change.coordinated else change.jobs
    remote = min(cached * change.nodes, 1.0) - cached if change.partitioned else 0.0
    missed = 1 - cached - remote
    network = job.sample_bytes * remote / change.network
    latency, busy = _miss(job)
    # More readers get more out of storage that one reader waits for, up to what it gives to many.
    deeper = max(min(workers / today, job.storage_most / job.storage), 1.0) if job.storage_most else 1.0
    storage = missed * busy / change.storage / deeper
    worker = (_own(job) + missed * latency / change.storage + network) / workers
    # Where it is unknown: no faster than with a worker for each core.
    unknown = today / job.prep / max(job.cores, today)
    cores = job.cpu_seconds * job.processes / job.cores if job.cpu_seconds else unknown
    if workers == today:
        cores = min(cores, 1 / job.prep)
        worker = max(worker, 1 / job.prep)
    return max(worker, network, storage * sharing, cores * sharing)


def _overlapped(compute: float, load: float, workers: int) -> float:
    return compute + load if workers == 0 else max(compute, load)


def _interference(job: Job, cached: float) -> float:
    """How much longer a sample takes than in the slowest stage alone, since the stages share the machine."""
    warm = job.seconds_warm / _overlapped(1 / job.ingestion, _loader_seconds(job, 1.0, TODAY), job.workers)
    cold = job.seconds_cold / _overlapped(1 / job.ingestion, _loader_seconds(job, 0.0, TODAY), job.workers)
    return cached * warm + (1 - cached) * cold


def _seconds(job: Job, cached: float, change: Change) -> float:
    workers = job.workers if change.workers is None else change.workers
    alone = _overlapped(1 / job.ingestion / change.gpu, _loader_seconds(job, cached, change), workers)
    return alone * _interference(job, cached)


def predict(job: Job, cached: float, change: Change = TODAY) -> Prediction:
    """An epoch with hits for a share `cached` (0 to 1) of the bytes, on every node."""
    compute = 1 / job.ingestion / change.gpu
    warm = max(_seconds(job, 1.0, change), compute)
    total = max(_seconds(job, cached, change), warm)
    each = job.samples / change.nodes
    return Prediction(total * each, 1 / total, (warm - compute) / total, (total - warm) / total)


def enough_cache(job: Job, hits: Callable[[float], float], most: float = 1.0) -> float:
    """The smallest share of the dataset to cache, in hundredths up to `most`, that is as good as any within 1 %.

    `hits(share)` is the share of the bytes that is found then.
    """
    shares = [*(percent / 100 for percent in range(int(most * 100))), most]
    seconds = [predict(job, hits(share)).seconds for share in shares]
    return next(share for share, value in zip(shares, seconds, strict=True) if value <= min(seconds) * _NEAR)


def enough_workers(job: Job, cached: float, most: int) -> int:
    """The smallest number of workers, 1 to `most`, that is as good as any of them within 1 %."""
    seconds = [predict(job, cached, replace(TODAY, workers=n)).seconds for n in range(1, most + 1)]
    return next(n for n, value in enumerate(seconds, 1) if value <= min(seconds) * _NEAR)
