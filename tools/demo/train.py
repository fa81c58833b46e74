"""Trains a small convolutional network on a directory of images, one folder a class. Knows nothing of coordlfs.

python train.py DATA [--epochs 3] [--workers 2]
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

SIZE = 64  # pixels, of a crop's side
BATCH = 64


class Images(Dataset[tuple[Tensor, int]]):
    """Image files in folders, a random crop of each, perhaps mirrored."""

    def __init__(self, root: Path) -> None:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        self.classes = len(folders)
        self.files = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        with Image.open(path) as file:
            image = random_crop(file.convert("RGB"))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255), label


def random_crop(image: Image.Image) -> Image.Image:
    """A random part of the image, of 20 to 100 % of its area, resized to `SIZE`."""
    area = image.width * image.height * random.uniform(0.2, 1)
    ratio = random.uniform(3 / 4, 4 / 3)
    width, height = min(image.width, (area * ratio) ** 0.5), min(image.height, (area / ratio) ** 0.5)
    x, y = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (x, y, x + width, y + height))


def network(classes: int) -> nn.Module:
    """Three convolutions and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


def main() -> None:
    """Train, and print what each epoch took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # leaves the cores to the workers, which decode
    dataset = Images(arguments.data)
    print(f"{len(dataset)} images of {dataset.classes} classes", flush=True)
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=arguments.workers)
    model = network(dataset.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(1, arguments.epochs + 1):
        start, total = time.perf_counter(), 0.0
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        seconds = time.perf_counter() - start
        speed = len(dataset) / seconds
        print(f"epoch {epoch}: {seconds:.2f} s, {speed:.0f} images/s, loss {total / len(dataset):.3f}", flush=True)


if __name__ == "__main__":
    main()
