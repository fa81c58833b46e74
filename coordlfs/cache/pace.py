"""How fast two places are, by what READs of them took: whether one that should be faster is slower. No I/O here."""

from __future__ import annotations

_FADES = 0.99  # what a READ still counts for when one more has been made
_ENOUGH = 32  # READs, of each, before anything is said
_SLOWER = 2.0  # times
_NOTICEABLE = 0.005  # seconds: what takes no longer is fast enough


class Pace:
    """Seconds that a READ takes on average, in which older ones count less and less.

    >>> pace = Pace()
    >>> pace.took(2.0), pace.took(4.0, 2)
    (None, None)
    >>> round(pace.mean, 2)
    2.0
    """

    def __init__(self) -> None:
        self._seconds = self._count = 0.0

    def took(self, seconds: float, reads: int = 1) -> None:
        """So many READs took so many seconds in all."""
        fades = _FADES**reads
        self._seconds = self._seconds * fades + seconds
        self._count = self._count * fades + reads

    @property
    def mean(self) -> float:
        """0 if nothing was read."""
        return self._seconds / self._count if self._count else 0.0

    def is_slower_than(self, other: Pace) -> bool:
        """Whether it is worth while to read the other place instead, as far as is known."""
        if min(self._count, other._count) < _ENOUGH or self.mean < _NOTICEABLE:
            return False
        return self.mean > _SLOWER * other.mean
