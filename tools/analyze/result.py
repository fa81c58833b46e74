"""What an analysis found, as one plain object: `--json` writes it, the table and the report are made from it."""

from __future__ import annotations

import math
import os
import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from coordlfs_tools.analyze import whatif
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.sources import Dali
from coordlfs_tools.analyze.model import Prediction
from coordlfs_tools.analyze.rounds import Measured
from coordlfs_tools.analyze.words import duration
from coordlfs_tools.storage.measure import device_of, mounted_on

from coordlfs.commands.choice import fits_pin
from coordlfs.kernel.memory import memory
from coordlfs.sizes import text
from coordlfs.sources.directory import lies_elsewhere

VERSION = 1


def result(measured: Measured) -> dict[str, Any]:
    """All figures; docs/analyser.md says what they mean."""
    available = memory()
    scouted = measured.scouted
    job = measured.job()
    advice = whatif.advise(job, available.available)
    disk_bytes = advice.disk_bytes if _is_far(scouted.directory) else 0
    storage = measured.storage
    spread: dict[str, Sequence[float]] = {
        "ingestion": measured.values("ingestion"),
        "prep": measured.values("prep"),
        "fetch": measured.values("fetch"),
        "storage": storage.storage if storage else [],
        "storage_most": storage.most if storage else [],
        "storage_latency": storage.latency if storage else [],
        "cache": storage.cache if storage else [],
    }
    shares = {name: measured.values(name) for name in ("prep_share", "fetch_share")}
    cold = measured.middle("iteration")
    prep, fetch = (median(values) for values in shares.values())
    return {
        "version": VERSION,
        "command": shlex.join(measured.command),
        "time": time.strftime("%Y-%m-%d %H:%M %Z"),
        "rates": {name: _number(median(values)) if values else None for name, values in spread.items()},
        "stalls": {
            "prep_share": prep,
            "fetch_share": fetch,
            "compute_share": max(1 - prep - fetch, 0.0),
            "prep_seconds": prep * cold,
            "fetch_seconds": fetch * cold,
            "compute_seconds": max(1 - prep - fetch, 0.0) * cold,
            "iteration_seconds": cold,
        },
        "spread": {name: [min(v), max(v)] if v else None for name, v in (spread | shares).items()},
        "rounds": {name: list(values) for name, values in (spread | shares).items()},
        "iterations": measured.iterations,
        "job": {
            "kind": scouted.kind,
            "workers": scouted.workers,
            "batch": scouted.batch,
            "processes": scouted.processes,
            "ranks": scouted.ranks,
            "loaders": scouted.loaders,
            "samples": measured.samples,
            "sample_bytes": scouted.sample_bytes,
            "dataset_bytes": measured.samples * scouted.sample_bytes,
            "cpu_seconds_per_sample": job.cpu_seconds,
            "data": str(scouted.directory) if scouted.directory else None,
        },
        "model": {name: _number(value) for name, value in asdict(job).items()},
        "what_if": {
            curve.name: {
                "label": threads(scouted.kind) if curve.name == "workers" else curve.label,
                "today": curve.today,
                "lines": {name: [_point(x, p) for x, p in points] for name, points in curve.lines.items()},
            }
            for curve in whatif.curves(job, available.available)
        },
        "today": _prediction(advice.today),
        "advice": {
            "helps": advice.helps,
            "why": advice.why,
            "gain": advice.gain,
            "cached_share": advice.cached,
            "cache_bytes": advice.cache_bytes,
            "workers": advice.workers,
            "epoch": _prediction(advice.mounted),
            "disk_bytes": disk_bytes,
            "epoch_with_disk": _prediction(advice.with_disk),
            "mount": mount_line(scouted.directory, advice.cache_bytes) if advice.helps else None,
            "pin": pin_line(scouted.directory, advice.cache_bytes) if advice.helps else None,
        },
        "verdict": verdict(prep, fetch, advice, job.workers, threads(scouted.kind), disk_bytes),
        "machine": {
            "cpu": _cpu(),
            "cores": job.cores,
            "memory": available.total,
            "available": available.available,
            "kernel": platform.release(),
            "storage": device_of(scouted.directory) if scouted.directory else None,
            "python": platform.python_version(),
            **scouted.versions,
        },
        "notes": list(dict.fromkeys([*scouted.notes, *measured.notes, *(storage.notes if storage else [])])),
    }


def _is_far(directory: Path | None) -> bool:
    """Whether the data lie on no local disk, so that one may be faster."""
    if directory is None:
        return False
    fd = os.open(directory, os.O_RDONLY)
    try:
        return lies_elsewhere(fd)
    finally:
        os.close(fd)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _prediction(prediction: Prediction) -> dict[str, float]:
    return {
        "seconds": prediction.seconds,
        "throughput": prediction.throughput,
        "prep_share": prediction.prep_share,
        "fetch_share": prediction.fetch_share,
    }


def _point(x: float, prediction: Prediction) -> dict[str, float]:
    return {"x": x, **_prediction(prediction)}


def mount_line(directory: Path | None, cache_bytes: int) -> str:
    """The command that mounts the data in place with such a cache."""
    place = shlex.quote(str(directory))
    return f"coordlfs mount {place} {place} --cache-size {_mebibytes(cache_bytes)}"


def pin_line(directory: Path | None, cache_bytes: int) -> str | None:
    """The command that keeps as much of the data in memory without a mount; None where that does not fit."""
    if directory is None or not fits_pin(mounted_on(directory)[0].encode()):
        return None
    return f"coordlfs pin {shlex.quote(str(directory))} --cache-size {_mebibytes(cache_bytes)}"


def _mebibytes(nbytes: int) -> str:
    return f"{max(math.ceil(nbytes / 2**20), 1)}M"


def threads(kind: str) -> str:
    """What the program calls that which prepares its data."""
    return "num_threads" if kind == Dali.KIND else "workers"


def verdict(
    prep: float, fetch: float, advice: whatif.Advice, workers: int, name: str = "workers", disk_bytes: int = 0
) -> list[str]:
    """What to make of it, in a few sentences; the first is the most important."""
    if prep + fetch < 0.05:
        first = f"This job hardly waits for data: {prep + fetch:.0%} of a cold epoch. It computes."
    elif fetch >= prep:
        first = f"This job waits for storage: {fetch:.0%} of a cold epoch is fetching, {prep:.0%} preparing data."
    else:
        first = f"This job waits for its data to be prepared: {prep:.0%} of a cold epoch, {fetch:.0%} for storage."
    sentences = [first]
    if advice.helps:
        sentences.append(
            f"With {text(advice.cache_bytes)} of cache coordlfs would make a steady epoch {advice.gain:.2f} times as "
            f"fast: {duration(advice.today.seconds)} today, {duration(advice.mounted.seconds)} then; {advice.why}."
        )
    else:
        sentences.append(f"coordlfs would not help: {advice.why}.")
    if disk_bytes:
        sentences.append(
            f"With {text(disk_bytes)} of a local disk beside {text(advice.cache_bytes)} of memory (--disk-cache), a "
            f"steady epoch would take {duration(advice.with_disk.seconds)}, if that disk keeps up."
        )
    if prep >= 0.05:
        if advice.workers != max(workers, 1) or workers == 0:
            best = f"{advice.workers} workers" if name == "workers" else f"{name}={advice.workers}"
            sentences.append(f"Preparing goes best with {best} (now {workers}).")
        else:
            more = "More workers" if name == "workers" else f"A larger {name}"
            sentences.append(f"{more} would not prepare faster on this machine: it takes more or faster cores.")
    return sentences


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine
