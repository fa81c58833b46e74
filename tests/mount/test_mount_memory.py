"""Memory that gets tight, made so on purpose: the cache releases some, and neither it nor a job is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from mounts import MIB, Cgroup, MakeMount, coordlfs, eventually, holding, locked, read, write_files

from coordlfs.kernel.memory import memory


def test_the_cache_gives_memory_back_in_its_cgroup_and_reads_on(
    cgroup: Callable[[int], Cgroup], source: Path, mount: MakeMount
) -> None:
    """Everything of the mount in one memory cgroup with a neighbour that grows: nobody is killed."""
    names = write_files(source, 192, MIB)
    group = cgroup(768 * MIB)
    mounted = mount(source, "256M")
    for pid in mounted.pids:
        group.add(pid)
    eventually(lambda: mounted.stats()["memory"]["available_bytes"] < 768 * MIB)
    for name in names:
        assert read(mounted.path / name) == (source / name).read_bytes()
    assert mounted.settle()["pinned_items"] == 192
    with holding(560 * MIB, group) as neighbour:
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == "held\n"
        eventually(lambda: mounted.stats()["memory"]["given_back_bytes"] > 0)
        left = mounted.settle()
        assert 0 < left["pinned_items"] < 192
        assert left["memory"]["limit_bytes"] < left["capacity_bytes"] == 256 * MIB
        assert left["pinned_bytes"] == left["pinned_items"] * MIB
        before = mounted.source_bytes()
        for name in names:
            if mounted.cached(name) == "pinned":
                assert read(mounted.path / name) == (source / name).read_bytes()
        assert mounted.source_bytes() == before  # the rest is untouched
        assert neighbour.poll() is None
    assert mounted.pids
    assert sorted(mounted.stats()["processes"]["keepers"]) == sorted(mounted.processes["keepers"])
    eventually(lambda: mounted.stats()["memory"]["limit_bytes"] == 256 * MIB)
    for name in names:
        assert read(mounted.path / name) == (source / name).read_bytes()
    assert mounted.settle()["pinned_items"] == 192
    assert "released" in mounted.log.read_text()


_EPOCHS = """
import sys, zlib
names = sys.argv[2:]
while True:
    total = 0
    for name in names:
        with open(f"{sys.argv[1]}/{name}", "rb", buffering=0) as f:
            total = zlib.crc32(f.read(), total)
    print(total, flush=True)
"""


def test_a_server_that_takes_over_while_memory_is_tight_knows_of_every_pin(
    cgroup: Callable[[int], Cgroup], source: Path, mount: MakeMount
) -> None:
    names = write_files(source, 9_000, 8_000)
    write_files(source, 64, MIB)
    group = cgroup(768 * MIB)
    mounted = mount(source, "256M")
    mounted.expect_errors = True
    for pid in mounted.pids:
        group.add(pid)
    for name in names:
        read(mounted.path / name)
    pinned = mounted.settle()["pinned_bytes"]
    assert locked(mounted.processes["keepers"]) == pinned
    available = mounted.stats()["memory"]["available_bytes"]
    with holding(available - 75 * MIB, group) as neighbour:  # less than is to stay available, more than is tight
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == "held\n"
        for _ in range(3):
            os.kill(mounted.stats()["processes"]["server"], signal.SIGKILL)
            eventually(lambda: locked(mounted.processes["keepers"]) == mounted.stats()["pinned_bytes"] > 0)
    assert mounted.settle()["pinned_bytes"] > pinned // 2


def test_neither_the_job_nor_the_cache_is_killed_when_both_are_pressed(
    cgroup: Callable[[int], Cgroup], source: Path, mount: MakeMount
) -> None:
    """A job in a cgroup smaller than the cache, the cache in one of its own, and in both somebody takes memory."""
    names = write_files(source, 160, MIB)
    expected = 0
    for name in names:
        expected = zlib.crc32((source / name).read_bytes(), expected)
    jobs, caches = cgroup(72 * MIB), cgroup(640 * MIB)
    mounted = mount(source, "256M")
    for pid in mounted.pids:
        caches.add(pid)
    eventually(lambda: mounted.stats()["memory"]["available_bytes"] < 640 * MIB)
    job = subprocess.Popen(
        [sys.executable, "-c", _EPOCHS, str(mounted.path), *names],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=jobs.enter,
    )
    try:
        assert job.stdout is not None
        said = [job.stdout.readline()]
        assert mounted.settle()["pinned_bytes"] > 72 * MIB
        with holding(36 * MIB, jobs) as one, holding(460 * MIB, caches) as other:
            for neighbour in (one, other):
                assert neighbour.stdout is not None
                assert neighbour.stdout.readline() == "held\n"
            said += [job.stdout.readline() for _ in range(3)]
            eventually(lambda: mounted.stats()["memory"]["given_back_bytes"] > 0)
            said += [job.stdout.readline() for _ in range(2)]
            assert mounted.stats()["pinned_bytes"] > 0
            assert one.poll() is other.poll() is job.poll() is None
        assert said == [f"{expected}\n"] * 6
    finally:
        job.kill()
        job.communicate()
    assert jobs.oom_kills() == caches.oom_kills() == 0
    assert sorted(mounted.stats()["processes"]["keepers"]) == sorted(mounted.processes["keepers"])


def test_a_keeper_in_a_cgroup_too_small_for_the_cache(
    cgroup: Callable[[int], Cgroup], source: Path, mount: MakeMount
) -> None:
    names = write_files(source, 192, MIB)
    group = cgroup(160 * MIB)
    mounted = mount(source, "256M")
    [keeper] = mounted.processes["keepers"]
    group.add(keeper)
    eventually(lambda: mounted.stats()["memory"]["limit_bytes"] < 160 * MIB)
    for _ in range(2):
        for name in names:
            assert read(mounted.path / name) == (source / name).read_bytes()
    figures = mounted.settle()
    assert 20 * MIB < figures["pinned_bytes"] < 160 * MIB
    assert figures["processes"]["keepers"] == [keeper]


def test_a_keeper_that_is_squeezed_dies_before_anybody_else_and_the_cache_adapts(
    cgroup: Callable[[int], Cgroup], source: Path, mount: MakeMount
) -> None:
    names = write_files(source, 192, MIB)
    mounted = mount(source, "256M")
    mounted.expect_errors = True  # the kernel kills the keeper, since it may not hold so much at once
    assert int(Path(f"/proc/{mounted.processes['keepers'][0]}/oom_score_adj").read_text()) == 1000
    coordlfs("warm", mounted.path)
    group = cgroup(900 * MIB)
    for pid in mounted.pids:
        group.add(pid)
    with holding(800 * MIB, group) as neighbour:
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == "held\n"
        for name in names:
            assert read(mounted.path / name) == (source / name).read_bytes()
        assert neighbour.poll() is None
    assert mounted.stats()["processes"]["server"] == mounted.processes["server"]


def test_what_a_process_may_use_is_what_its_cgroup_leaves(cgroup: Callable[[int], Cgroup]) -> None:
    group = cgroup(300 * MIB)
    with holding(100 * MIB, group) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        have = memory(process.pid)
        assert have.total == 300 * MIB
        assert 150 * MIB < have.available < 200 * MIB
    assert memory(os.getpid()).total > 300 * MIB
