"""Trains for a task: `python -m coordlfs_tools.tasks.train images|detection|audio DIR`. Knows nothing of coordlfs."""

from __future__ import annotations

import argparse
import json
import random
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coordlfs_tools.tasks import models
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_SIDE = {False: 96, True: 224}  # pixels of a crop; of the paper's models
_SCENE = {False: 128, True: 300}
_CLIP = 32_000  # samples of a recording that are trained on


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


class _Files(Dataset[Any]):
    """The files of a kind in a directory, in a folder for each class."""

    pattern = "*.jpg"

    def __init__(self, root: Path) -> None:
        self.paths = sorted(root.rglob(self.pattern))
        names = sorted({path.parent.name for path in self.paths})
        self.labels = [names.index(path.parent.name) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)


class Images(_Files):
    """A random crop of each, perhaps mirrored, and its class."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        share, side = random.uniform(0.3, 1) ** 0.5, _SIDE[models.of_paper()]
        width, height = image.width * share, image.height * share
        x, y = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
        crop = image.resize((side, side), Image.Resampling.BILINEAR, (x, y, x + width, y + height))
        return _pixels(crop).flip(-1) if random.random() < 0.5 else _pixels(crop), self.labels[index]


class Scenes(_Files):
    """Each, perhaps mirrored, and the boxes in it: rows of x0, y0, x1, y1 (0 to 1) and class."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, side = self.paths[index], _SCENE[models.of_paper()]
        with Image.open(path) as file:
            picture = _pixels(file.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
        boxes = torch.tensor(json.loads(path.with_suffix(".json").read_text()))
        if random.random() < 0.5:
            picture = picture.flip(-1)
            boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
        return picture, boxes


class Recordings(_Files):
    """Some seconds of each, and its class. The whole file is read, as a decoder of compressed sound would."""

    pattern = "*.wav"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with wave.open(str(self.paths[index])) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        begin = random.randrange(len(sound) - _CLIP)
        return torch.from_numpy(sound[begin : begin + _CLIP] / np.float32(32768)).unsqueeze(0), self.labels[index]


def _with_boxes(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    return torch.stack([picture for picture, _ in samples]), [boxes for _, boxes in samples]


DATASETS: dict[str, type[_Files]] = {"images": Images, "detection": Scenes, "audio": Recordings}


def main() -> None:
    """Train, and print what each epoch took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=list(DATASETS))
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # leaves the cores to the workers, which decode
    loader = DataLoader(
        DATASETS[arguments.task](arguments.data),
        arguments.batch,
        shuffle=True,
        num_workers=arguments.workers,
        collate_fn=_with_boxes if arguments.task == "detection" else None,
        drop_last=True,
    )
    model = models.make(arguments.task).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for epoch in range(1, arguments.epochs + 1):
        begin, total = time.perf_counter(), 0.0
        for inputs, targets in loader:
            moved = [boxes.to(device) for boxes in targets] if isinstance(targets, list) else targets.to(device)
            loss = model(inputs.to(device), moved)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds = time.perf_counter() - begin
        print(f"epoch {epoch}: {seconds:.2f} s, loss {total / len(loader):.3f}", flush=True)


if __name__ == "__main__":
    main()
