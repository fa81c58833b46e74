"""The sections of a measurement, as the stream of minibatches that the program gets instead of its loader's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle
from typing import Any

from . import device
from .config import Section
from .rebuild import CannotCopyError
from .seen import clock
from .sources import Source

_READY = 8  # minibatches that are kept and handed out over and over


class Exhausted(Exception):
    """The loader has no minibatch any more."""


class Plan:
    """Hands out minibatches of `source`, section by section, and calls `finish` instead of ending.

    `meet(name)` is where the ranks of a job wait for each other. `results` has the figures of the sections so far.
    """

    def __init__(
        self, source: Source, sections: Sequence[Section], meet: Callable[[str], object], finish: Callable[[], None]
    ) -> None:
        self.source = source
        self.results: dict[str, dict[str, Any]] = {}
        self.exhausted: str | None = None  # the section in which the loader ended
        self.notes: list[str] = []
        self.handed = 0
        self._sections = sections
        self._meet = meet
        self._finish = finish
        self._left = 0  # when a minibatch was handed out last
        self._away = 0  # nanoseconds of a section that are not the loop's
        self._lost = 0  # iterations that were not measured because of that
        self._current: Iterator[Any] | None = None
        self._batches = self._run()

    def __next__(self) -> Any:
        batch = next(self._batches)
        self.handed += 1
        self._left = clock()
        return batch

    def open(self) -> Any:
        """Begin the source, if it was not yet; the iterator that it has now."""
        if self._current is None:
            self._current = self.source.start(False, self.most)
        return self._current

    @property
    def most(self) -> int | None:
        """How many minibatches the loader may make in the first section (None: any number)."""
        first = self._sections[0]
        return sum(self._counts(first)) if first.last else None

    def _counts(self, section: Section) -> tuple[int, int]:
        """How many iterations of the section are left out, and how many are measured."""
        workers = self.source.workers if section.last else 0
        return max(section.skip, workers), max(section.count, 2 * workers)

    def came_back(self) -> None:
        """The program left its loop and begins another: what it did between two passes is no iteration."""
        if self._left:
            self._away += clock() - self._left
            self._lost += 1

    def _run(self) -> Iterator[Any]:
        for section in self._sections:
            try:
                yield from self._section(section)
            except Exhausted:
                self.exhausted = section.name
                break
        if self._current is not None:
            self.source.stop(self._current)
        self._finish()

    def _section(self, section: Section) -> Iterator[Any]:
        skip, count = self._counts(section)
        draw = self._draw(section, skip + count if section.last else None)
        for _ in range(skip):
            batch = draw()
            if not section.drain:
                yield batch
        device.synchronize()
        self._meet(section.name)
        assert self._current is not None
        waits = samples = self._away = self._lost = 0
        before = self.source.usage(self._current) if section.drain else None
        start = clock()
        for _ in range(count):
            asked = clock()
            batch = draw()
            waits += clock() - asked
            samples += self.source.samples(batch)
            if not section.drain:
                yield batch
        device.synchronize()
        taken = clock() - start - self._away
        after = self.source.usage(self._current) if section.drain else None
        self.results[section.name] = {
            "iterations": count,
            "measured": count - self._lost,
            "samples": samples,
            "seconds": taken / 1e9 * count / max(count - self._lost, 1),
            "wait": waits / 1e9,
            "cpu": after[0] - before[0] if before and after else None,
            "read": after[1] - before[1] if before and after else None,
        }

    def _draw(self, section: Section, most: int | None) -> Callable[[], Any]:
        """What gives the section's minibatches, one a call. Raises Exhausted."""
        if self._current is None or section.restart:
            if self._current is not None:
                self.source.stop(self._current)
            self._current = self.source.start(section.restart, most)
        current = self._current

        def draw() -> Any:
            try:
                return self.source.advance(current)
            except StopIteration:
                raise Exhausted from None

        if not section.ready:
            return draw
        kept = [self._made(device.ready, draw())]
        with suppress(Exhausted):
            kept += (self._made(device.ready, draw()) for _ in range(_READY - 1))
        self.source.stop(current)
        batches = cycle(kept)

        def draw_ready() -> Any:
            began = clock()
            batch = self._made(device.copied, next(batches))
            self._away += clock() - began
            return batch

        return draw_ready

    def _made(self, make: Callable[[Any], Any], batch: Any) -> Any:
        """What `make` makes of the minibatch, or that itself, and a note, if it cannot."""
        try:
            return make(batch)
        except CannotCopyError as e:
            note = (
                f"fed with minibatches at hand, the program got the same objects again, for they cannot be copied: {e}"
            )
            if not self.notes:
                self.notes.append(note)
            return batch


class Handout:
    """What the program gets for its loader's iterator while that is measured, where the iterator cannot tell itself.

    It has the iterator's attributes, and says that it is of its class.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._iterator = plan.open()

    def __iter__(self) -> Handout:
        return self

    def __next__(self) -> Any:
        return next(self._plan)

    def __len__(self) -> int:
        return len(self._plan.source.owner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._iterator)
