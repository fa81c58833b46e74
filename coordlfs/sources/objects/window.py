"""How many requests are in flight: as many as the store bears, which it says by refusing some.

The rule of TCP (Chiu and Jain, 1989): a success adds a little, a refusal halves. It knows no store.
"""

from __future__ import annotations

import threading
import time

_BEGIN = 64
_ONE_REFUSAL = 1.0  # seconds in which refusals are one: they answer requests that were on their way together


class Window:
    """At most `most` at a time. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(min(_BEGIN, most))
        self._in_flight = 0
        self._halved_at = float("-inf")
        self._free = threading.Condition()

    @property
    def limit(self) -> int:
        """How many may be in flight now."""
        return int(self._limit)

    @property
    def in_flight(self) -> int:
        """How many are."""
        return self._in_flight

    def __enter__(self) -> None:
        """Wait until one more may be in flight; it is until the block ends, which is a success if it raises nothing."""
        with self._free:
            while self._in_flight + 1 > self._limit:
                self._free.wait()
            self._in_flight += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._free:
            self._in_flight -= 1
            if kind is None and self._limit < self._most:  # after as many as are allowed, one more is
                self._limit = min(float(self._most), self._limit + 1 / self._limit)
                self._free.notify()
            self._free.notify()

    def refused(self, now: float | None = None) -> None:
        """The store asked for fewer."""
        now = time.monotonic() if now is None else now
        with self._free:
            if now - self._halved_at > _ONE_REFUSAL:
                self._limit = max(1.0, self._limit / 2)
                self._halved_at = now
