"""For training loops that use no loader the analyser knows. Without `coordlfs analyze` both cost nothing.

>>> from coordlfs_tools.analyze import analyzer
>>> for batch in analyzer.batches([[1, 2], [3, 4]], samples=2):
...     with analyzer.iteration(samples=2):
...         print(sum(batch))
3
7

`batches` is the better of the two where minibatches come from something that can be iterated over, for it is measured
as a DataLoader is: drained, repeated, fed. All that `iteration` can tell is how long its body takes, and how long it is
from one to the next, which is taken for loading. Use one of them, not both, around the loop that is to be measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def _hook() -> ModuleType | None:
    return import_module("coordlfs_stall_hook.loops") if "coordlfs_stall_hook" in sys.modules else None


def iteration(samples: int = 1, name: str = "loop") -> AbstractContextManager[None]:
    """Mark the computing of one iteration over `samples` samples; loops of different names are told apart."""
    hook = _hook()
    if hook is None:
        return nullcontext()
    marked: AbstractContextManager[None] = hook.iteration(samples, name)
    return marked


def batches(iterable: Iterable[T], samples: int | None = None) -> Iterator[T]:
    """Iterate over minibatches of `samples` samples each (None: as many as the first thing in them has)."""
    hook = _hook()
    if hook is None:
        return iter(iterable)
    measured: Iterator[T] = hook.batches(iterable, samples)
    return measured
