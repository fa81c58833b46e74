"""A circuit breaker: whether a peer that failed is to be asked again. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

FIRST, LONGEST = 0.5, 30.0  # seconds for which a peer is left alone, after the first failure and at most


@dataclass(slots=True)
class Breaker:
    """Closed, a peer is asked; a failure opens it for a time, doubled by each; then one request tries.

    Not thread-safe. Times are seconds of any one clock.
    """

    failures: int = 0  # in a row
    until: float = -math.inf  # nobody asks before
    rests_until: float = -math.inf  # nor before this: it was busy, which is no failure
    trying: bool = False

    @property
    def open(self) -> bool:
        """Whether the last that is known of the peer is a failure."""
        return self.failures > 0

    def allows(self, now: float) -> bool:
        """Whether to ask now; whoever is told yes says `succeeded` or `failed` afterwards."""
        if now < self.rests_until:
            return False
        if not self.failures:
            return True
        if self.trying or now < self.until:
            return False
        self.trying = True
        return True

    def succeeded(self) -> None:
        """The peer answered as it should."""
        self.failures, self.trying = 0, False

    def rest(self, now: float, seconds: float) -> None:
        """It answered that it is busy: leave it alone for so long, or `LONGEST`."""
        self.rests_until = max(self.rests_until, now + min(LONGEST, seconds))

    def failed(self, now: float) -> None:
        """It did not. Failures of requests that were under way when the first came in count once."""
        if self.failures and now < self.until:
            return
        self.trying = False
        self.until = now + min(LONGEST, FIRST * 2 ** min(self.failures, 10))
        self.failures += 1
