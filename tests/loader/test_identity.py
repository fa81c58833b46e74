"""Jobs share only what is shown to be the same: what is compared, what a difference is called, and who vouches."""

from __future__ import annotations

import builtins
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coordlfs_loader import CoordinatedLoader, Refused, profile
from coordlfs_loader.identity import Identity, identify
from coordlfs_loader.order import Order
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

SCRIPT = """
import argparse, functools
args = argparse.Namespace(size=SIZE, rate=RATE)
class Config: size, rate = SIZE, RATE
LIMIT = LIMITS
def helper(sample): return sample + HELP
def unused(sample): return sample + UNUSED
class Base:
    scale = SCALE
    def read(self, index): return index * LIMIT
class D(Base):
    def __init__(self, augment, mean): self.augment, self.mean, self.kinds = augment, mean, {"a", "b", "c", "d"}
    def __len__(self): return 8
    def __getitem__(self, index): return helper(self.read(index)) + args.size + Config.size
def closure(value): return lambda sample: sample + value
dataset = D(AUGMENT, {"red": MEAN})
collate = functools.partial(closure(CLOSED), OPTION)
"""
FIRST = {"SIZE": 1, "RATE": 0.1, "LIMITS": 3, "HELP": 4, "UNUSED": 5, "SCALE": 6}
VALUES: dict[str, Any] = FIRST | {"AUGMENT": 0, "MEAN": 0.5, "CLOSED": 7, "OPTION": 8}


def run(**changes: Any) -> dict[str, Any]:
    """The script's names, after it ran with some values changed."""
    source = SCRIPT
    for name, value in {**VALUES, **changes}.items():
        source = source.replace(name, repr(value))
    found: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "/home/user/train.py", "exec"), found)
    return found


def of(**changes: Any) -> dict[str, Any]:
    """What a job that runs the script says of its content."""
    script = run(**changes)
    return told(identify(dataset=script["dataset"], collate_fn=script["collate"]))


def told(found: Identity) -> dict[str, Any]:
    return {"content": found.digest, "parts": found.parts, "unknown": found.unknown}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"AUGMENT": 1}, "dataset.augment is 1 here and 0 there"),
        ({"MEAN": 0.6}, "dataset.mean['red'] is 0.6 here and 0.5 there"),
        ({"SCALE": 7}, "Base.scale is 7 here and 6 there"),
        ({"LIMITS": 4}, "__main__.LIMIT is 4 here and 3 there"),
        ({"SIZE": 2}, "__main__.args.size is 2 here and 1 there; __main__.Config.size is 2 here and 1 there"),
        ({"HELP": 5}, "the code of helper differs"),
        ({"CLOSED": 8}, "value in closure.<locals>.<lambda> is 8 here and 7 there"),
        ({"OPTION": 9}, "collate_fn(0) is 9 here and 8 there"),
        ({"AUGMENT": "x" * 100}, "dataset.augment differs"),
    ],
)
def test_what_differs_is_named(change: dict[str, Any], named: str) -> None:
    assert "; ".join(profile.differences(of(**change), of())) == named


@pytest.mark.parametrize("change", [{}, {"RATE": 0.2}, {"UNUSED": 6}])
def test_what_does_not_take_part_makes_no_difference(change: dict[str, Any]) -> None:
    """A search differs in its learning rate, which may lie beside what the dataset uses."""
    assert of()["content"] is not None
    assert profile.differences(of(**change), of()) == []


class Opaque:
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("no way")


class Exits:
    def __getstate__(self) -> Any:
        raise SystemExit(3)


def endless() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("thing", "named"),
    [
        (Opaque(), "dataset is of Opaque: RuntimeError: no way"),
        ({"deep": [Exits()]}, "dataset['deep'][0] is of Exits: SystemExit: 3"),
        (endless(), "dataset is of generator: TypeError: cannot pickle 'generator' object"),
    ],
)
def test_what_cannot_be_compared_is_not_shared(thing: Any, named: str) -> None:
    found = told(identify(dataset=thing))
    assert found["content"] is None
    [said] = profile.differences(found, found)
    assert said == f"whether the samples are the same cannot be told: {named}"


def cycle() -> dict[str, Any]:
    found: dict[str, Any] = {"x": [1]}
    found["self"] = found
    return found


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def module(**names: Any) -> torch.nn.Module:
    found = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(found.weight, names.get("weight", 1.0))
    torch.nn.init.constant_(found.bias, 0.0)
    return found


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a: int) -> None:
        self.a = a


class Tagged(torch.Tensor):
    """Goes the way of torch's own reduction."""


class Noted(np.ndarray[Any, Any]):
    """Has an attribute."""

    note = 0


def noted(note: int) -> Noted:
    found = np.zeros(3).view(Noted)
    found.note = note
    return found


def local(value: int) -> threading.local:
    found = threading.local()
    found.value = value
    return found


def padded(value: int) -> np.ndarray[Any, Any]:
    """Records of which a byte is used and seven are not, with anything in them."""
    found = np.frombuffer(bytearray(os.urandom(16 * 100)), np.dtype([("a", "i1"), ("b", "i8")], align=True))
    found["a"], found["b"] = value, 2
    return found


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "tensors": (lambda: torch.zeros(5), lambda: torch.tensor([0.0, 0, 0, 0, 1])),
    "dtypes": (lambda: torch.zeros(4, dtype=torch.int32), lambda: torch.zeros(4)),
    "shapes": (lambda: torch.zeros(2, 3), lambda: torch.zeros(3, 2)),
    "sparse": (lambda: torch.eye(3).to_sparse(), lambda: torch.ones(3, 3).to_sparse()),
    "storages": (lambda: torch.zeros(4).untyped_storage(), lambda: torch.ones(4).untyped_storage()),
    "arrays": (lambda: np.arange(10)[::2], lambda: np.arange(10)[1::2]),
    "arrays in lists": (lambda: [np.array([1, 0], np.int32)], lambda: [np.array([1])]),
    "arrays of objects": (lambda: np.array([{1}, "a"], object), lambda: np.array([{2}, "a"], object)),
    "orders in memory": (lambda: np.eye(2, 3), lambda: np.asfortranarray(np.eye(2, 3))),
    "strides": (lambda: torch.eye(2), lambda: torch.eye(2).t()),
    "masks": (lambda: np.ma.array([1, 2], mask=[False, True]), lambda: np.ma.array([1, 2], mask=[False, False])),
    "kinds of arrays": (lambda: noted(1), lambda: noted(2)),
    "records": (lambda: padded(1), lambda: padded(2)),
    "kinds of tensors": (lambda: torch.zeros(3).as_subclass(Tagged), lambda: torch.ones(3).as_subclass(Tagged)),
    "modules": (module, lambda: module(weight=2.0)),
    "subsets": (lambda: Subset(range(9), [1, 2]), lambda: Subset(range(9), [2, 1])),  # type: ignore[arg-type]
    "parts": (
        lambda: ConcatDataset([TensorDataset(torch.zeros(3)), TensorDataset(torch.ones(2))]),
        lambda: ConcatDataset([TensorDataset(torch.zeros(3)), TensorDataset(torch.zeros(2))]),
    ),
    "paths": (lambda: [Path(f"/d/{i}") for i in range(5000)], lambda: [Path(f"/d/{i}") for i in range(1, 5001)]),
    "lists": (
        lambda: [(f"/d/{i}", i % 10) for i in range(50_000)],
        lambda: [(f"/d/{i}", i % 10 + (i == 49_999)) for i in range(50_000)],
    ),
    "types in lists": (lambda: [1, 0], lambda: [True, False]),
    "sets": (lambda: {"a", "b", ("c", 1)}, lambda: {"a", "b", ("c", 2)}),
    "dicts": (lambda: {str(i): i for i in range(1000)}, lambda: {str(i): i for i in range(999)}),
    "cycles": (cycle, lambda: {**cycle(), "x": [2]}),
    "deep": (lambda: nested(60), lambda: nested(61)),
    "generators": (lambda: np.random.default_rng(1), lambda: np.random.default_rng(2)),
    "torch's generators": (
        lambda: torch.Generator().manual_seed(1).get_state(),
        lambda: torch.Generator().manual_seed(2).get_state(),
    ),
    "random": (lambda: random.Random(1), lambda: random.Random(2)),
    "slots": (lambda: Slotted(1), lambda: Slotted(2)),
    "partial": (lambda: partial(int, base=2), lambda: partial(int, base=3)),
    "methods": (lambda: Slotted(1).__init__, lambda: Slotted(2).__init__),  # type: ignore[misc]
    "builtin methods": (lambda: [1].count, lambda: [2].count),
    "files": (lambda: open("/etc/passwd"), lambda: open("/etc/group")),  # noqa: SIM115
    "lambdas": (lambda: lambda x: x + 1, lambda: lambda x: x + 2),
    "defaults": (lambda: lambda x=1: x, lambda: lambda x=2: x),
    "of a thread": (lambda: local(1), lambda: local(2)),
    "shared arrays": (
        lambda: torch.multiprocessing.RawArray("i", [1, 2]),
        lambda: torch.multiprocessing.RawArray("i", [1, 3]),
    ),
    "shared values": (lambda: torch.multiprocessing.Value("i", 1), lambda: torch.multiprocessing.Value("i", 2)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_equal_things_are_equal_and_others_are_not(kind: str) -> None:
    one, other = PAIRS[kind]
    first, again, different = (identify(dataset=make()) for make in (one, one, other))
    assert (first.unknown, different.unknown) == (None, None)
    assert first.digest == again.digest != different.digest


READ = """
class D:
    def __init__(self): self.kept = KEPT
    def __len__(self): return 8
    def __getitem__(self, index): return EXPRESSION
dataset = D()
"""
# What leads from a script to the 1 in the module `settings`, or to the 2 that lies there in another job.
WAYS = {
    "attribute": ("import settings", "settings.value"),
    "set by the script": ("import settings; settings.value = settings.value + 5", "settings.value"),
    "another name": ("import settings", "(lambda module: module.value)(settings)"),
    "by name": ("import settings", "getattr(settings, 'value')"),
    "kept": ("import settings; KEPT = settings", "self.kept.value"),
    "its __getattr__": ("import settings", "settings.computed"),
    "function": ("from settings import read", "read()"),
    "imported when called": ("def read():\n import settings\n return settings.value", "read()"),
    "imported from when called": ("def read():\n from inner import found\n return found.value", "read()"),
    "imported by what is imported": ("def read():\n import outer\n return outer.settings.value", "read()"),
    "any global": ("from settings import value", "globals()['value']"),
    "evaluated": ("from settings import value", "eval('value')"),
    "a new builtin": ("import builtins, settings; builtins.made_up = settings.value", "made_up"),
    "put into a package": ("import sys, settings; sys.made_up = settings.value", "sys.made_up"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_code_takes_of_modules_of_ones_own_is_compared(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys_path = list(sys.path)

    def of(value: int) -> str | None:
        home = tmp_path / str(value)
        (home / "inner").mkdir(parents=True, exist_ok=True)
        (home / "inner/__init__.py").touch()
        text = f"value = {value}\ndef read(): return value\ndef __getattr__(name): return value + {value}\n"
        for name in ("settings.py", "inner/found.py"):
            (home / name).write_text(text)
        (home / "outer.py").write_text("import settings\n")
        monkeypatch.setattr(sys, "path", [os.fspath(home), *sys_path])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        for module in ("settings", "inner", "inner.found", "outer"):
            sys.modules.pop(module, None)
        begin, expression = WAYS[way]
        script: dict[str, Any] = {"__name__": "__main__", "KEPT": None}
        read = READ.replace("EXPRESSION", expression)
        exec(compile(f"{begin}\n{read}", os.fspath(home / "train.py"), "exec"), script)
        found = identify(dataset=script["dataset"])
        assert found.unknown is None
        assert script["dataset"][0] >= value  # it reads what it is said to read
        return found.digest

    try:
        assert of(1) == of(1) != of(2)
    finally:
        vars(builtins).pop("made_up", None)
        vars(sys).pop("made_up", None)
        for module in ("settings", "inner", "inner.found", "outer"):
            sys.modules.pop(module, None)


def test_a_method_that_a_script_replaces_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identify(dataset=TensorDataset(torch.ones(3)))
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, index: index)
    first = identify(dataset=TensorDataset(torch.ones(3)))
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, index: -index)
    second = identify(dataset=TensorDataset(torch.ones(3)))
    assert len({before.digest, first.digest, second.digest, None}) == 4


def test_what_is_shared_makes_no_difference() -> None:
    text, numbers = "".join(["x"] * 50), list(range(50))
    shared = [text, text, numbers, numbers, Slotted(1)]
    copies = ["".join(["x"] * 50), "".join(["x"] * 50), list(range(50)), list(range(50)), Slotted(1)]
    assert identify(a=shared).digest == identify(a=copies).digest
    lock = threading.Lock()
    assert identify(a=lock).digest == identify(a=threading.Lock()).digest is not None


def test_a_mapped_file_is_compared_as_a_path(tmp_path: Path) -> None:
    path = tmp_path / "array"
    np.arange(100).tofile(path)
    one, other = np.memmap(path, int, "r"), np.memmap(path, int, "r")
    assert identify(a=one[3:]).digest == identify(a=other[3:]).digest != identify(a=other[4:]).digest
    with open(path, "r+b") as file:  # what lies in files is not compared
        file.write(b"x")
    assert identify(a=one[3:]).digest == identify(a=other[3:]).digest


class D(Dataset[Any]):
    def __init__(self, augment: int) -> None:
        self.augment = augment

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return 10 * index + self.augment


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COORDLFS_RUNTIME_DIR", str(tmp_path / "run"))


def test_other_samples_are_not_given_unless_somebody_vouches() -> None:
    def load(dataset: Any, **arguments: Any) -> CoordinatedLoader:
        return CoordinatedLoader(dataset, 4, group=group, num_workers=1, **arguments)

    group = "by content"
    first, batches = load(D(0)), []
    ours = iter(first)
    batches.append(next(ours).tolist())
    with pytest.raises(Refused, match=r"dataset\.augment is 1 here and 0 there\. .*equal identity="):
        iter(load(D(1)))
    with pytest.raises(Refused, match="collate fn is"):
        iter(load(D(0), collate_fn=list))
    with pytest.raises(Refused, match="worker_init_fn"):
        iter(load(D(0), worker_init_fn=lambda number: None))
    with pytest.raises(Refused, match="identity is 'mine' here and None there"):
        iter(load(D(0), identity="mine"))
    second = load(D(0))
    assert [b.tolist() for b in second] == [[0, 10, 20, 30], [40, 50, 60, 70]]
    batches += [b.tolist() for b in ours]
    assert batches == [[0, 10, 20, 30], [40, 50, 60, 70]]
    first.close()
    second.close()
    group = "by word"
    first, second = load(D(0), identity="mine"), load(D(1), identity="mine")
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine, other)
    first.close()
    second.close()


JOB = """
import sys
from coordlfs_loader import CoordinatedLoader
class D:
    kinds = {"a", "b", "c", "d", "e"}
    def __len__(self): return 8
    def __getitem__(self, index): return 10 * index + VALUE
loader = CoordinatedLoader(D(), 4, group="script", num_workers=1)
try:
    batches = iter(loader)
    print(next(batches).tolist(), flush=True)
    sys.stdin.readline()
except RuntimeError as e:
    print(e, flush=True)
loader.close()
"""


def test_a_script_that_was_edited_is_another(tmp_path: Path) -> None:
    """In processes that hash texts differently."""

    def start(value: int, seed: int) -> subprocess.Popen[str]:
        path = tmp_path / f"train{value}.py"
        path.write_text(JOB.replace("VALUE", str(value)))
        return subprocess.Popen(
            [sys.executable, path],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    first = start(1, 1)
    assert first.stdout is not None
    assert first.stdout.readline() == "[1, 11, 21, 31]\n"
    same, edited = start(1, 2), start(2, 3)
    assert same.communicate("\n")[0] == "[1, 11, 21, 31]\n"
    assert "the code of D.__getitem__ differs. Give it another group" in edited.communicate("\n")[0]
    first.communicate("\n")
    assert [job.returncode for job in (first, same, edited)] == [0, 0, 0]


class Index:
    """What a sampler may give."""

    def __init__(self, number: int) -> None:
        self.number = number


@pytest.mark.parametrize(
    "batch",
    [
        lambda n: np.r_[np.arange(5000), n, np.arange(5000)],
        lambda n: torch.cat([torch.arange(5000), torch.tensor([n]), torch.arange(5000)]),
        lambda n: [Index(n), Index(7)],
        lambda n: [(5, "x"), (n, "y")],
        lambda n: list(np.array([5, n])),
    ],
)
def test_orders_of_whatever_a_sampler_gives_are_told_apart(batch: Callable[[int], Any]) -> None:
    one, same, other = (Order(0, [batch(1), batch(n)]).digest for n in (1, 1, 2))
    assert one == same != other
