"""What nodes say to each other of filling their caches together: who wants it, and how far each has come. Pure.

It travels with what a node says of itself (`coordlfs.peers.membership`), and nothing of it is believed before it is
checked. What is done about it is decided in `coordlfs.peers.warming`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from coordlfs.peers.link import Member

MOST_PATHS = 1 << 11  # characters of the paths that may be named, so that a node can still say who it is
STATES = ("listing", "filling", "done", "full", "failed")
LONGEST_TEXT = 300
_NONSENSE = "what it says of warming makes no sense"


class Wish(NamedTuple):
    """Who wants what to be cached: `paths` as text (see `coordlfs.kernel.paths`), all if there are none."""

    id: str
    paths: tuple[str, ...]


class Progress(NamedTuple):
    """How far a node has come with a wish. Bytes are those of its own items; what follows `listing` knows them all."""

    id: str
    state: str
    files: int = 0  # that were seen to
    cached_bytes: int = 0
    bytes: int = 0
    problem: str = ""


class Told(NamedTuple):
    """What a node says of warming."""

    wish: Wish | None = None
    progress: Progress | None = None

    def plain(self) -> dict[str, Any] | None:
        """As JSON has it; None if there is nothing to say."""
        if self == Told():
            return None
        return {"wish": self.wish, "progress": self.progress}


def parse(said: Any) -> Told:
    """What another node says, if it makes sense. Raises ValueError."""
    if said is None:
        return Told()
    try:
        wish, progress = said["wish"], said["progress"]
        told = Told(
            None if wish is None else Wish(wish[0], tuple(wish[1])), None if progress is None else Progress(*progress)
        )
    except (LookupError, TypeError):
        raise ValueError(_NONSENSE) from None
    if not (told.wish is None or _is_sound_wish(told.wish)):
        raise ValueError(_NONSENSE)
    if not (told.progress is None or _is_sound_progress(told.progress)):
        raise ValueError(_NONSENSE)
    return told


def _is_text(text: object) -> bool:
    return isinstance(text, str) and len(text) <= LONGEST_TEXT


def _is_sound_wish(wish: Wish) -> bool:
    texts = all(isinstance(path, str) for path in wish.paths)
    return _is_text(wish.id) and texts and sum(map(len, wish.paths)) <= MOST_PATHS


def _is_sound_progress(progress: Progress) -> bool:
    numbers = progress.files, progress.cached_bytes, progress.bytes
    counts = all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
    return counts and progress.state in STATES and _is_text(progress.id) and _is_text(progress.problem)


@dataclass(slots=True)
class Exchange:
    """What is said here, and what the others say: set by who warms, and by who talks with the peer server."""

    told: Told = field(default_factory=Told)
    members: list[Member] = field(default_factory=list)
