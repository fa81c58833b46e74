"""Entries of directories as compiled code packs them, against the Python code that enters and packs single names."""

from __future__ import annotations

import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sides import TREES, Side, make, side_of

from coordlfs.catalogue.catalog import node_of_path
from coordlfs.catalogue.timeouts import NAME_TIMEOUT, attr_timeout
from coordlfs.kernel import fuse
from coordlfs.serving.listings import Listings
from coordlfs.sources.contract import Listing

_ENTRY = struct.Struct("=128sQQII")  # what LOOKUP would be answered; node, offset, length of the name, type
_CHANGES = st.sampled_from(["grow", "touch", "replace", "remove", "chmod"])


def _packed(name: bytes, entry: bytes, node: int, offset: int, kind: int) -> bytes:
    packed = _ENTRY.pack(entry, node, offset, len(name), kind) + name
    return packed.ljust(-(-len(packed) // 8) * 8, b"\0")


def _expected(side: Side, listing: Listing, directory: int) -> Iterator[bytes]:
    """Each of the entries in turn, entered when it is asked for; empty if the name is gone."""
    catalog, namespace = side.catalog, side.namespace
    yield _packed(b".", b"", catalog.node(directory), 1, stat.S_IFDIR >> 12)
    yield _packed(b"..", b"", catalog.node(catalog.entry(directory)[0]), 2, stat.S_IFDIR >> 12)
    for offset, name in enumerate(listing.names, 3):
        try:
            found = listing.lstat(name)
        except FileNotFoundError:
            yield b""
            continue
        node = namespace.node(namespace.enter(directory, name, found))
        entry = fuse.entry_reply(0, node, found, NAME_TIMEOUT, attr_timeout(found))[fuse.OUT_HEADER.size :]
        yield _packed(name, entry, node, offset, found.st_mode >> 12)


def _assert_lists_alike(ours: Side, theirs: Side, directory: int, room: int) -> None:
    """By as many replies as it takes."""
    entries = ours.entries()
    listings = [side.reader.source.listing(side.catalog.directory_path(directory)) for side in (ours, theirs)]
    assert listings[0].names == listings[1].names
    expected = list(_expected(theirs, listings[1], directory))
    into, position = memoryview(bytearray(room)), 0
    while True:
        n = entries.pack(listings[0], directory, position, into)
        there = b""
        while position < len(expected) and len(there + expected[position]) <= room:
            there += expected[position]
            position += 1
        assert bytes(into[:n]) == there
        if not n:
            break
    assert position == len(expected)
    assert ours.records() == theirs.records()
    for listing in listings:
        listing.close()


def _change(path: bytes, how: str) -> None:
    if how == "touch":
        os.utime(path, ns=(5, 5), follow_symlinks=False)
    elif how == "grow" and os.path.isfile(path) and not os.path.islink(path):
        with open(path, "ab") as f:
            f.write(b"more")
    elif how == "chmod" and not os.path.islink(path):
        os.chmod(path, 0o700)
    elif how in ("replace", "remove") and not os.path.isdir(path):
        os.unlink(path)
        if how == "replace":
            os.mkfifo(path)


@given(
    tree=TREES,
    below=TREES,
    many=st.integers(0, 150),
    room=st.integers(256, 3000),
    changes=st.lists(_CHANGES, max_size=8),
    id_bits=st.sampled_from([63, 7]),
)
@settings(deadline=None, max_examples=60)
def test_entries_are_those_of_the_python_code(
    tree: dict[bytes, str], below: dict[bytes, str], many: int, room: int, changes: list[str], id_bits: int
) -> None:
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        make(bytes(root), {b"below": "directory"})
        make(bytes(root), {name: kind for name, kind in tree.items() if name != b"below"})
        make(bytes(root / "below"), below | {b"%d" % n: "empty" for n in range(many if id_bits == 63 else 0)})
        ours, theirs = (stack.enter_context(side_of(root, id_bits=id_bits)) for _ in range(2))
        for changed in ([], changes):
            for name, how in zip(sorted(os.listdir(bytes(root))), changed, strict=False):
                _change(bytes(root) + b"/" + name, how)
            _assert_lists_alike(ours, theirs, 0, room)
            directory = ours.catalog.find(node_of_path(b"below"))
            if directory is not None and id_bits == 63:
                _assert_lists_alike(ours, theirs, directory, room)
        assert ours.figures() == theirs.figures()


def test_a_name_that_is_gone_is_left_out(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).touch()
    with side_of(tmp_path) as side:
        listing = side.reader.source.listing(b"")
        (tmp_path / "b").unlink()
        into = memoryview(bytearray(4096))
        n = side.entries().pack(listing, 0, 2, into)
        assert [into[at + _ENTRY.size : at + _ENTRY.size + 1] for at in range(0, n, n // 2)] == [b"a", b"c"]
        assert len(side.catalog) == 3


@pytest.mark.parametrize("position", [3, 5, 1 << 63, (1 << 64) - 1])
def test_nothing_is_behind_the_end(tmp_path: Path, position: int) -> None:
    (tmp_path / "a").touch()
    with side_of(tmp_path) as side:
        listing = side.reader.source.listing(b"")
        assert side.entries().pack(listing, 0, position, memoryview(bytearray(4096))) == 0
        assert side.entries().pack(listing, 0, 0, memoryview(bytearray(100))) == 0  # no room for one
        assert side.entries().pack(listing, 0, 2, memoryview(bytearray(0))) == 0


class _Reader:
    """Somebody who lists a directory by and by."""

    def __init__(self, listings: Listings) -> None:
        self.names: list[bytes] = []
        self._goes_on = True
        self._listings = listings
        self._position = 0
        self._into = memoryview(bytearray(600))

    def step(self) -> bool:
        """Take a reply's entries; False at the end."""
        if not self._goes_on:
            return False
        n, at = self._listings.pack(fuse.ROOT_NODE, self._position, self._into), 0
        while at < n:
            _, _, self._position, length, _ = _ENTRY.unpack_from(self._into, at)
            self.names.append(bytes(self._into[at + _ENTRY.size : at + _ENTRY.size + length]))
            at += -(-(_ENTRY.size + length) // 8) * 8
        self._goes_on = n > 0
        return self._goes_on


_STEPS = st.one_of(
    st.tuples(st.just("begin"), st.just(0)),
    st.tuples(st.just("step"), st.integers(0, 5)),
    st.tuples(st.sampled_from(["add", "remove"]), st.integers(0, 30)),
)


@given(steps=st.lists(_STEPS, max_size=60))
@settings(deadline=None, max_examples=60)
def test_who_lists_a_changing_directory_gets_what_stays_once(steps: list[tuple[str, int]]) -> None:
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        for number in range(0, 31, 2):
            (root / f"{number:02}").touch()
        side = stack.enter_context(side_of(root))
        listings = Listings(side.namespace, side.entries())
        readers, changed = [_Reader(listings)], set()
        for what, number in steps:
            path = root / f"{number:02}"
            if what == "begin":
                readers.append(_Reader(listings))
                readers[-1].step()
            elif what == "step":
                readers[number % len(readers)].step()
            else:
                changed.add(os.fsencode(path.name))
                path.touch() if what == "add" else path.unlink(missing_ok=True)
        stay = {b".", b"..", *(b"%02d" % number for number in range(0, 31, 2))} - changed
        for reader in readers:
            while reader.step():
                pass
            assert len(reader.names) == len(set(reader.names))
            assert stay <= set(reader.names)
        assert not listings._listed
