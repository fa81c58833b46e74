"""Three nodes in network namespaces, in epochs that are checked, while links are cut, healed and slowed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from coordlfs_tools.bench.network import Host, network
from mounts import MakeMount, drop_caches, eventually, read, write_files

_STALL = 30.0  # seconds that one read may take, on a machine that is four times slower


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Three hosts on a network of their own."""
    with network(3) as found:
        yield found


@pytest.mark.timeout(180)
def test_links_that_are_cut_healed_and_slow(source: Path, place: Path, mount: MakeMount, hosts: list[Host]) -> None:
    names = write_files(source, 90, 100_000)
    wanted = {name: read(source / name) for name in names}
    key = place / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    key.chmod(0o600)
    peers = ",".join(f"{host.address}:7070" for host in hosts)
    more = ("--peers", peers, "--cluster-key-file", key)
    nodes = [mount(source, "16M", "--listen", "0.0.0.0:7070", *more, inside=host.namespace) for host in hosts]

    def alive(count: int) -> bool:
        return all(node.stats()["peers"]["alive"] == count for node in nodes[:2])

    eventually(lambda: alive(2), 30, "all alive")
    assert [node.stats()["peers"]["name"] for node in nodes] == peers.split(",")
    stop, failed, longest = threading.Event(), [], [0.0]

    def epochs(number: int) -> None:
        seed = 0
        try:
            while not stop.is_set():
                order = list(names)
                random.Random(seed).shuffle(order)
                for name in order:
                    began = time.monotonic()
                    assert read(nodes[number].path / name) == wanted[name]
                    longest[0] = max(longest[0], time.monotonic() - began)
                drop_caches()
                seed += 1
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=epochs, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(2)
        hosts[2].cut()
        eventually(lambda: alive(1), 60, "the others notice")
        hosts[2].heal()
        eventually(lambda: alive(2), 60, "it is back")
        hosts[2].shape("1mbit")
        time.sleep(5)
        hosts[2].shape("10gbit")
        time.sleep(3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed, failed
    assert longest[0] < _STALL
    assert all(node.stats()["peers"]["bad_payloads"] == 0 for node in nodes)
    before = [node.stats()["peers"]["bytes"] for node in nodes]

    def shares_again() -> bool:
        drop_caches()
        for node in nodes:
            for name in names:
                assert read(node.path / name) == wanted[name]
        # The third may have cached all that there is while it was alone.
        return all(node.stats()["peers"]["bytes"] > b for node, b in zip(nodes[:2], before[:2], strict=True))

    eventually(shares_again, 60, "all are asked again")
