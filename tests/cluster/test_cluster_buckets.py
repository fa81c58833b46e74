"""Nodes that share their caches of a bucket: each object is fetched once, whoever reads or warms it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from coordlfs_tools.lab.buckets import Bucket, serve
from mounts import MakeMount, Mount, coordlfs, noise, read
from test_peers import _alive, _options, free_ports

FILES = {f"{n % 4}/{n:04}.jpg": noise(50_000, n) for n in range(120)}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket that serves `FILES`, and credentials for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with serve(Bucket(delay=0.01)) as served:
        for name, data in FILES.items():
            served.put(f"set/{name}", data)
        yield served


def _nodes(bucket: Bucket, mount: MakeMount, count: int) -> list[Mount]:
    reach = ["--source-option", f"endpoint={bucket.endpoint}", "--source-option", "allow-http=true"]
    ports = free_ports(count)
    nodes = [mount("s3://bucket/set", "32M", *_options(port, ports, *reach)) for port in ports]
    _alive(*nodes, count=count - 1)
    return nodes


def _read(node: Mount, names: list[str]) -> None:
    for name in names:
        assert read(node.path / name) == FILES[name]


def test_a_cold_epoch_fetches_each_object_once(bucket: Bucket, mount: MakeMount) -> None:
    nodes = _nodes(bucket, mount, 3)
    names = list(FILES)
    random.Random(1).shuffle(names)
    with ThreadPoolExecutor(6) as pool:  # two readers on each
        list(pool.map(_read, [*nodes, *nodes], [names[n::6] for n in range(6)]))
    assert bucket.count("GET") == len(FILES)
    for node in nodes:
        node.settle()
        _read(node, names)
    assert bucket.count("GET") == len(FILES)
    assert sum(node.stats()["peers"]["bytes"] for node in nodes) > 0


def test_all_nodes_warm_it_together(bucket: Bucket, mount: MakeMount) -> None:
    nodes = _nodes(bucket, mount, 3)
    done = coordlfs("warm", nodes[0].path, "--cluster")
    assert "are cached by 3 nodes" in done.stdout
    assert bucket.count("GET") == len(FILES)
    assert sum(node.stats()["pinned_items"] for node in nodes) == len(FILES)
    for node in nodes:
        _read(node, list(FILES))
    assert bucket.count("GET") == len(FILES)
