"""The partitioned cache on real mounts: two or three nodes on loopback, epochs that are checked, and bad peers."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import liars
import pytest
from coordlfs_tools.lab import faulty_fs
from liars import Liar
from mounts import (
    MIB,
    NOBODY,
    PATIENCE,
    Cgroup,
    MakeMount,
    Mount,
    coordlfs,
    eventually,
    holding,
    is_alive,
    noise,
    read,
    unmount_lazily,
    write_files,
)
from prometheus_client.parser import text_string_to_metric_families
from users import User

from coordlfs.cache import items
from coordlfs.cache.minio import MinIO
from coordlfs.catalogue import memfds
from coordlfs.catalogue.catalog import Catalog, node_of_path
from coordlfs.catalogue.metrics import Counters
from coordlfs.errors import UserError
from coordlfs.peers import connection, link, protocol, settings
from coordlfs.peers.connection import Credentials
from coordlfs.peers.ownership import Node, Ownership, key_of
from coordlfs.peers.placement import Placement
from coordlfs.peers.protocol import ProtocolError, Reply, Request, Status, Verb
from coordlfs.peers.sharing import Sharing
from coordlfs.peers.wishes import Exchange

_STALL = PATIENCE / 2  # seconds that one read may take whatever the peers do: more is a hang, on any machine
_KEY = b"0123456789abcdef0123456789abcdef"


def free_ports(count: int) -> list[int]:
    """Free ports."""
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


def _own_key() -> bytes:
    """The key of nodes that are given none."""
    return settings.read_key(settings.loopback_key())


def _list(ports: list[int]) -> str:
    return ",".join(f"127.0.0.1:{port}" for port in ports)


def _options(port: int, ports: list[int], *more: object) -> tuple[object, ...]:
    return ("--listen", f"127.0.0.1:{port}", "--peers", _list(ports), *more)


def _alive(*mounts: Mount, count: int) -> None:
    def reached() -> bool:
        return all(mount.stats()["peers"]["alive"] == count for mount in mounts)

    eventually(reached, what=f"{count} peers of {[mount.path for mount in mounts]} alive")


def _restarted(mount: Mount, kind: str, pid: int) -> None:
    eventually(lambda: mount.stats()["processes"][kind] not in (pid, 0, None))


def _forget(*nodes: Mount) -> None:
    for node in nodes:
        node.forget()


def _check(mount: Mount, names: list[str], seed: int = 0, readers: int = 4) -> float:
    """Read every file in random order and compare it with the source; the longest that a read took."""
    longest = mount.read_all(names, seed, readers)
    assert longest < _STALL
    return longest


@pytest.fixture
def nodes(source: Path, mount: MakeMount) -> Callable[..., list[Mount]]:
    """Mounts `source` on several nodes that know each other."""

    def make(count: int, cache: str = "16M", *more: object) -> list[Mount]:
        ports = free_ports(count)
        made = [mount(source, cache, *_options(port, ports, *more)) for port in ports]
        _alive(*made, count=count - 1)
        return made

    return make


def _unanswered(node: Mount) -> int:
    """READs that the other nodes did not answer with bytes."""
    peers = node.stats()["peers"]
    return int(peers["failures"] + peers["skipped"] + peers["refusals"])


def _check_storage(nodes: Sequence[Mount], before: list[int], unanswered: list[int]) -> None:
    """No node has read from its source since, but for what others did not answer, which is counted.

    On a machine that is so busy that a node does not answer in time, its neighbour reads for itself, once a READ.
    """
    for node, bytes_before, unanswered_before in zip(nodes, before, unanswered, strict=True):
        assert node.source_bytes() - bytes_before <= (_unanswered(node) - unanswered_before) * MIB


# -- the caches add up ----------------------------------------------------------------------------------------------


def test_what_is_cached_somewhere_is_read_from_no_source(source: Path, nodes: Callable[..., list[Mount]]) -> None:
    """Neither node has room for the dataset, both together have; files of a page, of some, and of several chunks."""
    names = write_files(source, 120, 100_000)
    (source / "small").write_bytes(b"x")
    (source / "large").write_bytes(noise(40 * MIB + 5))
    names += ["small", "large"]
    made = nodes(2, "50M")  # as much as one of them needs that owns every chunk of the large file
    for seed in range(2):
        for node in made:
            _check(node, names, seed)
        for node in made:
            node.settle()
        _forget(*made)
    before = [node.source_bytes() for node in made]
    unanswered = [_unanswered(node) for node in made]
    assert sum(before) < 1.5 * sum((source / name).stat().st_size for name in names)  # about once in all
    for seed in range(2, 4):
        for node in made:
            _check(node, names, seed)
        _forget(*made)
    _check_storage(made, before, unanswered)
    figures = [node.stats() for node in made]
    assert sum(f["pinned_items"] for f in figures) == 121 + 3
    assert all(f["pinned_items"] > 30 and f["peers"]["bytes"] > 0 for f in figures)
    assert all(f["peers"]["failures"] == f["peers"]["bad_payloads"] == 0 for f in figures)


def test_disks_of_nodes_add_up_with_their_memory(source: Path, place: Path, mount: MakeMount) -> None:
    """What an owner has on its disk only is given to others as well."""
    names = write_files(source, 120, 100_000)
    ports = free_ports(2)
    made = [
        mount(source, "1M", *_options(port, ports, "--disk-cache", place / f"disk{port}", "--disk-size", "12M"))
        for port in ports
    ]
    _alive(*made, count=1)
    for seed in range(3):
        for node in made:
            _check(node, names, seed)
        for node in made:
            node.settle()
            eventually(lambda node=node: node.stats()["disk"]["waiting_blocks"] == 0)  # type: ignore[misc]
        _forget(*made)
    before = [node.source_bytes() for node in made]
    unanswered = [_unanswered(node) for node in made]
    for node in made:
        _check(node, names, 9)
    _check_storage(made, before, unanswered)
    figures = [node.stats() for node in made]
    assert all(20 < f["disk"]["held_blocks"] < 110 and f["peers"]["bytes"] > 0 for f in figures)
    assert sum(f["disk"]["held_blocks"] for f in figures) >= 120
    assert all(f["peers"]["failures"] == f["peers"]["bad_payloads"] == 0 for f in figures)


def test_a_node_brings_what_is_on_its_disk(source: Path, place: Path, mount: MakeMount) -> None:
    """As after a reboot: every process of it is killed, and it is mounted again."""
    names = write_files(source, 120, 100_000)
    ports = free_ports(2)

    def make(port: int) -> Mount:
        tier = ("--disk-cache", place / f"disk{port}", "--disk-size", "16M")
        return mount(source, "1M", *_options(port, ports, *tier))

    one, two = map(make, ports)
    _alive(one, two, count=1)
    coordlfs("warm", one.path, "--cluster")
    assert sum(node.stats()["disk"]["held_blocks"] for node in (one, two)) >= 118
    two.expect_errors = True
    for pid in two.pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    unmount_lazily(two.path)
    eventually(lambda: one.stats()["peers"]["alive"] == 0)
    again = make(ports[1])
    _alive(one, again, count=1)
    eventually(lambda: again.stats()["disk"]["is_ready"])
    _forget(one, again)
    before, unanswered = one.source_bytes(), _unanswered(one)
    _check(one, names)
    assert one.source_bytes() - before <= 2 * 100_000 + (_unanswered(one) - unanswered) * MIB
    assert again.source_bytes() <= 2 * 100_000
    assert again.stats()["disk"]["bytes"] > 30 * 100_000


def test_an_owner_without_room_says_no(source: Path, nodes: Callable[..., list[Mount]]) -> None:
    names = write_files(source, 80, 100_000)
    made = nodes(2, "2M")
    for seed in range(3):
        for node in made:
            _check(node, names, seed)
            node.settle()
        _forget(*made)
    figures = [node.stats() for node in made]
    assert all(f["fill"] > 0.9 for f in figures)
    assert sum(f["peers"]["refusals"] for f in figures) > 0
    assert all(f["peers"]["failures"] == 0 for f in figures)


def test_what_belongs_to_a_node_that_joins_gives_way(source: Path, mount: MakeMount) -> None:
    """The first node caches all that it can; once there is another, both cache what they own."""
    names = write_files(source, 100, 100_000)  # 10.2 MB in whole pages
    ports = free_ports(2)
    first = mount(source, "7M", *_options(ports[0], ports))
    eventually(lambda: "name" in first.stats()["peers"])
    time.sleep(1.5)  # until it knows itself alone
    _check(first, names)
    first.settle()
    assert first.stats()["fill"] > 0.9
    second = mount(source, "7M", *_options(ports[1], ports))
    _alive(first, second, count=1)
    for seed in range(6):
        for node in (first, second):
            _check(node, names, seed)
            node.settle()
        _forget(first, second)
    made = (first, second)
    before, unanswered = [node.source_bytes() for node in made], [_unanswered(node) for node in made]
    for node in made:
        _check(node, names, 9)
    _check_storage(made, before, unanswered)


def test_what_gives_way_is_found_while_questions_are_answered(key_file: Path) -> None:
    """Of 50,000 pinned items what another node owns, and that of the last view only; nobody waits for it."""
    count, page = 50_000, 4096
    own, other = Node("127.0.0.1:1", count * page), Node("127.0.0.1:2", 2 * count * page)
    mine = {"name": own.name, "key_file": str(key_file), "own_key": False}
    config = mine | dict.fromkeys(("tls_cert", "tls_key", "tls_ca"))
    policy = MinIO(count)
    fds = memfds.allocate()
    with ExitStack() as stack:
        for fd in fds:
            stack.callback(os.close, fd)
        catalog = Catalog(*fds)
        wanted: set[int] = set()
        ownership = Ownership([own, other])
        for number in range(count):
            name = b"item-%d" % number
            st = os.stat_result((0o100644, number + 2, 1, 1, 0, 0, page, 0, 0, 0), {"st_mtime_ns": 0})
            item = items.item_at(catalog.enter(0, name, st)[0], 0)
            assert policy.admit(item, 1)
            policy.pin(item, 0)
            if ownership.owner(key_of(node_of_path(name), 0)) == other:
                wanted.add(item)
        admission: Any = SimpleNamespace(policy=policy, lock=threading.RLock(), has_room=lambda npages: False)
        placement = Placement(own, catalog, policy)
        sharing = Sharing(config, catalog, placement, admission, Counters(catalog.counters), Exchange())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            stack.callback(sock.close)
        theirs.settimeout(240)
        sharing.attach(os.getpid(), ours)
        thread = threading.Thread(target=sharing.run)
        thread.start()
        stack.callback(thread.join)
        stack.callback(sharing.close)

        def tell(*nodes: Node) -> None:
            for packet in link.encode_members(
                [link.Member(n.name, "127.0.0.1", 2, n.weight, 0, True, 0.0, 0, "") for n in nodes]
            ):
                theirs.send(packet)
            theirs.recv(link.MOST)

        def displaced() -> list[int]:
            with admission.lock:
                return placement.displaced(1)

        tell()
        assert displaced() == []  # it is alone
        tell(Node("127.0.0.1:3", 1))
        displaced()
        tell(other)
        found: list[int] = []
        asked = 0

        def all_gone() -> bool:
            nonlocal asked
            theirs.send(link.QUESTION.pack(b"?", 1, 12345, 0))
            asked += link.ANSWER.unpack(theirs.recv(link.MOST))[0] == b"!"
            found.extend(displaced())
            return len(found) >= len(wanted)

        eventually(all_gone)
        assert set(found) == wanted
        assert len(found) == len(wanted)
        assert asked > 5  # questions were answered meanwhile


def test_an_owner_whose_memory_gets_tight_says_no(
    cgroup: Callable[[int], Cgroup], source: Path, nodes: Callable[..., list[Mount]]
) -> None:
    """It gives back what it caches; the others read what it refuses, and are right."""
    names = write_files(source, 128, MIB)
    asker, owner = nodes(2, "256M")
    group = cgroup(500 * MIB)
    for pid in owner.pids:
        group.add(pid)
    for node in (asker, owner):
        _check(node, names)
        node.settle()
    _forget(asker, owner)
    held = owner.stats()["pinned_bytes"]
    with holding(400 * MIB, group) as neighbour:
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == "held\n"
        eventually(lambda: owner.stats()["pinned_bytes"] < held)
        owner.settle()
        _forget(asker, owner)
        before = asker.stats()["peers"]["refusals"]
        _check(asker, names, 1)
        figures = asker.stats()["peers"]
        assert figures["refusals"] > before
        assert figures["failures"] == 0
        assert neighbour.poll() is None
    assert owner.stats()["pinned_bytes"] < held


# -- nodes that go and come -----------------------------------------------------------------------------------------


def test_a_node_is_killed_and_mounted_again_during_epochs(source: Path, mount: MakeMount, place: Path) -> None:
    names = write_files(source, 150, 100_000)
    ports = free_ports(3)
    made = [mount(source, "16M", *_options(port, ports)) for port in ports]
    _alive(*made, count=2)
    stop, failed = threading.Event(), []

    def epochs(node: Mount) -> None:
        seed = 0
        try:
            while not stop.is_set():
                _check(node, names, seed, readers=2)
                _forget(node)
                seed += 1
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=epochs, args=(node,)) for node in made[:2]]
    for thread in threads:
        thread.start()
    try:
        time.sleep(2)
        victim = made[2]
        victim.expect_errors = True
        for pid in victim.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        unmount_lazily(victim.path)
        eventually(lambda: made[0].stats()["peers"]["alive"] == 1)
        again = mount(source, "16M", *_options(ports[2], ports))
        _alive(*made[:2], again, count=2)
        _check(again, names)
        time.sleep(2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed, failed


def test_the_peer_server_and_the_server_are_killed(source: Path, nodes: Callable[..., list[Mount]]) -> None:
    names = write_files(source, 60, 100_000)
    made = nodes(2)
    for node in made:
        node.expect_errors = True
        _check(node, names)
    for kind in ("peer_server", "server"):
        pid = made[1].stats()["processes"][kind]
        os.kill(pid, signal.SIGKILL)
        _forget(made[0])
        _check(made[0], names)
        _restarted(made[1], kind, pid)
        _alive(*made, count=1)
        _forget(made[0])
        for node in made:
            _check(node, names)
    before = made[0].stats()["peers"]["bytes"]

    def asks_again() -> bool:
        _forget(made[0])
        _check(made[0], names)
        return bool(made[0].stats()["peers"]["bytes"] > before)

    eventually(asks_again)


def test_a_restart_replaces_the_peer_server_too(source: Path, nodes: Callable[..., list[Mount]]) -> None:
    names = write_files(source, 60, 100_000)
    made = nodes(2)
    for node in made:
        _check(node, names)
        node.settle()
    before = made[1].stats()
    done = coordlfs("restart", made[1].path)
    assert done.stdout.startswith("server and 1 keepers and peer server replaced, ")
    after = made[1].stats()
    assert after["pinned_items"] == before["pinned_items"] > 0
    for kind in ("server", "peer_server"):
        assert after["processes"][kind] != before["processes"][kind]
    assert after["processes"]["supervisor"] == before["processes"]["supervisor"]
    made[1].processes = after["processes"]
    _alive(*made, count=1)
    for node in made:
        _forget(node)
        _check(node, names)


def test_a_frozen_node_costs_a_bounded_delay_once(source: Path, nodes: Callable[..., list[Mount]]) -> None:
    names = write_files(source, 60, 100_000)
    made = nodes(2)
    for node in made:
        _check(node, names)
        node.settle()
    _forget(*made)
    frozen = made[1].stats()["processes"]["peer_server"]
    os.kill(frozen, signal.SIGSTOP)
    try:
        _check(made[0], names)
        figures = made[0].stats()["peers"]
        assert figures["failures"] > 0
        assert figures["failures"] + figures["skipped"] >= 10  # and not each of them waited
    finally:
        os.kill(frozen, signal.SIGCONT)
    _alive(made[0], count=1)


# -- peers that lie -------------------------------------------------------------------------------------------------


@pytest.fixture
def liar() -> Iterator[Callable[..., Liar]]:
    """Makes a node that lies."""
    with ExitStack() as stack:

        def make(port: int, lie: liars.Lie, key: bytes | None = None, says: bytes | None = None) -> Liar:
            made = Liar(socket.create_server(("127.0.0.1", port)), key or _own_key(), lie, says)
            stack.callback(made.close)
            return made

        yield make


_LIES = [
    (liars.garbage, "failures"),
    (liars.wrong_bytes, "bad_payloads"),
    (liars.wrong_version, "wrong_versions"),
    (liars.half_a_frame, "failures"),
    (liars.half_a_head, "failures"),
    (liars.nothing, "failures"),
    (liars.too_much, "failures"),
    (liars.another_answer, "failures"),
    (liars.an_error, "failures"),
]


@pytest.mark.parametrize(("lie", "counted"), _LIES)
def test_whatever_a_peer_answers_readers_get_right_bytes(
    source: Path, mount: MakeMount, liar: Callable[..., Liar], lie: Any, counted: str
) -> None:
    names = write_files(source, 30, 50_000)
    ports = free_ports(2)
    bad = liar(ports[1], lie)
    node = mount(source, "16M", *_options(ports[0], ports))
    _alive(node, count=1)
    _check(node, names)
    figures = node.stats()["peers"]
    assert bad.asked > 0
    assert figures[counted] > 0
    assert figures["bytes"] == 0
    assert figures["failures"] + figures["bad_payloads"] <= 30


@pytest.mark.parametrize(
    "says",
    [
        b"[" * 10_000,
        b"null",
        liars.introduction("\ud800:1"),
        liars.introduction("[red]\n:1"),
        liars.introduction("no address"),
        liars.introduction("a:1", -1),
    ],
)
def test_who_does_not_say_who_it_is_is_no_member_and_harms_nobody(
    source: Path, mount: MakeMount, liar: Callable[..., Liar], says: bytes
) -> None:
    names = write_files(source, 3, 50_000)
    ports = free_ports(2)
    liar(ports[1], liars.nothing, says=says)
    node = mount(source, "16M", *_options(ports[0], ports))
    before = node.stats()["processes"]

    def problem() -> str:
        found: str = json.loads(coordlfs("peers", node.path, "--json").stdout)[1]["problem"]
        return found

    eventually(lambda: node.stats()["peers"].get("known") == 1 and problem() != "not yet reached")
    _check(node, names)
    assert node.stats()["peers"]["alive"] == 0
    assert node.stats()["processes"] == before


def test_a_slow_peer_is_left_alone(source: Path, mount: MakeMount, liar: Callable[..., Liar]) -> None:
    """It sends right bytes at 100 kB/s."""
    names = write_files(source, 20, 100_000)

    def drip(sock: socket.socket, request: Request) -> None:
        data = (source / os.fsdecode(request.path)).read_bytes()[request.offset :][: request.length]
        sock.sendall(protocol.encode_reply(Reply(Status.OK, request.number, len(data), protocol.checksum(data))))
        for at in range(0, len(data), 10_000):
            sock.sendall(data[at : at + 10_000])
            time.sleep(0.1)

    ports = free_ports(2)
    liar(ports[1], drip)
    node = mount(source, "16M", *_options(ports[0], ports))
    _alive(node, count=1)
    _check(node, names)
    figures = node.stats()["peers"]
    assert figures["failures"] + figures["skipped"] >= 15


# -- who may ask ----------------------------------------------------------------------------------------------------


def test_an_owner_that_is_busy_says_for_how_long(source: Path, place: Path, mount: MakeMount) -> None:
    """It reads a source that takes its time for each file, and is asked for all of them at once."""
    names = write_files(source, 20, 1000)
    ports = free_ports(2)
    with faulty_fs.served(source, place) as faulty:
        faulty.set("read *", delay=0.4)
        node = mount(faulty.path, "16M", *_options(ports[0], ports))
        eventually(lambda: any(row["share"] == 1 for row in json.loads(coordlfs("peers", node.path, "--json").stdout)))
        replies = []
        with connection.connect(("127.0.0.1", ports[0]), Credentials(_own_key()), None) as sock:
            connection.set_limits(sock, PATIENCE, PATIENCE)
            asked = []
            for number, name in enumerate(names):
                st = (source / name).stat()
                asked.append(Request(Verb.GET, number, 1000, 0, st.st_size, st.st_mtime_ns, name.encode()))
            sock.sendall(b"".join(map(protocol.encode_request, asked)))
            for request in asked:
                head = bytearray(protocol.REPLY)
                connection.fill(sock, memoryview(head))
                reply = protocol.parse_reply(head, request)
                connection.fill(sock, memoryview(bytearray(reply.length)))
                replies.append(reply)
        given = [reply.status for reply in replies].count(Status.OK)
        assert 1 <= given <= 4
        assert all(reply.status is Status.NO and 1000 < reply.checksum < 30_000 for reply in replies[given:])
        node.end()


@pytest.fixture
def key_file(place: Path) -> Path:
    path = place / "key"
    path.write_bytes(_KEY + b"\n")
    path.chmod(0o600)
    return path


def test_nodes_with_the_key_share_and_a_stranger_learns_nothing(
    source: Path, nodes: Callable[..., list[Mount]], key_file: Path
) -> None:
    names = write_files(source, 40, 50_000)
    made = nodes(2, "16M", "--cluster-key-file", key_file)
    for node in made:
        _check(node, names)
    assert all(node.stats()["peers"]["bytes"] > 0 for node in made)
    where = ("127.0.0.1", int(made[0].stats()["peers"]["name"].partition(":")[2]))
    with connection.connect(where, Credentials(_KEY), None) as sock:
        sock.sendall(protocol.encode_request(Request(Verb.INFO, 1)))
        assert sock.recv(100)
    for key in (b"", b"another key of no use"):
        with pytest.raises((ProtocolError, ConnectionError)):
            connection.connect(where, Credentials(key), None)
    with socket.create_connection(where, 5) as sock:
        said = b""
        sock.settimeout(240)
        sock.sendall(os.urandom(64) + protocol.encode_request(Request(Verb.INFO, 1)))
        with suppress(ConnectionError):
            while data := sock.recv(1000):
                said += data
        assert len(said) == protocol.GREETING  # a nonce, and nothing about anything
    # Whoever says nothing is not waited for, and does not keep others away.
    _check_silence(where, Credentials(_KEY))


def _check_silence(where: tuple[str, int], credentials: Credentials) -> None:
    """A hundred connections on which nothing is said keep nobody who knows the key away for long."""

    def meets() -> bool:
        with suppress(OSError, ProtocolError):
            connection.connect(where, credentials, credentials.context(server=False)).close()
            return True
        return False

    silent = [socket.create_connection(where, 5) for _ in range(100)]
    try:
        eventually(meets)
    finally:
        for sock in silent:
            sock.close()


def test_a_node_with_another_key_is_no_member(
    source: Path, mount: MakeMount, liar: Callable[..., Liar], key_file: Path
) -> None:
    names = write_files(source, 20, 50_000)
    ports = free_ports(2)
    bad = liar(ports[1], liars.nothing, b"another key of no use")
    node = mount(source, "16M", *_options(ports[0], ports, "--cluster-key-file", key_file))
    eventually(lambda: bad.strangers > 0)
    _check(node, names)
    figures = node.stats()["peers"]
    assert figures["alive"] == bad.asked == figures["failures"] == 0


def test_a_stranger_is_refused_where_no_key_is_given(
    source: Path, nodes: Callable[..., list[Mount]], liar: Callable[..., Liar], mount: MakeMount
) -> None:
    names = write_files(source, 20, 50_000)
    made = nodes(2)
    where = ("127.0.0.1", int(made[0].stats()["peers"]["name"].partition(":")[2]))
    for key in (b"", _KEY):
        with pytest.raises((ProtocolError, ConnectionError)):
            connection.connect(where, Credentials(key), None)
    connection.connect(where, Credentials(_own_key()), None).close()
    ports = free_ports(2)
    bad = Liar(socket.create_server(("127.0.0.1", ports[1])), b"", liars.nothing)
    try:
        node = mount(source, "16M", *_options(ports[0], ports))
        eventually(lambda: bad.strangers > 0)
        _check(node, names)
        assert node.stats()["peers"]["alive"] == bad.asked == 0
    finally:
        bad.close()


def _prepare(**options: str) -> None:
    """What a mount does with its options, on a port that is free."""
    [port] = free_ports(1)
    cluster = settings.Cluster(listen=f"127.0.0.1:{port}", **{"peers": f"127.0.0.1:{port}", **options})
    config, sock = settings.prepare(cluster)
    sock.close()
    assert settings.credentials(config).key


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /run/coordlfs."""
    monkeypatch.setattr(settings, "_OF_ROOT", str(place / "run"))
    return place / "run"


def test_a_key_is_made_once_for_all_nodes_without_one(run: Path) -> None:
    found: list[tuple[str, bytes]] = []

    def look() -> None:
        path = settings.loopback_key()
        found.append((path, settings.read_key(path)))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    path, key = found[0]
    assert path == str(run / "loopback.key")
    assert len(key) == 64
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert run.stat().st_mode & 0o777 == 0o700
    assert os.listdir(run) == ["loopback.key"]


def _open_to_others(key: Path) -> None:
    key.chmod(0o644)


def _of_somebody_else(key: Path) -> None:
    os.chown(key, NOBODY, NOBODY)


def _too_short(key: Path) -> None:
    key.write_bytes(b"short")


def _a_directory_of_all(key: Path) -> None:
    key.parent.chmod(0o777)


def _a_directory_of_somebody_else(key: Path) -> None:
    os.chown(key.parent, NOBODY, NOBODY)


@pytest.mark.parametrize(
    "spoil",
    [
        _open_to_others,
        _of_somebody_else,
        _too_short,
        _a_directory_of_all,
        _a_directory_of_somebody_else,
    ],
)
def test_a_key_that_others_may_know_is_refused_in_one_line(run: Path, spoil: Callable[[Path], None]) -> None:
    _prepare()
    spoil(run / "loopback.key")
    with pytest.raises(UserError) as caught:
        _prepare()
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_the_key_of_a_user_lies(run: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = User("nobody", place)
    home, runtime, foreign = (place / name for name in ("home", "runtime", "foreign"))
    for made in (home, runtime, foreign):
        made.mkdir(mode=0o755)
    for made in (home, runtime):
        os.chown(made, user.uid, user.gid)
    foreign.chmod(0o777)
    in_home = home / ".cache" / "coordlfs" / "loopback.key"
    monkeypatch.setenv("HOME", str(home))
    for directory, wanted in (
        (str(runtime), runtime / "coordlfs" / "loopback.key"),
        (str(foreign), in_home),
        ("relative", in_home),
        (str(place / "missing"), in_home),
    ):
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        assert user.do(settings.loopback_key) == str(wanted)
        assert wanted.stat().st_uid == user.uid
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place / "foreign"))
    assert settings.loopback_key() == str(run / "loopback.key")  # root's, whatever the environment
    monkeypatch.setattr(settings, "_OF_ROOT", "/proc/coordlfs")
    monkeypatch.setenv("HOME", str(place))
    assert settings.loopback_key() == str(place / ".cache" / "coordlfs" / "loopback.key")


def test_a_key_that_is_gone_is_made_again(run: Path) -> None:
    """As when XDG_RUNTIME_DIR went with the user's session: a server that is replaced must come up."""
    [port] = free_ports(1)
    config, sock = settings.prepare(settings.Cluster(listen=f"127.0.0.1:{port}", peers=f"127.0.0.1:{port}"))
    sock.close()
    key = settings.credentials(config).key
    (run / "loopback.key").unlink()
    assert len(again := settings.credentials(config).key) == len(key)
    assert again != key
    with pytest.raises(FileNotFoundError):
        settings.credentials(config | {"own_key": False, "key_file": "/nowhere"})


def test_only_files_of_the_dataset_can_be_asked_for(source: Path, mount: MakeMount, place: Path) -> None:
    (source / "directory").mkdir()
    (source / "file").write_bytes(b"inside")
    (place / "secret").write_bytes(b"secret")
    (source / "link").symlink_to(place / "secret")
    ports = free_ports(2)
    node = mount(source, "16M", *_options(ports[0], ports))
    st = (source / "file").stat()
    with connection.connect(("127.0.0.1", ports[0]), Credentials(_own_key()), None) as sock:

        def ask(path: bytes, size: int = 6, mtime_ns: int = st.st_mtime_ns) -> Status:
            request = Request(Verb.GET, 7, 1, 0, size, mtime_ns, path)
            sock.sendall(protocol.encode_request(request))
            reply = protocol.parse_reply(sock.recv(protocol.REPLY, socket.MSG_WAITALL), request)
            if reply.length:
                assert sock.recv(reply.length, socket.MSG_WAITALL) == b"i"
            return reply.status

        eventually(lambda: ask(b"file") is Status.OK)
        secret = (place / "secret").stat()
        for path in (b"../" + os.fsencode(place.name) + b"/secret", b"/etc/passwd", b"link", b"no", b"file/x", b"\0"):
            assert ask(path, secret.st_size, secret.st_mtime_ns) in (Status.ERROR, Status.WRONG_VERSION), path
        assert ask(b"directory", 4096) is Status.WRONG_VERSION
        assert ask(b"file", 7) is Status.WRONG_VERSION
        assert ask(b"file", 6, st.st_mtime_ns + 1) is Status.WRONG_VERSION
        assert ask(b"file") is Status.OK
        sock.sendall(os.urandom(1000))  # garbage ends the connection, and nothing else
        with suppress(ConnectionError):
            while sock.recv(1000):
                pass
    assert is_alive(node.stats()["processes"]["peer_server"])


def test_another_version_is_not_served(source: Path, nodes: Callable[..., list[Mount]]) -> None:
    """Node 1 has cached files; they change; node 2, which lists them only now, gets the new ones."""
    names = write_files(source, 20, 50_000)
    one, two = nodes(2)
    _check(one, names)
    one.settle()
    two.settle()
    theirs = [name for name in names if one.cached(name) == "pinned"]
    assert len(theirs) > 2
    for name in names:
        (source / name).write_bytes(noise(60_000, 7))
    for name in theirs:
        assert read(two.path / name) == noise(60_000, 7)


def _owned_by(node: Mount, names: list[str]) -> list[str]:
    rows = json.loads(coordlfs("peers", node.path, "--json").stdout)
    ownership = Ownership([Node(row["name"], row["capacity_bytes"]) for row in rows])

    def owner(name: str) -> str | None:
        found = ownership.owner(key_of(node_of_path(name.encode()), 0))
        return None if found is None else found.name

    return [name for name in names if owner(name) == rows[0]["name"]]


def _read_again_if_stale(path: Path) -> bytes:
    """What whoever opens a file again gets that was changed while it was read."""
    found: list[bytes] = []

    def is_read() -> bool:
        try:
            found.append(read(path))
        except OSError as e:
            if e.errno != errno.ESTALE:
                raise
        return bool(found)

    eventually(is_read, what=f"{path} is not stale")
    return found[0]


@pytest.mark.parametrize("replaced", [False, True])
def test_what_changes_after_all_nodes_have_listed_it_is_read_in_one_version(
    source: Path, nodes: Callable[..., list[Mount]], replaced: bool
) -> None:
    """The owner, which has read nothing of it, learns by the request that its file is another one than it believes."""
    # Read in one READ, and in some; longer, as long and shorter than before.
    kinds = [(size, change) for size in (50_000, 2_500_000) for change in (1.3, 1, 0.7)]
    names = {kind: [f"{kind[0]}-{kind[1]}-{number}" for number in range(16)] for kind in kinds}
    for size, change in kinds:
        for number, name in enumerate(names[size, change]):
            (source / name).write_bytes(noise(size, number + 100))
    one, two = nodes(2, "300M")
    for node in (one, two):
        for size, change in kinds:
            for name in names[size, change]:
                assert (node.path / name).stat().st_size == size
    for size, change in kinds:
        new = noise(int(size * change), 7)
        theirs = _owned_by(two, names[size, change])
        assert theirs
        asked = one.stats()["peers"]["wrong_versions"]
        for name in theirs:
            old = read(source / name)
            if replaced:
                (source / "new").write_bytes(new)
                (source / "new").rename(source / name)
            else:
                with open(source / name, "r+b") as f:
                    f.truncate(len(new))
                    f.write(new)
            for node in (one, two, one):
                data = _read_again_if_stale(node.path / name)
                assert data in (old, new), (name, node.path, len(data))
        assert one.stats()["peers"]["wrong_versions"] > asked
    figures = one.stats()["peers"]
    assert figures["failures"] == figures["bad_payloads"] == 0


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--listen", "0.0.0.0:0"], 2, "--peers"),
        (["--peers", "a:1,b:2"], 2, "--listen"),
        (["--peers", "a:1", "--listen", "0.0.0.0:7070"], 2, "--cluster-key-file"),
        (["--peers", "127.0.0.1:1,10.1.2.3:7070", "--listen", "127.0.0.1:7070"], 2, "--cluster-key-file"),
        (["--peers", "[2001:db8::1]:7070", "--listen", "127.0.0.1:7070"], 2, "--cluster-key-file"),
        (["--peers", "a:1", "--listen", "nonsense"], 2, "HOST:PORT"),
        (["--peers", "nonsense", "--listen", "127.0.0.1:0"], 2, "etcd:URL"),
        (["--peers", "a:1", "--listen", "127.0.0.1:7070", "--tls-cert", "x"], 2, "go together"),
        (["--peers", "a:1", "--listen", "127.0.0.1:7070", "--cluster-key-file", "/nowhere"], 1, "No such file"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    source: Path, place: Path, options: list[str], status: int, says: str
) -> None:
    done = coordlfs("mount", source, place / "mnt", *options, status=status)
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert not (place / "mnt").exists()


def test_the_commands_tell_of_the_nodes(source: Path, nodes: Callable[..., list[Mount]]) -> None:
    names = write_files(source, 40, 50_000)
    made = nodes(3)
    one = made[0]
    for seed in range(2):
        for node in made:
            _check(node, names, seed)
            node.settle()
        _forget(*made)

    def rows(node: Mount) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(coordlfs("peers", node.path, "--json").stdout)
        return found

    def exchanged() -> list[tuple[str, str, int, int]]:
        tables = {rows(node)[0]["name"]: rows(node)[1:] for node in made}
        received = {(here, row["name"]): row["received_bytes"] for here, table in tables.items() for row in table}
        served = {(row["name"], here): row["served_bytes"] for here, table in tables.items() for row in table}
        return [(*pair, received[pair], served[pair]) for pair in received]

    # What one has received of another is what that has sent it, as it says with its next greeting; on a machine so busy
    # that an answer is not waited for, that was sent all the same.
    lost = sum(map(_unanswered, made)) * MIB
    eventually(lambda: all(0 < received <= served <= received + lost for _, _, received, served in exchanged()))
    here, there, _ = rows(one)
    assert here["self"]
    assert there["state"] == "alive"
    assert sum(row["received_bytes"] for row in rows(one)[1:]) == one.stats()["peers"]["bytes"]
    assert there["latency_seconds"] < 1
    assert sum(row["share"] for row in rows(one)) == pytest.approx(1)
    assert here["pinned_bytes"] == one.stats()["pinned_bytes"]
    assert there["name"] in coordlfs("peers", one.path).stdout.replace("\n", "")
    assert "local / peer / source" in coordlfs("status", one.path).stdout
    figures = one.stats()
    epochs = [*figures["epoch_history"], figures["epoch"]]
    assert any(epoch["peer_bytes"] for epoch in epochs)
    for epoch in epochs:
        assert epoch["local_bytes"] + epoch["peer_bytes"] + epoch["bytes"] == 40 * 50_000


def test_metrics_tell_of_each_node(source: Path, place: Path, mount: MakeMount) -> None:
    names = write_files(source, 40, 50_000)
    ports, told = free_ports(2), list[str]()
    tier = ("--disk-cache", place / "disk", "--disk-size", "8M")
    one = mount(source, "16M", *_options(ports[0], ports, "--metrics", "0"), said=told.append)
    two = mount(source, "16M", *_options(ports[1], ports, *tier))
    _alive(one, two, count=1)
    for node in (two, one):
        _check(node, names)
        node.settle()
    [url] = re.findall(r"^metrics: (\S+)$", "\n".join(told), re.MULTILINE)

    def of_nodes(name: str) -> dict[str, float]:
        with urllib.request.urlopen(url, timeout=PATIENCE) as reply:
            families = {family.name: family for family in text_string_to_metric_families(reply.read().decode())}
        return {sample.labels["node"]: sample.value for sample in families[f"coordlfs_node_{name}"].samples}

    here, there = (f"127.0.0.1:{port}" for port in ports)
    assert of_nodes("alive") == {here: 1, there: 1}
    eventually(lambda: of_nodes("disk_size_bytes") == {here: 0, there: 8 * MIB})
    assert of_nodes("memory_bytes") == {here: 16 * MIB, there: 16 * MIB}
    assert of_nodes("received_bytes") == {there: one.stats()["peers"]["bytes"]}
    eventually(lambda: of_nodes("pinned_bytes")[there] == two.stats()["pinned_bytes"])
    eventually(lambda: of_nodes("disk_held_bytes")[there] == two.stats()["disk"]["held_bytes"] > 0)
    unmount_lazily(two.path)
    eventually(lambda: of_nodes("alive") == {here: 1, there: 0})


def test_two_mounts_on_one_host_as_the_readme_shows_it(source: Path, place: Path, mount: MakeMount) -> None:
    """The lines as they are printed; only the directories are others."""
    (source / "train").mkdir()
    names = [f"train/{name}" for name in write_files(source / "train", 60, 100_000)]
    text = (Path(__file__).parents[2] / "README.md").read_text()
    [block] = [part for part in text.split("```") if part.startswith("sh\n") and "--peers" in part]
    lines = block.replace("/data/imagenet", str(source)).replace("/mnt/", f"{place}/").splitlines()[1:]
    assert len(lines) == 4
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with ExitStack() as stack:
        for path in (place / "a", place / "b"):
            stack.callback(unmount_lazily, path)
        said = [
            subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=PATIENCE)
            for line in lines
        ]
        assert [done.returncode for done in said] == [0] * 4, said
        assert "127.0.0.1:7071" in said[3].stdout
        assert "127.0.0.1:7072" in said[3].stdout
        made = [Mount(source, place / name, place / f"log-{name}") for name in ("a", "b")]
        for node in made:
            stack.callback(node.end)
        _alive(*made, count=1)

        def share() -> bool:
            _forget(*made)
            for node in made:
                _check(node, names)
                node.settle()
            # One of them, at least: what the other has read before it knew of a neighbour, it keeps.
            return any(node.stats()["peers"]["bytes"] > 0 for node in made)

        eventually(share)


def test_who_stands_alone_has_no_peers(source: Path, mount: MakeMount) -> None:
    alone = mount(source)
    assert alone.stats()["processes"]["peer_server"] is None
    assert "--peers" in coordlfs("peers", alone.path, status=1).stderr


# -- TLS ------------------------------------------------------------------------------------------------------------


def _authority(place: Path, name: str) -> tuple[Path, Path, Path]:
    """A certificate authority, and a certificate by it: certificate, private key, and whom to believe."""
    ca, ca_key, cert, private = (place / f"{name}-{part}" for part in ("ca", "ca-key", "cert", "key"))
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    for more in (
        ["-subj", f"/CN={name}", "-keyout", str(ca_key), "-out", str(ca)],
        ["-subj", "/CN=node", "-CA", str(ca), "-CAkey", str(ca_key), "-keyout", str(private), "-out", str(cert)],
    ):
        subprocess.run([*new, *more], check=True, capture_output=True)
    return cert, private, ca


def test_tls_between_nodes_and_a_foreign_authority(source: Path, mount: MakeMount, place: Path, key_file: Path) -> None:
    names = write_files(source, 40, 50_000)
    (source / "large").write_bytes(noise(20 * MIB + 1))
    names.append("large")
    ours, foreign = _authority(place, "ours"), _authority(place, "foreign")

    def tls(cert: Path, private: Path, ca: Path) -> tuple[object, ...]:
        options = ("--tls-cert", cert, "--tls-key", private, "--tls-ca", ca)
        return ("--cluster-key-file", key_file, *options)

    ports = free_ports(3)
    made = [mount(source, "32M", *_options(port, ports, *tls(*ours))) for port in ports[:2]]
    stranger = mount(source, "32M", *_options(ports[2], ports, *tls(*foreign)))
    _alive(*made, count=1)
    for seed in range(2):
        for node in (*made, stranger):
            _check(node, names, seed)
        _forget(*made)
    assert all(node.stats()["peers"]["bytes"] > 0 for node in made)
    assert all(node.stats()["peers"]["failures"] == 0 for node in made)
    figures = stranger.stats()["peers"]
    assert figures["alive"] == figures["bytes"] == 0
    where = ("127.0.0.1", ports[0])
    with pytest.raises((ProtocolError, OSError)):
        connection.connect(where, Credentials(_KEY), None)  # the key alone is not enough
    _check_silence(where, Credentials(_KEY, *map(str, ours)))
