"""Types of `entries.pyx`."""

from coordlfs.catalogue.metrics import Counters
from coordlfs.catalogue.records import Records
from coordlfs.serving.namespace import Namespace
from coordlfs.sources.contract import Listing

class Entries:
    def __init__(self, records: Records, namespace: Namespace, counters: Counters) -> None: ...
    def pack(self, listing: Listing, directory: int, position: int, into: memoryview) -> int: ...
