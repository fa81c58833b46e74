"""Loaders that are measured, and how each kind is begun, begun again with the same samples, and ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from .rebuild import attribute_names

_DEPTH = 8  # of what lies in each other in a minibatch


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

    def advance(self, iterator: Iterator[Any]) -> Any:
        """Its next minibatch."""
        return next(iterator)

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
    with suppress(Exception):  # a minibatch may be of any class, and answer as it likes
        return max(_length(batch, 0) or 1, 1)
    return 1


def _length(batch: Any, depth: int) -> int | None:
    if depth > _DEPTH or isinstance(batch, (str, bytes, int, float)) or batch is None:
        return None
    shape = getattr(batch, "shape", None)
    if isinstance(shape, tuple):
        return int(shape[0]) if shape else None
    if isinstance(batch, Mapping):
        return _first(batch.values(), depth)
    if isinstance(batch, (list, tuple)):
        if not batch:
            return None
        nested = isinstance(batch[0], (Mapping, list, tuple)) or hasattr(batch[0], "shape") or hasattr(batch, "_fields")
        return _first(batch, depth) if nested else len(batch)
    for name in ("num_graphs", "batch_size"):
        if isinstance(number := getattr(batch, name, None), int):
            return number
    return _first((getattr(batch, name, None) for name in attribute_names(batch)), depth)


def _first(values: Any, depth: int) -> int | None:
    lengths = (_length(each, depth + 1) for each in values)
    return next((length for length in lengths if length), None)


class Iterable(Source):
    """Anything of the program's own that can be iterated over, and over again."""

    again = True


class Dali(Source):
    """One of DALI's iterators: threads of this process prepare, as many as its pipelines were given."""

    KIND = "DALIGenericIterator"

    def __init__(self, begin: Callable[[], Iterator[Any]], owner: Any) -> None:
        super().__init__(self.KIND, begin, owner)
        with suppress(Exception):
            pipes = owner._pipes
            self.workers = sum(int(pipe.num_threads) for pipe in pipes)
            self.queue = max(int(getattr(pipe, "prefetch_queue_depth", 2)) for pipe in pipes)

    def loading(self, iterator: Iterator[Any]) -> list[int]:
        """This process."""
        return [os.getpid()]


class TorchLoader(Source):
    """A torch DataLoader, by the iterators that its class or a class made of it makes, however it does so.

    `first` is the iterator that the program made. What its sampler gives is written along, so that the same samples can
    be asked for again by another iterator of the same class. The loader keeps its own sampler, and the program its own
    iterator: it is asked, and answers with what the plan has.
    """

    KIND = "torch.utils.data.DataLoader"

    def __init__(
        self, loader: Any, first: Any, make: Callable[[], Any], advance: Callable[[Any], Any], placed: list[Any]
    ) -> None:
        super().__init__(self.KIND, make, loader)
        self.again = not isinstance(loader.dataset, _iterable_dataset())  # which decides itself what comes
        self.workers = int(getattr(first, "_num_workers", self.workers))
        self.queue = self.workers * (getattr(loader, "prefetch_factor", None) or 0)
        sampler = getattr(loader, "batch_sampler", None)
        self.batch = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
        self.first = first
        self._advance = advance
        self._placed = placed  # the sampler that the next iterator gets instead of the loader's
        self._drawn: list[Any] = []
        self._most: int | None = None

    def record(self, sampler: Any, most: int | None) -> Any:
        """A sampler that gives what `sampler` does, and remembers it; with `most` so many at most."""
        self._most = most
        return _Sampler(sampler, self._drawn, most)

    def start(self, again: bool, most: int | None = None) -> Iterator[Any]:
        """The program's own iterator; with `again` another over the minibatches that were drawn before, made anew."""
        self._most = most
        if not again:
            iterator: Iterator[Any] = self.first
            return iterator
        self._placed.append(_Sampler(list(self._drawn), None, None))
        try:
            return self._begin()
        finally:
            self._placed.clear()

    def advance(self, iterator: Any) -> Any:
        """Its next minibatch, by the class's own way."""
        return self._advance(iterator)

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

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":  # not yet set, as while it is unpickled
            raise AttributeError(name)
        return getattr(self._sampler, name)
