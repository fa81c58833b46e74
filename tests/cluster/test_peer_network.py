"""Three nodes in network namespaces, in epochs that are checked: links fail, nodes die, return and lie."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import liars
import pytest
from coordlfs_tools.lab.network import Host, network
from liars import Liar, introduction
from mounts import MIB, PATIENCE, MakeMount, Mount, eventually, read, unmount_lazily, write_files
from test_peer_discovery import Etcd

from coordlfs.peers.protocol import Request

_STALL = PATIENCE / 2  # seconds that one read may take: more is a hang, on any machine


_LIES = [liars.garbage, liars.wrong_bytes, liars.wrong_version, liars.half_a_frame, liars.nothing]


def _listen(host: Host) -> socket.socket:
    """A socket that listens on port 7070 of a host: a thread goes there, opens it and ends."""
    made = []

    def work() -> None:
        host.enter()
        made.append(socket.create_server((host.address, 7070)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return made[0]


def _alive(nodes: list[Mount], count: int) -> None:
    eventually(lambda: all(node.stats()["peers"]["alive"] == count for node in nodes), what=f"{count} alive")


@contextmanager
def _epochs(nodes: list[Mount], names: list[str]) -> Iterator[list[float]]:
    """A job on each node, which reads epoch by epoch and compares every byte; how long the longest read took."""
    wanted = {name: read(nodes[0].source / name) for name in names}
    stop, failed, longest = threading.Event(), [], [0.0]

    def epochs(node: Mount) -> None:
        seed = 0
        try:
            while not stop.is_set():
                order = list(names)
                random.Random(seed).shuffle(order)
                for name in order:
                    began = time.monotonic()
                    assert read(node.path / name) == wanted[name]
                    longest[0] = max(longest[0], time.monotonic() - began)
                node.forget()
                seed += 1
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=epochs, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    try:
        yield longest
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed, failed


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Three hosts on a network of their own."""
    with network(3) as found:
        yield found


def test_links_that_are_cut_healed_and_slow(source: Path, place: Path, mount: MakeMount, hosts: list[Host]) -> None:
    names = write_files(source, 90, 100_000)
    wanted = {name: read(source / name) for name in names}
    key = place / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    key.chmod(0o600)
    peers = ",".join(f"{host.address}:7070" for host in hosts)
    more = ("--peers", peers, "--cluster-key-file", key)
    nodes = [mount(source, "16M", "--listen", "0.0.0.0:7070", *more, inside=host.namespace) for host in hosts]

    _alive(nodes, 2)
    assert [node.stats()["peers"]["name"] for node in nodes] == peers.split(",")
    with _epochs(nodes, names) as longest:
        time.sleep(2)
        hosts[2].cut()
        _alive(nodes[:2], 1)
        hosts[2].heal()
        _alive(nodes[:2], 2)
        hosts[2].shape("1mbit")
        time.sleep(5)
        hosts[2].shape("10gbit")
        time.sleep(3)
    assert longest[0] < _STALL
    assert all(node.stats()["peers"]["bad_payloads"] == 0 for node in nodes)
    before = [node.stats()["peers"]["bytes"] for node in nodes]

    def shares_again() -> bool:
        for node in nodes:
            node.forget()
            for name in names:
                assert read(node.path / name) == wanted[name]
        # The third may have cached all that there is while it was alone.
        return all(node.stats()["peers"]["bytes"] > b for node, b in zip(nodes[:2], before[:2], strict=True))

    eventually(shares_again, what="all are asked again")


def test_a_node_that_is_killed_a_peer_that_lies_and_an_etcd_that_stops(
    source: Path, place: Path, mount: MakeMount
) -> None:
    """Three nodes that know each other from etcd, which is on a fourth host; a fifth knows the key, and lies."""
    names = write_files(source, 90, 100_000)
    key = place / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    key.chmod(0o600)
    lies, told = itertools.cycle(_LIES), set()

    def lie(sock: socket.socket, request: Request) -> None:
        chosen = next(lies)
        told.add(chosen)
        chosen(sock, request)

    with ExitStack() as stack:
        hosts = stack.enter_context(network(5))
        etcd = Etcd(place / "etcd", hosts[3])
        stack.callback(etcd.stop)
        etcd.start()
        liar_is = f"{hosts[4].address}:7070"
        says = introduction(liar_is, 16 * MIB)  # it owns a quarter
        stack.callback(Liar(_listen(hosts[4]), key.read_bytes(), lie, says).close)
        etcd.put(f"/job/{liar_is}")

        def start(host: Host) -> Mount:
            more = ("--peers", f"etcd:{etcd.url}/job", "--cluster-key-file", key)
            return mount(source, "16M", "--listen", f"{host.address}:7070", *more, inside=host.namespace)

        nodes = [start(host) for host in hosts[:3]]
        _alive(nodes, 3)
        with _epochs(nodes[:2], names) as longest:
            time.sleep(2)
            etcd.stop()
            victim = nodes.pop()
            victim.expect_errors = True
            for pid in victim.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            unmount_lazily(victim.path)
            _alive(nodes, 2)  # greetings tell, not etcd
            etcd.start()
            again = start(hosts[2])
            _alive([*nodes, again], 3)
            with _epochs([again], names):
                time.sleep(2)
        assert longest[0] < _STALL
        for node in (*nodes, again):
            assert node.stats()["peers"]["bytes"] > 0
        assert told == set(_LIES)
