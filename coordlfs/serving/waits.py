"""Which requests wait for the source, as the data loop, its fast path and admission see it.

It only says who waits; who is answered in place of the source, and when, is for `coordlfs.serving.data_loop`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from coordlfs.cache import items


class Part(NamedTuple):
    """What is waited for: a chunk of a file."""

    node: int
    chunk: int

    @classmethod
    def at(cls, node: int, offset: int) -> Part:
        """The chunk that holds byte `offset` of a file."""
        return cls(node, offset // items.CHUNK)


@dataclass(slots=True)
class Wait:
    """A request that waits for the source."""

    since: float
    is_keepers: bool
    interrupted: bool = False
    holds_thread: bool = False
    is_replaced: bool = False  # by another thread
    is_over: bool = False
    bytes_of: Part | None = None
    unique: int = 0  # the request's number, of a wait on the fast path
    thread: int = 0  # that waits, if it is held
    asked: object = None  # of a READ, what it asks for
    is_given_away: bool = False  # somebody else answers, as it has waited for the disk tier for too long
    untold: int = 0  # the thread that waits, if the kernel will not tell of its signals: it reads with O_DIRECT


class DiskRead(Protocol):
    """A READ of a small file that the fast path has the disk read for."""

    node: int


class Waits:
    """All of them. Thread-safe, as single operations of lists and dictionaries are."""

    def __init__(self) -> None:
        self.by_request: dict[int, Wait] = {}  # by the request's number
        self.disk: list[DiskRead | None] = []  # by the fast path's slot
        self.is_reading: Callable[[int], bool] = lambda node: False  # whether the plain path has a disk read of a file
        self.early: dict[int, float] = {}  # requests that were interrupted before they were seen to wait, and when
        self.hung: set[Part | None] = set()  # what a keeper was told in place of the source

    def is_awaited(self, node: int, offset: int) -> bool:
        """Whether somebody waits for the source's bytes of a chunk of a file, but for a keeper that is told in time."""
        part = Part.at(node, offset)
        if not part.chunk and any(read is not None and read.node == node for read in self.disk):
            return True
        if not part.chunk and self.is_reading(node):
            return True
        return any(wait.bytes_of == part and not wait.is_keepers for wait in list(self.by_request.values()))
