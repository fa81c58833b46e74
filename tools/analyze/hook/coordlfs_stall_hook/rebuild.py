"""Copies of a minibatch, whatever it is made of, so that a program may change what it was given.

Not `copy.deepcopy`: it copies the whole storage under a tensor that shows a part of it (a memory-mapped file), and it
builds a tuple that has a constructor of its own by calling that. Nothing here calls a constructor where there is
another way.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

_MOST = 100_000  # objects in a minibatch: one with more of them refers to something else, such as its dataset
_ATOMS = (
    int, float, complex, str, bytes, bool, type, range, type(None), type(Ellipsis), Enum,
    FunctionType, BuiltinFunctionType, MethodType, ModuleType,
)  # fmt: skip


class CannotCopyError(Exception):
    """A part of the minibatch is of a kind that cannot be copied, or there are too many parts."""


def rebuilt(batch: Any, change: Callable[[Any], Any], clone: Callable[[Any], Any] | None = None) -> Any:
    """The minibatch with `change(tensor)` for every tensor in it, and else copies of what holds them.

    `clone` is asked for a copy of objects that can make one of themselves. What is there twice is the same object twice
    in the copy, too. Raises CannotCopyError.
    """
    try:
        return _Copier(change, clone or (lambda value: value.clone())).copy(batch)
    except CannotCopyError:
        raise
    except Exception as e:  # whatever a program's own classes may raise
        raise CannotCopyError(f"{type(batch).__qualname__}: {e}") from e


class _Copier:
    def __init__(self, change: Callable[[Any], Any], clone: Callable[[Any], Any]) -> None:
        self._change = change
        self._clone = clone
        self._done: dict[int, Any] = {}
        self._kept: list[Any] = []  # what an id in `_done` belongs to must not be freed

    def copy(self, value: Any) -> Any:
        if isinstance(value, _ATOMS):
            return value
        if id(value) in self._done:
            return self._done[id(value)]
        if len(self._kept) >= _MOST:
            raise CannotCopyError(f"it has more than {_MOST:,} objects in it")
        self._kept.append(value)
        if isinstance(value, _tensors()):
            return self._is(value, self._change(value))
        if isinstance(value, dict):
            return self._dict(value)
        if isinstance(value, list):
            return self._list(value)
        if isinstance(value, tuple):
            return self._tuple(value)
        if isinstance(value, (set, frozenset)):
            return self._is(value, type(value)(self.copy(each) for each in value))
        if callable(getattr(value, "clone", None)) and callable(getattr(value, "to", None)):
            return self._is(value, self._clone(value))  # TensorDict, the graphs of PyTorch Geometric
        if hasattr(value, "__array_interface__") and callable(getattr(value, "copy", None)):
            return self._is(value, value.copy())
        return self._object(value)

    def _is(self, value: Any, new: Any) -> Any:
        self._done[id(value)] = new
        return new

    def _dict(self, value: Any) -> Any:
        new = self._is(value, copy.copy(value))  # with what its class has beside the items: a default_factory
        for key, each in dict.items(value):
            dict.__setitem__(new, key, self.copy(each))
        return self._attributes(value, new)

    def _list(self, value: Any) -> Any:
        new = self._is(value, copy.copy(value))
        for at, each in enumerate(list.__iter__(value)):
            list.__setitem__(new, at, self.copy(each))
        return self._attributes(value, new)

    def _tuple(self, value: Any) -> Any:
        items = [self.copy(each) for each in tuple.__iter__(value)]
        try:
            new = tuple.__new__(type(value), items)  # not its own constructor, which may take something else
        except TypeError:  # what C code defines, as torch.return_types
            new = type(value)(items)
        return self._attributes(value, self._is(value, new))

    def _object(self, value: Any) -> Any:
        names = attribute_names(value)
        if not names:
            return self._is(value, copy.deepcopy(value))
        return self._attributes(value, self._is(value, copy.copy(value)))

    def _attributes(self, value: Any, new: Any) -> Any:
        for name in attribute_names(value):
            try:
                each = object.__getattribute__(value, name)
            except AttributeError:  # a slot that was never set
                continue
            object.__setattr__(new, name, self.copy(each))  # past what a frozen dataclass forbids
        return new


def attribute_names(value: Any) -> list[str]:
    """What the instance has of its own: in its dictionary and in the slots of its classes."""
    try:
        names = list(object.__getattribute__(value, "__dict__"))
    except AttributeError:
        names = []
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                names.append(f"_{cls.__name__.lstrip('_')}{name}" if private else name)
    return names


def _tensors() -> tuple[type, ...]:
    module = sys.modules.get("torch")
    return (module.Tensor,) if module is not None else ()
