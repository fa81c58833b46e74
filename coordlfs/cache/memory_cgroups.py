"""Whose memory the cache is: where keepers and jobs are charged for it.

A page is charged to the memory cgroup of whoever had it read. Where every reader of a file is charged where the keepers
are, its pages are pinned as they are; elsewhere they are read anew, by a keeper. Knows processes, and nothing of items.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from coordlfs.kernel import cgroups

_KNOWN = 1.0  # seconds that a process is believed to stay in its cgroup
_MOST = 1000  # processes whose cgroup is remembered


class MemoryCgroups:
    """The memory cgroups of keepers, and of the jobs that read. Not thread-safe."""

    def __init__(self) -> None:
        self._of_keepers: set[bytes | None] = set()
        self._of_jobs: dict[int, tuple[bytes | None, float]] = {}  # by pid; and until when that is believed

    def look(self, keepers: Iterable[int]) -> dict[bytes | None, int]:
        """See where the keepers are charged, as somebody may have moved them; the pid of one of each such cgroup."""
        found = {cgroups.of_memory(pid): pid for pid in keepers}
        self._of_keepers = set(found)
        return found

    def is_keepers(self, pid: int) -> bool:
        """Whether a job is charged where every keeper is; remembered for a moment."""
        now = time.monotonic()
        known = self._of_jobs.get(pid)
        if known is None or known[1] < now:
            if len(self._of_jobs) > _MOST:
                self._of_jobs.clear()
            known = self._of_jobs[pid] = (cgroups.of_memory(pid), now + _KNOWN)
        return known[0] is not None and self._of_keepers == {known[0]}
