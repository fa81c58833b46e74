"""Randomness that is a function of seed, epoch and index, so that it does not matter who prepares a sample, or when.

Before each sample torch, NumPy and `random` are seeded with `sample_seed`; before the order of an epoch is drawn, with
`epoch_seed`. `Seeded` does the same for a plain DataLoader, which then gives the very bytes. It knows nothing of
groups.
"""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch.utils.data import Dataset, Subset


def _hash(*parts: object) -> int:
    return int.from_bytes(blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1


def epoch_seed(seed: int, epoch: int) -> int:
    """What random generators are seeded with before the order of an epoch is drawn."""
    return _hash(seed, epoch)


def sample_seed(seed: int, epoch: int, index: object) -> int:
    """What they are seeded with before a sample is prepared; `index` is whatever the sampler yields."""
    try:
        index = operator.index(index)  # type: ignore[arg-type]
    except TypeError:
        pass
    return _hash(seed, epoch, index)


def set_seeds(value: int) -> None:
    """Seed torch's CPU generator, NumPy's and Python's global ones."""
    torch.default_generator.manual_seed(value)
    random.seed(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(value & 0xFFFFFFFF)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Global random generators are afterwards as they were: training has randomness of its own."""
    numpy = sys.modules.get("numpy")
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)


class Seeded(Dataset[Any]):
    """A map-style dataset whose samples are random as a CoordinatedLoader makes them: for a plain DataLoader.

    `set_epoch` before each epoch; workers are told only if they start anew (persistent_workers=False).
    """

    def __init__(self, dataset: Any, seed: int = 0, epoch: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch that samples are prepared for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        set_seeds(sample_seed(self.seed, self.epoch, index))
        return self.dataset[index]

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        """The samples of a batch. A dataset that fetches whole batches is seeded once for each."""
        if not by_batch(self.dataset):
            return [self[index] for index in indices]
        set_seeds(sample_seed(self.seed, self.epoch, [sample_seed(self.seed, self.epoch, i) for i in indices]))
        return list(self.dataset.__getitems__(indices))


def by_batch(dataset: Any) -> bool:
    """Whether a dataset fetches whole batches. A Subset does where what it is part of does."""
    if type(dataset) is Subset:
        return by_batch(dataset.dataset)
    return callable(getattr(dataset, "__getitems__", None))
