"""Measures a command round after round: cold, warm and fed; and the storage under it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from coordlfs_tools.analyze.hook.coordlfs_stall_hook.config import Section
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.loops import MARKED
from coordlfs_tools.analyze.model import Job
from coordlfs_tools.analyze.runs import Tick, run
from coordlfs_tools.analyze.scout import Scouted, check
from coordlfs_tools.storage.files import drop, resident_share
from coordlfs_tools.storage.measure import Rates, measure, parts, rate

from coordlfs.errors import UserError
from coordlfs.kernel.memory import memory

_SECONDS = 4.0  # that a section should take
_ITERATIONS = 10, 400  # at least and at most, unless the user says
_LARGE = 4  # samples: a file with more of them in it is read in parts
_ROOM = 0.5  # of the available memory that may be filled with the dataset
_WARM = 0.98  # of the dataset in memory: less is not warm
_DISTURBED = 0.05  # of what was to be warm read from a disk


@dataclass(frozen=True, slots=True)
class Round:
    """One round: samples/s of all processes together, and seconds for one iteration (the mean of the processes)."""

    ingestion: float
    prep: float
    fetch: float
    cold: float
    warm: float
    ready: float
    cpu_seconds: float  # of loading, for one sample

    @property
    def iteration(self) -> float:
        """Seconds of a cold iteration: never less than a warm one, whatever disturbed the measurement."""
        return max(self.cold, self.warm, self.ready)

    @property
    def prep_share(self) -> float:
        """What of a cold iteration is waiting for prep."""
        return max(self.warm - self.ready, 0.0) / self.iteration

    @property
    def fetch_share(self) -> float:
        """What of a cold iteration is waiting for storage."""
        return (self.iteration - max(self.warm, self.ready)) / self.iteration


@dataclass(frozen=True, slots=True)
class Measured:
    """All that was measured of a job."""

    command: list[str]
    scouted: Scouted
    iterations: int
    rounds: list[Round]
    storage: Rates | None
    notes: list[str]

    def middle(self, name: str) -> float:
        """The median of a figure of the rounds."""
        return median(self.values(name))

    def values(self, name: str) -> list[float]:
        """A figure of every round."""
        return [getattr(each, name) for each in self.rounds]

    @property
    def samples(self) -> int:
        """In one epoch, of all processes; a guess where the loader does not know."""
        known = self.scouted.samples
        size = self.scouted.sample_bytes
        if known:
            return known * self.scouted.ranks
        return max(int(sum(file.size for file in self.scouted.files) / size), 1) if size else 1

    def job(self) -> Job:
        """For the model."""
        scouted = self.scouted
        each = scouted.processes
        rates = self.storage
        per_sample = 1 / scouted.batch
        return Job(
            ingestion=self.middle("ingestion") / scouted.ranks,
            prep=self.middle("prep") / scouted.ranks,
            fetch=min(self.middle("fetch"), self.middle("prep")) / scouted.ranks,
            storage=median(rates.storage) / each if rates else float("inf"),
            storage_most=median(rates.most) / each if rates else 0.0,
            latency=median(rates.latency) * scouted.sample_bytes / rates.read_bytes if rates else 0.0,
            seconds_cold=max(self.middle("iteration"), self.middle("warm")) * per_sample,
            seconds_warm=self.middle("warm") * per_sample,
            sample_bytes=scouted.sample_bytes,
            samples=self.samples // scouted.ranks,
            workers=scouted.workers,
            cpu_seconds=self.middle("cpu_seconds"),
            cores=len(os.sched_getaffinity(0)),
            processes=each,
        )


def iterations(scouted: Scouted, asked: int | None) -> int:
    """How many iterations a section measures. Raises UserError if an epoch does not have what they need."""
    skip = _skip(scouted)
    most = scouted.batches // 2 - skip if scouted.batches else None
    if asked is not None:
        if most is not None and asked > most:
            raise UserError(
                f"the dataset is smaller than a measurement needs: an epoch has {scouted.batches} minibatches, and "
                f"--iterations {asked} takes {2 * (asked + skip)}: give at most {max(most, 0)}"
            )
        return asked
    wanted = min(max(round(_SECONDS / scouted.seconds), _ITERATIONS[0]), _ITERATIONS[1])
    if scouted.sample_bytes:
        fits = memory().available / 4 / scouted.sample_bytes / scouted.batch / scouted.processes
        wanted = min(wanted, max(int(fits) - skip, 1))
    if most is not None:
        wanted = min(wanted, most)
        if wanted < _ITERATIONS[0] / 2:
            raise UserError(
                f"the dataset is smaller than a measurement needs: an epoch has {scouted.batches} minibatches, and "
                f"at least {2 * (_ITERATIONS[0] // 2 + skip)} are needed with {scouted.workers} workers"
            )
    workers = max(scouted.workers, 1)
    return max(wanted // workers * workers, 1)


def _skip(scouted: Scouted) -> int:
    """Iterations that are left out of each section: what was prepared ahead, and the first that every worker made."""
    return scouted.queue + max(scouted.workers, 2)


def estimate(scouted: Scouted, count: int) -> float:
    """About how many seconds a round will take."""
    runs = len(_runs(scouted, count))
    return runs * scouted.startup + 5 * (count + _skip(scouted)) * scouted.seconds


def _runs(scouted: Scouted, count: int) -> list[list[Section]]:
    """The sections of each run of a round."""
    skip = _skip(scouted)
    cold, cold_drain = Section("cold", skip, count), Section("cold-drain", skip, count, drain=True)
    if scouted.kind == MARKED:
        return [[cold], [Section("warm", skip, count)]]
    if not scouted.again:  # the second run finds all of the data warm
        ready = Section("ready", 2, count, ready=True)
        return [
            [cold, cold_drain],
            [Section("warm-drain", skip, count, drain=True), Section("warm", skip, count), ready],
        ]
    warm = [Section("warm-drain", skip, count, drain=True, restart=True), Section("warm", skip, count)]
    return [[cold, cold_drain, *warm, Section("ready", 2, count, ready=True, restart=True)]]


def measure_round(
    command: Sequence[str], scouted: Scouted, count: int, loader: int | None, tick: Tick
) -> tuple[Round, list[str]]:
    """One round, and what is to be said of it."""
    notes = []
    if scouted.files:
        dropped = drop(scouted.files)
        if dropped.cold is False:
            notes.append(f"cold runs were not cold: {dropped.how}")
        elif dropped.cold is None:
            notes.append("whether cold runs were cold cannot be seen on this file system")
    processes: list[dict[str, Any]] = []
    for number, sections in enumerate(_runs(scouted, count)):
        if number and scouted.files:
            notes += _warm(scouted)
        ran = run(command, sections, data=scouted.directory, loader=loader, tick=tick)
        check(ran, sections)
        notes += [note for result in ran.measured for note in result["notes"]]
        processes = processes or [{} for _ in ran.measured]
        for known, result in zip(processes, ran.measured, strict=False):
            known |= result["sections"]
    if scouted.kind == MARKED:
        return _marked(processes, scouted), notes
    drained = [p["warm-drain"] for p in processes]
    share = sum(d["read"] for d in drained) / max(sum(d["samples"] for d in drained) * scouted.sample_bytes, 1.0)
    if share > _DISTURBED and scouted.files:
        notes.append(
            f"in a round {share:.0%} of what should have been warm was read from storage: something drops caches"
        )
    return _drained(processes, scouted), notes


def _warm(scouted: Scouted) -> list[str]:
    """Read the whole dataset into memory, as far as it fits; what is to be said of it."""
    if sum(file.size for file in scouted.files) < _ROOM * memory().available:
        rate(parts(scouted.files), 4, 600.0)
    share = resident_share(scouted.files)
    if share is None or share >= _WARM:
        return []
    return [f"warm runs were not warm: {share:.0%} of the dataset was in memory, and this loader decides what it reads"]


def _seconds(processes: Sequence[dict[str, Any]], name: str) -> float:
    """Of an iteration."""
    return float(sum(p[name]["seconds"] / p[name]["iterations"] for p in processes) / len(processes))


def _drained(processes: Sequence[dict[str, Any]], scouted: Scouted) -> Round:
    def rate_of(name: str) -> float:
        return float(sum(p[name]["samples"] / p[name]["seconds"] for p in processes)) * scouted.ranks / len(processes)

    drained = [p["warm-drain"] for p in processes]
    return Round(
        ingestion=rate_of("ready"),
        prep=rate_of("warm-drain"),
        fetch=rate_of("cold-drain"),
        cold=_seconds(processes, "cold"),
        warm=_seconds(processes, "warm"),
        ready=_seconds(processes, "ready"),
        cpu_seconds=sum(d["cpu"] for d in drained) / max(sum(d["samples"] for d in drained), 1),
    )


def _marked(processes: Sequence[dict[str, Any]], scouted: Scouted) -> Round:
    """All that is known of a loop that is only marked is the time in and between its iterations."""

    def between(name: str) -> float:
        rates = (p[name]["samples"] / max(p[name]["wait"], 1e-9) for p in processes)
        return float(sum(rates)) * scouted.ranks / len(processes)

    computing = sum((p["warm"]["seconds"] - p["warm"]["wait"]) / p["warm"]["iterations"] for p in processes)
    ready = max(computing / len(processes), 1e-9)
    return Round(
        ingestion=scouted.batch * scouted.ranks / ready,
        prep=between("warm"),
        fetch=between("cold"),
        cold=_seconds(processes, "cold"),
        warm=_seconds(processes, "warm"),
        ready=ready,
        cpu_seconds=0.0,
    )


def measure_storage(scouted: Scouted, rounds: int) -> Rates | None:
    """S and C with the loader's pattern and concurrency; None if where the data lies is unknown."""
    if not scouted.files:
        return None
    readers = max(scouted.workers, 1) * scouted.processes
    mean = sum(file.size for file in scouted.files) / len(scouted.files)
    each = max(int(scouted.sample_bytes), 1) if mean > _LARGE * scouted.sample_bytes > 0 else None
    return measure(scouted.files, readers, each=each, rounds=rounds)
