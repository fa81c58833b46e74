"""Hints: epochs of a training whose compute takes as long as fetching, with hints and without, from a slow disk.

Half of the dataset is pinned, the other half is read from the disk in every epoch. Compute is a pause for each batch,
as for a job whose accelerator computes. The best an epoch can take is the longer of the two, compute and fetching.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from statistics import median

from coordlfs_tools.bench import reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.cgroups import cgroup
from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.machine import drop_pages

_THROTTLE = 25_000_000  # bytes per second
_FILES, _QUICK_FILES = 4_000, 600
_BATCH = 64  # so that a batch takes longer than the tenth of a second in which the kernel lets a slow disk catch up
_READERS = 8
_ROUNDS = 2
_WORKERS = (0, 2)  # of the DataLoader; 0: the training process reads, and computes in turn
_LIMIT = 300.0  # seconds

_TRAINING = """
import json, sys, time
from torch.utils.data import DataLoader, Dataset, RandomSampler
from coordlfs_loader import HintedSampler
import torch
given = json.load(sys.stdin)
paths, pause = given["paths"], given["pause"]

class Files(Dataset):
    def __len__(self):
        return len(paths)
    def __getitem__(self, index):
        with open(paths[index], "rb", buffering=0) as f:
            return len(f.read())

torch.manual_seed(given["seed"])
sampler = RandomSampler(paths)
if given["hints"]:
    sampler = HintedSampler(sampler, paths)
loader = DataLoader(Files(), batch_size=given["batch"], sampler=sampler, num_workers=given["workers"])
begun, nbytes = time.perf_counter(), 0
for sizes in loader:
    nbytes += int(sizes.sum())
    time.sleep(pause)
print(json.dumps({"seconds": time.perf_counter() - begun, "bytes": nbytes}))
"""


def run(context: Context) -> list[Figure]:
    """Seconds of an epoch ÷ the longer of compute and fetching, for DataLoaders without and with workers."""
    data = context.images().part(_QUICK_FILES if context.quick else _FILES)
    rounds = context.rounds(_ROUNDS)
    with (
        cgroup(context.disk, bytes_per_second=_THROTTLE) as slow,
        mounts.coordlfs(data.root, data.allocated // 2, slow) as mount,
    ):
        reader.read(mount.point, data.paths, _READERS, 0)
        pinned = mount.settled()["pinned_bytes"]

        def fetch(seed: int) -> float:
            drop_pages()
            return reader.read(mount.point, data.paths, _READERS, seed).seconds

        fetching = median([fetch(seed) for seed in range(1, rounds + 1)])
        missing = data.allocated - pinned
        context.say(f"  {missing / 1e6:,.0f} MB are not pinned, and are read in {fetching:.2f} s")
        return [figure for workers in _WORKERS for figure in _compare(context, data, mount, fetching, missing, workers)]


def _compare(
    context: Context, data: Images, mount: mounts.Mount, fetching: float, missing: int, workers: int
) -> list[Figure]:
    read: dict[bool, list[float]] = {True: [], False: []}

    def epoch(*, hints: bool) -> Callable[[int], float]:
        def measure(seed: int) -> float:
            drop_pages()
            before = mount.status()["source"]["bytes"]
            seconds = _train(data, mount, fetching, seed, workers=workers, hints=hints)
            read[hints].append((mount.status()["source"]["bytes"] - before) / missing)
            return seconds

        return measure

    sides = {"with hints": epoch(hints=True), "without": epoch(hints=False)}
    seconds = alternate(context, context.rounds(_ROUNDS), sides)
    return [
        Figure(
            f"epoch ÷ max(compute, fetch), DataLoader with {workers} workers: {side}",
            [s / fetching for s in taken],
            Bound(1.1) if side == "with hints" else None,
            f"{median(taken):.2f} s ÷ {fetching:.2f} s; read ÷ (D − C) {median(read[side == 'with hints']):.3f}",
        )
        for side, taken in seconds.items()
    ]


def _train(data: Images, mount: mounts.Mount, compute: float, seed: int, *, workers: int, hints: bool) -> float:
    """Seconds that an epoch of a training takes whose batches together compute for `compute` seconds."""
    given = {
        "paths": [str(mount.point / path) for path in data.paths],
        "pause": compute / -(-len(data.paths) // _BATCH),
        "seed": seed,
        "batch": _BATCH,
        "workers": workers,
        "hints": hints,
    }
    done = subprocess.run(
        [sys.executable, "-c", _TRAINING], input=json.dumps(given), capture_output=True, text=True, timeout=_LIMIT
    )
    if done.returncode:
        raise LabError(f"the training failed: {done.stderr.strip()}")
    return float(json.loads(done.stdout)["seconds"])
