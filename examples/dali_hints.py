"""Tells coordlfs from NVIDIA DALI which files come next, so that they are fetched ahead of the reader (docs/hints.md).

python examples/dali_hints.py /mnt/cached/train     (pip install coordlfs nvidia-dali-cuda120; runs without a GPU too)

DALI's own file reader shuffles where nobody sees it. So the order is drawn here, and the pipeline is fed in that order.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

try:
    from nvidia.dali import fn, pipeline_def, types
except ImportError:
    sys.exit("this example needs DALI: pip install nvidia-dali-cuda120")

from coordlfs_loader.hints import Hints  # needs no torch


class Files:
    """Encoded images in a new random order every epoch, which the mount is told before they are read."""

    def __init__(self, root: Path, batch: int) -> None:
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        self.batch = batch
        self.hints = Hints.for_files(self.paths)  # None if they do not lie on a mount that takes hints
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.paths) // self.batch

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        order = random.Random(self.epoch).sample(self.paths, len(self) * self.batch)
        if self.hints:
            self.hints.begin(self.epoch, order)  # announces a window of the order, and more of it as we go on
        self.epoch += 1
        for start in range(0, len(order), self.batch):
            if self.hints:
                self.hints.advance(self.batch)  # what was read until now may be let go
            yield [np.fromfile(path, np.uint8) for path in order[start : start + self.batch]]
        if self.hints:
            self.hints.end()


@pipeline_def
def decode(files: Files, device: str):  # type: ignore[no-untyped-def]
    """Decoded, a random part of each, resized, as a network wants them."""
    # `cycle="raise"`: an epoch of `files` is an epoch of the pipeline, and the next one begins after `reset()`.
    encoded = fn.external_source(source=files, cycle="raise", dtype=types.UINT8, ndim=1)
    images = fn.decoders.image_random_crop(encoded, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize(images, size=(224, 224))
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, mirror=fn.random.coin_flip())


def main() -> None:
    """Read some epochs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="a directory of images, on a mount of coordlfs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--gpu", type=int, help="the GPU's number; without it all is done by the CPU")
    arguments = parser.parse_args()

    files = Files(arguments.root, arguments.batch)
    device = "cpu" if arguments.gpu is None else "gpu"
    pipeline = decode(files, device, batch_size=arguments.batch, num_threads=2, device_id=arguments.gpu)
    pipeline.build()
    for epoch in range(arguments.epochs):
        images = 0
        for _ in range(len(files)):
            (batch,) = pipeline.run()
            images += len(batch)  # here a network would be trained
        pipeline.reset()
        print(f"epoch {epoch}: {images} images, {'with' if files.hints else 'without'} hints")


if __name__ == "__main__":
    main()
