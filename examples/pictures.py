"""What the examples train: a small network that tells how many stripes a picture has. Knows nothing of coordlfs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

STRIPES = (2, 4, 7, 11)  # a class each
_SIDE, _PART = 64, 48  # pixels of a picture, and of the part of it that is trained on


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures that are drawn when they are wanted, which takes as long as reading and decoding small ones."""

    def __init__(self, count: int, first: int = 0) -> None:
        self._count, self._first = count, first

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        kind = index % len(STRIPES)
        picture = _draw(STRIPES[kind], np.random.default_rng(self._first + index))
        # The augmentation: like every use of `random`, `numpy.random` and `torch` in here, it is the same for whoever
        # prepares the sample, and another in every epoch. CoordinatedLoader sees to that.
        top, left = random.randrange(_SIDE - _PART), random.randrange(_SIDE - _PART)
        part = picture[top : top + _PART, left : left + _PART]
        if random.random() < 0.5:
            part = part[:, ::-1]
        return torch.from_numpy(part[None].astype(np.float32)), kind


def _draw(stripes: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:_SIDE, 0:_SIDE] / _SIDE
    angle, phase = rng.uniform(0, 2 * math.pi, 2)
    waves: np.ndarray = np.sin(2 * math.pi * stripes * (x * math.cos(angle) + y * math.sin(angle)) + phase)
    return waves + rng.normal(0, 0.7, waves.shape)


def network() -> nn.Module:
    """Three convolutions and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 5, stride=2, padding=2), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, len(STRIPES)))


def train(loader: Iterable[tuple[Tensor, Tensor]], rate: float, epochs: int) -> Iterator[float]:
    """Train a new network with the learning rate `rate`; the accuracy on unseen pictures, after each epoch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the cores are for the other trials, and for the workers
    unseen = list(DataLoader(Pictures(200, first=1_000_000), 100))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(epochs):
        model.train()
        for pictures, kinds in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pictures), kinds).backward()
            optimizer.step()
        yield accuracy(model, unseen)


def accuracy(model: nn.Module, unseen: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of pictures whose stripes are counted rightly."""
    model.eval()
    with torch.no_grad():
        right = [(model(pictures).argmax(1) == kinds).float().mean().item() for pictures, kinds in unseen]
    return sum(right) / len(right)
