"""How nodes find each other: Slurm's host lists, the name service, and a real etcd that is stopped and started."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from coordlfs_tools.bench.network import Host
from hypothesis import given
from hypothesis import strategies as st
from mounts import MakeMount, Mount, coordlfs, eventually, read, write_files
from test_peers import free_ports

from coordlfs.peers import discovery


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
    assert discovery.expand(text) == hosts


@given(st.text("ab[]-,0123", max_size=12))
def test_host_lists_that_make_no_sense_are_refused_or_harmless(text: str) -> None:
    with suppress(ValueError):
        assert all("," not in host for host in discovery.expand(text))


@pytest.mark.parametrize("nodelist", ["localhost", "127.0.0.[1-1]"])
@pytest.mark.timeout(60)
def test_nodes_of_a_slurm_job(source: Path, mount: MakeMount, monkeypatch: pytest.MonkeyPatch, nodelist: str) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", nodelist)
    _two_find_each_other(source, mount, "slurm:{}")


@pytest.mark.timeout(60)
def test_slurm_outside_of_a_job(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    options = ["--listen", "127.0.0.1:0", "--peers", "slurm:7070"]
    assert "within the job" in coordlfs("mount", source, place / "mnt", *options, status=1).stderr


@pytest.mark.timeout(60)
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
    eventually(lambda: all(node.stats()["peers"]["alive"] == count for node in nodes), 40, f"{count} peers alive")


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
        eventually(self._answers, 40, "etcd answers")

    def _answers(self) -> bool:
        return b"true" in self._get("health")

    def _get(self, path: str, body: str | None = None) -> bytes:
        command = [sys.executable, "-c", _GET, f"{self.url}/{path}", *([body] if body else [])]
        return subprocess.run(self._inside(command), capture_output=True, timeout=20).stdout

    def put(self, key: str) -> None:
        """Write an empty key, which is there for good."""
        assert self._get("v3/kv/put", json.dumps({"key": base64.b64encode(key.encode()).decode()}))

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
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


@pytest.mark.timeout(180)
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
    eventually(lambda: all(node.stats()["peers"]["known"] == 1 for node in made[:2]), 60, "its lease has run out")
    fourth = make_node(peers)
    _alive([*made[:2], fourth], 2)
    check(fourth)


@pytest.fixture
def make_node(source: Path, mount: MakeMount) -> Callable[[str], Mount]:
    """Mounts `source` on a node that finds the others in the given way."""
    return lambda peers: mount(source, "16M", "--listen", f"127.0.0.1:{free_ports(1)[0]}", "--peers", peers)
