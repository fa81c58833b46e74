"""Watching memory, and having the cache follow what the governor decides.

The less is left, the sooner it is looked at again, so that nobody who allocates as fast as the kernel can uses it up
unseen: memory that ran out is not released, it costs somebody's life. It does not know by which rule: how much may
stay is decided by `governor`, what goes by `admission`.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress

import trio

from coordlfs.cache.admission import Admission
from coordlfs.cache.governor import Governor, Marks
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import cgroups, pages
from coordlfs.kernel.memory import memory, stalled
from coordlfs.sizes import text

log = logging.getLogger(__name__)

_SOONEST, _LATEST = 0.01, 0.25  # seconds between looks
_RATE = 8 << 30  # bytes a second, twice what one process can come to use: so soon what is spare may be gone
_SAY_EVERY = 30.0  # seconds


class MemoryWatch:
    """Holds the cache to its governor's limit.

    `available` is what was found last, in bytes; `spare` what of it need not stay available.
    """

    def __init__(self, governor: Governor, admission: Admission, counters: Counters) -> None:
        self.governor = governor
        self.available = 0
        self.spare = 0
        self._admission = admission
        self._counters = counters
        self._above_low = 0  # bytes that may be taken until some have to be released
        self._given = 0  # bytes since it was last said
        self._said = float("-inf")

    async def run(self) -> None:
        """Look every so often, until cancelled."""
        while True:
            try:
                self._look()
            except OSError as e:  # no descriptor is left to look with: that passes, and must not end the server
                log.warning("what memory is available cannot be told: %s", e)
            await trio.sleep(min(_LATEST, max(_SOONEST, self._above_low / _RATE)))

    def _look(self) -> None:
        have = memory()
        # Pins are charged where the keepers are, which somebody may have given a memory cgroup of their own.
        ours = cgroups.of_memory(os.getpid())
        for cgroup, pid in self._admission.look_at_cgroups().items():
            if cgroup == ours:
                continue
            with suppress(OSError):
                of_keeper = memory(pid)
                if of_keeper.available < have.available:
                    have = of_keeper
        self.available = have.available
        marks = Marks.of(have.total)
        self.spare, self._above_low = max(0, have.available - marks.high), have.available - marks.low
        now = time.monotonic()
        before = self.governor.limit
        held = self._admission.held_pages() * pages.PAGE
        limit = self.governor.update(held, have, stalled(), now)
        given = self._admission.limit(limit // pages.PAGE) * pages.PAGE
        self._say(given, before, now)

    def _say(self, given: int, before: int, now: float) -> None:
        self._counters.add("given_back_bytes", given)
        self._given += given
        if self._given and now - self._said >= _SAY_EVERY:
            log.warning(
                "memory is tight (%s available): %s of cache released, %s left",
                *(text(self.available), text(self._given), text(self.governor.limit)),
            )
            self._given, self._said = 0, now
        if before < self.governor.configured == self.governor.limit:
            log.info("memory is available again: the cache may grow to %s", text(self.governor.limit))
