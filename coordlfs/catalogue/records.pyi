"""Types of `records.pyx`, as far as others than compiled modules use it."""

from array import array

from coordlfs.catalogue.catalog import Catalog

def fill_index(slots: array[int], words: memoryview, count: int) -> None: ...

class Records:
    @property
    def catalog(self) -> Catalog: ...
    def __init__(self, catalog: Catalog) -> None: ...
