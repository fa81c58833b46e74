"""Pages of a file that are there already: may a keeper pin them as they are, or must they be dropped and read anew?

What a mount's server knows by its requests, the kernel is asked here: where pages are charged. Those that are charged
where the keeper is stay. Those of a job's memory cgroup would count against the job's limit for as long as they are
pinned. Where the kernel does not say, pages are taken to be somebody else's. It knows nothing of items.
"""

from __future__ import annotations

from contextlib import suppress

from coordlfs.cache.keeper_protocol import Outcome
from coordlfs.kernel import pages
from coordlfs.kernel.charges import Charges


class OwnedPages:
    """Tells the keeper's own pages; asks the kernel only once there is something to tell."""

    def __init__(self) -> None:
        self._charges: Charges | None = None
        self._is_asked = False

    def settle(self, fd: int, offset: int, length: int, is_wanted_whole: bool) -> Outcome | None:
        """See to what is resident of a range of a file: None if it can be pinned now, else what to answer.

        `is_wanted_whole`: only if all of it is resident and the keeper's own; else nothing is changed. Raises OSError.
        """
        if self._may_stay(fd, offset, length, is_wanted_whole):
            return None
        if is_wanted_whole:
            return Outcome.LEFT
        pages.drop(fd, offset, length)
        return Outcome.BUSY if pages.resident(fd, offset, length) else None

    def _may_stay(self, fd: int, offset: int, length: int, is_wanted_whole: bool) -> bool:
        if self._asked() is None:
            return False
        address = pages.map_file(fd, offset, length)
        try:
            runs = pages.resident_runs(address, length)
            if is_wanted_whole and runs != [(0, pages.count(length))]:
                return False
            for first, count in runs:
                pages.populate(address + first * pages.PAGE, count * pages.PAGE)
            return self.are_own(address, length)
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
