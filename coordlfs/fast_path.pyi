"""Types of `fast_path.pyx`."""

from collections.abc import Callable

from coordlfs.kernel.pages import Buffer
from coordlfs.reading import Reader, Request

class Messages:
    unlooked: int
    wait: object | None
    has_waited: bool
    @property
    def awaited(self) -> int: ...
    @property
    def awaited_by(self) -> int: ...
    @property
    def awaited_since(self) -> float: ...
    def __init__(self, request: bytearray, into: Buffer) -> None: ...

class Whole:
    @property
    def unique(self) -> int: ...
    @property
    def fd(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def request(self) -> Request: ...

class FastPath:
    def __init__(
        self,
        device: int,
        reader: Reader,
        begin: Callable[[Whole], bool],
        refuse: Callable[[int, Exception], None],
        end_wait: Callable[[int, object], None],
    ) -> None: ...
    def receive(self, messages: Messages, most: int) -> int | None: ...
    def finish(self, whole: Whole, n: int, data: memoryview) -> bool: ...
