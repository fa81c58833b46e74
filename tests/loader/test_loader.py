"""CoordinatedLoader against a plain DataLoader, to the byte; what it refuses; what it says of itself."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import inspect
import itertools
import json
import os
import random
import re
import signal
import time
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coordlfs_loader import CoordinatedLoader, Refused, Seeded, area, loader, payload, room, stage, wire
from loader_jobs import Noise, broker_pid, digest, eventually, plain, workers_of
from mounts import coordlfs, script
from torch.masked import MaskedTensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

Pair = namedtuple("Pair", "image label")
MakeLoader = Callable[..., CoordinatedLoader]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of the test's own."""
    path = tmp_path / ("run" * 50)  # longer than a socket's address may be
    monkeypatch.setenv("COORDLFS_RUNTIME_DIR", str(path))
    return path


@pytest.fixture
def make() -> Iterator[MakeLoader]:
    """Makes loaders, and closes them."""
    with ExitStack() as stack:

        def make_loader(dataset: Any, *args: Any, **arguments: Any) -> CoordinatedLoader:
            made = CoordinatedLoader(dataset, *args, **{"group": "test", **arguments})
            stack.callback(made.close)
            return made

        yield make_loader


def equal(a: Any, b: Any) -> bool:
    """Whether two batches are of the same types and have the same bytes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and equal(a.numpy(), b.numpy())
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def mixed_collate(samples: list[Any]) -> Any:
    """A batch of everything, random itself."""
    images, about = default_collate(samples)
    return Pair(images + torch.rand(1) + np.random.rand(), {"names": about["name"], "array": np.random.rand(100, 3)})


class Alternating(torch.utils.data.Sampler[int]):
    """An order of its own for each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(21)[:: 1 if self.epoch % 2 else -1])

    def __len__(self) -> int:
        return 21


class Fetching(Noise):
    """Fetches whole batches."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        shared = torch.rand(3, 8, 8)
        return [(shared + i, {"index": i, "name": str(i)}) for i in indices]


ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "in order": lambda: {"batch_size": 4},
    "shuffled": lambda: {"batch_size": 4, "shuffle": True},
    "without the last": lambda: {"batch_size": 4, "shuffle": True, "drop_last": True},
    "with a generator": lambda: {"batch_size": 4, "shuffle": True, "generator": torch.Generator()},
    "with a sampler": lambda: {"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * 21, 30)},
    "with a sampler of epochs": lambda: {"batch_size": 4, "sampler": Alternating()},
    "with a batch sampler": lambda: {"batch_sampler": BatchSampler(RandomSampler(range(21)), 5, False)},
    "with a collate function": lambda: {"batch_size": 4, "shuffle": True, "collate_fn": mixed_collate},
    "with lists": lambda: {"batch_size": 4, "collate_fn": list},
    "one by one": lambda: {"batch_size": None, "shuffle": True},
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", ARGUMENTS)
def test_it_gives_the_bytes_that_a_dataloader_gives(make: MakeLoader, what: str, workers: int) -> None:
    """Two jobs, three epochs; and the job's own randomness is left alone."""
    dataset = Noise(21)
    arguments = ARGUMENTS[what]()
    loaders = [make(dataset, num_workers=workers, **ARGUMENTS[what]()) for _ in range(2)]
    for epoch in range(3):
        state = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        found = [list(batches) for batches in zip(*loaders, strict=True)]
        assert torch.equal(torch.get_rng_state(), state[0])
        assert (repr(np.random.get_state()), random.getstate()) == state[1:]
        if isinstance(arguments.get("sampler"), Alternating):
            arguments["sampler"].set_epoch(epoch)
        wanted = plain(dataset, 0, epoch, **arguments)
        assert len(found) == len(wanted) == len(loaders[0])
        assert all(equal(a, w) and equal(b, w) for (a, b), w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dataset", [Fetching(21), Subset(Noise(50), range(10, 31)), Subset(Fetching(50), range(21))])
def test_datasets_that_fetch_batches_and_subsets(make: MakeLoader, dataset: Any) -> None:
    loader = make(dataset, 4, shuffle=True, num_workers=2)
    wanted = plain(dataset, 0, 0, batch_size=4, shuffle=True)
    assert all(map(equal, loader, wanted))


class Growing(Dataset[Any]):
    """Batches of four that are larger and smaller than the one before, of all that is stacked in the stage, and not."""

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> dict[str, Any]:
        side = 4 + 8 * (index // 4 * 7 % 5)
        image = torch.rand(1, 3, side, side).to(memory_format=torch.channels_last)[0]
        spread = torch.rand(1, side).expand(side, side)
        return {
            "image": image,
            "array": np.random.rand(side, 40),
            "half": spread.half(),
            "none": torch.zeros(0),
            "i": index,
        }


def test_batches_of_all_sizes_are_stacked_in_the_stage(make: MakeLoader) -> None:
    found = list(make(Growing(), 4, num_workers=2))
    wanted = list(DataLoader(Seeded(Growing()), 4, num_workers=1))
    assert len(found) == len(wanted) == 20
    assert all(map(equal, found, wanted))


def test_a_room_knows_what_lies_in_it() -> None:
    memory = np.zeros(1 << 16, np.uint8)
    samples = [(torch.rand(20, 30), torch.rand(2), str(i)) for i in range(8)]
    found = room.Room(memory)
    batch = found.collate(samples)
    assert equal(batch, default_collate(samples))
    size, buffers = payload.encode(batch, found)
    assert np.shares_memory(memory, batch[0].numpy())
    assert not np.shares_memory(memory, batch[1].numpy())  # too small for a place of its own
    raw = b"".join(buffers)
    assert len(raw) == size
    assert raw[: 8 * 20 * 30 * 4] == memory[: 8 * 20 * 30 * 4].tobytes()
    assert equal(payload.decode(memoryview(bytearray(raw))), batch)
    assert equal(room.Room(memory[:1000]).collate(samples), batch)  # which is too small for it


def test_seeds_make_a_difference(make: MakeLoader) -> None:
    a, b = make(Noise(21), 4, seed=1, group="a"), make(Noise(21), 4, seed=2, group="b")
    assert not any(map(equal, a, b))
    again = make(Noise(21), 4, seed=1, group="c")
    again.set_epoch(1)
    assert all(map(equal, list(a), again))


@pytest.mark.parametrize(
    "batch",
    [
        torch.arange(1000.0),
        torch.rand(40, 50, dtype=torch.float64).t(),
        torch.rand(2, 3, 16, 16).to(memory_format=torch.channels_last),
        torch.rand(20, 30).to(torch.bfloat16).view(torch.int16),
        torch.zeros(0, 5),
        torch.tensor(3),
        torch.rand(1, 20).expand(30, 20),
        torch.rand(100, 100)[::2, 3:50],
        torch.randn(300, dtype=torch.complex64),
        torch.rand(1000) > 0.5,
        np.arange(1000).reshape(10, 100),
        np.asfortranarray(np.random.rand(30, 40)),
        np.array([{"a": 1}, "b", None], dtype=object),
        {"nested": [{"deep": (torch.rand(500), "text", 3.5, None, b"bytes")}], "more": Pair(np.zeros(0), {1, 2})},
        ["text"] * 1000,
        b"x" * 10000,
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batches_survive_the_way(batch: Any) -> None:
    """As they come out of a pickle; tensors and arrays can be written to."""
    size, buffers = payload.encode(batch)
    raw = bytearray().join(memoryview(b).cast("B") for b in buffers)
    assert len(raw) == size
    found = payload.decode(memoryview(raw))
    if isinstance(batch, torch.Tensor):
        assert torch.equal(found, batch)
        assert (found.dtype, found.shape) == (batch.dtype, batch.shape)
        if batch.is_contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch.is_contiguous():
            assert found.stride() == batch.stride()
        found.fill_(1)
    elif isinstance(batch, np.ndarray):
        assert np.array_equal(found, batch)
        assert found.flags.writeable
    else:
        assert equal(found, batch)


class Labelled(torch.Tensor):
    """A kind of tensor."""

    label = "none"


def test_kinds_of_tensors_stay_what_they_are() -> None:
    batch = torch.rand(100, 10).as_subclass(Labelled)
    batch.label = "cat"
    parameter = torch.nn.Parameter(torch.rand(1000))
    found, other = payload.decode(memoryview(bytearray().join(payload.encode((batch, parameter))[1])))
    assert type(found) is Labelled
    assert found.label == "cat"
    assert torch.equal(found, batch)
    assert type(other) is torch.nn.Parameter
    assert other.requires_grad
    assert torch.equal(other, parameter)


def overlapping() -> list[torch.Tensor]:
    whole = torch.arange(1000.0)
    return [whole[3:500], whole[400:900:2], whole.view(torch.int32)[450:460], torch.zeros(9), whole[990:]]


class Wrapper(torch.Tensor):
    """Has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.held = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(Wrapper, lambda w: w.held, (args, kwargs or {}))
        return function(*args, **kwargs)


def nested(layout: torch.layout, size: int = 300) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.full((5,), 2.0), torch.ones(size)], layout=layout)


# What a dataset makes, and what of it is compared.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "nested": (lambda: nested(torch.strided), lambda v: [t.tolist() for t in v.unbind()]),
    "small nested": (lambda: nested(torch.strided, 3), lambda v: [t.tolist() for t in v.unbind()]),
    "jagged": (lambda: nested(torch.jagged), lambda v: [t.tolist() for t in v.unbind()]),
    "masked": (
        lambda: MaskedTensor(torch.arange(600.0), torch.arange(600) % 2 == 0),
        lambda v: (v.get_data().tolist(), v.get_mask().tolist()),
    ),
    "wrapper": (lambda: Wrapper(torch.arange(300)), lambda v: (type(v.held), v.held.tolist())),
    "storage": (lambda: torch.arange(1000).untyped_storage(), list),
    "small storage": (lambda: torch.tensor([1, 2], dtype=torch.uint8).untyped_storage(), list),
    "empty storage": (lambda: torch.UntypedStorage(0), list),
    "typed storage": (lambda: torch.arange(9).storage(), list),
    "sparse": (lambda: torch.eye(50).to_sparse(), lambda v: (v.layout, v.to_dense().tolist())),
    "csr": (lambda: torch.eye(50).to_sparse_csr(), lambda v: (v.layout, v.to_dense().tolist())),
    "on meta": (lambda: torch.empty(3, 4, device="meta"), lambda v: (v.device, v.shape, v.stride())),
    "empty": (lambda: torch.empty(0, 3, device="cpu"), lambda v: (v.device, v.shape, v.stride())),
    "strided": (lambda: torch.rand(100, 100)[::2, 3:50], lambda v: (v.stride(), v.tolist())),
    "spread": (lambda: torch.rand(1, 20).expand(30, 20), lambda v: (v.stride(), v.tolist())),
    "transposed": (lambda: torch.rand(20, 40, dtype=torch.float64).t(), lambda v: (v.stride(), v.tolist())),
    "scalar": (lambda: torch.tensor(3), lambda v: (v.shape, v.dtype, v.tolist())),
    "overlapping": (overlapping, lambda v: [(t.stride(), t.tolist()) for t in [v[0].fill_(-1), *v]]),
    "the same twice": (lambda: [torch.zeros(300)] * 2, lambda v: (v[0] is v[1], v[0].fill_(1).tolist(), v[1].tolist())),
    "named": (lambda: torch.rand(300).as_subclass(Labelled), lambda v: (type(v), v.tolist())),
}


class Makes(Dataset[Any]):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return KINDS[self.kind][0]()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_dataloader_hands_over_is_handed_over(make: MakeLoader, kind: str) -> None:
    """Each sample is compared as soon as it is there, and written to."""
    show = KINDS[kind][1]
    ours = [show(sample) for sample in make(Makes(kind), None, num_workers=1)]
    theirs = [show(sample) for sample in DataLoader(Seeded(Makes(kind)), None, num_workers=1)]
    assert ours == theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_goes_with_the_last_that_refers_to_it(kind: str) -> None:
    """Not when cycles are looked for: until then its slot is not free, and the next batch needs another."""
    raw = bytearray().join(payload.encode(KINDS[kind][0]())[1])
    memory = (ctypes.c_ubyte * len(raw)).from_buffer(raw)
    gone = weakref.ref(memory)
    gc.disable()
    try:
        batch = payload.decode(memoryview(memory).cast("B"))
        del memory
        del batch
        assert gone() is None
    finally:
        gc.enable()


def test_tensors_stay_on_their_device_whatever_the_default_is() -> None:
    batch = torch.empty(0, 3), torch.ones(2), torch.ones(300), torch.ones(8).untyped_storage()
    raw = memoryview(bytearray().join(payload.encode(batch)[1]))
    with torch.device("meta"):
        assert [each.device.type for each in payload.decode(raw)] == ["cpu"] * 4


def test_a_few_elements_of_much_are_packed() -> None:
    """Rather than what lies between them."""
    size, buffers = payload.encode(torch.arange(1_000_000)[::1000])
    assert size < 20_000
    found = payload.decode(memoryview(bytearray().join(buffers)))
    assert found.tolist() == list(range(0, 1_000_000, 1000))


def test_a_late_job_draws_the_same_whatever_generators_samplers_have(make: MakeLoader) -> None:
    def loader() -> CoordinatedLoader:
        inner = RandomSampler(range(21), generator=torch.Generator().manual_seed(5))
        return make(Noise(21), batch_sampler=BatchSampler(inner, 5, False))

    first = loader()
    list(first), list(first)
    batches = iter(first)
    seen = [digest(next(batches))]
    late = [digest(b) for b in loader()]
    seen += [digest(b) for b in batches]
    assert sorted(late) == sorted(seen)


def test_it_goes_on_where_it_was(make: MakeLoader) -> None:
    wanted = [list(map(digest, plain(Noise(41), 0, e, batch_size=4, shuffle=True))) for e in range(3)]
    first = make(Noise(41), 4, shuffle=True, num_workers=1)
    list(first)
    batches = iter(first)
    seen = [digest(next(batches)) for _ in range(5)]
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = make(Noise(41), 4, shuffle=True, num_workers=2, group="another")
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert seen + [digest(b) for b in second] == wanted[1]
    assert [digest(b) for b in second] == wanted[2]
    third = make(Noise(41), 4, shuffle=True, group="a third")
    third.load_state_dict(second.state_dict())
    assert third.state_dict()["epoch"] == 3
    with pytest.raises(ValueError, match="seed 0, and this loader has seed 1"):
        make(Noise(41), 4, seed=1).load_state_dict(state)


def test_epochs_can_be_chosen_and_given_up(make: MakeLoader) -> None:
    wanted = [list(map(digest, plain(Noise(41), 0, e, batch_size=4, shuffle=True))) for e in range(6)]
    loader = make(Noise(41), 4, shuffle=True, num_workers=1)
    loader.set_epoch(5)
    batches = iter(loader)
    assert [digest(next(batches)) for _ in range(3)] == wanted[5][:3]
    loader.set_epoch(2)
    assert [digest(b) for b in loader] == wanted[2]
    assert list(batches) == []  # it ended when another began
    assert [digest(b) for b in loader] == wanted[3]


def test_what_was_handed_over_outlives_the_loader(make: MakeLoader) -> None:
    loader = make(Noise(40), 4, shuffle=True, stage_bytes=1 << 20)
    wanted = plain(Noise(40), 0, 0, batch_size=4, shuffle=True)
    kept = list(loader)
    loader.close()
    other = make(Noise(40), 4, shuffle=True, stage_bytes=1 << 20)
    for _ in range(5):
        list(other)
    assert all(map(equal, kept, wanted))


def _told(number: int) -> None:
    os.environ["WORKER"] = str(number)


class Worker(Dataset[Any]):
    """Says who prepared it."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[int, ...]:
        time.sleep(0.01)
        info = get_worker_info()
        assert info is not None
        assert isinstance(info.dataset, Worker)
        assert torch.get_num_threads() == 1
        return info.id, info.num_workers, int(os.environ["WORKER"]), os.getpid()


@pytest.mark.parametrize("context", [None, "spawn"])
def test_workers_are_as_they_are_used_to_be(make: MakeLoader, context: str | None) -> None:
    loader = make(Worker(), 1, num_workers=2, worker_init_fn=_told, multiprocessing_context=context)
    found = torch.cat([torch.stack(batch, 1) for batch in loader])
    assert (found[:, 0] == found[:, 2]).all()
    assert (found[:, 1] == 2).all()
    assert os.getpid() not in found[:, 3]


def _fails(number: int) -> None:
    raise FileNotFoundError("no such disk")


def test_a_worker_that_cannot_begin_says_why(make: MakeLoader) -> None:
    with pytest.raises(FileNotFoundError, match="no such disk"):
        next(iter(make(Noise(20), 4, num_workers=1, worker_init_fn=_fails)))


class Unloadable(Noise):
    """Cannot be unpickled."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise ImportError("no such module")


def test_workers_that_cannot_begin_are_an_error(make: MakeLoader, capfd: pytest.CaptureFixture[str]) -> None:
    batches = iter(make(Unloadable(8), 4, num_workers=1, multiprocessing_context="spawn"))
    with pytest.raises(RuntimeError, match=r"workers end before they can begin: .* exited with status 1\."):
        next(batches)
    assert capfd.readouterr().err.count("ImportError: no such module") == 2


class Strange(Exception):
    """Cannot be made of a text alone."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)


class Raising(Noise):
    """Raises all kinds of things."""

    def __getitem__(self, index: int) -> Any:
        class Local(Exception):
            pass

        if index == 3:
            raise KeyError("no key")
        if index == 5:
            raise Strange(1, 2)
        if index == 7:
            raise Local("nobody else knows this class")
        if index == 9:
            return lambda: "which cannot be pickled"
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_exceptions_are_raised_as_a_dataloader_would(make: MakeLoader, workers: int) -> None:
    dataset = Raising(12)
    batches = iter(make(dataset, 1, num_workers=workers, collate_fn=lambda samples: samples[0]))
    plain_batches = iter(DataLoader(dataset, 1, num_workers=1, collate_fn=lambda samples: samples[0]))
    for index in range(12):
        if index not in (3, 5, 7, 9):
            next(batches)
            next(plain_batches)
            continue
        with pytest.raises(Exception) as ours:
            next(batches)
        if index in (3, 5):
            with pytest.raises(Exception) as theirs:
                next(plain_batches)
            assert type(ours.value) is type(theirs.value)
            assert "in __getitem__" in str(ours.value)
            # The same traceback from the dataset on.
            assert str(ours.value).splitlines()[-3:] == str(theirs.value).splitlines()[-3:]
        elif index == 7:
            assert isinstance(ours.value, RuntimeError)
            assert "nobody else knows this class" in str(ours.value)
            plain_batches = iter(DataLoader(Noise(12), 1))
        else:
            assert "pickle" in str(ours.value)
    assert list(batches) == []


class Endless(IterableDataset[int]):
    """Has no indices."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def test_what_cannot_be_is_refused(make: MakeLoader) -> None:
    with pytest.raises(ValueError, match=r"map-style dataset.*Endless is iterable"):
        make(Endless())
    with pytest.raises(ValueError, match="mutually exclusive"):
        make(Noise(10), shuffle=True, sampler=SequentialSampler(range(10)))
    with pytest.raises(ValueError, match="must not be negative"):
        make(Noise(10), num_workers=-1)
    for bad in ({"stage_bytes": 1000}, {"patience": -1}):
        with pytest.raises(ValueError, match="stage_bytes must be at least 65536, and patience not negative"):
            make(Noise(10), **bad)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"batch_size": 8}, "batch size is 8 here and 4 there"),
        ({"seed": 1}, "seed is 1 here and 0 there"),
        ({"dataset": Noise(22)}, "dataset length is 22 here and 21 there"),
        ({"drop_last": True, "patience": 3}, "drop last is True here and False there; patience is 3 here and None"),
        ({"stage_bytes": 1 << 20}, "stage bytes is 1048576 here and"),
        ({"collate_fn": list}, "collate fn is 'builtins.list' here and"),
        ({"dataset": Worker()}, r"dataset is 'test_loader\.Worker' here and 'loader_jobs\.Noise' there"),
    ],
)
def test_jobs_that_disagree_are_told_in_what(make: MakeLoader, other: dict[str, Any], named: str) -> None:
    first = make(Noise(21), 4)
    batches = iter(first)
    next(batches)
    with pytest.raises(Refused, match=named):
        iter(make(**{"dataset": Noise(21), "batch_size": 4, **other}))
    assert len(list(batches)) == 5  # which nobody else needs to know


def test_jobs_with_other_orders_are_refused(make: MakeLoader) -> None:
    class Private(SequentialSampler):
        def __init__(self, first: int) -> None:
            super().__init__(range(21))
            self.first = first

        def __iter__(self) -> Iterator[int]:
            return iter([self.first, *range(20)])

    batches = iter(make(Noise(21), 4, sampler=Private(20)))
    next(batches)
    with pytest.raises(Refused, match=r"the order of epoch 0 .* is not the one that the other jobs"):
        iter(make(Noise(21), 4, sampler=Private(19)))
    assert len(list(batches)) == 5


class Numbers(Dataset[Any]):
    """Without a length."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


class Batches:
    """Other batches each time, without a length."""

    def __init__(self, *epochs: list[Any]) -> None:
        self.epochs = iter(epochs)

    def __iter__(self) -> Iterator[list[int]]:
        yield from next(self.epochs)


class Longer:
    """Gives more than it says."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        yield from range(10)


@pytest.mark.parametrize("workers", [0, 1])
def test_without_lengths_it_gives_what_a_dataloader_gives(make: MakeLoader, workers: int) -> None:
    epochs = [[[0, 1, 2], [3], [4, 5]], [], [[7]]]
    ours = make(Numbers(), batch_sampler=Batches(*epochs), num_workers=workers)
    theirs: Any = DataLoader(Numbers(), batch_sampler=Batches(*epochs))
    for want in epochs:
        assert [b.tolist() for b in ours] == [b.tolist() for b in theirs] == want
    for sampler in (Longer, lambda: [3, 1, 2, 0], lambda: iter([1, 2, 3])):
        found = [b.tolist() for b in make(Numbers(), 2, sampler=sampler(), num_workers=workers, group=str(sampler))]
        assert found == [b.tolist() for b in DataLoader(Numbers(), 2, sampler=sampler())]
    with pytest.raises(TypeError):
        len(ours)


def test_a_sampler_without_an_end_is_an_error(make: MakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_LEAST", 10_000)
    monkeypatch.setattr(loader, "_NO_LENGTH", 20_000)
    with pytest.raises(RuntimeError, match=r"the sampler does not end: BatchSampler of count gave 20,\d+ samples\. "):
        iter(make(Numbers(), 4, sampler=itertools.count()))
    with pytest.raises(RuntimeError, match=r"does not end: cycle gave 10,\d+ samples, 1,\d+ times the length\. "):
        iter(make(Noise(10), batch_sampler=itertools.cycle([[1, 2], [3]]), group="other"))


def test_an_iterator_keeps_its_loader() -> None:
    """Of a loader that nobody keeps, as with DataLoader; and with the iterator all of it goes."""
    data = list(range(12))
    arguments: dict[str, Any] = {"batch_size": 4, "num_workers": 1, "group": "temporary"}
    want = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]

    def deeper() -> Iterator[Any]:
        yield from CoordinatedLoader(data, **arguments)

    assert [b.tolist() for b in CoordinatedLoader(data, **arguments)] == want
    assert next(iter(CoordinatedLoader(data, **arguments))).tolist() == want[0]
    assert [b.tolist() for b in deeper()] == want
    pairs = zip(CoordinatedLoader(data, **arguments), deeper(), strict=True)
    assert [(a.tolist(), b.tolist()) for a, b in pairs] == [(b, b) for b in want]
    found: Any = CoordinatedLoader(data, **arguments)
    found = enumerate(found)
    assert next(found)[1].tolist() == want[0]
    gc.collect()
    assert [(i, b.tolist()) for i, b in found] == [(1, want[1]), (2, want[2])]
    del found
    gc.collect()
    others = set(workers_of(os.getpid()))
    gc.disable()  # no cycle is to be found first
    try:
        batches = iter(CoordinatedLoader(data, **arguments))
        next(batches)
        assert set(workers_of(os.getpid())) - others
        del batches
        eventually(lambda: not set(workers_of(os.getpid())) - others)
    finally:
        gc.enable()


def test_where_a_loader_is_outlives_its_iterator(make: MakeLoader) -> None:
    first = make(Noise(41), 4, shuffle=True, num_workers=1)
    for count, _ in enumerate(first):
        if count == 3:
            break
    state = first.state_dict()
    assert (state["epoch"], state["taken"]) == (0, 4)
    second = make(Noise(41), 4, shuffle=True, group="another")
    second.load_state_dict(state)
    wanted = [digest(b) for b in plain(Noise(41), 0, 0, batch_size=4, shuffle=True)]
    assert [digest(b) for b in second] == wanted[4:]


def test_arguments_of_a_dataloader_are_taken(make: MakeLoader) -> None:
    """All of one that is there."""
    names = inspect.signature(DataLoader).parameters
    loader_ = DataLoader(Noise(21), 4, num_workers=1, prefetch_factor=4, persistent_workers=True)
    arguments = {name: getattr(loader_, name) for name in names if hasattr(loader_, name)}
    for name in ("batch_sampler", "dataset"):  # batch_size was turned into the first
        del arguments[name]
    ours = make(Noise(21), **arguments)
    assert all(map(equal, ours, plain(Noise(21), 0, 0, batch_size=4)))
    defaults = {name: p.default for name, p in names.items() if p.default is not p.empty and name != "dataset"}
    assert all(map(equal, make(Noise(21), **defaults, group="defaults"), plain(Noise(21), 0, 0)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prefetch_factor": 2}, "prefetch_factor and persistent_workers are for workers"),
        ({"persistent_workers": True}, "prefetch_factor and persistent_workers are for workers"),
        ({"prefetch_factor": -1, "num_workers": 1}, "must not be negative, and is -1"),
        ({"pin_memory_device": "xpu"}, "pinned for CUDA only"),
        ({"group": 1}, "group must be text, not 1. Write group='1'"),
        ({"group": None}, "group must be text, not None"),
        ({"group": "a\0b"}, "without NUL"),
        ({"group": ""}, "of 1 to 1000 characters"),
        ({"group": "x" * 100_000}, "of 1 to 1000 characters"),
        ({"identity": 3}, "identity must be text, not 3. Write identity='3'"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line(make: MakeLoader, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as raised:
        make(Noise(21), 4, **arguments)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_directory_must_be_the_users_own(make: MakeLoader, runtime: Path) -> None:
    runtime.mkdir(mode=0o755)
    runtime.chmod(0o755)
    with pytest.raises(RuntimeError, match="nobody else may enter"):
        iter(make(Noise(10)))


def test_the_broker_ends_with_the_last_job_and_leaves_nothing(make: MakeLoader, runtime: Path) -> None:
    a, b = make(Noise(10)), make(Noise(10))
    list(a), list(b)
    pid = broker_pid("test")
    assert pid is not None
    a.close()
    time.sleep(1.5)
    assert broker_pid("test") == pid
    b.close()
    eventually(lambda: not Path(f"/proc/{pid}").exists() or broker_pid("test") is None)
    eventually(lambda: list(runtime.iterdir()) == [])


def test_a_stranger_ends_only_its_own_connection(make: MakeLoader) -> None:
    loader = make(Noise(21), 4, num_workers=1)
    batches = iter(loader)
    next(batches)
    path = wire.socket_path("test")
    for packet in (
        b"nonsense",
        b"[" * 60000,
        b"{}",
        b'{"verb": "begin"}',
        b'{"verb": "join", "name": 3, "profile": {"stage_bytes": 1}}',
        b'{"verb": "join", "name": "x", "workers": 0, "profile": {"stage_bytes": 1e99}}',
        b'{"verb": "work", "name": ""}',
        b'{"verb": "work", "name": "nobody"}',
        b'{"verb": "stats"}',
        os.urandom(5000),
    ):
        for repeated in (1, 50):
            with wire.connect(path) as sock:
                try:
                    for _ in range(repeated):
                        sock.send(packet)
                except OSError:
                    pass
    assert len(list(batches)) == 5
    assert broker_pid("test") is not None


def test_ten_thousand_batches_leave_nothing_behind(make: MakeLoader) -> None:
    """Memory, descriptors and mappings of the job and of the broker are at the end what they were after a tenth."""
    loader = make(Noise(1000, side=16), 2, shuffle=True, num_workers=1, stage_bytes=1 << 20)

    def used() -> tuple[list[int], list[int]]:
        gc.collect()
        broker = broker_pid("test")
        assert broker is not None
        fds = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), broker)]
        fds.append(len(Path("/proc/self/maps").read_text().splitlines()))
        status = [Path(f"/proc/{pid}/status").read_text() for pid in (os.getpid(), broker)]
        return fds, [int(re.search(r"VmRSS:\s+(\d+)", text)[1]) for text in status]  # type: ignore[index]

    count = 0
    before: tuple[list[int], list[int]] | None = None
    kept = []
    for epoch in range(20):
        for batch in loader:
            count += 1
            if count % 100 == 0:
                kept.append(batch)
            kept = kept[-10:]
        del batch
        if epoch == 1:
            before = used()
    after = used()
    assert count == 10_000
    assert before is not None
    assert all(abs(a - b) <= 40 for a, b in zip(after[0], before[0], strict=True))
    assert all(a - b < 8 << 10 for a, b in zip(after[1], before[1], strict=True))  # KiB
    with wire.connect(wire.socket_path("test")) as sock:
        wire.send(sock, {"verb": "stats"})
        answer = wire.receive(sock)
    assert answer is not None
    stage = answer[0]["stats"]["stage"]
    assert stage["used_bytes"] + stage["idle_bytes"] <= stage["bytes"] == 1 << 20
    kept.clear()
    loader.close()
    assert not [name for name in os.listdir("/dev/shm") if str(os.getpid()) in re.findall(r"\d+", name)]


class Recorder:
    """Pins nothing, and tells what it was asked to pin."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.registered = 0
        self.copying = False

    def register(self, address: int, size: int) -> None:
        """Pin."""
        assert address not in self.pinned
        self.pinned[address] = size
        self.registered += 1

    def unregister(self, address: int) -> None:
        """Pin no longer."""
        del self.pinned[address]

    def fence(self) -> Callable[[], bool]:
        """What is under way."""
        return lambda: not self.copying


def test_slots_are_pinned_once_and_not_freed_while_they_are_copied() -> None:
    """But for CUDA itself, which is not here."""
    memory = area.create("test")
    os.ftruncate(memory, 1 << 20)
    writer, recorder = stage.Writer(memory), Recorder()
    reader = stage.Reader(memory, recorder)
    slot, freed = (8192, 8192), []
    for turn in range(5):
        writer.write(slot, [bytes([turn]) * 8192])
        view = reader.view(slot, lambda: freed.append(1))
        assert bytes(view) == bytes([turn]) * 8192
        recorder.copying = True
        del view
        reader.trim()
        assert len(freed) == turn
        recorder.copying = False
        reader.trim()
        assert len(freed) == turn + 1
    assert (recorder.registered, list(recorder.pinned.values())) == (1, [8192])
    child = os.fork()
    if not child:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        faulthandler.disable()
        stage.Reader(memory, Recorder()).view(slot, lambda: None)[0] = 1
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV  # rather than spoil another's batch
    del reader
    assert recorder.pinned == {}
    writer.close()
    os.close(memory)


def test_pinned_or_not_it_gives_the_same(make: MakeLoader) -> None:
    loader = make(Noise(21), 4, shuffle=True, num_workers=1, pin_memory=True)
    assert all(map(equal, loader, plain(Noise(21), 0, 0, batch_size=4, shuffle=True)))


def test_broker_and_groups_need_no_torch() -> None:
    script("import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import coordlfs_loader.broker")
    script("import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import coordlfs_loader.groups")


def test_groups_are_shown(make: MakeLoader, runtime: Path) -> None:
    assert json.loads(coordlfs("groups", "--json").stdout) == []
    assert "no group is at work" in coordlfs("groups").stdout
    loaders = [make(Noise(40), 4, num_workers=n, group="lr sweep") for n in (0, 1)]
    iterators = list(map(iter, loaders))  # one that is dropped ends its epoch
    for batches in iterators:
        for _ in range(3):
            batch = next(batches)
    found = json.loads(coordlfs("groups", "--json").stdout)
    assert [f["group"] for f in found] == ["lr sweep"]
    (group,) = found
    assert [j["pid"] for j in group["jobs"]] == [os.getpid()] * 2
    assert [j["workers"] for j in group["jobs"]] == [0, 1]
    assert [(j["epoch"], j["batches"]) for j in group["jobs"]] == [(0, 10)] * 2
    assert all(j["taken"] >= 1 for j in group["jobs"])
    assert group["samples_delivered"] >= 24
    assert group["samples_prepared"] + group["samples_saved"] == group["samples_delivered"]
    shown = coordlfs("groups").stdout
    assert "lr sweep" in shown
    assert str(os.getpid()) in shown
    assert "0: " in shown
    del batch
