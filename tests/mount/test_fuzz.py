"""Random and truncated messages wherever coordlfs is talked to: refused or ignored, and nobody dies of them."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounts import MIB, MakeMount, Mount, coordlfs, read, write_files

from coordlfs.cache import items, keeper_protocol
from coordlfs.cache.keeper_protocol import PINS, REPLY, REQUEST, How, Outcome, Verb
from coordlfs.cache.residence import Residence
from coordlfs.catalogue import memfds
from coordlfs.kernel import fuse

SHORT, LONG = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
OFTEN = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
TIMEOUT = 20

# -- packets between server, keepers and supervisor ---------------------------------------------------------------


def cut(message: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Messages, whole or cut off anywhere, and noise."""
    return st.one_of(message, st.builds(lambda m, n: m[: n % (len(m) + 1)], message, SHORT), st.binary(max_size=200))


FLAWED_REQUESTS = cut(
    st.builds(
        lambda verb, flags, numbers, path: REQUEST.pack(verb, flags, *numbers) + path,
        st.one_of(st.sampled_from(Verb), st.integers(0, 255)),
        st.integers(0, 255),
        st.tuples(LONG, LONG, LONG, LONG),
        st.binary(max_size=100),
    )
)
FLAWED_REPLIES = cut(
    st.builds(
        lambda outcome, code, item, pins: REPLY.pack(outcome, 0, code, item) + b"".join(PINS.pack(*p) for p in pins),
        st.one_of(st.sampled_from(Outcome), st.integers(0, 255)),
        st.integers(-(1 << 31), (1 << 31) - 1),
        st.one_of(LONG, st.integers(0, 100)),
        st.lists(st.tuples(LONG, LONG), max_size=5),
    )
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FLAWED_JSON = cut(st.builds(lambda value: json.dumps(value).encode(), JSON))


@given(FLAWED_REQUESTS)
def test_a_request_is_one_that_can_be_served_or_is_refused(packet: bytes) -> None:
    with suppress(ValueError):
        verb, _, _, _, offset, length, path = keeper_protocol.parse_request(packet)
        assert verb in Verb
        assert offset + length < 1 << 63
        assert length <= items.CHUNK
        assert packet.endswith(path)


@given(FLAWED_REPLIES)
def test_a_reply_is_read_whole_or_refused(packet: bytes) -> None:
    with suppress(ValueError):
        outcome, code, item, pins = keeper_protocol.parse_reply(packet)
        assert packet[:1] == bytes([outcome])
        assert REPLY.unpack_from(packet)[2:] == (code, item)
        assert len(packet) == REPLY.size + PINS.size * len(pins)


@OFTEN
@given(FLAWED_JSON | st.just(b"[" * 60_000), st.integers(0, 4))
def test_what_is_no_message_is_an_empty_one_and_leaves_no_descriptor(packet: bytes, count: int) -> None:
    if not packet:
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = set(os.listdir("/proc/self/fd"))
    with ours, theirs:
        socket.send_fds(ours, [packet], [ours.fileno()] * count)
        received = keeper_protocol.receive(theirs)
        assert received is not None
        message, fds = received
        assert isinstance(message, dict)
        assert len(fds) == (count if fds else 0)
        for fd in fds:
            os.close(fd)
        assert set(os.listdir("/proc/self/fd")) <= before


# -- a server and a keeper of which the test is the kernel, the supervisor and the other --------------------------


class Harness:
    """A process of coordlfs, started with sockets where the kernel and the supervisor would be."""

    def __init__(self, stack: ExitStack, module: str, config: dict[str, Any], pairs: dict[str, Any], fds: list[int]):
        theirs = []
        self.sockets: dict[str, socket.socket] = {}
        for name in pairs:
            ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for sock in (ours, other):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
            ours.settimeout(TIMEOUT)
            self.sockets[name] = stack.enter_context(ours)
            theirs.append(other)
            pairs[name](config, other.fileno())
        command = [sys.executable, "-P", "-m", module, json.dumps(config)]
        fds = [*fds, *(sock.fileno() for sock in theirs)]
        self.process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
        stack.callback(self._end)
        for sock in theirs:
            sock.close()

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()


def _init_request() -> bytes:
    flags = (1 << 30) | fuse.NO_OPEN_SUPPORT | fuse.NO_OPENDIR_SUPPORT | fuse.DO_READDIRPLUS | fuse.ASYNC_READ
    body = fuse.INIT_IN.pack(7, 40, 1 << 20, flags, fuse.HAS_RESEND).ljust(64, b"\0")
    return fuse.IN_HEADER.pack(fuse.IN_HEADER.size + len(body), fuse.INIT, 2, 0, 0, 0, 0, 0, 0) + body


class FakeKernel(Harness):
    """A server, and the connection to it that /dev/fuse would be; `keeper` is the other end of its keeper's socket."""

    def __init__(self, stack: ExitStack, source: Path, log: Path) -> None:
        records, names = memfds.allocate()
        root = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
        for fd in (records, names, root):
            stack.callback(os.close, fd)
        config: dict[str, Any] = {
            "source": str(source),
            "mountpoint": str(log) + "-no-such-mountpoint",
            "capacity": 64 * MIB,
            "log": str(log),
            "acl": False,
            "is_remote": False,
            "fstype": None,
            "resend": True,
            "memory": None,
            "residence": Residence.PAGE_CACHE,
            "lockable": None,
            "is_busy": False,
            "metrics": None,
            "revalidate": None,
            "peers": None,
            "parent": os.getpid(),
            "records": records,
            "names": names,
            "root": root,
            "init": _init_request().hex(),
            "keepers": [{"index": 1, "pid": os.getpid(), "socket": -1}],
        }
        pairs: dict[str, Callable[[dict[str, Any], int], None]] = {
            "device": lambda c, fd: c.update(device=fd),
            "link": lambda c, fd: c.update(link=fd),
            "keeper": lambda c, fd: c["keepers"][0].update(socket=fd),
        }
        super().__init__(stack, "coordlfs.processes.server", config, pairs, [records, names, root])
        self.log = log
        self.unique = 1 << 60
        assert keeper_protocol.receive(self.sockets["link"]) == ({"ready": True}, [])

    def ask(self, opcode: int, node: int, body: bytes = b"") -> tuple[int, bytes]:
        """A message as the kernel sends it; errno and body of the answer. Answers to others are thrown away."""
        self.unique += 2
        self.send(opcode, self.unique, node, body)
        while True:
            answer = b""
            with suppress(ConnectionError):
                answer = self.sockets["device"].recv(1 << 21)
            assert answer, f"the server died: {self.log.read_text()}"
            length, error, unique = fuse.OUT_HEADER.unpack_from(answer)
            assert length == len(answer)
            if unique == self.unique:
                return -error, answer[fuse.OUT_HEADER.size :]

    def send(self, opcode: int, unique: int, node: int, body: bytes, length: int | None = None) -> None:
        """A message, with another length than its own if one is given."""
        total = fuse.IN_HEADER.size + len(body) if length is None else length
        self.send_raw(fuse.IN_HEADER.pack(total, opcode, unique, node, 0, 0, os.getpid(), 0, 0) + body)

    def send_raw(self, message: bytes) -> None:
        """Any bytes but none at all, which would be the end."""
        try:
            self.sockets["device"].send(message)
        except ConnectionError:
            raise AssertionError(f"the server died: {self.log.read_text()}") from None

    def lookup(self, name: bytes) -> int:
        """The node of a name in the root."""
        error, body = self.ask(fuse.LOOKUP, fuse.ROOT_NODE, name + b"\0")
        assert error == 0
        node: int = fuse.ENTRY.unpack_from(body)[0]
        return node

    def assert_serves(self, content: bytes) -> None:
        """That every part of the server answers, and rightly."""
        node = self.lookup(b"item-00000")
        assert self.ask(fuse.READ, node, fuse.READ_IN.pack(0, 0, 4096, 0, 0, 0) + bytes(4)) == (0, content)
        error, names = self.ask(fuse.READDIRPLUS, fuse.ROOT_NODE, fuse.READ_IN.pack(0, 0, 4096, 0, 0, 0) + bytes(4))
        assert error == 0
        assert b"item-00001" in names
        assert self.process.poll() is None


@pytest.fixture
def kernel(source: Path, place: Path) -> Iterator[FakeKernel]:
    """A server that believes the test to be the kernel."""
    write_files(source, 3, 1000)
    with ExitStack() as stack:
        yield FakeKernel(stack, source, place / "log")


OPCODES = st.one_of(st.integers(0, 60), st.sampled_from([fuse.READ, fuse.LOOKUP, fuse.GETXATTR, fuse.READDIRPLUS]))
BODIES = st.one_of(
    st.binary(max_size=100),
    st.builds(lambda *n: fuse.READ_IN.pack(*n) + bytes(4), LONG, LONG, SHORT, SHORT, LONG, SHORT),
    st.builds(lambda size, name: struct.pack("=II", size, 0) + name + b"\0", SHORT, st.binary(max_size=300)),
    st.builds(
        lambda name: name + b"\0", st.sampled_from([b"", b".", b"..", b"a/b", b"item-00000", b"\0", b"x" * 5000])
    ),
)
NOISE = st.binary(min_size=1, max_size=60)
LENGTHS = st.one_of(st.none(), st.none(), SHORT, st.integers(0, 200))


def test_messages_of_a_kernel_gone_mad(kernel: FakeKernel, source: Path) -> None:
    content = read(source / "item-00000")
    kernel.assert_serves(content)
    nodes = st.one_of(LONG, st.sampled_from([0, 1, kernel.lookup(b"item-00000"), kernel.lookup(b"item-00002")]))
    uniques = st.integers(1, 1 << 59).map(lambda n: n * 2)

    @OFTEN
    @given(
        st.lists(st.tuples(OPCODES, uniques, nodes, BODIES, LENGTHS), max_size=5), st.binary(min_size=1, max_size=60)
    )
    def send(messages: list[tuple[int, int, int, bytes, int | None]], noise: bytes) -> None:
        for message in messages:
            kernel.send(*message)
        kernel.send_raw(noise)
        assert kernel.ask(fuse.GETATTR, fuse.ROOT_NODE, bytes(16))[0] == 0

    send()
    kernel.assert_serves(content)


def test_messages_that_are_cut_off_are_refused(kernel: FakeKernel) -> None:
    whole = {
        fuse.READ: fuse.READ_IN.pack(0, 0, 4096, 0, 0, 0),
        fuse.LOOKUP: b"item-00000\0",
        fuse.GETXATTR: struct.pack("=II", 100, 0) + b"user.x\0",
        fuse.LISTXATTR: struct.pack("=II", 100, 0),
        fuse.READDIRPLUS: fuse.READ_IN.pack(0, 0, 4096, 0, 0, 0),
    }
    for opcode, body in whole.items():
        for length in range(len(body)):
            assert kernel.ask(opcode, fuse.ROOT_NODE, body[:length]) == (errno.EINVAL, b""), (opcode, length)
    for name in (b".", b"..", b"a/b", b"../x", b"a\0b"):
        assert kernel.ask(fuse.LOOKUP, fuse.ROOT_NODE, name + b"\0") == (errno.EINVAL, b"")
    for opcode in (6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 28, 31, 33, 35, 37, 38, 40, 43, 45, 46, 47, 50, 52, 4096):
        assert kernel.ask(opcode, fuse.ROOT_NODE, bytes(8)) == (errno.ENOSYS, b"")


def test_a_keeper_gone_mad(kernel: FakeKernel, source: Path) -> None:
    content = read(source / "item-00000")
    kernel.assert_serves(content)
    keeper = kernel.sockets["keeper"]

    @OFTEN
    @given(st.lists(FLAWED_REPLIES.filter(bool), max_size=10))
    def send(packets: list[bytes]) -> None:
        for packet in packets:
            keeper.send(packet)
        while select.select([keeper], [], [], 0)[0]:
            keeper.recv(keeper_protocol.MAX_PACKET)
        assert kernel.ask(fuse.GETATTR, fuse.ROOT_NODE, bytes(16))[0] == 0

    send()
    kernel.assert_serves(content)


def test_a_supervisor_gone_mad(kernel: FakeKernel, source: Path) -> None:
    content = read(source / "item-00000")
    known = st.fixed_dictionaries({}, optional={"lost": JSON, "keeper": JSON, "index": JSON, "x": JSON})
    nested = st.builds(
        lambda inner: {"keeper": inner},
        st.fixed_dictionaries({"index": JSON | st.integers(0, 9), "pid": JSON | st.integers()}),
    )
    messages = st.one_of(FLAWED_JSON.filter(bool), st.builds(lambda v: json.dumps(v).encode(), known | nested))

    @OFTEN
    @given(messages, st.booleans())
    def send(packet: bytes, with_file: bool) -> None:
        fds = [sys.__stderr__.fileno()] if with_file and sys.__stderr__ else []
        socket.send_fds(kernel.sockets["link"], [packet], fds)

    send()
    kernel.assert_serves(content)
    while select.select([kernel.sockets["link"]], [], [], 0)[0]:
        assert keeper_protocol.receive(kernel.sockets["link"]) is not None


def test_requests_to_a_keeper(source: Path) -> None:
    write_files(source, 2, 1000)
    tree = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    config = {"parent": os.getpid(), "tree": tree, "readahead": 1 << 20, "in_memory": False}
    with ExitStack() as stack:
        stack.callback(os.close, tree)
        pairs = {"socket": lambda c, fd: c.update(socket=fd)}
        keeper = Harness(stack, "coordlfs.cache.keeper", config, pairs, [tree])
        sock = keeper.sockets["socket"]
        inode = (source / "item-00000").stat().st_ino  # a keeper opens by path, and compares

        def pin(item: int) -> None:
            sock.send(REQUEST.pack(Verb.PIN, How.KEEP, item, inode, 0, 1000) + b"item-00000")
            while True:
                packet = sock.recv(keeper_protocol.MAX_PACKET)
                assert packet, "the keeper died"
                outcome, _, about, _ = keeper_protocol.parse_reply(packet)
                if outcome is Outcome.PINNED and about == item:
                    return

        count = 1 << 50

        @OFTEN
        @given(st.lists(FLAWED_REQUESTS.filter(bool), max_size=10))
        def send(packets: list[bytes]) -> None:
            nonlocal count
            for packet in packets:
                sock.send(packet)
            count += 1
            pin(count)

        send()
        assert keeper.process.poll() is None


# -- what anybody may say to a mount ------------------------------------------------------------------------------


def _control(mounted: Mount) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT)
    sock.connect(b"\0" + os.getxattr(mounted.path, "user.coordl.control"))
    return sock


PATHS = st.lists(st.sampled_from(["item-00000", "..", ".", "/", "a\0b", "\ud800", "x/../y"]))
REQUESTS = st.fixed_dictionaries(
    {"verb": st.sampled_from(["admit", "source", "drop", "x"]) | JSON},
    optional={
        "paths": JSON | st.lists(st.sampled_from(["item-00000", "..", ".", "/", "a\0b", "\ud800", "x/../y"])),
        "y": JSON,
    },
)


def test_the_control_socket(source: Path, mount: MakeMount) -> None:
    write_files(source, 3, 1000)
    mounted = mount(source)

    @settings(OFTEN, max_examples=100)
    @given(st.one_of(FLAWED_JSON, cut(st.builds(lambda r: json.dumps(r).encode() + b"\n", REQUESTS))))
    def send(data: bytes) -> None:
        with _control(mounted) as sock:
            with suppress(BrokenPipeError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while sock.recv(1 << 16):
                    pass  # it closes in the end, or this runs into its time limit

    send()
    for data in (b"[" * 200_000 + b"\n", b"9" * 100_000 + b"\n", b"x" * (5 << 20)):
        with _control(mounted) as sock, suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            assert sock.recv(100) == b""
    coordlfs("warm", mounted.path)
    assert mounted.settle()["pinned_items"] == 3
    assert mounted.stats()["processes"]["server"] == mounted.processes["server"]


def test_names_of_extended_attributes(source: Path, mount: MakeMount) -> None:
    write_files(source, 2, 1000)
    mounted = mount(source)
    names = st.binary(min_size=1, max_size=240).filter(lambda name: b"\0" not in name)
    verbs = st.sampled_from([b"stats", b"control", b"cached", b"hint", b"hint.", b"hint.1.", b"ahead", b""])

    @OFTEN
    @given(
        st.one_of(names, st.builds(lambda verb, name: verb + name, verbs, names), verbs),
        st.binary(max_size=1000),
        st.sampled_from([".", "item-00000"]),
    )
    def use(name: bytes, value: bytes, file: str) -> None:
        full = b"user.coordl." + name
        with suppress(OSError):
            os.getxattr(mounted.path / file, full)
        with pytest.raises(OSError) as caught:
            os.setxattr(mounted.path / file, full, value)
        assert caught.value.errno in (errno.EROFS, errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.ERANGE)
        with pytest.raises(OSError):
            os.removexattr(mounted.path / file, full)

    use()
    assert mounted.stats()["processes"]["server"] == mounted.processes["server"]
