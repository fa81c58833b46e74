"""HintedSampler and CoordinatedLoader: the same indices as without hints, and the mount knows of them."""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coordlfs_loader import CoordinatedLoader, HintedSampler
from coordlfs_loader.announcer import files_of
from mounts import MakeMount, eventually, read, write_files
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler, Subset

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


def test_files_elsewhere_and_strange_ones_are_no_trouble(source: Path, names: list[str]) -> None:
    plain = list(samplers()["random"])
    here = [source / name for name in names]
    nowhere = [source / "nowhere" / name for name in names]

    def fails(index: int) -> str:
        raise RuntimeError("no path")

    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(5)

    for files in (here, nowhere, here[:3], fails, []):
        assert list(HintedSampler(samplers()["random"], files)) == plain
    assert list(HintedSampler(Endless(), here)) == list(range(5))
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
