"""What a cluster of nodes would read from where: a simulator with the product's own ownership and policy.

`python -m coordlfs_tools.cluster_sim --nodes 2,10,100,1000 --total 1.1` says, for every number of nodes, which share of
an epoch's bytes each node gets from its own memory and disk, from other nodes, and from its storage. Every epoch is
shuffled anew and dealt to the nodes, as a DistributedSampler does. With the speeds of link, disk and storage it says
how much of the dataset a node can be given each second.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from coordlfs.cache.minio import MinIO
from coordlfs.kernel.pages import PAGE
from coordlfs.peers.ownership import Node, Ownership

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Epoch:
    """Bytes of one epoch, one figure for each node, in the order of `Cluster.nodes`."""

    local: Ints
    peer: Ints  # received from others; what they read from their storage for it is in their `source`
    sent: Ints
    source: Ints
    disk: Ints  # read from the node's disk, for itself or for others; a part of `local` and `sent`


class Cluster:
    """Nodes, a dataset, and what is cached where after the epochs so far."""

    def __init__(
        self, nodes: Sequence[Node], keys: npt.NDArray[np.uint64], sizes: Ints, disk_share: float = 0.0
    ) -> None:
        """`keys` and `sizes` (bytes) of all items; the weight of a node is its capacity in bytes.

        `disk_share`: which part of that is disk. Memory takes what comes first, and the disk what has no room there: a
        copy of what memory holds gives way, so that both are one capacity (`coordlfs.cache.tiers`).
        """
        ownership = Ownership(nodes)
        self.nodes = ownership.nodes
        self.sizes = sizes
        self.owners = ownership.owners(keys)
        self.cached = np.zeros(len(keys), bool)
        self.in_memory = np.zeros(len(keys), bool)
        self._pages = -(-sizes // PAGE)
        self._caches = [MinIO(node.weight // PAGE) for node in self.nodes]
        self._memories = [MinIO(int(node.weight * (1 - disk_share)) // PAGE) for node in self.nodes]

    def epoch(self, askers: npt.NDArray[np.int32], order: Ints) -> Epoch:
        """Read item `order[i]` on node `askers[order[i]]`, one after the other."""
        hit, in_memory = self.cached.copy(), self.in_memory.copy()
        self._admit(order)
        by_owner = hit | self.cached  # the owner reads and keeps it, or had it
        own = askers == self.owners
        local, peer = hit & own, by_owner & ~own
        filled = self.cached & ~hit
        return Epoch(
            self._sum(askers, local),
            self._sum(askers, peer),
            self._sum(self.owners, peer),
            self._sum(self.owners, filled) + self._sum(askers, ~by_owner),
            self._sum(self.owners, hit & ~in_memory),
        )

    def _admit(self, order: Ints) -> None:
        missing = order[~self.cached[order]]
        owners, pages = self.owners.tolist(), self._pages.tolist()
        for item in missing.tolist():
            if owners[item] >= 0 and self._caches[owners[item]].admit(item, pages[item]):
                self.cached[item] = True
                self.in_memory[item] = self._memories[owners[item]].admit(item, pages[item])

    def _sum(self, nodes: npt.NDArray[np.int32], chosen: npt.NDArray[np.bool_]) -> Ints:
        weights = self.sizes[chosen].astype(float)
        return np.bincount(nodes[chosen], weights, len(self.nodes)).astype(np.int64)


def deal(items: int, nodes: int, seed: int) -> tuple[npt.NDArray[np.int32], Ints]:
    """An epoch of a DistributedSampler: which node reads each item, and the order of all reads."""
    order = np.random.default_rng(seed).permutation(items)
    askers = np.empty(items, np.int32)
    askers[order] = np.arange(items) % nodes
    return askers, order


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes a second of a node's link, each way, of its disk and of its storage; None: not asked for."""

    link: float | None
    disk: float | None
    storage: float | None

    def given(self, epoch: Epoch) -> tuple[float, str] | None:
        """How many bytes a second the slowest node can be given, and what holds it up; None if nothing is known.

        As long as its busiest part takes: a node that serves others is busy with what it sends as well.
        """
        read = epoch.local + epoch.peer + epoch.source
        parts = {
            "link": (np.maximum(epoch.peer, epoch.sent), self.link),
            "disk": (epoch.disk, self.disk),
            "storage": (epoch.source, self.storage),
        }
        rates = {
            name: float((read * speed / np.maximum(nbytes, 1)).min())
            for name, (nbytes, speed) in parts.items()
            if speed is not None and nbytes.any()
        }
        slowest = min(rates, key=rates.__getitem__, default=None)
        return None if slowest is None else (rates[slowest], slowest)


def _simulate(nodes: int, items: int, mean: int, capacity: float, disk_share: float, epochs: int) -> Epoch:
    random = np.random.default_rng(items)
    sizes = np.maximum(1, random.lognormal(0, 0.45, items) * mean / np.exp(0.45**2 / 2)).astype(np.int64)
    each = int((-(-sizes // PAGE)).sum() * PAGE * capacity)
    members = [Node(f"node{i}:7070", each) for i in range(nodes)]
    cluster = Cluster(members, random.integers(0, 1 << 63, items, dtype=np.uint64), sizes, disk_share)
    for seed in range(epochs):
        last = cluster.epoch(*deal(items, nodes, seed))
    return last


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m coordlfs_tools.cluster_sim", description=__doc__)
    parser.add_argument("--nodes", default="2,4,10,100,1000", help="how many, separated by commas")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=110_000, help="bytes of an item, on average")
    total = parser.add_mutually_exclusive_group()
    total.add_argument("--capacity", type=float, help="memory of each node, as a share of the dataset")
    total.add_argument("--total", type=float, default=1.1, help="of all nodes together (default: %(default)s)")
    parser.add_argument("--disk", type=float, default=0.0, help="disk of each node beside it, or of all, by the same")
    for name, what in (("link", "each way"), ("disk", "of its cache"), ("storage", "that it can read")):
        parser.add_argument(f"--{name}-speed", type=float, metavar="GB/s", help=f"of each node, {what}")
    parser.add_argument("--epochs", type=int, default=3, help="the last is shown (default: %(default)s)")
    return parser


def main() -> None:
    """The command line."""
    a = _parser().parse_args()
    speeds = Speeds(*(speed and speed * 1e9 for speed in (a.link_speed, a.disk_speed, a.storage_speed)))
    table = Table(title=f"{a.items:,} items, epoch {a.epochs}: bytes per node, mean (highest)")
    headings = ["nodes", "capacity of each", "local", "peers", "storage", "received", "sent", "read from storage"]
    headings += ["read from disk"] * bool(a.disk) + ["a node can be given"] * any(
        (a.link_speed, a.disk_speed, a.storage_speed)
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for nodes in map(int, a.nodes.split(",")):
        share = 1 if a.capacity is not None else nodes
        capacity = ((a.total if a.capacity is None else a.capacity) + a.disk) / share
        e = _simulate(nodes, a.items, a.size, capacity, a.disk / share / capacity if capacity else 0, a.epochs)
        read = (e.local + e.peer + e.source).sum()
        shares = (f"{part.sum() / read:.1%}" for part in (e.local, e.peer, e.source))
        parts = (e.peer, e.sent, e.source, *([e.disk] if a.disk else []))
        amounts = (f"{p.mean() / 1e9:.3f} GB ({p.max() / 1e9:.3f})" for p in parts)
        given = speeds.given(e)
        rate = [] if given is None else [f"{given[0] / 1e9:.2f} GB/s ({given[1]})"]
        table.add_row(f"{nodes:,}", f"{capacity:.2%}", *shares, *amounts, *rate)
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)


if __name__ == "__main__":
    main()
