"""The figures of a directory that is pinned: those of a mount, less what only a server of requests can count.

No READ comes here, so that nobody can say what was read by whom, or hit. What is known is what the keepers had read
from the disk, as the kernel counts it for each process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from coordlfs.cache import residence
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import process
from coordlfs.processes.stats import Stats

if TYPE_CHECKING:
    from coordlfs.pinning.filling import Filling
    from coordlfs.pinning.watching import Watching

_ONLY_OF_A_MOUNT: dict[str, Any] = {"requests": None, "peers": None, "hints": {"jobs": []}, "stash_bytes": None}
_UNKNOWN = "not known: the kernel answers every read by itself, and counts none"


class DiskBytes:
    """Counts what the keepers had read from the disk."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._seen: dict[int, int] = {}  # by process

    def look(self, pids: Iterable[int]) -> None:
        """See what each of these processes has had read since the last call; of one that is new, from now on."""
        now = {pid: nbytes for pid in pids if (nbytes := process.disk_bytes(pid)) is not None}
        is_first = not self._seen and self._counters["server_starts"] > 1
        for pid, nbytes in now.items():
            before = self._seen.get(pid, nbytes if is_first else 0)
            self._counters.add("source_bytes", max(0, nbytes - before))
        self._seen = now


class PinStats(Stats):
    """Collects the figures."""

    def __init__(self, *of_mount: Any, filling: Filling, watching: Watching) -> None:
        super().__init__(*of_mount)
        self._filling = filling
        self._watching = watching
        self._left_out = residence.left_out(self._config["wanted"], self._config["lockable"]) or None

    def collect(self) -> dict[str, Any]:
        """All figures, as plain values."""
        return (
            super().collect()
            | _ONLY_OF_A_MOUNT
            | {
                "mode": "pin",
                "locked_memory": {
                    "limit_bytes": self._config["lockable"],
                    "wanted_bytes": self._config["wanted"],
                    "remedy": residence.REMEDY if self._left_out else None,
                    "left_out": self._left_out,
                },
                "epoch": None,
                "epoch_history": [],
                "hit_rate": None,
                "hits_known_by": _UNKNOWN,
                "dataset": {
                    "items": self._counters["dataset_items"],
                    "bytes": self._counters["dataset_bytes"],
                    "is_known": self._watching.is_scanned,
                },
                "directories": {"watched": len(self._watching.changes), "unwatched": self._watching.changes.unwatched},
                "gives_way": self._filling.pace.is_giving_way,
            }
        )
