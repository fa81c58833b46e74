"""HintedSampler and CoordinatedLoader: the same indices as without hints, and the mount knows of them."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import random
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coordlfs_loader import CoordinatedLoader, HintedSampler
from coordlfs_loader.announcer import files_of
from mounts import MakeMount, eventually, read, write_files
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

COUNT, SIZE = 120, 20_000


class Files(Dataset[Any]):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, sum(read(self.paths[index])[:100])


@pytest.fixture
def names(source: Path) -> list[str]:
    return write_files(source, COUNT, SIZE)


def samplers() -> dict[str, Any]:
    data = range(COUNT)
    return {
        "random": RandomSampler(data, generator=torch.Generator().manual_seed(1)),
        "replacement": RandomSampler(
            data, replacement=True, num_samples=50, generator=torch.Generator().manual_seed(1)
        ),
        "distributed": DistributedSampler(data, num_replicas=2, rank=1, seed=3),  # type: ignore[arg-type]
        "batches": BatchSampler(RandomSampler(data, generator=torch.Generator().manual_seed(2)), 7, drop_last=True),
    }


@pytest.mark.parametrize("kind", samplers())
def test_the_indices_are_those_of_the_sampler(kind: str, source: Path, mount: MakeMount, names: list[str]) -> None:
    mounted = mount(source, "1M")
    plain, hinted = samplers()[kind], HintedSampler(samplers()[kind], [mounted.path / name for name in names])
    assert len(hinted) == len(plain)
    for epoch in (0, 1, 5):
        for sampler in (plain, hinted):
            if kind == "distributed":
                sampler.set_epoch(epoch)
        order = list(plain)
        assert list(hinted) == order
        [job] = mounted.stats()["hints"]["jobs"]
        files = sum(map(len, order)) if kind == "batches" else len(order)
        assert (job["files"], job["position"], job["readers"]) == (files, files, 1)
        assert job["epoch"] == (epoch if kind == "distributed" else {0: 0, 1: 1, 5: 2}[epoch])
    if kind == "batches":
        assert hinted.batch_size == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_reads_the_same(workers: int, source: Path, mount: MakeMount, names: list[str]) -> None:
    mounted = mount(source, "1M")
    data = Files([mounted.path / name for name in names])

    def epoch(sampler: Sampler[Any]) -> list[Any]:
        return [batch for pair in DataLoader(data, 16, sampler=sampler, num_workers=workers) for batch in pair]

    plain = epoch(samplers()["random"])
    hinted = epoch(HintedSampler(samplers()["random"], data.paths))
    assert all(map(torch.equal, plain, hinted))
    eventually(lambda: mounted.stats()["hints"]["jobs"][0]["position"] == COUNT)
    batches = DataLoader(data, batch_sampler=HintedSampler(samplers()["batches"], data.paths.__getitem__))
    assert len(list(batches)) == COUNT // 7


class Endless:
    """Has a length, and no end, as mmdetection's InfiniteSampler."""

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield from torch.randperm(COUNT, generator=generator).tolist()


class Unsized:
    """An order of another length each time, without saying so."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = iter(lengths)

    def __iter__(self) -> Iterator[int]:
        yield from range(next(self.lengths))


def test_a_sampler_without_an_end_is_drawn_in_windows(source: Path, mount: MakeMount, names: list[str]) -> None:
    mounted = mount(source, "1M")
    hinted = HintedSampler(Endless(), [mounted.path / name for name in names])
    want = list(itertools.islice(Endless(), 10_000))
    tracemalloc.start()
    drawn = iter(hinted)
    assert list(itertools.islice(drawn, 5000)) == want[:5000]
    before = tracemalloc.get_traced_memory()[0]
    [job] = mounted.stats()["hints"]["jobs"]
    assert 5000 - 64 <= job["position"] <= job["files"] <= 5000 + 4096 + 64
    assert job["files"] > 5000  # what is announced is ahead of it
    assert list(itertools.islice(drawn, 5000)) == want[5000:]
    assert tracemalloc.get_traced_memory()[0] - before < 500_000
    tracemalloc.stop()
    drawn.close()  # type: ignore[attr-defined]
    [job] = mounted.stats()["hints"]["jobs"]
    assert job["position"] == 10_000


def test_samplers_without_a_length_are_announced(source: Path, mount: MakeMount, names: list[str]) -> None:
    mounted = mount(source, "1M")
    paths = [mounted.path / name for name in names]
    hinted = HintedSampler(Unsized(100, 20, 0, 50), paths)
    for epoch, length in enumerate((100, 20)):
        assert list(hinted) == list(range(length))
        [job] = mounted.stats()["hints"]["jobs"]
        assert (job["epoch"], job["files"], job["position"]) == (epoch, length, length)
    assert list(hinted) == []
    assert list(hinted) == list(range(50))
    batches = BatchSampler(SequentialSampler(range(COUNT)), 50, False)
    assert list(HintedSampler(batches, paths)) == list(batches)
    assert sorted(job["files"] for job in mounted.stats()["hints"]["jobs"]) == [50, COUNT]


class Feedback:
    """Draws what depends on what became of the last sample."""

    def __init__(self) -> None:
        self.seen = 0

    def __iter__(self) -> Iterator[int]:
        for i in range(100):
            assert self.seen == i
            yield i


def test_where_there_is_no_mount_nothing_is_drawn_ahead(source: Path, names: list[str]) -> None:
    sampler = Feedback()
    for _ in HintedSampler(sampler, [source / name for name in names]):
        sampler.seen += 1
    assert sampler.seen == 100


@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_what_a_sampler_raises_is_raised_in_its_place(
    error: type[BaseException], source: Path, mount: MakeMount, names: list[str]
) -> None:
    def draw() -> Iterator[int]:
        yield from range(50)
        raise error("no more")

    mounted = mount(source, "1M")
    drawn = iter(HintedSampler(draw(), [mounted.path / name for name in names]))
    assert list(itertools.islice(drawn, 50)) == list(range(50))
    with pytest.raises(error, match="no more"):
        next(drawn)


class Base(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


class Keys(Base):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise KeyError(name)


class Raises(Base):
    @property
    def files(self) -> Any:
        raise SystemExit("not downloaded yet")

    paths = imgs = files


class Hangs(Base):
    @property
    def samples(self) -> Any:
        threading.Event().wait()

    indices = dataset = samples


class Circle(Base):
    indices = range(8)

    def __init__(self) -> None:
        self.dataset = self


class Opens(Base):
    """A list whose elements mind."""

    class List(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            raise SystemExit("no element")

    def __init__(self) -> None:
        self.samples = self.List(["/a"] * 8)


class Unsaid(Base):
    samples = ("/a",)

    def __len__(self) -> int:
        raise OSError("not downloaded yet")


@pytest.mark.parametrize("kind", [Keys, Raises, Hangs, Circle, Opens, Unsaid])
def test_datasets_that_mind_being_looked_at_are_not(kind: type[Base]) -> None:
    assert files_of(kind()) is None
    if kind is not Unsaid:
        batches = CoordinatedLoader(kind(), 4, group=f"minds {kind.__name__}", num_workers=1)
        assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_files_in_slots_and_of_a_class_are_found() -> None:
    class Slots(Base):
        __slots__ = ("samples",)
        samples: list[tuple[str, int]]

    slots = Slots()
    assert files_of(slots) is None
    slots.samples = [(f"/{i}", i) for i in range(8)]
    found = files_of(slots)
    assert found is not None
    assert found(3) == "/3"


def test_files_elsewhere_and_strange_ones_are_no_trouble(source: Path, names: list[str]) -> None:
    plain = list(samplers()["random"])
    here = [source / name for name in names]
    nowhere = [source / "nowhere" / name for name in names]

    def fails(index: int) -> str:
        raise RuntimeError("no path")

    for files in (here, nowhere, here[:3], fails, []):
        assert list(HintedSampler(samplers()["random"], files)) == plain
    assert list(HintedSampler(Unsized(5), here)) == list(range(5))
    again = pickle.loads(pickle.dumps(HintedSampler(samplers()["random"], here)))
    assert list(again) == plain
    assert list(copy.deepcopy(again)) != []


def test_a_mount_that_goes_away_ends_hints_and_nothing_else(source: Path, mount: MakeMount, names: list[str]) -> None:
    mounted = mount(source, "1M")
    hinted = HintedSampler(samplers()["random"], [mounted.path / name for name in names])
    drawn = []
    for at, index in enumerate(hinted):
        drawn.append(index)
        if at == 10:
            mounted.expect_errors = True
            os.kill(mounted.supervisor, 9)
            eventually(lambda: not os.path.ismount(mounted.path), what="unmounted")
    assert drawn == list(samplers()["random"])
    assert sorted(hinted) == list(range(COUNT))


def test_files_of_datasets_as_they_are_usual() -> None:
    paths = [f"/data/{i}" for i in range(6)]

    class Folder(Dataset[Any]):
        samples = [(path, 0) for path in paths]  # noqa: RUF012

        def __len__(self) -> int:
            return len(self.samples)

    class Bytes(Dataset[Any]):
        samples = [(b"", 0)]  # noqa: RUF012

        def __len__(self) -> int:
            return 5

    found = files_of(Subset(Subset(Folder(), [5, 4, 3]), [2, 0]))
    assert found is not None
    assert [found(0), found(1)] == [paths[3], paths[5]]
    assert files_of(Bytes()) is None
    assert files_of([1, 2, 3]) is None


def test_a_coordinated_loader_announces_its_order_by_itself(source: Path, mount: MakeMount, names: list[str]) -> None:
    mounted = mount(source, "1M")
    data = Files([mounted.path / name for name in names])
    group = f"hints-{random.getrandbits(64)}"
    first = CoordinatedLoader(data, 16, True, num_workers=1, group=group)
    second = CoordinatedLoader(data, 16, True, num_workers=1, group=group)
    try:
        for epoch in range(2):
            ours, theirs = iter(first), iter(second)
            for _ in range(len(first)):
                mine, other = next(ours), next(theirs)
                assert torch.equal(mine[0], other[0])
                for index, total in zip(*mine, strict=True):
                    assert sum(read(source / names[index])[:100]) == total
            assert next(ours, None) is next(theirs, None) is None
            [job] = mounted.stats()["hints"]["jobs"]
            assert (job["epoch"], job["files"], job["position"], job["readers"]) == (epoch, COUNT, COUNT, 1)
            assert job["hits"] + job["misses"] == COUNT
        first.close()
        assert len(list(second)) == len(second)  # now it is the other that announces
        eventually(lambda: any(job["epoch"] == 2 for job in mounted.stats()["hints"]["jobs"]))
    finally:
        first.close()
        second.close()
