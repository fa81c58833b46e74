"""Types of `stock.pyx`."""

from array import array

class Stock:
    rows: int
    bytes: int
    bad_rows: int
    beyond: int
    used: int
    last_name: int
    unwanted: array[int]
    def __init__(self, seed: int, units: int) -> None: ...
    def see(self, first: int, raw: memoryview) -> None: ...
    def erased(self) -> array[int]: ...
    def free(self) -> list[tuple[int, int]]: ...
