"""A loader as the program uses it: how long each `__next__` took, and how long the program was away between two."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from typing import Any

clock = time.perf_counter_ns


class Seen:
    """One loader of the program, and nanoseconds in its `__next__` and between. Keeps nothing of the loader alive."""

    def __init__(self, number: int, kind: str, dataset: str | None, training: bool) -> None:
        self.number = number
        self.kind = kind
        self.dataset = dataset
        self.training = training
        self.waits = array("q")
        self.computes = array("q")
        self.left = 0  # when it was left last; 0 at the beginning of a pass
        self._begins: list[tuple[int, int]] = []  # of the passes: how many waits and computes there were

    def begin(self) -> None:
        """A pass over it begins."""
        self.left = 0
        self._begins.append((len(self.waits), len(self.computes)))

    def timed(self, advance: Callable[[Any], Any], iterator: Any) -> Any:
        """`advance(iterator)`, timed."""
        asked = clock()
        if self.left:
            self.computes.append(asked - self.left)
        batch = advance(iterator)
        self.left = left = clock()
        self.waits.append(left - asked)
        return batch

    def figures(self) -> dict[str, Any]:
        """As the result has it; seconds."""
        return {
            "number": self.number,
            "kind": self.kind,
            "dataset": self.dataset,
            "training": self.training,
            "passes": [
                {
                    "iterations": waits.stop - waits.start,
                    "wait": sum(self.waits[waits]) / 1e9,
                    "compute": sum(self.computes[computes]) / 1e9,
                }
                for waits, computes in self._passes()
            ],
        }

    def _passes(self) -> Iterator[tuple[slice, slice]]:
        ends = [*self._begins[1:], (len(self.waits), len(self.computes))]
        for (wait, compute), (last_wait, last_compute) in zip(self._begins, ends, strict=True):
            yield slice(wait, last_wait), slice(compute, last_compute)


class Observed:
    """An iterator whose waits are timed; for loaders whose own iterators cannot be told to."""

    def __init__(self, iterator: Iterator[Any], seen: Seen) -> None:
        self._iterator = iterator
        self._seen = seen

    def __iter__(self) -> Observed:
        return self

    def __next__(self) -> Any:
        return self._seen.timed(next, self._iterator)

    def __len__(self) -> int:
        return len(self._iterator)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for whoever asks what it is
        return type(self._iterator)
