"""Types of `entries.pyx`."""

from coordlfs.metrics import Counters
from coordlfs.namespace import Namespace
from coordlfs.records import Records
from coordlfs.source import Listing

class Entries:
    def __init__(self, records: Records, namespace: Namespace, counters: Counters) -> None: ...
    def pack(self, listing: Listing, directory: int, position: int, into: memoryview) -> int: ...
