"""One training job of the loader's benchmarks, a process: `python -m coordlfs_tools.bench.loader_job SPEC`.

SPEC is a `Spec` as JSON. The process says that it is ready, waits for a line, and then takes every batch of its loader
as soon as it can. What it prints are JSON objects, each with an `event`. It ends when its standard input does.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

SIZE = 224  # pixels, of a crop's side
_SCALE = (0.08, 1.0)  # of the picture's area
_RATIO = (3 / 4, 4 / 3)
_STAMPED = 0.01  # seconds that a stamped batch takes to be made

PLAIN, COORDINATED, CONSUMER, PRODUCER = "plain", "coordinated", "consumer", "producer"
PHOTOS, PREBUILT, STAMPED, NUMBERED = "photos", "prebuilt", "stamped", "numbered"


@dataclass(frozen=True, slots=True)
class Spec:
    """What a job is.

    `side`: its loader; PLAIN is torch's, CONSUMER and PRODUCER are TensorSocket's. `work`: its samples; photographs, a
    batch of `batch_bytes` that is made once, the same with the time at which it was ready, or the sample's number.
    """

    side: str
    work: str
    samples: int
    batch: int
    workers: int
    epochs: int = 1
    root: str = ""  # of the photographs
    batch_bytes: int = 0
    prep: float = 0.0  # seconds a numbered sample takes
    step: float = 0.0  # seconds the job spends on a batch
    group: str = ""
    stage_bytes: int = 0
    ports: tuple[int, ...] = ()
    consumers: int = 0  # that a producer waits for before it begins
    tell: bool = False  # every batch as it comes, and not all in the end

    def json(self) -> dict[str, Any]:
        """As the process is told."""
        return asdict(self)


class Photos:
    """JPEG files, decoded, a random part resized, perhaps mirrored, as 3 × SIZE × SIZE floats."""

    def __init__(self, root: str, samples: int) -> None:
        self._files = sorted(str(path) for path in Path(root).rglob("*.jpg"))
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import numpy as np
        import torch
        from PIL import Image

        with Image.open(self._files[index % len(self._files)]) as file:
            image = file.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, _crop(file.width, file.height))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.array(image, np.float32).transpose(2, 0, 1) / 255
        return torch.from_numpy(np.ascontiguousarray(pixels)), index


def _crop(width: int, height: int) -> tuple[float, float, float, float]:
    area = width * height * random.uniform(*_SCALE)
    ratio = random.uniform(*_RATIO)
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    x, y = random.uniform(0, width - w), random.uniform(0, height - h)
    return x, y, x + w, y + h


class Prebuilt:
    """Samples that are whole batches, made before, so that prep costs nothing; stamped, they take a while."""

    def __init__(self, samples: int, nbytes: int, *, stamped: bool) -> None:
        import torch

        self._samples, self._stamped = samples, stamped
        self._tensor = torch.ones(nbytes // 8, dtype=torch.float64)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Any:
        if self._stamped:
            time.sleep(_STAMPED)
            self._tensor[0] = time.monotonic()
        return self._tensor


class Numbered:
    """Samples that are their own number, and take a while."""

    def __init__(self, samples: int, prep: float) -> None:
        self._samples, self._prep = samples, prep

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[int]:
        time.sleep(self._prep)
        return (index,)  # TensorSocket wants tuples


def _only(samples: list[Any]) -> Any:
    return samples[0]


def _dataset(spec: Spec) -> Any:
    if spec.work == PHOTOS:
        return Photos(spec.root, spec.samples)
    if spec.work == NUMBERED:
        return Numbered(spec.samples, spec.prep)
    return Prebuilt(spec.samples, spec.batch_bytes, stamped=spec.work == STAMPED)


def _loader(spec: Spec) -> Any:
    import torch
    from torch.utils.data import DataLoader

    # Torch's own makes a batch in shared memory, without which a worker would hand the same over again and again.
    collate = _only if spec.work in (PREBUILT, STAMPED) and spec.side == COORDINATED else None
    if spec.side == CONSUMER:
        return _consumer(spec)
    if spec.side == COORDINATED:
        loader = importlib.import_module("coordlfs_loader").CoordinatedLoader
        options = {"stage_bytes": spec.stage_bytes} if spec.stage_bytes else {}
        return loader(
            _dataset(spec),
            batch_size=spec.batch,
            group=spec.group,
            num_workers=spec.workers,
            shuffle=True,
            seed=0,
            collate_fn=collate,
            **options,
        )
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        _dataset(spec), spec.batch, shuffle=True, num_workers=spec.workers, collate_fn=collate, generator=generator
    )


def _consumer(spec: Spec) -> Any:
    data, acknowledgements, *hearts = spec.ports
    consumer = importlib.import_module("tensorsocket").TensorConsumer
    return consumer(data, acknowledgements, tuple(hearts), batch_size=spec.batch)


def _produce(spec: Spec) -> None:
    """Feed the consumers until we are killed, from when the first of them are there."""
    data, acknowledgements, *hearts = spec.ports
    producer = importlib.import_module("tensorsocket").TensorProducer(
        _loader(replace(spec, side=PLAIN)),
        data,
        acknowledgements,
        tuple(hearts),
        # With 1 it sends its first batch for ever; with 8, the default, ten times eight batches are held in memory.
        producer_batch_size=2,
    )
    while len(producer.hb.consumers) < spec.consumers:
        time.sleep(0.02)
    time.sleep(1)  # what is said before a consumer's subscription is through is lost to it
    while True:
        for _ in producer:
            pass


def _take(spec: Spec) -> Iterator[dict[str, Any]]:
    """Every batch of every epoch: when it came, in `time.monotonic`'s seconds, and what is known of it."""
    loader = _loader(spec)
    for epoch in range(spec.epochs):
        for batch in loader:
            now = time.monotonic()
            taken: dict[str, Any] = {"epoch": epoch, "at": now}
            if spec.work == STAMPED:
                taken["late"] = now - float(batch.flatten()[0])
            elif spec.work == NUMBERED:
                taken["samples"] = batch[0].tolist()
            yield taken
            if spec.step:
                time.sleep(spec.step)


def _say(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


def _end_with_stdin() -> None:
    # Not through sys.stdin: its lock would be held in forked workers, which close it.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Be the job."""
    import torch

    spec = Spec(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)  # cores are for the workers
    if spec.side == COORDINATED:
        importlib.import_module("coordlfs_loader")
    _say("ready")
    if not os.read(0, 1):
        return
    Thread(target=_end_with_stdin, daemon=True).start()
    if spec.side == PRODUCER:
        _produce(spec)
    taken: list[dict[str, Any]] = []
    for each in _take(spec):
        if not taken:
            _say("first")
        if spec.tell:
            _say("batch", **each)
        taken.append(each)
    _say("done", taken=taken)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
