"""Minibatches of every kind are copied such that a program may change them, and their samples are counted."""

from __future__ import annotations

import collections
import dataclasses
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.device import copied
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.rebuild import CannotCopyError
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.sources import _first_length
from coordlfs_tools.clients.__main__ import CLIENTS, fault, is_installed, prepare
from torch.nn.utils.rnn import PackedSequence, pack_sequence


class Pair(tuple[Any, ...]):
    """A constructor that takes something else than what a tuple's does."""

    def __new__(cls, a: Any, b: Any) -> Pair:
        return super().__new__(cls, (a, b))


class Named(NamedTuple):
    x: Any
    y: Any = 1


class Named2(Named):
    def __new__(cls, both: Any) -> Named2:
        return super().__new__(cls, both, both)


class Fields(dict[str, Any]):
    def __init__(self, x: Any, *, scale: int) -> None:
        super().__init__(x=x)
        self.scale = scale


class Rows(list[Any]):
    def __init__(self, x: Any, name: str) -> None:
        super().__init__([x])
        self.name = name


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any


@dataclasses.dataclass(slots=True)
class Slots:
    x: Any
    missing: Any = dataclasses.field(init=False)


class Plain:
    def __init__(self, x: Any) -> None:
        self.parts = {"x": [x]}


def _x() -> torch.Tensor:
    return torch.arange(8.0).reshape(4, 2)


KINDS: dict[str, tuple[Any, Any]] = {
    "tensor": (_x(), lambda b: b),
    "list": ([_x(), 1], lambda b: b[0]),
    "dict": ({"x": _x()}, lambda b: b["x"]),
    "defaultdict": (collections.defaultdict(list, x=_x()), lambda b: b["x"]),
    "OrderedDict": (collections.OrderedDict(x=_x()), lambda b: b["x"]),
    "dict with a constructor": (Fields(_x(), scale=3), lambda b: b["x"]),
    "list with a constructor": (Rows(_x(), "n"), lambda b: b[0]),
    "tuple with a constructor": (Pair(_x(), 1), lambda b: b[0]),
    "named tuple": (Named(_x()), lambda b: b.x),
    "named tuple with a constructor": (Named2(_x()), lambda b: b.y),
    "UserDict": (collections.UserDict(x=_x()), lambda b: b["x"]),
    "frozen dataclass": (Frozen(_x()), lambda b: b.x),
    "dataclass with slots": (Slots(_x()), lambda b: b.x),
    "object": (Plain(_x()), lambda b: b.parts["x"][0]),
    "torch.return_types": (torch.max(_x(), 1), lambda b: b.values),
    "array": ({"x": _x().numpy()}, lambda b: b["x"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_may_be_changed(kind: str) -> None:
    batch, tensor = KINDS[kind]
    before = tensor(batch).sum()
    first = copied(batch)
    assert type(first) is type(batch)
    assert (tensor(first) == tensor(batch)).all()
    changed = tensor(first)
    changed *= 7
    assert tensor(batch).sum() == before
    assert tensor(copied(batch)).sum() == before
    assert vars(first).keys() == vars(batch).keys() if hasattr(batch, "__dict__") else True
    assert _first_length(batch) == 4


def test_what_the_class_has_beside_its_items_is_in_the_copy() -> None:
    assert copied(KINDS["defaultdict"][0])["new"] == []
    assert copied(KINDS["dict with a constructor"][0]).scale == 3
    assert copied(KINDS["list with a constructor"][0]).name == "n"


def test_the_same_object_stays_the_same_and_circles_end() -> None:
    batch: dict[str, Any] = {"a": (x := _x()), "b": x}
    batch["self"] = batch
    new = copied(batch)
    assert new["a"] is new["b"]
    assert new["self"] is new


def test_a_part_of_a_large_storage_is_copied_alone() -> None:
    assert copied([torch.zeros(1 << 20)[:8]])[0].untyped_storage().nbytes() == 32


def test_a_packed_sequence() -> None:
    packed = copied(pack_sequence([_x(), _x()]))
    assert type(packed) is PackedSequence
    assert packed.data.shape == (8, 2)


def test_what_cannot_be_copied_is_said() -> None:
    with pytest.raises(CannotCopyError, match="lock"):
        copied({"x": _x(), "lock": threading.Lock()})


@pytest.mark.parametrize("batch", [None, 1, "abc", [], {}, object(), [[], {}], torch.tensor(1.0)])
def test_what_has_no_length_is_one_sample(batch: Any) -> None:
    assert _first_length(batch) == 1


def test_labels_only() -> None:
    assert _first_length([1, 2, 3]) == 3


@pytest.mark.parametrize("name", [name for name in CLIENTS if is_installed(name)])
def test_a_framework_for_real(name: str, tmp_path: Path) -> None:
    """What is installed here; `python -m coordlfs_tools.clients` also reads through a mount."""
    prepare(name, tmp_path)
    assert fault(name, tmp_path) is None
