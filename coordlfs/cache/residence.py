"""Where cached bytes are held, and why: policy, without I/O.

Best in the page cache, locked by keepers: a hit takes no round trip to user space. How much a process may lock may be
limited (RLIMIT_MEMLOCK), for each keeper by itself. If so many as are sensible may not lock all that is wanted, the
cache is in private memory, from which READs are answered: it never evicts either, and a hit takes a round trip.
"""

from __future__ import annotations

from enum import StrEnum

from coordlfs import sizes
from coordlfs.cache.items import CHUNK

KEEPERS = 8  # so many at most, only because each may lock so little
COST = "each hit takes a round trip through the server"  # of private memory
REMEDY = "`ulimit -l unlimited`, memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity, or CAP_IPC_LOCK"


class Residence(StrEnum):
    """How cached bytes are held, as `status` shows it."""

    PAGE_CACHE = "page cache (mlock)"
    PRIVATE_MEMORY = "private memory"

    @classmethod
    def _missing_(cls, value: object) -> Residence | None:
        """As a supervisor of version 0.1 calls it, whose server has been replaced since."""
        return cls.PRIVATE_MEMORY if value == "memory of its own" else None


def choose(capacity: int, lockable: int | None) -> Residence:
    """Where `capacity` bytes are held if a keeper may lock `lockable` of them (None: no limit).

    A keeper is full when the next item, of `CHUNK` bytes at most, does not fit.
    """
    if lockable is None or capacity <= lockable or capacity <= KEEPERS * (lockable - CHUNK):
        return Residence.PAGE_CACHE
    return Residence.PRIVATE_MEMORY


def wanted(capacity: int) -> int:
    """What each keeper must be allowed to lock for the page cache to hold `capacity` bytes."""
    return min(capacity, -(-capacity // KEEPERS) + CHUNK)


def pinnable(capacity: int, lockable: int | None) -> tuple[int, int]:
    """How much of `capacity` bytes keepers can lock where there is no private memory instead, and how much of one item.

    A keeper is full when the next item does not fit: where little may be locked, large ones are left out.
    """
    if lockable is None or capacity <= lockable:
        return capacity, CHUNK
    most = min(CHUNK, lockable // 4)
    return min(capacity, KEEPERS * (lockable - most)), most


def left_out(capacity: int, lockable: int | None) -> str:
    """What is not pinned of `capacity` bytes as a process may lock only `lockable` (see `pinnable`); else nothing."""
    most_of_all, most = pinnable(capacity, lockable)
    less = [f"no more than {sizes.text(most_of_all)} of {sizes.text(capacity)} are pinned"] * (most_of_all < capacity)
    less += [f"files and chunks above {sizes.text(most)} are left out"] * (most < CHUNK)
    if not less:
        return ""
    return f"a process may lock only {sizes.text(lockable or 0)}, so that {', and '.join(less)}: {REMEDY}"
