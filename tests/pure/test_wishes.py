"""What nodes say of warming: nothing of it is believed unless it makes sense; and whose bytes are whose."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordlfs.cache.items import CHUNK
from coordlfs.catalogue.catalog import node_of_path
from coordlfs.peers.ownership import Node, Ownership, key_of
from coordlfs.peers.warming import owned_bytes
from coordlfs.peers.wishes import LONGEST_TEXT, MOST_PATHS, STATES, Progress, Told, Wish, parse

TEXTS = st.text(max_size=20)
NUMBERS = st.integers(0, (1 << 62) - 1)
WISHES = st.builds(Wish, TEXTS, st.lists(TEXTS, max_size=5).map(tuple))
PROGRESSES = st.builds(Progress, TEXTS, st.sampled_from(STATES), NUMBERS, NUMBERS, NUMBERS, TEXTS)
TOLD = st.builds(Told, st.none() | WISHES, st.none() | PROGRESSES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(TEXTS | st.just("wish"), inner, max_size=4),
    max_leaves=12,
)


@given(TOLD)
def test_what_is_said_is_heard(told: Told) -> None:
    assert parse(json.loads(json.dumps(told.plain()))) == told


@given(JSON | st.fixed_dictionaries({"wish": JSON, "progress": JSON}))
def test_what_makes_no_sense_is_refused(said: Any) -> None:
    try:
        told = parse(said)
    except ValueError:
        return
    assert parse(json.loads(json.dumps(told.plain()))) == told


@pytest.mark.parametrize(
    "said",
    [
        {"wish": ["x" * (LONGEST_TEXT + 1), []], "progress": None},
        {"wish": ["x", ["y" * (MOST_PATHS + 1)]], "progress": None},
        {"wish": ["x", [1]], "progress": None},
        {"wish": None, "progress": ["x", "resting", 0, 0, 0, ""]},
        {"wish": None, "progress": ["x", "done", -1, 0, 0, ""]},
        {"wish": None, "progress": ["x", "done", 0, True, 0, ""]},
        {"wish": None, "progress": ["x", "done", 0, 1 << 62, 0, ""]},
        {"wish": None, "progress": ["x", "done", 0, 0, 0, "y" * (LONGEST_TEXT + 1)]},
        {"wish": None},
        "done",
        7,
    ],
)
def test_what_is_too_long_or_of_another_kind_is_refused(said: Any) -> None:
    with pytest.raises(ValueError, match="no sense"):
        parse(said)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 100), min_size=1),
    st.lists(st.tuples(st.binary(min_size=1, max_size=8), st.integers(1, 5 * CHUNK)), min_size=1, max_size=20),
)
def test_every_byte_is_one_nodes(weights: dict[str, int], files: list[tuple[bytes, int]]) -> None:
    ownership = Ownership([Node(name, weight) for name, weight in weights.items()])
    of_each = {name: owned_bytes(files, ownership, name) for name in weights}
    for number, (path, size) in enumerate(files):
        expected = dict.fromkeys(weights, 0)
        for chunk, start in enumerate(range(0, size, CHUNK)):
            owner = ownership.owner(key_of(node_of_path(path), chunk))
            assert owner is not None
            expected[owner.name] += min(CHUNK, size - start)
        assert {name: owned[number] for name, owned in of_each.items()} == expected
