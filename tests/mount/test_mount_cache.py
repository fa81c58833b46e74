"""MinIO on real mounts: what is read from the source, what stays in memory, and whom it is charged to."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mounts import (
    CHUNK,
    MIB,
    PAGE,
    PATIENCE,
    Cgroup,
    MakeMount,
    Mount,
    coordlfs,
    eventually,
    forget,
    locked,
    noise,
    page_count,
    read,
    resident,
    script,
    write_files,
)

from coordlfs.kernel.writeback import write_back

# -- epochs of jobs that read -------------------------------------------------------------------------------------

_EPOCH = """
import os, random, sys, threading
paths, seed, readers = sys.argv[3:], sys.argv[1], int(sys.argv[2])
random.Random(seed).shuffle(paths)
def work(part):
    for path in part:
        fd = os.open(path, os.O_RDONLY)
        while os.read(fd, 1 << 20):
            pass
        os.close(fd)
threads = [threading.Thread(target=work, args=(paths[i::readers],)) for i in range(readers)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def _epoch(mounted: Mount, names: list[str], seed: int, readers: int = 4) -> None:
    """Read every file once, in random order, with several threads; then drop what is not pinned."""
    mounted.read_all(names, seed, readers)
    mounted.settle()
    mounted.forget()


def _dataset(source: Path) -> dict[str, int]:
    """Files of many sizes, 20 MiB in all."""
    sizes = random.Random(1)
    dataset = {f"f{number:03}": int(sizes.lognormvariate(11, 0.7)) for number in range(220)}
    dataset |= {"tiny": 1, "page": PAGE, "large": 2 * MIB + 5, "empty": 0}
    for name, size in dataset.items():
        (source / name).write_bytes(noise(size, hash(name) & 0xFF))
    write_back(source)
    return dataset


def _held_by_keepers(mounted: Mount) -> int:
    return locked(mounted.stats()["processes"]["keepers"])


def _assert_holds_what_it_says(mounted: Mount, names: list[str]) -> None:
    figures = mounted.stats()
    assert figures["pinned_bytes"] <= figures["capacity_bytes"]
    assert _held_by_keepers(mounted) == figures["pinned_bytes"]
    assert sum(resident(mounted.path / name) for name in names) * PAGE == figures["pinned_bytes"]


def test_each_epoch_reads_what_is_not_pinned(source: Path, mount: MakeMount) -> None:
    dataset = _dataset(source)
    names, total = list(dataset), sum(dataset.values())
    mounted = mount(source, str(total // 2))
    _epoch(mounted, names, 1)
    assert mounted.source_bytes() == total
    _epoch(mounted, names, 2)
    pinned = {name for name in names if mounted.cached(name) == "pinned" and dataset[name]}
    unpinned = {name for name in names if mounted.cached(name) == "no"}
    assert pinned | unpinned | {"empty"} == set(names)
    misses = sum(dataset[name] for name in unpinned)
    room = mounted.stats()["capacity_bytes"] - mounted.stats()["pinned_bytes"]
    assert all(page_count(dataset[name]) * PAGE > room for name in unpinned), "there was room for more"
    assert misses < 0.55 * total
    for epoch in range(3, 6):
        before = mounted.source_bytes()
        _epoch(mounted, names, epoch)
        assert mounted.source_bytes() - before == misses
        assert {name for name in names if mounted.cached(name) == "pinned" and dataset[name]} == pinned
        figures = mounted.stats()
        assert figures["epochs"] == epoch
        assert figures["pinned_items"] == len(pinned)
        assert figures["pinned_bytes"] == sum(page_count(dataset[name]) for name in pinned) * PAGE
        last = figures["epoch"]
        assert (last["number"], last["bytes"], last["misses"]) == (epoch, misses, len(unpinned))
        assert last["hit_rate"] == figures["hit_rate"] == round(1 - misses / total, 4)
    history = mounted.stats()["epoch_history"]
    assert [e["number"] for e in history] == [1, 2, 3, 4]
    assert [e["bytes"] for e in history[2:]] == [misses, misses]
    assert history[0]["bytes"] == total
    _assert_holds_what_it_says(mounted, names)


def test_everything_fits(source: Path, mount: MakeMount) -> None:
    dataset = _dataset(source)
    names, total = list(dataset), sum(dataset.values())
    mounted = mount(source, "100M")
    for epoch in range(1, 5):
        _epoch(mounted, names, epoch)
        time.sleep(0.1)  # epochs that miss nothing are told apart by the time between them
        figures = mounted.stats()
        assert figures["source"]["bytes"] == total
        assert figures["pinned_items"] == len(names) - 1
        assert figures["epochs"] == epoch
        assert figures["hit_rate"] == (0.0 if epoch == 1 else 1.0)
    _assert_holds_what_it_says(mounted, names)
    assert figures["source"]["files"] == len(names) - 1
    assert figures["fill"] == round(figures["pinned_bytes"] / figures["capacity_bytes"], 4)


def test_no_cache(source: Path, mount: MakeMount) -> None:
    dataset = _dataset(source)
    names, total = list(dataset), sum(dataset.values())
    mounted = mount(source, "0")
    for epoch in range(1, 4):
        _epoch(mounted, names, epoch)
        figures = mounted.stats()
        assert figures["source"]["bytes"] == epoch * total
        assert (figures["pinned_items"], figures["processes"]["keepers"]) == (0, [])
        assert (figures["epochs"], figures["hit_rate"]) == (epoch, 0.0)
    assert sum(resident(mounted.path / name) for name in names) == 0


def test_figures_have_what_was_read_just_before(source: Path, mount: MakeMount) -> None:
    """Also where several threads answer without the GIL, and so without the counters."""
    names = write_files(source, 40, 50_000)
    mounted = mount(source, "0")
    expected = 0
    with ThreadPoolExecutor(8) as readers:
        for _ in range(20):
            for first in range(0, len(names), 8):
                some = names[first : first + 8]
                for name in some:
                    forget(mounted.path / name)
                for name, data in zip(some, readers.map(lambda name: read(mounted.path / name), some), strict=True):
                    assert data == (source / name).read_bytes()
                expected += 50_000 * len(some)
                assert mounted.source_bytes() == expected


def test_four_readers_of_the_same_files_read_the_source_once(source: Path, mount: MakeMount) -> None:
    # Among them files of several READs, and such as the keeper must drop and read again.
    names = write_files(source, 30, 110_000)
    large = {"l1": 3 * MIB + 5, "l2": 5 * MIB, "l3": CHUNK + 3 * MIB}
    for name, size in large.items():
        (source / name).write_bytes(noise(size))
    names += large
    total = 30 * 110_000 + sum(large.values())
    for cache in ("0", "300M"):
        mounted = mount(source, cache)
        jobs = [
            subprocess.Popen([sys.executable, "-c", _EPOCH, "same", "1", *(str(mounted.path / n) for n in names)])
            for _ in range(4)
        ]
        assert [job.wait(PATIENCE) for job in jobs] == [0, 0, 0, 0]
        figures = mounted.settle()
        assert figures["source"]["bytes"] == total
        # What a keeper read, to complete an item, is what a reader missed.
        assert sum(e["bytes"] for e in [*figures["epoch_history"], figures["epoch"]]) == total
        mounted.end()


def test_a_large_file_is_cached_by_the_chunk(source: Path, mount: MakeMount) -> None:
    size = 13 * CHUNK
    data = noise(size)
    (source / "big").write_bytes(data)
    (source / "small").write_bytes(noise(5000))
    (source / "late").write_bytes(noise(20 * MIB))
    mounted = mount(source, "64M")
    assert read(mounted.path / "small") == noise(5000)
    mounted.settle()
    for _ in range(2):  # chunks may find no room in the stash the first time
        assert read(mounted.path / "big") == data
        mounted.settle()
        forget(mounted.path / "big")
    assert (mounted.cached("small"), mounted.cached("big"), mounted.cached("late")) == ("pinned", "partial", "no")
    figures = mounted.stats()
    held = (figures["pinned_bytes"] - 2 * PAGE) // CHUNK
    assert held == 3  # a fourth does not fit beside the small file
    for _ in range(2):
        before = mounted.source_bytes()
        assert read(mounted.path / "big") == data
        mounted.settle()
        forget(mounted.path / "big")
        assert mounted.source_bytes() - before == size - held * CHUNK
    _assert_holds_what_it_says(mounted, ["big", "small", "late"])


def test_a_large_file_is_read_once_and_is_one_epoch(source: Path, mount: MakeMount) -> None:
    size = 100 * MIB + 1
    data = noise(size)
    (source / "big").write_bytes(data)
    mounted = mount(source, "512M")
    assert read(mounted.path / "big") == data
    figures = mounted.settle()
    assert figures["source"]["bytes"] == size
    assert (figures["epochs"], figures["source"]["files"], figures["pinned_items"]) == (1, 1, 7)
    assert mounted.cached("big") == "pinned"
    with mounted.messages() as sent:
        assert read(mounted.path / "big") == data
    assert sent["read"] == 0


def test_an_item_is_read_once_even_where_the_cache_is_smaller_than_a_chunk(source: Path, mount: MakeMount) -> None:
    (source / "big").write_bytes(noise(CHUNK))
    mounted = mount(source, "20M")
    assert read(mounted.path / "big") == noise(CHUNK)
    assert mounted.settle()["source"]["bytes"] == CHUNK


def test_a_part_of_a_file_counts_whole_once_it_is_pinned(source: Path, mount: MakeMount) -> None:
    # The capacity counts pages in memory: whoever reads a piece has the whole item brought in, once.
    (source / "f").write_bytes(noise(4 * MIB))
    mounted = mount(source)
    fd = os.open(mounted.path / "f", os.O_RDONLY)
    assert os.pread(fd, 100, MIB) == noise(4 * MIB)[MIB : MIB + 100]
    os.close(fd)
    eventually(lambda: mounted.cached("f") == "pinned")
    assert mounted.settle()["source"]["bytes"] == 4 * MIB
    _assert_holds_what_it_says(mounted, ["f"])


# -- no second copy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["0", "200M"])
def test_the_source_is_not_cached_too(source: Path, mount: MakeMount, cache: str) -> None:
    sizes = {"a": 1, "b": 110_000, "c": 3 * MIB + 5, "d": 40 * MIB}
    for name, size in sizes.items():
        (source / name).write_bytes(noise(size))
    write_back(source)
    for name in sizes:
        forget(source / name)
    mounted = mount(source, cache)
    for name, size in sizes.items():
        assert read(mounted.path / name) == noise(size)
    mounted.settle()
    assert {name: resident(source / name) for name in sizes} == dict.fromkeys(sizes, 0)


def test_what_the_source_has_cached_stays(source: Path, mount: MakeMount) -> None:
    (source / "f").write_bytes(noise(3 * MIB))
    write_back(source)
    read(source / "f")
    mounted = mount(source)
    assert read(mounted.path / "f") == noise(3 * MIB)
    mounted.settle()
    assert resident(source / "f") == 3 * MIB // PAGE


# -- memory cgroups -----------------------------------------------------------------------------------------------

_BY_MMAP = """
import mmap, os, sys
for path in sys.argv[3:]:
    fd = os.open(path, os.O_RDONLY)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        sum(mapped[::4096])
    os.close(fd)
"""


def _job(group: Cgroup, program: str, paths: list[Path], readers: int = 4) -> None:
    script(program, "1", readers, *paths, preexec_fn=group.enter)


@pytest.mark.parametrize("program", [_EPOCH, _BY_MMAP], ids=["read", "mmap"])
@pytest.mark.parametrize(("count", "size"), [(900, 110_000), (1, 100 * MIB)], ids=["files", "one-large"])
def test_a_job_in_a_small_cgroup_is_not_charged(
    source: Path, mount: MakeMount, cgroup: Callable[[int], Cgroup], program: str, count: int, size: int
) -> None:
    names = write_files(source, count, size)
    mounted = mount(source, "256M")
    group = cgroup(40 * MIB)
    for _ in range(3):
        _job(group, program, [mounted.path / name for name in names])
        mounted.settle()
    figures = mounted.stats()
    assert figures["pinned_bytes"] == count * page_count(size) * PAGE
    assert figures["source"]["bytes"] < 1.05 * count * size  # a small group may lose what was read ahead
    assert group.stat()["unevictable"] < MIB
    group.reclaim()
    assert group.usage() < 2 * MIB
    with mounted.messages() as sent:
        _job(group, program, [mounted.path / name for name in names])
    assert sent["read"] == 0


def test_admitting_for_a_job_elsewhere_reads_the_source_once(
    source: Path, mount: MakeMount, cgroup: Callable[[int], Cgroup]
) -> None:
    dataset = _dataset(source)
    mounted = mount(source, "512M")
    _job(cgroup(200 * MIB), _EPOCH, [mounted.path / name for name in dataset])
    figures = mounted.settle()
    assert figures["source"]["bytes"] == sum(dataset.values())
    assert figures["pinned_items"] == len(dataset) - 1
    _assert_holds_what_it_says(mounted, list(dataset))


def test_a_cgroup_smaller_than_a_capacity_that_is_too_small(
    source: Path, mount: MakeMount, cgroup: Callable[[int], Cgroup]
) -> None:
    names = write_files(source, 900, 110_000)
    mounted = mount(source, "50M")
    group = cgroup(24 * MIB)
    paths = [mounted.path / name for name in names]
    for _ in range(2):
        _job(group, _EPOCH, paths, readers=8)
        mounted.settle()
    figures: dict[str, Any] = mounted.stats()
    room = figures["capacity_bytes"] - figures["pinned_bytes"]
    assert room < page_count(110_000) * PAGE
    group.reclaim()
    before = mounted.source_bytes()
    # By one: of eight that take turns, one that is not let run for 20 ms has its pages taken by the others, uncopied.
    _job(group, _EPOCH, paths, readers=1)
    assert mounted.source_bytes() - before == (900 - figures["pinned_items"]) * 110_000


# -- more files than one process may map --------------------------------------------------------------------------


@pytest.fixture
def few_mappings(place: Path, _may_mount: None) -> Iterator[None]:
    """Processes that are started now believe that they may have 3,500 mappings: in this mount namespace only."""
    (place / "max_map_count").write_text("3500\n")
    subprocess.run(["mount", "--bind", place / "max_map_count", "/proc/sys/vm/max_map_count"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "/proc/sys/vm/max_map_count"], check=True)


_MAP_ALL = """
import sys, tempfile
from coordlfs.cache import keeper
from coordlfs.kernel import pages
most = int(open("/proc/sys/vm/max_map_count").read()) - keeper._SPARE_MAPPINGS
with tempfile.TemporaryFile() as f:
    f.write(b"x" * pages.PAGE)
    f.flush()
    for _ in range(most):
        pages.map_file(f.fileno(), 0, pages.PAGE)
print("mapped")
"""


def test_a_keeper_may_have_as_many_mappings_as_it_expects() -> None:
    """As the kernel counts them, together with those of the interpreter."""
    assert script(_MAP_ALL) == "mapped\n"


@pytest.mark.usefixtures("few_mappings")
def test_more_files_than_one_keeper_may_map(in_memory: Path, mount: MakeMount) -> None:
    count = 6_000
    for number in range(count):
        fd = os.open(in_memory / f"{number}", os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"%d" % (number % 10))
        os.close(fd)
    mounted = mount(in_memory, "64M")
    assert len(list(os.scandir(mounted.path))) == count
    for number in range(count):
        assert read(mounted.path / f"{number}") == b"%d" % (number % 10)
    eventually(lambda: mounted.stats()["pinned_items"] == count)
    figures = mounted.settle()
    assert len(figures["processes"]["keepers"]) == 3  # of 2,500 each
    assert figures["pinned_bytes"] == count * PAGE == _held_by_keepers(mounted)
    assert figures["source"]["bytes"] == count
    with mounted.messages() as sent:
        for number in range(0, count, 7):
            assert read(mounted.path / f"{number}") == b"%d" % (number % 10)
    assert sent["read"] == 0
    coordlfs("umount", mounted.path)
