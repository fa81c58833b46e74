"""Types of `records.pyx`, as far as others than compiled modules use it."""

from coordlfs.catalogue.catalog import Catalog

class Records:
    @property
    def catalog(self) -> Catalog: ...
    def __init__(self, catalog: Catalog) -> None: ...
