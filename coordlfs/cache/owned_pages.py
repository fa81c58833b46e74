"""Pages of a file that are there already: may a keeper pin them as they are, or must they be dropped and read anew?

What a mount's server knows by its requests, the kernel is asked here: where pages are charged. Those that are charged
where the keeper is stay. Those of a job's memory cgroup would count against the job's limit for as long as they are
pinned. Where the kernel does not say, pages are taken to be somebody else's. It knows nothing of items.
"""

from __future__ import annotations

from contextlib import suppress

from coordlfs.cache.keeper_protocol import How, Outcome
from coordlfs.kernel import pages
from coordlfs.kernel.charges import Charges


class OwnedPages:
    """Tells the keeper's own pages; asks the kernel only once there is something to tell."""

    def __init__(self) -> None:
        self._charges: Charges | None = None
        self._is_asked = False

    def settle(self, fd: int, offset: int, length: int, how: int) -> Outcome | None:
        """See to what is resident of a range of a file: None if it can be pinned now, else what to answer.

        `how`: flags of `How`, which say what is to be left as it is. Raises OSError.
        """
        there, is_own = self._look(fd, offset, length)
        if how & How.RESIDENT:
            return None if is_own and there == pages.count(length) else Outcome.LEFT
        if is_own or there == 0:
            return None
        if how & How.SPARE and there:
            return Outcome.LEFT
        pages.drop(fd, offset, length)
        return Outcome.BUSY if pages.resident(fd, offset, length) else None

    def _look(self, fd: int, offset: int, length: int) -> tuple[int | None, bool]:
        """How many pages are resident, None if nobody says, and whether all of these are the keeper's own."""
        charges = self._asked()
        if charges is None:
            return pages.resident(fd, offset, length), False
        address = pages.map_file(fd, offset, length)
        try:
            runs = pages.resident_runs(address, length)
            for first, count in runs:
                pages.populate(address + first * pages.PAGE, count * pages.PAGE)
            return sum(count for _, count in runs), self.are_own(address, length)
        finally:
            pages.unmap(address, length)

    def are_own(self, address: int, length: int) -> bool:
        """Whether the pages of a mapping that are faulted in are the keeper's own, as far as the kernel says."""
        charges = self._asked()
        if charges is None:
            return True
        try:
            return charges.are_own(address, length)
        except OSError:  # it has lost the right to see it
            self._charges = None
            return True

    def _asked(self) -> Charges | None:
        if not self._is_asked:
            self._is_asked = True
            with suppress(OSError):
                self._charges = Charges()
        return self._charges
