"""Ownership: how even the shares of a million items are, what a node that leaves moves, and what it takes to tell.

Each round has other items and other nodes. Items fall to nodes by chance, so the shares are off by chance: the worst of
many nodes by about three standard deviations of a binomial distribution, whichever hash it is; that is printed beside.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
from coordlfs_tools.bench.report import Bound, Context, Figure

from coordlfs.peers.ownership import Node, Ownership

_ROUNDS = 7
_NODES = (3, 10, 30, 100)
_WEIGHTS = {"equal": (1,), "of weights 1, 2, 3 in turn": (1, 2, 3)}


def measure(context: Context) -> list[Figure]:
    """Deviations as shares of what the weights say, seconds of processor time, and items moved ÷ items owned."""
    items = 20_000 if context.quick else 1_000_000
    return [
        figure
        for kind, weights in _WEIGHTS.items()
        for count in _NODES
        for figure in _of(context, items, f"{count} nodes, {kind}", [weights[i % len(weights)] for i in range(count)])
    ]


def _of(context: Context, items: int, nodes: str, weights: Sequence[int]) -> Iterator[Figure]:
    off, moved, seconds = [], [], []
    for number in range(context.rounds(_ROUNDS)):
        keys = np.random.default_rng(number).integers(0, 1 << 64, items, dtype=np.uint64)
        all_nodes = [Node(f"node{i:03}.{number}:7070", weight << 30) for i, weight in enumerate(weights)]
        start = time.process_time()
        owners = Ownership(all_nodes).owners(keys)
        seconds.append(time.process_time() - start)
        counts = np.bincount(owners, minlength=len(weights))
        off.append(float(max(abs(counts / (items * np.array(weights) / sum(weights)) - 1))))
        left = Ownership(all_nodes[1:]).owners(keys) + 1  # the nodes are in the order of their names
        moved.append(float((left != owners).sum() / counts[0]))
        context.say(f"  {nodes}, round {number + 1}: {off[-1]:.2%} off, {moved[-1]:.4f} moved, {seconds[-1]:.2f} s")
    chance = math.sqrt(sum(weights) / min(weights) / items)
    sides = (
        f"standard deviation of the smallest share: {chance:.2%}; {sum(x > 0.03 for x in off)} of {len(off)} over 3 %"
    )
    yield Figure(f"{nodes}: the worst node's share of {items:,} items, off its weight's", off, Bound(0.03), sides)
    yield Figure(f"{nodes}: items that a node which leaves moves ÷ those it owned", moved, Bound(1.02))
    yield Figure(f"{nodes}: owners of all, seconds of processor time", seconds, Bound(2.0))
