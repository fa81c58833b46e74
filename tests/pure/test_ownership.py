"""Ownership: shares by weight, the same everywhere, and little that moves."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordlfs.peers.ownership import Node, Ownership, key_of, keys_of

KEYS = st.integers(0, (1 << 64) - 1)
NODES = st.dictionaries(st.text(max_size=8), st.integers(0, 1 << 45), max_size=12).map(
    lambda weights: [Node(name, weight) for name, weight in weights.items()]
)


def _names(ownership: Ownership, keys: np.ndarray) -> list[str | None]:
    return [ownership.nodes[i].name if i >= 0 else None for i in ownership.owners(keys)]


def _keys(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 1 << 63, count, dtype=np.uint64)


@given(NODES, st.lists(KEYS, max_size=40), st.randoms())
def test_one_and_many_items_are_owned_alike_whatever_the_order_of_the_nodes(
    nodes: list[Node], keys: list[int], shuffler: random.Random
) -> None:
    ownership = Ownership(nodes)
    shuffled = list(nodes)
    shuffler.shuffle(shuffled)
    owners = _names(ownership, np.array(keys, np.uint64))
    assert owners == _names(Ownership(shuffled), np.array(keys, np.uint64))
    assert owners == [owner.name if (owner := ownership.owner(key)) else None for key in keys]


@given(NODES, st.lists(KEYS, min_size=1, max_size=40), st.integers(1, 1 << 45))
def test_a_node_that_joins_takes_items_and_moves_no_others(nodes: list[Node], keys: list[int], weight: int) -> None:
    before = Ownership(nodes)
    after = Ownership([*nodes, Node("newcomer ", weight)])
    for key in keys:
        owner = after.owner(key)
        assert owner is not None
        assert owner.name == "newcomer " or owner == before.owner(key)


@given(NODES, KEYS)
def test_a_node_without_capacity_owns_nothing(nodes: list[Node], key: int) -> None:
    owner = Ownership(nodes).owner(key)
    if any(node.weight for node in nodes):
        assert owner is not None
        assert owner.weight > 0
    else:
        assert owner is None


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="one name"):
        Ownership([Node("a", 1), Node("a", 2)])


def test_the_keys_of_many_items_are_those_of_each() -> None:
    nodes, chunks = _keys(100), np.arange(100, dtype=np.uint64)
    assert keys_of(nodes, chunks).tolist() == [key_of(int(n), int(c)) for n, c in zip(nodes, chunks, strict=True)]


@pytest.mark.parametrize("count", [3, 10, 30, 100])
def test_shares_follow_the_weights(count: int) -> None:
    """Within 3 %, and where 1,000,000 items are too few to expect that, within 4 standard deviations."""
    weights = np.array([1 + i % 3 for i in range(count)]) << 30
    ownership = Ownership([Node(f"node{i:03}:7070", int(w)) for i, w in enumerate(weights)])
    counts = np.bincount(ownership.owners(_keys(1_000_000)), minlength=count)
    expected = 1_000_000 * weights / weights.sum()
    assert (abs(counts / expected - 1) <= np.maximum(0.03, 4 / np.sqrt(expected))).all()


@pytest.mark.parametrize("count", [3, 10, 100])
def test_a_node_that_leaves_moves_its_share(count: int) -> None:
    nodes = [Node(f"node{i:03}:7070", 1 << 34) for i in range(count)]
    keys = _keys(200_000)
    before, after = _names(Ownership(nodes), keys), _names(Ownership(nodes[1:]), keys)
    moved = sum(b != a for b, a in zip(before, after, strict=True))
    assert moved == before.count(nodes[0].name)
    shares = [after.count(node.name) / before.count(node.name) for node in nodes[1:]]
    assert min(shares) > 1 - 0.05  # and what it had goes to all the others
