"""Counters that outlive the server: they lie in the catalogue's memory, which the supervisor owns.

It does not know who counts: what becomes of them is decided in `coordlfs.processes.stats`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

NAMES = (
    "source_bytes",  # read from the source, for whomever
    "source_reads",  # READs that went to the source
    "source_files",  # misses of whole files, or of large files by the pass
    "source_errors",
    "stash_bytes",  # served from the stash
    "requests",  # of the kernel, but for FORGET
    "reads",  # READ requests
    "lookups",  # LOOKUP and GETATTR requests
    "name_requests",  # handed to the namespace loop
    "direct_opens",  # requests refused to make opening free
    "ioctls",  # refused; not so that the kernel would remember
    "not_admitted",  # items that had room and yet were not pinned
    "pin_retries",
    "pin_errors",
    "changed_files",
    "dataset_items",  # items that were ever read
    "dataset_bytes",
    "epochs_before",  # epochs of servers before this one
    "server_starts",
    "given_back_bytes",  # for want of memory
    "checked_files",  # by the passes that look for changes
    "passes",
    "interrupted",  # requests whose callers gave up on a source that does not answer
    "memory_bytes",  # served from a cache in private memory
    "peer_bytes",  # got from other nodes
    "peer_reads",  # READs that they answered
    "peer_refusals",  # answers that they cache it not
    "peer_wrong_versions",
    "peer_failures",  # no answer, or an error
    "peer_bad_payloads",  # whose checksum was wrong
    "hints",  # messages about what will be read
    "fetched_items",  # ahead of a reader, and not to stay
    "told_epoch",  # which epoch of which job the last hint was about, as a hash
    "turns",  # times that a thread of the data loop took the GIL to see to requests
    "disk_bytes",  # given to readers from the disk tier
    "disk_reads",  # READs that it answered
    "disk_read_bytes",  # read from its disk for that
    "disk_written_bytes",  # of blocks that were added to it
    "disk_written_blocks",
    "disk_not_admitted",  # blocks that it could not keep up with
    "disk_bad_blocks",  # that were not what had been written
    "peer_skipped",  # not asked, because of failures before or because too many waited
)

_SOURCE_BYTES, _SOURCE_READS = NAMES.index("source_bytes"), NAMES.index("source_reads")
_PEER_BYTES, _PEER_READS = NAMES.index("peer_bytes"), NAMES.index("peer_reads")


_MOST = (1 << 64) - 1


class Counters:
    """Named 64-bit counters in `words`.

    Whoever counts in tallies of its own, as what does without the GIL must, adds to `tallies` what accounts for them.
    """

    def __init__(self, words: memoryview) -> None:
        if len(words) < len(NAMES):
            raise ValueError("too few words for the counters")
        self.words = words
        self._at = {name: index for index, name in enumerate(NAMES)}
        self.lock = threading.Lock()
        self.tallies: list[Callable[[], None]] = []

    def settle(self) -> None:
        """Have everything counted that was done before: called before figures are shown."""
        for account in self.tallies:
            account()

    def add(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        at = self._at[name]
        with self.lock:
            self.words[at] = min(self.words[at] + amount, _MOST)  # a sparse file may say that it has exabytes

    def count_read(self, nbytes: int) -> None:
        """Count a READ that went to the source."""
        with self.lock:
            self.words[_SOURCE_READS] += 1
            self.words[_SOURCE_BYTES] += nbytes

    def count_peer_read(self, nbytes: int) -> None:
        """Count a READ that another node answered."""
        with self.lock:
            self.words[_PEER_READS] += 1
            self.words[_PEER_BYTES] += nbytes

    def set(self, name: str, value: int) -> None:
        """Replace a counter's value."""
        self.words[self._at[name]] = value

    def __getitem__(self, name: str) -> int:
        return self.words[self._at[name]]
