"""Who owns an item: weighted rendezvous hashing, the same on every node, and no I/O.

Each node draws a number for each item; the item belongs to the node with the smallest, drawn from an exponential
distribution whose rate is the node's weight. So each node has its weight's share, and a node that joins or leaves moves
only that share (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998; the logarithmic form
for weights is from Schindelhauer and Schomaker, "Weighted distributed hash tables", 2005).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import xxhash

_MASK = (1 << 64) - 1
_CHUNK_STEP = 0x9E3779B97F4A7C15  # odd, so that no two chunks of a file have one key
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64
_PART = 1 << 16  # items whose numbers are drawn at once: they stay in the processor's cache


def key_of(node_id: int, chunk: int) -> int:
    """The 64-bit key of chunk number `chunk` of the file that the catalogue calls `node_id`."""
    return node_id + chunk * _CHUNK_STEP & _MASK


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * _MIX1 & _MASK
    x = (x ^ x >> 27) * _MIX2 & _MASK
    return x ^ x >> 31


@dataclass(frozen=True, slots=True)
class Node:
    """One node: the name by which all know it, and its weight, which is its capacity in bytes."""

    name: str
    weight: int
    seed: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", xxhash.xxh3_64_intdigest(self.name.encode("utf-8", "surrogateescape")))


class Ownership:
    """The owners of items among some nodes. Immutable.

    The logarithm's last bit may differ between machines; that moves one item in 10¹⁴, at the price of one refusal.

    >>> Ownership([Node("a:7070", 1 << 30), Node("b:7070", 1 << 30)]).owner(key_of(42, 0)).name
    'b:7070'
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        """Nodes of weight 0 own nothing; names must differ. Raises ValueError if they do not."""
        self.nodes = tuple(sorted(nodes, key=lambda node: node.name))
        if len({node.name for node in self.nodes}) != len(self.nodes):
            raise ValueError("two nodes have one name")
        self._draws = [(node.seed, 1 / node.weight, index) for index, node in enumerate(self.nodes) if node.weight > 0]

    def owner(self, key: int) -> Node | None:
        """The owner of one item; None if nobody caches anything."""
        index = self.index(key)
        return None if index is None else self.nodes[index]

    def index(self, key: int) -> int | None:
        """The index in `nodes` of the owner of one item; None if nobody caches anything."""
        if not self._draws:
            return None
        log = math.log
        best, owner = math.inf, 0
        for seed, scale, index in self._draws:
            drawn = -log((_mix(key ^ seed) >> 11) * 2.0**-53 + 2.0**-54) * scale
            if drawn < best:  # of equals the first by name
                best, owner = drawn, index
        return owner

    def owners(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """Indices into `nodes` of the owners of many items (shape: that of `keys`, one-dimensional); −1: nobody."""
        found = np.full(len(keys), -1, np.int32)
        bits, drawn = np.empty(_PART, np.uint64), np.empty(_PART, np.float64)
        shifted = np.empty(_PART, np.uint64)
        for start in range(0, len(keys), _PART):
            part = keys[start : start + _PART]
            n = len(part)
            x, t, d = bits[:n], shifted[:n], drawn[:n]
            best = np.full(n, np.inf)
            for seed, scale, index in self._draws:
                np.bitwise_xor(part, np.uint64(seed), out=x)
                for shift, factor in ((30, _MIX1), (27, _MIX2), (31, 0)):
                    np.right_shift(x, np.uint64(shift), out=t)
                    np.bitwise_xor(x, t, out=x)
                    if factor:
                        np.multiply(x, np.uint64(factor), out=x)
                np.right_shift(x, np.uint64(11), out=x)
                np.multiply(x, 2.0**-53, out=d)
                np.add(d, 2.0**-54, out=d)
                np.log(d, out=d)
                np.multiply(d, -scale, out=d)
                won = d < best
                best[won] = d[won]
                found[start : start + n][won] = index
        return found


def keys_of(node_ids: npt.NDArray[np.uint64], chunks: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`key_of` of many items."""
    return node_ids + chunks * np.uint64(_CHUNK_STEP)
