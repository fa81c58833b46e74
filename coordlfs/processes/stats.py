"""The figures of a mount, as `coordlfs status --json` and `user.coordl.stats` give them.

The names are part of the interface: docs/reference/status.md lists them. Fields may be added, never renamed. It counts
nothing: that is done where it happens.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from coordlfs import __version__
from coordlfs.cache.admission import Admission
from coordlfs.cache.epochs import HISTORY, Epoch, Epochs
from coordlfs.cache.fetch_ahead import FetchAhead
from coordlfs.cache.memory_watch import MemoryWatch
from coordlfs.cache.residence import REMEDY, Residence, wanted
from coordlfs.catalogue.catalog import Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import pages
from coordlfs.processes.bills import Bills
from coordlfs.sources.address import Options
from coordlfs.sources.contract import Source

if TYPE_CHECKING:
    from coordlfs.cache.disk_tier import DiskTier
    from coordlfs.peers.sharing import Sharing

_RATE_WINDOW = 2.0  # seconds


class Stats:
    """Collects the figures; keeps nothing but what throughput needs."""

    def __init__(
        self,
        config: dict[str, Any],
        catalog: Catalog,
        admission: Admission,
        epochs: Epochs,
        counters: Counters,
        memory_watch: MemoryWatch,
        source: Source,
        ahead: FetchAhead,
        sharing: Sharing | None,
        tier: DiskTier | None = None,
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._admission = admission
        self._epochs = epochs
        self._counters = counters
        self._memory = memory_watch
        self._source = source
        self._ahead = ahead
        self._sharing = sharing
        self._tier = tier
        self._bills = Bills(source.requests, epochs.current.number, HISTORY + 2)
        epochs.began = self._bills.begin
        self._started = time.time()
        self._mark = (time.monotonic(), 0)
        self._rate = 0.0

    def tick(self) -> None:
        """Note how much was read: called every so often, so that throughput is of late and not of always."""
        now, total = time.monotonic(), self._counters["source_bytes"]
        then, before = self._mark
        if now - then >= _RATE_WINDOW:
            self._rate = (total - before) / (now - then)
            self._mark = (now, total)

    def _epoch(self, epoch: Epoch) -> dict[str, Any]:
        known_items, known_bytes = self._counters["dataset_items"], self._counters["dataset_bytes"]
        if epoch.told_items:
            known_items, known_bytes = epoch.told_items, epoch.told_bytes
        rate = 1 - epoch.bytes / known_bytes if known_bytes else None
        return {
            **{name: value for name, value in asdict(epoch).items() if not name.startswith("told")},
            "requests": self._bills.of(epoch.number),
            "known_by": "order" if epoch.told_items else "misses",
            "items": known_items,
            "local_bytes": max(0, known_bytes - epoch.bytes - epoch.peer_bytes),
            "memory_bytes": max(0, known_bytes - epoch.bytes - epoch.peer_bytes - epoch.disk_bytes),
            "memory_items": max(0, known_items - epoch.misses),
            "hit_rate": None if rate is None else round(max(0.0, rate), 4),
        }

    def _options(self) -> dict[str, Any]:
        """How a bucket is reached, for who wants to reach it as well; nothing of it is secret."""
        return Options(*self._config["bucket"][1])._asdict() if "bucket" in self._config else {}

    def collect(self) -> dict[str, Any]:
        """All figures, as plain values."""
        c, policy = self._counters, self._admission.policy
        c.settle()
        # The keepers first: of one that is lost meanwhile nothing may be told that only held with it.
        keepers = sorted(self._admission.keeper_pids)
        states = self._admission.outcomes()
        finished = [self._epoch(e) for e in self._epochs.finished]
        current = self._epoch(self._epochs.current) if self._epochs.current.number else None
        latest = self._epochs.latest
        kind = Residence(self._config["residence"])
        capacity = self._config["capacity"] // pages.PAGE * pages.PAGE
        return {
            "version": __version__,
            "mode": "mount",
            "source_path": self._config["source"],
            "mountpoint": self._config["mountpoint"],
            "started": self._started,
            "processes": {
                "supervisor": self._config["parent"],
                "server": os.getpid(),
                "keepers": keepers,
                "peer_server": self._sharing.pid if self._sharing else None,
            },
            "server_starts": c["server_starts"],
            "residence": kind,
            "locked_memory": {
                "limit_bytes": self._config["lockable"],
                "wanted_bytes": wanted(capacity),
                "remedy": REMEDY if kind is Residence.PRIVATE_MEMORY else None,
            },
            "umount_needs_coordlfs": self._config["is_busy"],
            "capacity_bytes": capacity,
            "pinned_bytes": policy.pinned_pages * pages.PAGE,
            "pinned_items": states["pinned"],
            "pending_items": states["on_their_way"],
            "stash_bytes": self._admission.stash.size,
            "memory": {
                "limit_bytes": policy.capacity * pages.PAGE,
                "available_bytes": self._memory.available,
                "given_back_bytes": c["given_back_bytes"],
            },
            "fill": round(policy.pinned_pages * pages.PAGE / capacity, 4) if capacity else 1.0,
            "known_files": len(self._catalog),
            "catalog_bytes": self._catalog.memory,
            "source": {
                "bytes": c["source_bytes"],
                "reads": c["source_reads"],
                "files": c["source_files"],
                "errors": c["source_errors"],
                "changed_files": c["changed_files"],
                "retries": self._source.retries,
                "requests": self._source.requests(),
                "options": self._options(),
                "bytes_per_second": round(self._rate),
            },
            "requests": {
                "read": c["reads"],
                "name": c["lookups"] + c["name_requests"],
                "refused": c["direct_opens"],
                "ioctl": c["ioctls"],
                "interrupted": c["interrupted"],
                "turns": c["turns"],
                "stash_bytes": c["stash_bytes"],
                "memory_bytes": c["memory_bytes"],
            },
            "revalidation": {
                "interval_seconds": self._config["revalidate"],
                "passes": c["passes"],
                "checked_files": c["checked_files"],
            },
            "admission": {
                "not_admitted": c["not_admitted"],
                "retries": c["pin_retries"],
                "errors": c["pin_errors"],
            },
            "peers": {
                "bytes": c["peer_bytes"],
                "reads": c["peer_reads"],
                "refusals": c["peer_refusals"],
                "wrong_versions": c["peer_wrong_versions"],
                "failures": c["peer_failures"],
                "bad_payloads": c["peer_bad_payloads"],
                "skipped": c["peer_skipped"],
                **(self._sharing.summary() if self._sharing else {}),
            },
            "disk": None if self._tier is None else self._disk(self._tier),
            "hints": self._ahead.figures(),
            "epochs": self._epochs.current.number,
            "epoch": current,
            "epoch_history": finished,
            "hit_rate": self._epoch(latest)["hit_rate"] if latest else None,
            "hits_known_by": (
                "the order that a loader announced, less misses; both are exact"
                if self._epochs.told
                else "misses, which are exact, taken from all items read so far, each once an epoch"
            ),
        }

    def _disk(self, tier: DiskTier) -> dict[str, Any]:
        return {"directory": self._config["disk"]["path"], **tier.figures()}

    def encode(self) -> bytes:
        """As JSON, for the extended attribute; padded, since who reads one asks for its length first."""
        text = json.dumps(self.collect()).encode()
        return text.ljust(-(-(len(text) + 64) // 1024) * 1024)
