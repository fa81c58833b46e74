"""`coordlfs warm --cluster` on real mounts: each node fetches what it owns, once, until nobody wants it any more."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from coordlfs_tools.lab import faulty_fs
from coordlfs_tools.lab.faulty_fs import Faulty
from mounts import (
    COORDLFS,
    MIB,
    PAGE,
    PATIENCE,
    MakeMount,
    Mount,
    coordlfs,
    eventually,
    noise,
    page_count,
    unmount_lazily,
    write_files,
)
from test_peers import _alive, _check, _options, free_ports

SIZE = 100_000
SLOW = 1.0  # seconds for each read of the source


@pytest.fixture
def slow(source: Path, place: Path) -> Iterator[Faulty]:
    """`source` with 1,000 files, which take their time."""
    write_files(source, 1000, 10_000)
    with faulty_fs.served(source, place) as faulty:
        faulty.set("read *", delay=SLOW)
        yield faulty


def _nodes(source: Path, mount: MakeMount, count: int, cache: str = "64M") -> list[Mount]:
    ports = free_ports(count)
    made = [mount(source, cache, *_options(port, ports)) for port in ports]
    _alive(*made, count=count - 1)
    return made


def _pinned(nodes: list[Mount]) -> list[int]:
    return [int(node.stats()["pinned_items"]) for node in nodes]


def _warm(node: Mount) -> subprocess.Popen[str]:
    command = [*COORDLFS, "warm", str(node.path), "--cluster"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_each_node_fetches_what_it_owns(source: Path, mount: MakeMount) -> None:
    names = write_files(source, 90, SIZE)
    (source / "large").write_bytes(noise(40 * MIB + 5))
    nodes = _nodes(source, mount, 3)
    done = coordlfs("warm", nodes[0].path, "--cluster")
    assert "are cached by 3 nodes" in done.stdout
    assert min(_pinned(nodes)) > 0
    assert sum(_pinned(nodes)) == 90 + 3
    total = (90 * page_count(SIZE) + page_count(40 * MIB + 5)) * PAGE
    assert sum(node.stats()["pinned_bytes"] for node in nodes) == total
    before = sum(node.source_bytes() for node in nodes)
    assert before <= total
    for node in nodes:
        _check(node, [*names, "large"])
    assert sum(node.source_bytes() for node in nodes) == before
    again = coordlfs("warm", nodes[1].path, "--cluster")  # of another node: nothing is left to be fetched
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert sum(node.source_bytes() for node in nodes) == before


def test_part_of_the_dataset(source: Path, mount: MakeMount) -> None:
    for directory in ("train", "test"):
        (source / directory).mkdir()
        write_files(source / directory, 30, SIZE)
    nodes = _nodes(source, mount, 2)
    coordlfs("warm", nodes[0].path, nodes[0].path / "train", "--cluster")
    assert sum(_pinned(nodes)) == 30
    assert all(node.cached("test/item-00000") == "no" for node in nodes)


def test_nodes_without_room_say_so(source: Path, mount: MakeMount) -> None:
    write_files(source, 200, SIZE)
    nodes = _nodes(source, mount, 2, "4M")
    done = coordlfs("warm", nodes[0].path, "--cluster")
    assert done.stdout.count("is full, with") == 2
    assert all(node.stats()["fill"] > 0.9 for node in nodes)


def test_who_stands_alone_is_told_what_to_do(source: Path, mount: MakeMount) -> None:
    write_files(source, 1, SIZE)
    alone = mount(source)
    assert "shares its cache with nobody" in coordlfs("warm", alone.path, "--cluster", status=1).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_everywhere_with_who_wants_it(slow: Faulty, mount: MakeMount, number: signal.Signals) -> None:
    nodes = _nodes(slow.path, mount, 2)
    with _warm(nodes[0]) as warming:
        eventually(lambda: min(_pinned(nodes)) > 0)
        warming.send_signal(number)
        assert warming.wait(PATIENCE) == (130 if number == signal.SIGINT else -number)
    last, deadline = [-1, -1], time.monotonic() + PATIENCE
    while (now := _pinned(nodes)) != last:
        last = now
        time.sleep(5)  # in which many would be fetched
        assert time.monotonic() < deadline
    assert sum(last) < 1000
    slow.clear()
    coordlfs("warm", nodes[1].path, "--cluster")
    assert sum(_pinned(nodes)) == 1000


def test_what_a_node_owned_that_dies_is_fetched_by_the_others(slow: Faulty, mount: MakeMount) -> None:
    nodes = _nodes(slow.path, mount, 3)
    with _warm(nodes[0]) as warming:
        eventually(lambda: min(_pinned(nodes)) > 0)
        nodes[2].expect_errors = True
        for pid in nodes[2].pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        unmount_lazily(nodes[2].path)
        slow.clear()
        said, errors = warming.communicate(timeout=PATIENCE)
    assert warming.returncode == 0, errors
    assert "are cached by 2 nodes" in said
    assert "is not alive" in said
    assert sum(_pinned(nodes[:2])) == 1000
