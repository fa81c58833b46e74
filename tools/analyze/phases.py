"""Measures a command: what its loader does, then round after round cold, warm and fed, then the storage."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from coordlfs_tools.analyze.hook.coordlfs_stall_hook import WATCHED, TorchSource
from coordlfs_tools.analyze.model import Job
from coordlfs_tools.analyze.runs import Ran, run
from coordlfs_tools.storage.files import File, drop, listed, resident_bytes
from coordlfs_tools.storage.measure import Rates, measure, parts, rate

from coordlfs.errors import UserError
from coordlfs.kernel.memory import memory

SCOUTED = 10  # iterations that the first, short run looks at
_SECONDS = 4.0  # that a section should take
_ITERATIONS = 10, 400  # at least and at most, unless the user says
_LARGE = 4  # samples: a file with more of them in it is read in parts
_RATIOS = 0.2  # files for each sample this near to a whole number are that number

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Scouted:
    """What the first run saw: the measured loader of rank 0, all loaders, and where and how large the data is."""

    kind: str
    workers: int
    queue: int
    batch: int
    batches: int | None  # in an epoch of one process
    samples: int | None
    seconds: float  # of one iteration
    startup: float
    ranks: int
    processes: int  # on this machine
    loaders: list[dict[str, Any]]
    versions: dict[str, str]
    directory: Path | None
    files: list[File]
    sample_bytes: float
    notes: list[str]


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
    def prep_share(self) -> list[float]:
        """What of a cold iteration is waiting for prep; of every round."""
        return [max(each.warm - each.ready, 0.0) / each.cold for each in self.rounds]

    @property
    def fetch_share(self) -> list[float]:
        """What of a cold iteration is waiting for storage; of every round."""
        return [max(each.cold - each.warm, 0.0) / each.cold for each in self.rounds]

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
        storage, alone, cache = self.storage.medians if self.storage else (float("inf"),) * 3
        per_sample = 1 / scouted.batch
        return Job(
            ingestion=self.middle("ingestion") / scouted.ranks,
            prep=self.middle("prep") / scouted.ranks,
            fetch=min(self.middle("fetch"), self.middle("prep")) / scouted.ranks,
            storage=storage / each,
            cache=cache / each,
            storage_alone=min(alone, storage),
            seconds_cold=max(self.middle("cold"), self.middle("warm")) * per_sample,
            seconds_warm=self.middle("warm") * per_sample,
            sample_bytes=scouted.sample_bytes,
            samples=self.samples // scouted.ranks,
            workers=scouted.workers,
            cpu_seconds=self.middle("cpu_seconds"),
            cores=len(os.sched_getaffinity(0)),
            processes=each,
        )


# -- the first run --------------------------------------------------------------------------------------------------


def scout(command: Sequence[str], data: Path | None, loader: int | None) -> Scouted:
    """Run the command for a few iterations. Raises UserError if there is nothing in it that could be measured."""
    data = data.resolve() if data else None
    files = listed(data) if data else []
    drop(files)
    ran = run(command, [{"name": "scout", "skip": 2, "count": SCOUTED}], data=data, loader=loader, opens=True)
    result = _measured(ran, SCOUTED + 2)
    source, section = result["source"], result["sections"]["scout"]
    batch = source["batch"] or max(round(section["samples"] / section["iterations"]), 1)
    notes = [] if result["kind"] == TorchSource.kind else [f"the loop is measured as {result['kind']}"]
    handed = sum(r["handed"] * batch for r in ran.measured)
    drawn = sum(r["source"].get("drawn") or r["handed"] * batch for r in ran.measured)
    if data is None:
        data, files = _found(ran.opened, notes)
    size = _sample_bytes(data, files, ran.opened, handed, drawn, notes)
    seconds = section["seconds"] / section["iterations"]
    return Scouted(
        kind=result["kind"],
        workers=source["workers"],
        queue=source["queue"],
        batch=batch,
        batches=source["batches"],
        samples=source["samples"],
        seconds=seconds,
        startup=max(ran.seconds - seconds * (SCOUTED + 2), 0.0),
        ranks=result["ranks"],
        processes=len(ran.measured),
        loaders=result["loaders"],
        versions={name: result[name] for name in ("torch", "gpu") if name in result},
        directory=data,
        files=files,
        sample_bytes=size,
        notes=notes,
    )


def _measured(ran: Ran, wanted: int) -> dict[str, Any]:
    """The result of the first rank whose loader was measured. Raises UserError that says why there is none."""
    if ran.measured:
        for result in ran.measured:
            if result["exhausted"]:
                raise UserError(
                    f"the dataset is smaller than a measurement needs: the loader ended after {result['handed']} "
                    f"minibatches, in the part {result['exhausted']!r}; give fewer --iterations or more data"
                )
        return ran.measured[0]
    watched = ", ".join([*WATCHED, "coordlfs_tools.analyze.analyzer"])
    if not ran.results:
        why = "" if ran.hooked else " (no Python started in it, or one with -I, -E or -S)"
        raise UserError(f"the command used no loader{why}; looked for: {watched}")
    chosen = [seen for result in ran.results for seen in result["loaders"]]
    if not any(result["measured"] for result in ran.results):
        names = ", ".join(f"{seen['number']} ({seen['dataset'] or seen['kind']})" for seen in chosen)
        raise UserError(f"no loader was used for training, with gradients: choose one with --loader: {names}")
    handed = max((result.get("handed", 0) for result in ran.results), default=0)
    raise UserError(
        f"the command ended by itself after {handed} of the {wanted} iterations that are needed: "
        "let it train longer, or give fewer --iterations"
    )


def _found(opened: Sequence[str], notes: list[str]) -> tuple[Path | None, list[File]]:
    """The directory that the files which were opened have in common."""
    directories = [os.path.dirname(path) for path in opened if os.path.isfile(path)]
    common = os.path.commonpath(directories) if directories else "/"
    if common in ("/", "/tmp", os.path.expanduser("~")):
        notes.append("where the data lies was not seen: give it with --data DIR to have storage measured")
        return None, []
    notes.append(f"the data was seen to lie in {common} (no --data was given)")
    return Path(common), listed(Path(common))


def _sample_bytes(
    data: Path | None, files: Sequence[File], opened: Sequence[str], handed: int, drawn: int, notes: list[str]
) -> float:
    """What one sample is read as; 0 if that is unknown. Raises UserError if nothing of `data` was read."""
    if data is None:
        return 0.0
    inside = {os.path.realpath(path) for path in opened}
    named = [file for file in files if file.path in inside]
    held = resident_bytes(files)
    if not named and not held:
        raise UserError(f"the command read nothing from {data}: give the directory that it trains from")
    if named and len(named) >= handed / 2:
        low, high = len(named) / max(drawn, handed), len(named) / max(handed, 1)
        whole = max(round(len(named) / max(handed, 1)), 1)
        each = whole if low - _RATIOS <= whole <= high + _RATIOS else (low + high) / 2
        return each * sum(file.size for file in named) / len(named)
    notes.append("a file has many samples in it: what was read into the page cache is taken as their size")
    return held / ((handed + drawn) / 2)


# -- rounds ---------------------------------------------------------------------------------------------------------


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


def estimate(scouted: Scouted, count: int, rounds: int) -> float:
    """About how many seconds the rounds will take."""
    return rounds * (scouted.startup + 5 * (count + _skip(scouted)) * scouted.seconds) + 12


def _sections(scouted: Scouted, count: int) -> list[list[dict[str, Any]]]:
    """The sections of each run of a round."""
    both = {"skip": _skip(scouted), "count": count}
    cold = [{"name": "cold", **both}, {"name": "cold-drain", **both, "drain": True}]
    warm = [{"name": "warm-drain", **both, "drain": True}, {"name": "warm", **both}]
    ready = {"name": "ready", "skip": 2, "count": count, "ready": True}
    if scouted.kind.startswith("analyzer.iteration"):
        return [cold[:1], warm[1:]]
    if scouted.kind in (TorchSource.kind, "analyzer.batches"):
        return [[*cold, {**warm[0], "restart": True}, warm[1], {**ready, "restart": True}]]
    return [cold, [*warm, ready]]  # it cannot be begun again: the second run finds all of the data warm


def measure_round(command: Sequence[str], scouted: Scouted, count: int, loader: int | None) -> tuple[Round, list[str]]:
    """One round, and what is to be said of it."""
    notes = []
    if scouted.files:
        dropped = drop(scouted.files)
        if dropped.cold is False:
            notes.append(f"cold runs were not cold: {dropped.how}")
        elif dropped.cold is None:
            notes.append("whether cold runs were cold cannot be seen on this file system")
    sections: list[dict[str, Any]] = []
    for number, part in enumerate(_sections(scouted, count)):
        if number and scouted.files:
            rate(parts(scouted.files), 4, 600.0)  # read all, so that it is warm
        ran = run(command, part, data=scouted.directory, loader=loader)
        _measured(ran, sum(section["skip"] + section["count"] for section in part))
        for index, result in enumerate(ran.measured):
            if index >= len(sections):
                sections.append({})
            sections[index] |= result["sections"]
    return _round(sections, scouted), notes


def _round(processes: Sequence[dict[str, Any]], scouted: Scouted) -> Round:
    def mean(name: str) -> float:
        return float(sum(p[name]["seconds"] / p[name]["iterations"] for p in processes) / len(processes))

    def rate_of(name: str) -> float:
        return float(sum(p[name]["samples"] / p[name]["seconds"] for p in processes)) * scouted.ranks / len(processes)

    if scouted.kind.startswith("analyzer.iteration"):
        # All that is known of such a loop is the time in and between its iterations.
        def between(name: str) -> float:
            return float(sum(p[name]["samples"] / max(p[name]["wait"], 1e-9) for p in processes))

        computing = sum((p["warm"]["seconds"] - p["warm"]["wait"]) / p["warm"]["iterations"] for p in processes)
        ready = computing / len(processes)
        ingestion = scouted.batch * scouted.ranks / max(ready, 1e-9)
        return Round(ingestion, between("warm"), between("cold"), mean("cold"), mean("warm"), ready, 0.0)
    drained = [p["warm-drain"] for p in processes]
    cpu = sum(d["cpu"] for d in drained) / max(sum(d["samples"] for d in drained), 1)
    return Round(
        rate_of("ready"), rate_of("warm-drain"), rate_of("cold-drain"), mean("cold"), mean("warm"), mean("ready"), cpu
    )


def measure_storage(scouted: Scouted, rounds: int) -> Rates | None:
    """S and C with the loader's pattern and concurrency; None if where the data lies is unknown."""
    if not scouted.files:
        return None
    readers = max(scouted.workers, 1) * scouted.processes
    mean = sum(file.size for file in scouted.files) / len(scouted.files)
    each = int(scouted.sample_bytes) if mean > _LARGE * scouted.sample_bytes > 0 else None
    return measure(scouted.files, readers, each=each, rounds=rounds)
