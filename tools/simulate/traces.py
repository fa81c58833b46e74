"""What is asked of a cache: every item once an epoch in a new random order, or as it was recorded of a job."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coordlfs.errors import UserError

_SPREAD = 0.45  # standard deviation of the size's logarithm, as with photographs


@dataclass(frozen=True, slots=True)
class Trace:
    """Items are numbers from 0; `sizes[item]` in bytes; `epochs` the items in the order they are asked for."""

    sizes: list[int]
    epochs: list[list[int]]

    @property
    def dataset(self) -> int:
        """Bytes of all items."""
        return sum(self.sizes)


def random_epochs(
    items: int, mean: int, epochs: int, *, jobs: int = 1, spread: float = _SPREAD, seed: int = 0
) -> Trace:
    """`jobs` jobs that each read all items once an epoch in an order of their own, at the same pace.

    The items are `mean` bytes on average, the logarithm of their sizes normal with standard deviation `spread`.
    """
    random = np.random.default_rng(seed)
    sizes = random.lognormal(0, spread, items)
    sizes = np.maximum(sizes * (mean / sizes.mean()), 1).astype(int)
    orders = [np.stack([random.permutation(items) for _ in range(jobs)], axis=1).ravel() for _ in range(epochs)]
    return Trace(sizes.tolist(), [order.tolist() for order in orders])


def parse(lines: Sequence[str]) -> Trace:
    """A recorded trace: "SIZE NAME" a line, in the order the items were read; an epoch ends where a name comes again.

    That is what `coordlfs analyze --trace FILE` writes. Raises UserError for a line that is something else.
    """
    numbers: dict[str, int] = {}
    sizes: list[int] = []
    epochs: list[list[int]] = [[]]
    seen: set[int] = set()
    for at, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        size, _, name = line.rstrip("\n").partition(" ")
        if not name or not size.isascii() or not size.isdigit():
            raise UserError(f"line {at} of the trace is not a size and a name: {line.strip()[:60]!r}", 2)
        item = numbers.setdefault(name, len(numbers))
        if item == len(sizes):
            sizes.append(max(int(size), 1))
        if item in seen:
            seen.clear()
            epochs.append([])
        seen.add(item)
        epochs[-1].append(item)
    if not sizes:
        raise UserError("the trace has no reads in it", 2)
    return Trace(sizes, epochs)


def line(size: int, name: str) -> bytes:
    """A line of a trace. Only a line feed ends one: names may have every other character in them."""
    quoted = name.replace("\\", r"\\").replace("\n", r"\n")
    return b"%d %s\n" % (size, os.fsencode(quoted))


def read(path: Path) -> Trace:
    """The trace in a file. Raises UserError if there is none."""
    try:
        return parse(path.read_bytes().decode(errors="surrogateescape").split("\n"))
    except OSError as e:
        raise UserError(f"the trace {path} cannot be read: {e.strerror}", 2) from e
