"""Loops of the program's own: marked with `iteration`, or over `batches`; see `coordlfs_tools.analyze.analyzer`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import device, runtime
from .config import Section
from .runtime import Runtime
from .seen import Observed, Seen, clock
from .sources import Iterable, Source

MARKED = "analyzer.iteration"


class _Loop:
    """A loop marked with `iteration`: the time inside is computing, between is loading."""

    def __init__(self, active: Runtime, seen: Seen, samples: int) -> None:
        self._runtime = active
        self._seen = seen
        self._samples = samples
        self._section = active.config.sections[0] if active.measures(seen) else None
        self._count = 0
        self._start = 0
        self._wait = 0
        self._entered = 0
        self._left = 0

    def enter(self) -> None:
        now = clock()
        if self._left:
            self._seen.computes.append(self._left - self._entered)
            self._seen.waits.append(now - self._left)
        section = self._section
        if section:
            if self._count == section.skip:
                self._start, self._wait = now, 0
            elif self._left:
                self._wait += now - self._left
            if self._count == section.skip + section.count:
                self._end(section, now - self._start)
        self._count += 1
        self._entered = clock()

    def leave(self) -> None:
        device.synchronize()
        self._left = clock()

    def _end(self, section: Section, taken: int) -> None:
        plan = self._runtime.plan = self._runtime.plan_for(Source(MARKED, lambda: iter(()), self, self._samples))
        plan.handed = self._count
        plan.results[section.name] = {
            "iterations": section.count,
            "measured": section.count,
            "samples": section.count * self._samples,
            "seconds": taken / 1e9,
            "wait": self._wait / 1e9,
            "cpu": None,
            "read": None,
        }
        self._runtime.finish()


_loops: dict[str, _Loop] = {}


@contextmanager
def iteration(samples: int = 1, name: str = "loop") -> Iterator[None]:
    """Mark one iteration's computing."""
    active = runtime.active
    if active is None:
        yield
        return
    loop = _loops.get(name)
    if loop is None:
        loop = _loops[name] = _Loop(active, active.meet(object(), f"{MARKED}({name!r})"), samples)
    loop.enter()
    try:
        yield
    finally:
        loop.leave()


def batches(iterable: Any, samples: int | None = None) -> Iterator[Any]:
    """Iterate over the program's own source of minibatches."""
    active = runtime.active
    if active is None:
        return iter(iterable)
    seen = active.meet(iterable, "analyzer.batches")
    if active.measures(seen):
        return active.handout(lambda: Iterable("analyzer.batches", lambda: iter(iterable), iterable, samples))
    return Observed(iter(iterable), seen)
