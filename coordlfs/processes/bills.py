"""What each epoch cost in requests to an object store: the figures when it began, taken from those when it ended.

An epoch is seen to begin by what it asks for a second time, so a few of its first requests are counted with the epoch
before it, unless a loader says when it begins. What was asked for before the first belongs to the first. It knows
neither stores nor what an epoch is.
"""

from __future__ import annotations

from collections.abc import Callable

_KINDS = ("list", "get", "head", "bytes")


class Bills:
    """Of the last `most` epochs. `asked`: what was asked for since this server began, by kind; empty of no store.

    Thread-safe, as single operations of dictionaries are.
    """

    def __init__(self, asked: Callable[[], dict[str, int]], epoch: int, most: int) -> None:
        self._asked = asked
        self._most = most
        self._before: dict[int, dict[str, int]] = {epoch: {}}

    def begin(self, epoch: int) -> None:
        """An epoch begins now, and the one before it is over."""
        self._before[epoch] = {} if epoch == 1 else self._asked()
        self._before.pop(epoch - self._most, None)

    def of(self, epoch: int) -> dict[str, int]:
        """Requests by kind, and `bytes`; empty of an epoch that an earlier server saw, and of no store."""
        before = self._before.get(epoch)
        if before is None:
            return {}
        until = self._before.get(epoch + 1) or self._asked()
        return {kind: until[kind] - before.get(kind, 0) for kind in _KINDS if kind in until}
