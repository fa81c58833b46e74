"""Which items are asked for when: in the order of the disk until the cache is full, and what jobs have read at once.

What a job has read and what is charged here is pinned as it is, which costs no disk. All else is read by the keepers,
at the pace that `pace` allows; last, what is in memory and charged to others, who are spared reading the rest. It knows
neither names nor how items are pinned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import trio

from coordlfs.cache import items
from coordlfs.cache.keeper_protocol import How
from coordlfs.cache.pin_admission import PinAdmission
from coordlfs.catalogue.catalog import REGULAR, Catalog
from coordlfs.kernel import pages
from coordlfs.pinning.dataset import Dataset
from coordlfs.pinning.pace import Pace

_ON_THEIR_WAY = 96  # items that are asked for and have no answer yet
_BYTES = 48 << 20  # of them
_BATCH = 16
_AT_ONCE = 1000  # files that are looked through before others have their turn
_END = -1  # instead of an item
_PLENTY = 1 << 62  # pages
_SOON, _LATE = 0.01, 0.25  # seconds until it is looked again
_AGAIN = 30.0  # seconds after which what could not be pinned is tried again
_MOST_READ = 1 << 16  # items that were read and are not asked for yet


class Filling:
    """Keeps the cache full. `most_pages`: of one item, as a keeper may not lock more at once."""

    def __init__(
        self,
        catalog: Catalog,
        dataset: Dataset,
        admission: PinAdmission,
        pace: Pace,
        waited: Callable[[], float | None],
        most_pages: int,
    ) -> None:
        """`waited`: seconds that readers have waited for the disk, see `coordlfs.kernel.disks`."""
        self._catalog = catalog
        self._dataset = dataset
        self._admission = admission
        self._policy = admission.policy
        self.pace = pace
        self._waited = waited
        self._most_pages = most_pages
        self._asked: dict[int, int] = {}  # items on their way that are read from the disk, and their pages
        self._adopting: dict[int, None] = {}  # items on their way that are taken as they are
        self._unspared: set[int] = set()  # items on their way that are pinned whoever has them in memory
        self._spared: dict[int, None] = {}  # items that are in memory and another's: they come last
        self._read: dict[int, None] = {}  # items that a job has read, in that order
        self._pass: Iterator[int | None] | None = None
        self._is_last = False  # the pass has come to what was spared
        self._has_more = False  # not all has been looked at, or is there
        self._marks, self._troubles = (-1, 0), 0  # when the last pass began
        self._least_room, self._ended = 0, 0.0  # with which it left something out; when it ended

    @property
    def room(self) -> int:
        """Pages that may be pinned yet."""
        return self._policy.capacity - self._policy.used

    @property
    def has_use_for_reads(self) -> bool:
        """Whether something could be pinned because a job has read it."""
        return self.room > 0 and self._has_more

    def was_read(self, record: int) -> None:
        """A job has read of a file."""
        if self.room <= 0 or len(self._read) >= _MOST_READ:
            return
        for item in self._absent(record):
            if item not in self._spared:
                self._read[item] = None

    async def run(self) -> None:
        """Ask, and take the answers, until cancelled."""
        while True:
            with trio.move_on_after(self._step(time.monotonic())):
                await trio.lowlevel.wait_readable(self._admission.fd)
            self._admission.receive()

    def _step(self, now: float) -> float:
        """Ask for what may be asked for; in how many seconds to look again, if no answer comes before."""
        self._settle()
        if self.room <= 0 or self._admission.recovering:
            return _LATE
        self._adopt()
        self._has_more = self._has_work(now)
        if not self._has_more:
            return _SOON if self._adopting or self._read else _LATE
        if self.pace.may_ask(now, self._waited(), is_idle=not self._asked):
            self._feed(now)
        return _SOON

    def _settle(self) -> None:
        """See which items are not on their way any more, and which of them were left as they are."""
        waiting: dict[int, Any]
        for waiting in (self._asked, self._adopting):
            for item in [item for item in waiting if not self._admission.is_pending(item)]:
                waiting.pop(item)
                if self._admission.is_absent(item) and item not in self._unspared:
                    self._spared[item] = None
                self._unspared.discard(item)

    # -- what jobs have read ------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        wanted = list(islice(self._read, max(0, _ON_THEIR_WAY - len(self._adopting))))
        for item in wanted:
            del self._read[item]
        wanted = [item for item in wanted if self._admission.is_absent(item)]
        if wanted:
            self._admission.ask_for(wanted, How.RESIDENT)
            self._adopting |= dict.fromkeys(wanted)

    # -- all else -----------------------------------------------------------------------------------------------

    def _has_work(self, now: float) -> bool:
        """Whether something may have to be read from the disk."""
        if self._pass is None and not self._asked and self._is_pass_due(now):
            self._marks, self._troubles, self._least_room = self._now_marks(), self._now_troubles(), _PLENTY
            self._pass, self._is_last = self._all_absent(), False
        return self._pass is not None or bool(self._asked)

    def _is_pass_due(self, now: float) -> bool:
        """Whether a pass may find anything to pin: there is more to pin since the last one began, or more room.

        Or something could not be pinned then.
        """
        if self._admission.dropping:
            return False  # what is on its way out cannot be asked for
        if self._marks != self._now_marks() or self.room > self._least_room or self._spared:
            return True
        return self._troubles != self._now_troubles() and now > self._ended + _AGAIN

    def _now_marks(self) -> tuple[int, int]:
        return self._dataset.findings, self._admission.counters["given_back_bytes"]

    def _now_troubles(self) -> int:
        return self._admission.counters["not_admitted"] + self._admission.counters["pin_errors"]

    def _feed(self, now: float) -> None:
        batch: list[int] = []
        while self._pass is not None and len(self._asked) + len(batch) < _ON_THEIR_WAY and self._bytes_asked() < _BYTES:
            item = next(self._pass, _END)
            if item == _END:
                self._pass, self._ended = None, now
            if item is None or item == _END:
                break
            batch.append(item)
            if len(batch) == _BATCH:
                self._ask(batch)
                batch = []
        self._ask(batch)
        self._admission.flush()

    def _ask(self, batch: list[int]) -> None:
        self._admission.ask_for(batch, None if self._is_last else How.SPARE)
        for item in batch:
            if self._admission.is_pending(item):
                self._asked[item] = self._policy.pages(item)
                if self._is_last:
                    self._unspared.add(item)
            else:
                self._least_room = min(self._least_room, self.room)

    def _bytes_asked(self) -> int:
        return sum(self._asked.values()) * pages.PAGE

    def _all_absent(self) -> Iterator[int | None]:
        """What is not pinned, as it lies on the disk; last what jobs have read already: of the rest they are spared it.

        None now and then, so that others are not kept waiting.
        """
        for number, record in enumerate(self._dataset.order):
            if number % _AT_ONCE == _AT_ONCE - 1:
                yield None
            for item in self._absent(record):
                if item not in self._spared and item not in self._read:
                    yield item
        yield None  # what was asked for until now is asked for otherwise than what follows
        self._is_last = True
        spared, self._spared = self._spared, {}
        yield from filter(self._admission.is_absent, spared)

    def _absent(self, record: int) -> Iterator[int]:
        if not self._catalog.flags(record) & REGULAR:
            return
        size = self._catalog.size(record)
        for item in items.items_of(record, size):
            if self._admission.is_absent(item) and pages.count(items.length(item, size)) <= self._most_pages:
                yield item
