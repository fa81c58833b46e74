"""The compiled fast path against the Python code that it does the work of: replies, catalogue, counters are alike."""

from __future__ import annotations

import errno
import os
import select
import stat
import struct
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sides import ENTRY_NAMES, LARGEST, PID, TREES, Side, age, make, side_of

from coordlfs.cache import items
from coordlfs.cache.admission import Fetched
from coordlfs.catalogue.timeouts import NAME_TIMEOUT, attr_timeout
from coordlfs.kernel import fuse, pages
from coordlfs.serving.fast_path import FastPath, Requests

_MAX_REPLY = 2 * LARGEST


def _requests() -> Requests:
    return Requests(bytearray(fuse.REQUEST_BUFFER), pages.buffer(2 * fuse.MAX_READ + pages.PAGE))


def _request(opcode: int, unique: int, node: int, body: bytes) -> bytes:
    return fuse.IN_HEADER.pack(fuse.IN_HEADER.size + len(body), opcode, unique, node, 0, 0, PID, 0, 0) + body


def _lookup(unique: int, node: int, name: bytes) -> bytes:
    return _request(fuse.LOOKUP, unique, node, name + b"\0")


def _read(unique: int, node: int, size: int, offset: int = 0, flags: int = 0) -> bytes:
    return _request(fuse.READ, unique, node, fuse.READ_IN.pack(0, offset, size, 0, 0, flags) + bytes(4))


def _ask(side: Side, path: FastPath, requests: Requests, request: bytes) -> bytes | None:
    """The reply; None if the request is to be dispatched."""
    side.theirs.send(request)
    requests.unlooked = 0
    n = path.receive(requests, 1)
    while not n and side.waits.is_awaited(fuse.IN_HEADER.unpack_from(request)[3], 0):
        assert select.select([path.fd], [], [], 10)[0], "the disk does not read"
        path.hear()
        requests.unlooked = 0
        n = path.receive(requests, 1)
    if n:
        assert n == len(request)
        return None
    return side.theirs.recv(_MAX_REPLY)


@given(tree=TREES, below=TREES, others=st.lists(ENTRY_NAMES, max_size=4), id_bits=st.sampled_from([63, 6]))
@settings(deadline=None, max_examples=60)
def test_names_and_bytes_are_those_of_the_python_code(
    tree: dict[bytes, str], below: dict[bytes, str], others: list[bytes], id_bits: int
) -> None:
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        make(bytes(root), tree)
        directory = next((name for name, kind in tree.items() if kind == "directory"), None)
        if directory is not None:
            make(bytes(root) + b"/" + directory, below)
        ours = stack.enter_context(side_of(root, id_bits=id_bits))
        theirs = stack.enter_context(side_of(root, id_bits=id_bits))
        path, requests = ours.path(), _requests()

        def look_up(parent: int, name: bytes) -> int | None:
            """The record of a name, which both sides give alike; None if there is none."""
            reply = _ask(ours, path, requests, _lookup(7, ours.catalog.node(parent), name))
            try:
                record, attributes = theirs.namespace.lookup(parent, name)
            except OSError:
                assert reply is None
                return None
            if reply is None:
                attributes_ours = ours.namespace.lookup(parent, name)[1]
                is_usual = stat.S_ISDIR(attributes_ours.st_mode) or (
                    stat.S_ISREG(attributes_ours.st_mode) and attributes_ours.st_nlink == 1
                )
                assert not is_usual or id_bits < 63
            else:
                node = theirs.catalog.node(record)
                assert reply == fuse.entry_reply(7, node, attributes, NAME_TIMEOUT, attr_timeout(attributes))
                theirs.counters.add("lookups")
            assert ours.records() == theirs.records()
            return record

        places = [(0, [*tree, *others])]
        if directory is not None and (known := look_up(0, directory)) is not None:
            places.append((known, [*below, *others]))
        for above, names in places:
            for name in [*names, *names, b".", b"..", b"a/b", b"a\0b"]:
                record = look_up(above, name)
                if record is None:
                    continue
                size = theirs.catalog.size(record)
                asked = _read(9, ours.catalog.node(record), -(-size // pages.PAGE) * pages.PAGE)
                reply = _ask(ours, path, requests, asked)
                if reply is None:
                    continue
                data = (root / os.fsdecode(theirs.catalog.path(record))).read_bytes()
                assert reply == fuse.OUT_HEADER.pack(16 + size, 0, 9) + data
                version = theirs.catalog.version(record)
                assert theirs.catalog.serves(record, version)
                theirs.counters.add("reads")
                theirs.counters.count_read(size)
                fetched = Fetched(items.item_at(record, 0), 0, memoryview(data), version)
                theirs.reader.admission.missed(fetched, PID, False)
                assert ours.records() == theirs.records()
                assert ours.reader.admission.accounts.epochs == theirs.reader.admission.accounts.epochs
        assert ours.figures() == theirs.figures()
        assert not ours.refused
        assert not ours.left


@pytest.mark.parametrize(
    "unusual",
    [
        _read(1, 99, 4096),  # an unknown node
        _lookup(1, 99, b"file"),
        _lookup(1, fuse.ROOT_NODE, b""),
        _request(fuse.LOOKUP, 1, fuse.ROOT_NODE, b"file"),  # no NUL
        _request(fuse.LOOKUP, 1, fuse.ROOT_NODE, b""),
        _request(fuse.READ, 1, fuse.ROOT_NODE, b"short"),
        _read(1, fuse.ROOT_NODE, 4096),  # no file
        struct.pack("=II", 8, fuse.READ),
        _lookup(1, fuse.ROOT_NODE, b"n" * 256),
        _lookup(1, fuse.ROOT_NODE, b"n" * 5000),
    ],
)
def test_what_is_unusual_is_left_to_others(tmp_path: Path, unusual: bytes) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    with side_of(tmp_path) as side:
        path, requests = side.path(), _requests()
        side.theirs.send(unusual)
        assert path.receive(requests, 8) == len(unusual)
        before = side.records(), side.figures()
        assert path.receive(requests, 8) is None
        assert (side.records(), side.figures()) == before
        assert len(side.catalog) == 1


def _served(side: Side, name: bytes) -> tuple[FastPath, Requests, int]:
    path, requests = side.path(), _requests()
    assert _ask(side, path, requests, _lookup(1, fuse.ROOT_NODE, name)) is not None
    return path, requests, len(side.catalog) - 1


def test_parts_of_a_file_and_reads_around_the_page_cache_are_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10_000))
    with side_of(tmp_path) as side:
        path, requests, record = _served(side, b"file")
        node = side.catalog.node(record)
        for asked in (
            _read(2, node, 4096),  # not all of it
            _read(2, node, 12_288, offset=4096),
            _read(2, node, 12_288, flags=os.O_DIRECT),
            _read(2, node, 12_288, flags=os.O_NOATIME),
        ):
            assert _ask(side, path, requests, asked) is None
        assert side.counters["source_bytes"] == 0


@pytest.mark.parametrize("how", ["grown", "shrunk", "replaced", "touched", "locked up"])
def test_another_version_than_the_one_shown_is_left_to_others(tmp_path: Path, how: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(10_000))
    with side_of(tmp_path) as side:
        path, requests, record = _served(side, b"file")
        if how == "replaced":
            (tmp_path / "other").write_bytes(bytes(10_000))
            os.utime(tmp_path / "other", ns=(1, file.stat().st_mtime_ns))
            (tmp_path / "other").rename(file)
        elif how == "touched":
            os.utime(file, ns=(1, 1))
        elif how == "locked up":
            file.chmod(0)
        else:
            os.truncate(file, 20_000 if how == "grown" else 5_000)
        assert _ask(side, path, requests, _read(2, side.catalog.node(record), 12_288)) is None
        assert _ask(side, path, requests, _lookup(3, fuse.ROOT_NODE, b"file")) is None
        assert side.counters["source_bytes"] == 0


def test_while_there_is_room_items_are_admitted(tmp_path: Path) -> None:
    """The bytes that admission gets are those of the file, though the next one is read into the same memory."""
    contents = {b"%d" % i: os.urandom(50_000 + i) for i in range(4)}
    for name, data in contents.items():
        (tmp_path / os.fsdecode(name)).write_bytes(data)
        age(tmp_path / os.fsdecode(name))
    with side_of(tmp_path, 1000) as side:
        path, requests = side.path(), _requests()
        for name in contents:
            assert _ask(side, path, requests, _lookup(1, fuse.ROOT_NODE, name)) is not None
        nodes = {name: side.catalog.node(r) for r in range(1, len(side.catalog)) for _, name in [side.catalog.entry(r)]}
        for unique, (name, data) in enumerate(contents.items(), 10):  # all at once
            side.theirs.send(_read(unique, nodes[name], -(-len(data) // pages.PAGE) * pages.PAGE))
        replies: dict[int, bytes] = {}
        while len(replies) < len(contents):
            requests.unlooked = 0
            path.receive(requests, 100)
            while select.select([side.theirs], [], [], 0.05)[0]:
                reply = side.theirs.recv(_MAX_REPLY)
                replies[fuse.OUT_HEADER.unpack_from(reply)[2]] = reply[16:]
        assert [replies[unique] for unique in sorted(replies)] == list(contents.values())
        for name, data in contents.items():
            record = side.catalog.find(nodes[name])
            assert record is not None
            item = items.item_at(record, 0)
            assert side.reader.admission.is_pending(item)
            assert side.reader.admission.stash.parts(item, 0, len(data)) == [memoryview(data)]


def test_a_read_of_the_disk_is_known_and_can_be_given_up(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))
    age(file)
    with open(file, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with side_of(tmp_path) as side:
        path, requests, record = _served(side, b"file")
        if path.fd < 0:
            pytest.skip("no AIO here")
        node = side.catalog.node(record)
        side.theirs.send(_read(5, node, 102_400))
        requests.unlooked = 0
        path.receive(requests, 1)
        if side.waits.is_awaited(node, 0):  # else the disk was as quick
            assert not path.interrupt(6)
            assert path.interrupt(5)
            assert path.given_up(0.0) == []
            assert path.given_up(float("inf")) == [5]
            assert path.given_up(float("inf")) == []
            assert select.select([path.fd], [], [], 10)[0]
            path.hear()
            requests.unlooked = 0
            assert path.receive(requests, 1) == 0
        assert side.theirs.recv(200_000) == fuse.OUT_HEADER.pack(100_016, 0, 5) + bytes(100_000)
        assert not side.waits.is_awaited(node, 0)


def test_a_file_that_has_just_changed_is_left_to_others_until_bytes_of_it_went_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"new")
    with side_of(tmp_path) as side:
        path, requests, record = _served(side, b"file")
        request = _read(5, side.catalog.node(record), pages.PAGE)
        assert _ask(side, path, requests, request) is None
        assert side.catalog.serves(record, side.catalog.version(record))
        assert _ask(side, path, requests, request) == fuse.OUT_HEADER.pack(19, 0, 5) + b"new"


def test_ioctls_of_files_are_refused_at_once(tmp_path: Path) -> None:
    """But for every ninth of those that come together, before which the GIL is taken: it is dispatched."""
    terminal = fuse.IOCTL_IN.pack(0, 0, 0x5401, 0, 0, 0)
    with side_of(tmp_path) as side:
        path, requests = side.path(), _requests()
        for unique in range(2, 20):
            side.theirs.send(_request(fuse.IOCTL, unique, 99, terminal))
        answers = [path.receive(requests, 8) for _ in range(3)]
        assert answers == [fuse.IN_HEADER.size + len(terminal)] * 2 + [None]
        replies = [side.theirs.recv(100) for _ in range(16)]
        assert replies == [fuse.error_reply(unique, errno.ENOTTY) for unique in range(2, 20) if unique not in (10, 19)]
        assert side.counters["ioctls"] == 16


@pytest.mark.parametrize(
    "unusual",
    [
        _request(fuse.IOCTL, 2, 1, fuse.IOCTL_IN.pack(0, fuse.IOCTL_DIR, 0x5401, 0, 0, 0)),  # hints come so
        _request(fuse.IOCTL, 2, 1, fuse.IOCTL_IN.pack(0, 0, 0x5401, 0, 0, 0)[:-1]),
    ],
)
def test_other_ioctls_are_left_to_others(tmp_path: Path, unusual: bytes) -> None:
    with side_of(tmp_path) as side:
        path, requests = side.path(), _requests()
        side.theirs.send(unusual)
        assert path.receive(requests, 8) == len(unusual)
        assert side.counters["ioctls"] == 0
