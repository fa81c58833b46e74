"""Where cached bytes are held, and why: policy, without I/O.

Best in the page cache, locked by keepers: a hit costs no message. How much a process may lock may be limited
(RLIMIT_MEMLOCK), for each keeper by itself. If so many as are sensible may not lock all that is wanted, the cache is
memory of its own, from which READs are answered: it never evicts either, and a hit costs a message.
"""

from __future__ import annotations

from enum import StrEnum

from coordlfs.cache.items import CHUNK

KEEPERS = 8  # so many at most, only because each may lock so little
REMEDY = "`ulimit -l unlimited`, memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity, or CAP_IPC_LOCK"


class Residence(StrEnum):
    """How cached bytes are held, as `status` shows it."""

    PAGE_CACHE = "page cache (mlock)"
    MEMORY = "memory of its own"


def choose(capacity: int, lockable: int | None) -> Residence:
    """Where `capacity` bytes are held if a keeper may lock `lockable` of them (None: no limit).

    A keeper is full when the next item, of `CHUNK` bytes at most, does not fit.
    """
    if lockable is None or capacity <= lockable or capacity <= KEEPERS * (lockable - CHUNK):
        return Residence.PAGE_CACHE
    return Residence.MEMORY


def wanted(capacity: int) -> int:
    """What each keeper must be allowed to lock for the page cache to hold `capacity` bytes."""
    return min(capacity, -(-capacity // KEEPERS) + CHUNK)
