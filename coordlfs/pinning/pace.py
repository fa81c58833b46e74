"""When the disk may be asked, so that those who wait for it go first. No I/O here; times are seconds of one clock.

Whether somebody else waits for a disk can be seen only while nothing of ours is on its way. So work is done in bursts,
and after each of them it is looked. As long as others wait, bursts are short and rests are long: a job that never stops
reading does not keep the rest from being pinned for ever.
"""

from __future__ import annotations

from enum import Enum

_LOOK = 0.05  # seconds that are looked at
_BUSY = 0.2  # of that time: where readers have waited for so long, others are busy with the disk
_FREE_BURST, _BURST, _REST = 1.0, 0.1, 0.4  # seconds


class _State(Enum):
    WORKING = "working"
    ENDING = "ending"  # what was asked for is not all there
    LOOKING = "looking"


class Pace:
    """Says when to ask.

    >>> pace = Pace()
    >>> pace.may_ask(0.0, 7.0, is_idle=True), pace.may_ask(1.5, 7.0, is_idle=False)
    (True, False)
    """

    def __init__(self) -> None:
        self._state = _State.WORKING
        self._until = 0.0
        self._rested_at = 0.0  # when a burst is due though others are busy
        self._since, self._waited = 0.0, 0.0
        self.is_giving_way = False  # others are busy

    def may_ask(self, now: float, waited: float | None, *, is_idle: bool) -> bool:
        """Whether something may be asked for at `now`.

        `waited`: seconds that readers have waited for the disk, None if nobody says. `is_idle`: nothing that was
        asked for is on its way.
        """
        if waited is None:
            return True
        if self._state is _State.WORKING:
            if not self._until:
                self._until = now + _FREE_BURST
            if now < self._until:
                return True
            self._state = _State.ENDING
        if self._state is _State.ENDING:
            if not is_idle:
                return False
            self._state, self._rested_at = _State.LOOKING, now + _REST
            self._since, self._waited = now, waited
        if now - self._since >= _LOOK:
            self.is_giving_way = waited - self._waited > (now - self._since) * _BUSY
            self._since, self._waited = now, waited
            if not self.is_giving_way or now >= self._rested_at:
                self._state, self._until = _State.WORKING, now + (_BURST if self.is_giving_way else _FREE_BURST)
                return True
        return False
