"""How nodes find each other: Slurm's host lists, the name service, and a real etcd that is stopped and started."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from coordlfs_tools.lab.network import Host
from hypothesis import given
from hypothesis import strategies as st
from mounts import PATIENCE, MakeMount, Mount, coordlfs, eventually, read, write_files
from test_peers import free_ports

from coordlfs.peers import discovery, hostlist


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("one", ["one"]),
        ("a,b-2", ["a", "b-2"]),
        ("a[01-03,7],b", ["a01", "a02", "a03", "a7", "b"]),
        ("r[1-2]n[08-10]x", ["r1n08x", "r1n09x", "r1n10x", "r2n08x", "r2n09x", "r2n10x"]),
    ],
)
def test_host_lists_of_slurm(text: str, hosts: list[str]) -> None:
    assert hostlist.expand(text) == hosts


NAMES = st.text("abz-.9", min_size=1, max_size=4)
RANGES = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=3)


@given(st.lists(st.tuples(NAMES, st.lists(st.tuples(RANGES, st.just("") | NAMES), max_size=2)), max_size=3))
def test_host_lists_as_slurm_writes_them(
    entries: list[tuple[str, list[tuple[list[tuple[int, int, int]], str]]]],
) -> None:
    """Names with ranges of numbers in them, padded with zeros to a width."""
    written, hosts = [], []
    for name, brackets in entries:
        text, heads = name, [name]
        for ranges, tail in brackets:
            parts, numbers = [], []
            for first, more, width in ranges:
                parts.append(f"{first:0{width}}" + (f"-{first + more:0{width}}" if more else ""))
                numbers += [f"{n:0{len(parts[-1].split('-')[0])}}" for n in range(first, first + more + 1)]
            text += f"[{','.join(parts)}]{tail}"
            heads = [head + number + tail for head in heads for number in numbers]
        written.append(text)
        hosts += heads
    assert hostlist.expand(",".join(written)) == hosts


@given(st.text("ab[]-,0123 ", max_size=12))
def test_host_lists_that_make_no_sense_are_refused_or_harmless(text: str) -> None:
    with suppress(ValueError):
        assert all(host and not set(host) & set(",[] ") for host in hostlist.expand(text))


@pytest.mark.parametrize(
    "text", ["a[", "a[1", "a]", "a[]", "a[1-]", "a[3-1]", "a,,b", "a,", "a[1]]", "a[0-99999999999]"]
)
def test_host_lists_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"hosts|numbers"):
        hostlist.expand(text)


def test_the_hosts_of_a_job_that_grows_and_ends(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program in scontrol's place, since there is no Slurm here: it prints what the real one prints."""
    said = place / "said"
    program = place / "scontrol"
    program.write_text(f'#!/bin/sh\n[ "$*" = "-o show job 7" ] && cat {said}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setattr(discovery, "_ASK_SLURM_EVERY", 0.01)
    found: list[set[tuple[str, int]]] = []

    async def watch() -> None:
        async def until(hosts: set[str]) -> None:
            with trio.fail_after(20):
                while found[-1] != {(host, 7070) for host in hosts}:
                    await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            await nursery.start(discovery.watch, {"peers": "slurm:7070"}, found.append)
            assert found == [{("n1", 7070), ("n2", 7070)}]
            line = "JobId=7 JobName=train ReqNodeList=(null) ExcNodeList=x NodeList={} BatchHost=n1 NumNodes=3\n"
            said.write_text(line.format("n[1-3]"))
            await until({"n1", "n2", "n3"})
            said.write_text(line.format("n2"))
            await until({"n2"})
            for nothing in ("(null)", "n[", ""):
                said.write_text(line.format(nothing))
                await trio.sleep(0.1)
            said.unlink()
            await trio.sleep(0.1)
            assert found[-1] == {("n2", 7070)}  # what is known stays
            nursery.cancel_scope.cancel()

    trio.run(watch)


@pytest.mark.parametrize("nodelist", ["localhost", "127.0.0.[1-1]"])
def test_nodes_of_a_slurm_job(source: Path, mount: MakeMount, monkeypatch: pytest.MonkeyPatch, nodelist: str) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", nodelist)
    _two_find_each_other(source, mount, "slurm:{}")


def test_slurm_outside_of_a_job(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    options = ["--listen", "127.0.0.1:0", "--peers", "slurm:7070"]
    assert "within the job" in coordlfs("mount", source, place / "mnt", *options, status=1).stderr


def test_nodes_behind_a_name(source: Path, mount: MakeMount) -> None:
    _two_find_each_other(source, mount, "dns:localhost:{}")


def _two_find_each_other(source: Path, mount: MakeMount, peers: str) -> None:
    """On one host they differ by their ports, so each is told of the other's."""
    names = write_files(source, 20, 50_000)
    one, two = free_ports(2)
    made = [
        mount(source, "16M", "--listen", f"127.0.0.1:{mine}", "--peers", peers.format(other))
        for mine, other in ((one, two), (two, one))
    ]
    _alive(made, 1)
    for node in made:
        for name in names:
            assert read(node.path / name) == read(source / name)
    assert all(node.stats()["peers"]["bytes"] > 0 for node in made)


def _alive(nodes: list[Mount], count: int) -> None:
    eventually(lambda: all(node.stats()["peers"]["alive"] == count for node in nodes), what=f"{count} peers alive")


# -- etcd -----------------------------------------------------------------------------------------------------------


_GET = """
import sys, urllib.request
body = sys.argv[2].encode() if len(sys.argv) > 2 else None
print(urllib.request.urlopen(sys.argv[1], body, timeout=2).read().decode())
"""


class Etcd:
    """A server of its own, with its data in `directory`; in the network of `host` if there is one."""

    def __init__(self, directory: Path, host: Host | None = None) -> None:
        client, peer = free_ports(2)
        self.url = f"http://{host.address if host else '127.0.0.1'}:{client}"
        self._inside = host.inside if host else list
        other = f"http://127.0.0.1:{peer}"
        self._command = ["etcd", "--data-dir", str(directory), "--name", "test", "--initial-cluster", f"test={other}"]
        self._command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        self._command += ["--listen-peer-urls", other, "--initial-advertise-peer-urls", other]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            self._inside(self._command), stdout=quiet, stderr=quiet, start_new_session=True
        )
        eventually(self._answers, what="etcd answers")

    def _answers(self) -> bool:
        return b"true" in self._get("health")

    def _get(self, path: str, body: str | None = None) -> bytes:
        command = [sys.executable, "-c", _GET, f"{self.url}/{path}", *([body] if body else [])]
        return subprocess.run(self._inside(command), capture_output=True, timeout=PATIENCE).stdout

    def put(self, key: str) -> None:
        """Write an empty key, which is there for good."""
        assert self._get("v3/kv/put", json.dumps({"key": base64.b64encode(key.encode()).decode()}))

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


@pytest.fixture
def etcd(place: Path) -> Iterator[Etcd]:
    server = Etcd(place / "etcd")
    server.start()
    try:
        yield server
    finally:
        server.stop()


def test_nodes_find_each_other_through_etcd_which_may_stop(
    source: Path, mount: MakeMount, etcd: Etcd, make_node: Callable[..., Mount]
) -> None:
    names = write_files(source, 30, 50_000)
    peers = f"etcd:{etcd.url}/training/imagenet"

    def check(node: Mount) -> None:
        for name in names:
            assert read(node.path / name) == read(source / name)

    made = [make_node(peers) for _ in range(2)]
    _alive(made, 1)
    third = make_node(peers)
    made.append(third)
    _alive(made, 2)
    etcd.stop()
    time.sleep(3)
    for node in made:
        check(node)
    assert all(node.stats()["peers"]["alive"] == 2 for node in made)  # who they are is known
    assert all(node.stats()["peers"]["bytes"] > 0 for node in made)
    etcd.start()
    third.end()
    eventually(lambda: all(node.stats()["peers"]["known"] == 1 for node in made[:2]), what="its lease has run out")
    fourth = make_node(peers)
    _alive([*made[:2], fourth], 2)
    check(fourth)


@pytest.fixture
def make_node(source: Path, mount: MakeMount) -> Callable[[str], Mount]:
    """Mounts `source` on a node that finds the others in the given way."""
    return lambda peers: mount(source, "16M", "--listen", f"127.0.0.1:{free_ports(1)[0]}", "--peers", peers)
