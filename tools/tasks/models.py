"""The networks: small ones for a CPU; the paper's where there is a GPU, and torchvision, which has them.

Each is a module that takes a minibatch, with its targets, and gives the loss.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from coordlfs_tools.tasks.data import CLASSES
from torch import Tensor, nn
from torch.nn import functional as F

GRID = 8  # cells along a side of a picture in which the small detector looks for an object


def _convolutions(*channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class Classifier(nn.Module):
    """Any network that gives a score for each class."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.network(inputs), labels)


def _small_images() -> nn.Module:
    return nn.Sequential(_convolutions(3, 16, 32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def _m5(channels: int) -> nn.Module:
    """M5 of the paper "Very Deep Convolutional Neural Networks for Raw Waveforms" (Dai et al., ICASSP 2017)."""
    layers: list[nn.Module] = []
    sizes = ((1, channels, 80, 4), (channels, channels, 3, 1), (channels, 2 * channels, 3, 1))
    for inputs, outputs, kernel, stride in (*sizes, (2 * channels, 4 * channels, 3, 1)):
        layers += [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4 * channels, CLASSES))


class SmallDetector(nn.Module):
    """In each cell of a grid: whether an object's centre is in it, which class, and where its box is."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(_convolutions(3, 16, 32, 64, 64), nn.Conv2d(64, 1 + 4 + CLASSES, 1))

    def forward(self, pictures: Tensor, boxes: list[Tensor]) -> Tensor:
        """`boxes`: for each picture rows of x0, y0, x1, y1 (0 to 1) and class."""
        found = F.adaptive_avg_pool2d(self.network(pictures), GRID)
        there = torch.zeros_like(found[:, 0])
        loss = found.new_zeros(())
        for at, rows in enumerate(boxes):
            cells = ((rows[:, :2] + rows[:, 2:4]) / 2 * GRID).long().clamp(0, GRID - 1)
            there[at, cells[:, 1], cells[:, 0]] = 1
            seen = found[at, 1:, cells[:, 1], cells[:, 0]].T
            loss = (
                loss + F.l1_loss(seen[:, :4].sigmoid(), rows[:, :4]) + F.cross_entropy(seen[:, 4:], rows[:, 4].long())
            )
        return F.binary_cross_entropy_with_logits(found[:, 0], there) + loss / len(boxes)


class PaperDetector(nn.Module):
    """torchvision's SSD, given the same as the small one."""

    def __init__(self) -> None:
        super().__init__()
        detection: Any = import_module("torchvision.models.detection")
        self.network = detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES + 1)

    def forward(self, pictures: Tensor, boxes: list[Tensor]) -> Tensor:
        """The sum of SSD's losses."""
        scale = pictures.new_tensor([pictures.shape[3], pictures.shape[2]] * 2)
        targets = [{"boxes": rows[:, :4] * scale, "labels": rows[:, 4].long() + 1} for rows in boxes]
        losses: Any = self.network(list(pictures), targets)
        return sum(losses.values(), pictures.new_zeros(()))


def of_paper() -> bool:
    """Whether this machine runs the paper's models."""
    return torch.cuda.is_available() and find_spec("torchvision") is not None


def make(task: str) -> nn.Module:
    """The network for a task."""
    if not of_paper():
        return SmallDetector() if task == "detection" else Classifier(_small_images() if task == "images" else _m5(16))
    if task == "images":
        vision: Any = import_module("torchvision.models")
        return Classifier(vision.resnet18(num_classes=CLASSES))
    return PaperDetector() if task == "detection" else Classifier(_m5(128))
