"""Loaders that are measured, and how each kind is begun, begun again with the same samples, and ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any


class Source:
    """A loader that is measured: begun with `start`, then asked for minibatches, and ended with `stop`."""

    again = False  # whether it can be begun again with the same samples

    def __init__(self, kind: str, begin: Callable[[], Iterator[Any]], owner: Any, samples: int | None = None) -> None:
        self.kind = kind
        self.owner = owner
        self.workers = int(getattr(owner, "num_workers", 0))
        self.queue = 2 * self.workers  # minibatches that may be prepared ahead
        self.batch = samples or getattr(owner, "batch_size", None)
        self._begin = begin

    def start(self, again: bool, most: int | None = None) -> Iterator[Any]:
        """An iterator; with `again` over what was handed out before; with `most` it ends after so many minibatches."""
        return self._begin()

    def stop(self, iterator: Iterator[Any]) -> None:
        """End what the iterator runs."""

    def loading(self, iterator: Iterator[Any]) -> list[int]:
        """The processes that load; none if they are not known."""
        return [] if self.workers else [os.getpid()]

    def usage(self, iterator: Iterator[Any]) -> tuple[float, int]:
        """Seconds of CPU that loading has taken so far, and bytes that it has had read from disks."""
        ticks = read = 0
        for pid in self.loading(iterator):
            with suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{pid}/stat") as f:
                    fields = f.read().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
                with open(f"/proc/{pid}/io") as f:
                    read += next(int(line.split()[1]) for line in f if line.startswith("read_bytes"))
        return ticks / os.sysconf("SC_CLK_TCK"), read

    def samples(self, batch: Any) -> int:
        """How many samples the minibatch has."""
        return self.batch or _first_length(batch)

    def figures(self) -> dict[str, Any]:
        """What is known of it."""
        figures: dict[str, Any] = {"workers": self.workers, "queue": self.queue, "batch": self.batch}
        figures.update(again=self.again, exact=False, batches=None, samples=None)
        with suppress(Exception):
            figures["batches"] = len(self.owner)
        with suppress(Exception):
            figures["samples"] = len(self.owner.dataset)
        return figures


def _first_length(batch: Any) -> int:
    """The length of the first thing in the minibatch that has one, which is the batch by PyTorch's custom."""
    if isinstance(batch, dict) and batch:
        return _first_length(next(iter(batch.values())))
    if isinstance(batch, (list, tuple)) and batch:
        first = batch[0]
        return _first_length(first) if isinstance(first, (dict, list, tuple)) or hasattr(first, "shape") else len(batch)
    shape = getattr(batch, "shape", None)
    return int(shape[0]) if shape is not None and len(shape) else 1


class Iterable(Source):
    """Anything of the program's own that can be iterated over, and over again."""

    again = True


class TorchLoader(Source):
    """A torch DataLoader. Its sampler is written along, so that the same samples can be asked for again."""

    KIND = "torch.utils.data.DataLoader"

    def __init__(self, loader: Any) -> None:
        super().__init__(self.KIND, loader._get_iterator, loader)
        self.again = not isinstance(loader.dataset, _iterable_dataset())  # which decides itself what comes
        self.queue = loader.num_workers * (loader.prefetch_factor or 0)
        self.batch = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        self._name = "batch_sampler" if loader._auto_collation else "sampler"
        self._sampler = loader._index_sampler
        self._drawn: list[Any] = []
        self._most: int | None = None

    def start(self, again: bool, most: int | None = None) -> Iterator[Any]:
        """An iterator; with `again` over the minibatches that were drawn before, made anew."""
        self._most = most
        sampler = _Sampler(list(self._drawn), None, None) if again else _Sampler(self._sampler, self._drawn, most)
        # Straight into the dictionary: DataLoader refuses to have its sampler set. The loader is never used as it
        # was any more, for the process ends after the last section.
        self.owner.__dict__[self._name] = sampler
        return self._begin()

    def stop(self, iterator: Any) -> None:
        """End the workers."""
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    def loading(self, iterator: Any) -> list[int]:
        """The workers, or this process if there are none."""
        return [worker.pid for worker in iterator._workers] if self.workers else [os.getpid()]

    def figures(self) -> dict[str, Any]:
        """Its samples are the sampler's: of this rank, if there are several."""
        figures = super().figures()
        figures["exact"] = self._most is not None
        with suppress(Exception):
            figures["samples"] = len(self.owner.sampler)
        return figures


def _iterable_dataset() -> Any:
    from torch.utils.data import IterableDataset

    return IterableDataset


class _Sampler:
    """Yields what another does, at most `most`, and notes it in `drawn`."""

    def __init__(self, sampler: Any, drawn: list[Any] | None, most: int | None) -> None:
        self._sampler = sampler
        self._drawn = drawn
        self._most = most

    def __iter__(self) -> Iterator[Any]:
        for indices in islice(self._sampler, self._most):
            if self._drawn is not None:
                self._drawn.append(indices)
            yield indices

    def __len__(self) -> int:
        return len(self._sampler)
