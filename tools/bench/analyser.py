"""The stall analyser: what it measures of jobs whose truth is known, and what it predicts against epochs on a mount."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from coordlfs_tools.analyze import runs as analyse
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.config import Section
from coordlfs_tools.analyze.model import TODAY, Change, Job, predict
from coordlfs_tools.bench import dataset
from coordlfs_tools.bench.report import Bound, Context, Figure
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.cgroups import Cgroup, cgroup
from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.machine import drop_caches
from coordlfs_tools.storage.files import drop, listed

_BATCH = 16
_FILE = 102_400  # bytes
_FILES = 2400
_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
_EPOCH = re.compile(r"epoch \d+: ([\d.]+) s")
_LIMIT = 600.0


@dataclass(frozen=True, slots=True)
class _Case:
    """A job: milliseconds to prepare a sample and for a step, workers, and the disk's bytes a second."""

    prep: float
    step: float
    workers: int
    disk: int

    def command(self, directory: Path, *, epochs: int = 1) -> list[str]:
        return [
            *(sys.executable, "-m", "coordlfs_tools.analyze.synthetic", str(directory), f"--batch={_BATCH}"),
            *(f"--prep={self.prep}", f"--step={self.step}", f"--workers={self.workers}", f"--epochs={epochs}"),
        ]

    def truth(self) -> dict[str, float]:
        """Rates and shares, of a disk so slow that its workers wait for it and nothing else."""
        step = self.step / 1000
        warm = max(step, self.prep / 1000 * _BATCH / self.workers)
        cold = max(warm, _BATCH * _FILE / self.disk)
        return {
            "ingestion": _BATCH / step,
            "prep": self.workers / (self.prep / 1000),
            "storage": float(self.disk),
            "prep_share": (warm - step) / cold,
            "fetch_share": (cold - warm) / cold,
        }


_CASES = (
    _Case(prep=6, step=60, workers=2, disk=10_000_000),
    _Case(prep=10, step=40, workers=2, disk=10_000_000),
)
_PREDICTED = _Case(prep=2, step=30, workers=2, disk=20_000_000)


def run(context: Context) -> list[Figure]:
    """What the hook costs, and how far rates and shares are off."""
    data = dataset.equal(context.directory, _FILES, _FILE)
    return [*_hook_costs(context), *(figure for case in _CASES for figure in _against_truth(context, case, data))]


def predictions(context: Context) -> list[Figure]:
    """How far predicted epochs are off."""
    return list(_against_mounts(context, _PREDICTED, dataset.equal(context.directory, _FILES, _FILE)))


# An epoch of nothing but iterations, and what one takes.
_EMPTY = """
import time
from torch.utils.data import DataLoader
for epoch in range(2):
    begin = time.perf_counter()
    for _ in DataLoader(range({count}), batch_size=None):
        pass
print((time.perf_counter() - begin) / {count})
"""
_ITERATIONS = 50_000


def _hook_costs(context: Context) -> list[Figure]:
    """Microseconds that the hook adds to an iteration, of a loader that is only timed and of one that is measured."""
    command = [sys.executable, "-c", _EMPTY.format(count=_ITERATIONS)]
    section = Section("cold", skip=100, count=_ITERATIONS - 200)

    def seconds(hooked: bool) -> float:
        with tempfile.TemporaryDirectory(prefix="coordlfs-bench-") as directory:
            path = f"{directory}/out"
            if hooked:
                analyse.run(["sh", "-c", f'"$@" >{path}', "sh", *command])
                return float(Path(path).read_text())
        return float(subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=True).stdout)

    def fed() -> float:
        found = analyse.run(command, [section]).measured[0]["sections"]["cold"]
        return float(found["seconds"]) / int(found["iterations"])

    bare, timed, measured = [], [], []
    for _ in range(context.rounds(3)):
        bare.append(seconds(False))
        timed.append(1e6 * (seconds(True) - bare[-1]))
        measured.append(1e6 * (fed() - bare[-1]))
    sides = f"an iteration without it: {1e6 * median(bare):.1f}"
    return [
        Figure("the hook's cost of an iteration, timed: µs", timed, Bound(20), sides),
        Figure("the hook's cost of an iteration, measured: µs", measured, Bound(20), sides),
    ]


def _analyse(context: Context, case: _Case, data: Path, group: Cgroup) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="coordlfs-bench-") as directory:
        out = f"{directory}/out.json"
        command = [mounts.COORDLFS, "analyze"]
        command += [f"--data={data}", f"--json={out}", f"--rounds={context.rounds(3)}", "--", *case.command(data)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, preexec_fn=group.enter)
        if done.returncode:
            raise LabError(done.stderr.strip())
        found: dict[str, Any] = json.loads(Path(out).read_text())
        return found


def _against_truth(context: Context, case: _Case, data: Path) -> Iterator[Figure]:
    with cgroup(context.disk, bytes_per_second=case.disk) as group:
        found = _analyse(context, case, data, group)
    name = f"prep {case.prep:g} ms, step {case.step:g} ms, disk {case.disk / 1e6:g} MB/s"
    for key, true in case.truth().items():
        if key.endswith("_share"):
            values = [100 * abs(value - true) for value in found["rounds"][key]]
            sides = f"{found['stalls'][key]:.1%}, truly {true:.1%}"
            off = 100 * abs(found["stalls"][key] - true)
            yield Figure(f"{name}: {key}, points off", [off], Bound(2), sides + f"; each round {_words(values)}")
        else:
            value = found["rates"][key]
            yield Figure(
                f"{name}: {key}, % off", [100 * abs(value / true - 1)], Bound(3), f"{value:,.0f}, truly {true:,.0f}"
            )


def _words(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def _against_mounts(context: Context, case: _Case, data: Path) -> Iterator[Figure]:
    with cgroup(context.disk, bytes_per_second=case.disk) as group:
        job = Job(**_analyse(context, case, data, group)["model"])
        for share in _SHARES:
            predicted = predict(job, share).seconds
            yield _compared(f"epoch with {share:.0%} cached", predicted, _real(context, case, data, share, group), 5)
        for workers in (1, 2):
            other = _Case(case.prep, case.step, workers, case.disk)
            predicted = predict(job, 0.4, Change(workers=workers) if workers != job.workers else TODAY).seconds
            real = _real(context, other, data, 0.4, group)
            yield _compared(f"epoch with 40% cached, {workers} workers", predicted, real, 10)


def _compared(name: str, predicted: float, real: list[float], bound: float) -> Figure:
    sides = f"predicted {predicted:.2f} s, real {median(real):.2f} s"
    return Figure(f"{name}: prediction, % off", [100 * abs(predicted / median(real) - 1)], Bound(bound), sides)


def _real(context: Context, case: _Case, data: Path, share: float, group: Cgroup) -> list[float]:
    """The steady epochs of the job on a mount that caches a share of the data."""
    drop_caches()
    room = int(share * _FILES) * _FILE if share < 1 else _FILES * _FILE + (1 << 20)
    with mounts.coordlfs(data, room, group) as mount:
        mount.warm()
        seconds = []
        for _ in range(context.rounds(3)):
            # This machine's memory would hold all that was read; what is pinned stays, and nothing else.
            drop(listed(mount.point))
            done = subprocess.run(case.command(mount.point), capture_output=True, text=True, timeout=_LIMIT)
            if done.returncode:
                raise LabError(done.stderr.strip())
            seconds += [float(epoch) for epoch in _EPOCH.findall(done.stdout)]
        context.say(f"  {share:.0%}, {case.workers} workers: {_words(seconds)} s")
        return seconds
