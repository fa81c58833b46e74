"""Asks caches for a trace: one cache, or one on each node of a cluster, apart or adding up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordlfs_tools.simulate.policies import Policy, TwoTiers, make
from coordlfs_tools.simulate.traces import Trace


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch on all nodes: items asked for and found, in any cache; bytes by where they came from."""

    accesses: int
    hits: int
    storage_bytes: int
    remote_bytes: int
    disk_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits by accesses."""
        return self.hits / self.accesses if self.accesses else 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A policy with a cache of `capacity` bytes on each node."""

    policy: str
    capacity: int
    epochs: list[Epoch]
    disk: int = 0  # bytes of a second tier on each node

    @property
    def steady(self) -> Sequence[Epoch]:
        """The epochs after the first, which finds nothing; the first if there is no other."""
        return self.epochs[1:] or self.epochs

    @property
    def hit_rate(self) -> float:
        """Of the steady epochs."""
        return sum(e.hits for e in self.steady) / max(sum(e.accesses for e in self.steady), 1)

    @property
    def storage_bytes(self) -> float:
        """Read from storage in a steady epoch."""
        return sum(e.storage_bytes for e in self.steady) / len(self.steady)

    @property
    def remote_bytes(self) -> float:
        """Read from other nodes' caches in a steady epoch."""
        return sum(e.remote_bytes for e in self.steady) / len(self.steady)

    @property
    def disk_bytes(self) -> float:
        """Read from local disks in a steady epoch."""
        return sum(e.disk_bytes for e in self.steady) / len(self.steady)


def run(
    trace: Trace, policy: str, capacity: int, nodes: int = 1, *, partitioned: bool = False, disk: int = 0
) -> Outcome:
    """Go through `trace` with a cache of `capacity` bytes on each of `nodes`, which share every epoch's items.

    With `partitioned` each item has one node that may cache it and that the others ask for it; else every node caches
    what it reads itself. `disk`: bytes of a second tier on each node, which only minio has.
    """
    where = [
        [(item, item % nodes if partitioned else asker) for asker, item in _shared(order, nodes)]
        for order in trace.epochs
    ]
    asked = [[item for order in where for item, node in order if node == at] for at in range(nodes)]
    caches = [make(policy, capacity, own, disk) for own in asked]
    epochs = []
    for order, places in zip(trace.epochs, where, strict=True):
        hits = storage = remote = 0
        before = _from_disk(caches)
        for (asker, _), (item, node) in zip(_shared(order, nodes), places, strict=True):
            if caches[node].access(item, trace.sizes[item]):
                hits += 1
                remote += trace.sizes[item] if node != asker else 0
            else:
                storage += trace.sizes[item]
        epochs.append(Epoch(len(order), hits, storage, remote, _from_disk(caches) - before))
    return Outcome(policy, capacity, epochs, disk)


def _from_disk(caches: Sequence[Policy]) -> int:
    return sum(cache.disk_bytes for cache in caches if isinstance(cache, TwoTiers))


def _shared(order: Sequence[int], nodes: int) -> list[tuple[int, int]]:
    """Who asks for what: the nodes take turns, as with a DistributedSampler."""
    return [(position % nodes, item) for position, item in enumerate(order)]
