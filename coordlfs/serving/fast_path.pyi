"""Types of `fast_path.pyx`."""

from collections.abc import Callable
from typing import Any, Protocol

from coordlfs.catalogue.records import Records
from coordlfs.kernel.pages import Buffer
from coordlfs.serving.reading import Reader, Request
from coordlfs.serving.waits import Waits

class _ReadAnew(Protocol):
    def __call__(self, unique: int, asked: Request, *, interrupted: bool) -> None: ...

class Requests:
    unlooked: int
    wait: Any
    @property
    def awaited(self) -> int: ...
    @property
    def awaited_by(self) -> int: ...
    @property
    def awaited_since(self) -> float: ...
    def __init__(self, request: bytearray, into: Buffer) -> None: ...

class FastPath:
    is_watched: bool
    @property
    def fd(self) -> int: ...
    @property
    def answers_reads(self) -> bool: ...
    def __init__(
        self,
        device: int,
        records: Records,
        reader: Reader,
        refuse: Callable[[int, Exception], None],
        read_anew: _ReadAnew,
        end_wait: Callable[[Any], None],
        watch: int,
        waits: Waits,
    ) -> None: ...
    def receive(self, requests: Requests, most: int, poller: int = -1) -> int | None: ...
    def hung_in_tier(self, before: float) -> list[tuple[int, Request]]: ...
    def leave_to_others(self) -> None: ...
    def hear(self) -> None: ...
    def interrupt(self, unique: int) -> bool: ...
    def given_up(self, before: float) -> list[int]: ...
