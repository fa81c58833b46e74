"""A training job whose truth is known: `python -m coordlfs_tools.analyze.synthetic DIR`. Needs torch.

Loading a sample reads one file of DIR and sleeps for --prep milliseconds; a step sleeps for --step milliseconds.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

_SPIN = 0.0003  # seconds by which a sleep may be late


def pause(seconds: float) -> None:
    """Sleep, and for the last moments look at the clock: a sleep alone is late by what would be percents."""
    end = time.perf_counter() + seconds
    if seconds > _SPIN:
        time.sleep(seconds - _SPIN)
    while time.perf_counter() < end:
        pass


class Files(Dataset[torch.Tensor]):
    """The files of a directory; a sample is its number and the number of its bytes."""

    def __init__(self, directory: Path, prep: float) -> None:
        self.paths = sorted(str(path) for path in directory.rglob("*") if path.is_file())
        self.prep = prep

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        fd = os.open(self.paths[index], os.O_RDONLY)
        length = 0
        while block := os.read(fd, 1 << 20):
            length += len(block)
        os.close(fd)
        pause(self.prep)
        return torch.tensor([index, length])


def main() -> None:
    """Train, so to say, and print each epoch's time and a number that depends on the order and on every byte count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--prep", type=float, default=0.0, help="milliseconds for a sample")
    parser.add_argument("--step", type=float, default=0.0, help="milliseconds for a minibatch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--validate", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data = Files(arguments.directory, arguments.prep / 1000)
    loader = DataLoader(data, arguments.batch, shuffle=True, num_workers=arguments.workers, drop_last=True)
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for epoch in range(arguments.epochs):
        begin = time.perf_counter()
        for number, batch in enumerate(loader, 1):
            pause(arguments.step / 1000)
            loss = (batch.double().mean(0) * (weight + number)).sum()
            loss.backward()
        print(f"epoch {epoch}: {time.perf_counter() - begin:.3f} s", flush=True)
        if arguments.validate:
            with torch.no_grad():
                for batch in DataLoader(data, arguments.batch):
                    loss = batch.double().sum()
    assert weight.grad is not None
    print("gradient", [float.hex(float(value)) for value in weight.grad])


if __name__ == "__main__":
    main()
