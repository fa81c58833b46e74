"""The catalogue against a naive model: with restarts, collisions, replaced files, hard links and growth."""

from __future__ import annotations

import functools
import os
import random
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordlfs.catalogue import memfds
from coordlfs.catalogue.catalog import (
    COUNTERS,
    DIRECTORY,
    LATER,
    LINKED,
    REGULAR,
    SERVED,
    SUPERSEDED,
    Catalog,
    node_of_path,
)
from coordlfs.kernel.fuse import ROOT_NODE
from coordlfs.sources.versions import Version

NAMES = (
    st.sampled_from([b"a", b"b", b"c", b"\xff\xfe", b" ", b"\n", b"x" * 255])
    | st.binary(min_size=1, max_size=255).map(lambda name: name.replace(b"\0", b"0").replace(b"/", b"|"))
).filter(lambda name: name not in (b".", b".."))


def attributes(
    inode: int, *, size: int = 0, mtime_ns: int = 0, kind: int = stat.S_IFREG, links: int = 1, device: int = 1
) -> os.stat_result:
    """What stat(2) would say."""
    return os.stat_result((kind | 0o644, inode, device, links, 0, 0, size, 0, 0, 0), {"st_mtime_ns": mtime_ns})


def directory(inode: int) -> os.stat_result:
    """What stat(2) would say of a directory."""
    return attributes(inode, kind=stat.S_IFDIR, links=2)


@contextmanager
def memory() -> Iterator[tuple[int, int]]:
    """The memfds of a new catalogue."""
    fds = memfds.allocate()
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@pytest.fixture
def fds() -> Iterator[tuple[int, int]]:
    """The memfds of a new catalogue."""
    with memory() as fds:
        yield fds


class Model(RuleBasedStateMachine):
    """Files come, change, are replaced, linked and read, and servers die, in any order.

    Node ids have 8 bits, so that most of them collide.
    """

    @initialize()
    def begin(self) -> None:
        self.memory = memory()
        self.fds = self.memory.__enter__()
        self.inode = 100
        self.directories = {0: b""}  # record → path
        self.source: dict[tuple[int, bytes], os.stat_result] = {}
        self.node: dict[tuple[int, bytes], int] = {}  # that the name leads to
        self.links: dict[int, int] = {}  # inode → node
        self.shown: dict[int, tuple[bytes, Version | None]] = {ROOT_NODE: (b"", None)}  # every node there ever was
        self.served: set[int] = set()
        self.later: set[int] = set()  # nodes whose id is of a version
        self.restart()

    def teardown(self) -> None:
        self.memory.__exit__(None, None, None)

    @rule()
    def restart(self) -> None:
        """Another server takes over."""
        self.catalog = Catalog(*self.fds, id_bits=8)

    def enter(self, parent: int, name: bytes, attributes: os.stat_result) -> tuple[int, int]:
        """Look a name up as the server does: record, and node."""
        record, changed, _ = self.catalog.enter(parent, name, attributes)
        node = self.catalog.node(record)
        before = self.shown.get(node, (b"", None))[1]
        assert changed == (before is not None and before != Version.of(attributes))
        if changed:
            assert self.catalog.version(record) == before, "recorded before the pages went"
            self.catalog.set_version(record, Version.of(attributes))
            self.served.discard(node)
        return record, node

    def path(self, parent: int, name: bytes) -> bytes:
        return self.directories[parent] + b"/" + name if parent else name

    def new_inode(self) -> int:
        self.inode += 1
        return self.inode

    @precondition(lambda self: len(self.shown) < 60)
    @rule(data=st.data(), name=NAMES, kind=st.sampled_from(["file", "directory", "link"]))
    def appears(self, data: st.DataObject, name: bytes, kind: str) -> None:
        parent = data.draw(st.sampled_from(sorted(self.directories)), "directory")
        if (parent, name) in self.source or self.path(parent, name) in self.directories.values():
            return
        if kind == "directory":
            record, node = self.enter(parent, name, found := directory(self.new_inode()))
            self.directories[record] = self.path(parent, name)
        elif kind == "file":
            found = self.source[parent, name] = attributes(self.new_inode(), size=self.inode)
            record, node = self.enter(parent, name, found)
            self.node[parent, name] = node
        else:
            linked = data.draw(st.sampled_from([*sorted(self.links), self.new_inode()]), "inode")
            record, node = self.enter(parent, name, found := attributes(linked, links=9))
            known = self.links.setdefault(linked, node)
            assert node == known, "hard links are one node"
            self.source[parent, name] = found
            if node in self.shown:
                return
        assert node not in self.shown, "a node of another file"
        self.shown[node] = (self.path(parent, name), Version.of(found))

    @precondition(lambda self: self.node)
    @rule(data=st.data(), what=st.sampled_from(["nothing", "grows", "touched", "replaced", "served"]))
    def happens(self, data: st.DataObject, what: str) -> None:
        parent, name = at = data.draw(st.sampled_from(sorted(self.node)), "file")
        node, old = self.node[at], self.source[at]
        if what == "served":
            record = self.catalog.find(node)
            assert record is not None
            self.catalog.set_served(record)
            self.served.add(node)
            return
        self.source[at] = attributes(
            self.new_inode() if what == "replaced" else old.st_ino,
            size=old.st_size + (what == "grows"),
            mtime_ns=old.st_mtime_ns - (what == "touched") * 10**18,
        )
        _, now = self.enter(parent, name, self.source[at])
        is_later = node in self.later and what != "replaced"  # that one has the same size and time
        if what != "nothing" and (node in self.served or is_later):
            assert now not in self.shown, "whoever has the old version open would read the new one"
            self.node[at] = now
            self.later.add(now)
        else:
            assert now == node
        self.shown[now] = (self.path(*at), Version.of(self.source[at]))

    @invariant()
    def every_node_leads_where_it_did(self) -> None:
        assert len(self.catalog) == len(self.shown)
        for node, (path, version) in self.shown.items():
            record = self.catalog.find(node)
            assert record is not None
            assert self.catalog.node(record) == node
            assert self.catalog.path(record) == path
            assert version is None or self.catalog.version(record) == version
            assert bool(self.catalog.flags(record) & SERVED) == (node in self.served)

    @invariant()
    def every_name_leads_where_it_did(self) -> None:
        for (parent, name), found in self.source.items():
            node = self.links[found.st_ino] if found.st_nlink > 1 else self.node[parent, name]
            record, changed, _ = self.catalog.enter(parent, name, found)
            assert (self.catalog.node(record), changed) == (node, False)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

TREES = st.lists(st.tuples(st.integers(0, 1 << 30), NAMES), min_size=1, max_size=80)


def grow(catalog: Catalog, tree: list[tuple[int, bytes]], at: int = 0) -> list[int]:
    """Enter directories, each in one of those before it; their nodes."""
    records = list(range(len(catalog)))
    nodes = []
    for number, (parent, name) in enumerate(tree, at):
        record, *_ = catalog.enter(records[parent % len(records)], name, directory(number + 2))
        if record == len(records):
            records.append(record)
        nodes.append(catalog.node(record))
    return nodes


@settings(max_examples=60, deadline=None)
@given(tree=TREES, restart=st.integers(0, 80), id_bits=st.sampled_from([8, 63]))
def test_node_ids_depend_on_the_order_of_names_alone(tree: list[tuple[int, bytes]], restart: int, id_bits: int) -> None:
    with memory() as one, memory() as other:
        nodes = grow(Catalog(*one, id_bits=id_bits), tree)
        first = grow(Catalog(*other, id_bits=id_bits), tree[:restart])
        assert first + grow(Catalog(*other, id_bits=id_bits), tree[restart:], restart) == nodes


@settings(max_examples=60, deadline=None)
@given(tree=TREES)
def test_node_ids_are_made_of_the_path(tree: list[tuple[int, bytes]]) -> None:
    with memory() as fds:
        catalog = Catalog(*fds)
        grow(catalog, tree)
        for record in range(1, len(catalog)):
            assert catalog.node(record) == node_of_path(catalog.path(record))


def test_every_record_is_found_in_a_crowded_index(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds, id_bits=16)  # as crowded as it may be, and wrapping around its end
    for number in range(10_000):
        catalog.enter(0, b"%d" % number, attributes(number + 2))
    for seen in (catalog, Catalog(*fds, id_bits=16)):
        assert [seen.find(catalog.node(record)) for record in range(len(catalog))] == list(range(10_001))
        assert seen.find(1 << 20) is None


def test_names_of_many_directories_that_collide_are_told_apart(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds, id_bits=8)
    homes = [catalog.enter(0, b"%d" % number, directory(number))[0] for number in range(2, 92)]
    files = {catalog.enter(home, b"same", attributes(home + 1000))[0]: home for home in homes}
    assert len({catalog.node(record) for record in files}) == len(homes)
    for record, home in files.items():
        assert catalog.entry(record) == (home, b"same")
        assert catalog.enter(home, b"same", attributes(home + 1000))[:2] == (record, False)


def test_growth_past_the_index_is_seen_by_a_server_that_takes_over(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    names = [b"%016x.jpg" % number for number in range(20_000)]
    home, *_ = catalog.enter(0, b"images", directory(2))
    records = {
        name: catalog.enter(home, name, attributes(inode, size=inode, mtime_ns=-inode))[0]
        for inode, name in enumerate(names, 3)
    }
    assert len(set(records.values())) == len(names)
    for seen in (catalog, Catalog(*fds)):
        assert len(seen) == len(names) + 2
        for inode, (name, record) in enumerate(records.items(), 3):
            assert seen.find(seen.node(record)) == record
            assert seen.path(record) == b"images/" + name
            assert seen.version(record) == Version.of(attributes(inode, size=inode, mtime_ns=-inode))
        assert seen.find(12345) is None
        assert seen.memory / len(names) <= 400
    allocated = sum(os.fstat(fd).st_blocks * 512 for fd in fds)
    assert allocated <= seen.memory + (1 << 20), "what is said to be used is less than what is"


@contextmanager
def busy_threads(*work: Callable[[], None]) -> Iterator[None]:
    """Have threads repeat `work` meanwhile, and switch between them as often as can be."""
    done = threading.Event()

    def repeat(once: Callable[[], None]) -> None:
        while not done.is_set():
            once()

    threads = [threading.Thread(target=repeat, args=(once,)) for once in work]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)


def test_readers_find_everything_while_the_catalogue_grows(fds: tuple[int, int]) -> None:
    catalog, rng = Catalog(*fds), random.Random(1)
    known = [(ROOT_NODE, b"")]
    wrong: list[object] = []

    def find() -> None:
        node, path = rng.choice(known)
        record = catalog.find(node)
        if record is None or catalog.path(record) != path:
            wrong.append((node, record, path))

    with busy_threads(find, find):
        for inode in range(2, 10_000):
            name = b"%d" % inode
            known.append((catalog.node(catalog.enter(0, name, attributes(inode))[0]), name))
    assert not wrong


def test_threads_that_enter_the_same_names_agree(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds, id_bits=16)
    records: list[dict[bytes, int]] = [{}, {}, {}]

    def enter(seen: dict[bytes, int]) -> None:
        name = b"%d" % len(seen)
        if len(seen) < 3000:
            seen[name] = catalog.enter(0, name, attributes(len(seen) + 2))[0]

    with busy_threads(*(functools.partial(enter, seen) for seen in records)):
        while min(map(len, records)) < 3000:
            time.sleep(0.01)
    assert records[0] == records[1] == records[2]
    assert len(catalog) == 3001


def test_a_link_that_is_moved_is_never_seen_with_half_a_name(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    names = [b"short", b"much longer"]
    record, *_ = catalog.enter(0, names[0], attributes(2, links=2))
    seen: set[bytes] = set()
    with busy_threads(lambda: seen.add(catalog.path(record))):
        for number in range(60_000):
            catalog.move(record, 0, names[number % 2])
    assert seen == set(names)


def test_a_server_that_takes_over_knows_paths_as_deep_as_path_max(fds: tuple[int, int]) -> None:
    catalog, record = Catalog(*fds), 0
    for inode in range(2, 2048):
        record, *_ = catalog.enter(record, b"d", directory(inode))
    path = b"/".join([b"d"] * 2046)
    assert catalog.path(record) == path
    assert Catalog(*fds).path(record) == path


# -- versions -----------------------------------------------------------------------------------------------------


def test_kinds_are_told_apart(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    kinds = {stat.S_IFREG: REGULAR, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: 0, stat.S_IFIFO: 0, stat.S_IFSOCK: 0}
    for number, (kind, flags) in enumerate(kinds.items()):
        record, *_ = catalog.enter(0, b"%d" % number, attributes(number + 2, kind=kind))
        assert catalog.flags(record) == flags


def test_a_file_that_comes_back_has_its_old_node_again(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    first, second = attributes(2, size=1), attributes(3, size=2)
    old, *_ = catalog.enter(0, b"f", first)
    catalog.set_served(old)
    new, _, superseded = catalog.enter(0, b"f", second)
    assert superseded == old
    catalog.set_served(new)
    assert catalog.enter(0, b"f", first)[:2] == (old, False)
    assert catalog.enter(0, b"f", second)[:2] == (new, False)


def test_a_replaced_node_stays_so_though_its_inode_number_comes_back(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    old, *_ = catalog.enter(0, b"f", attributes(2, size=1))
    catalog.set_served(old)
    new, *_ = catalog.enter(0, b"f", attributes(3, size=2))
    again, *_ = Catalog(*fds).enter(0, b"f", attributes(2, size=3))  # inode 2 was free, and taken for the third file
    assert old not in (new, again), "whoever has the first file open would read the third"
    assert catalog.version(old) == Version.of(attributes(2, size=1))


def test_what_is_made_anew_is_another_node_though_it_gets_the_same_inode_number(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    old, *_ = catalog.enter(0, b"f", attributes(2, size=1))
    assert catalog.enter(0, b"f", attributes(2, size=2))[:2] == (old, True), "nobody has read of it"
    assert catalog.renew(old, Version.of(attributes(2, size=2)))
    catalog.set_served(old)
    catalog.supersede(old)  # its name was seen to be gone
    new, *_ = catalog.enter(0, b"f", attributes(2, size=3))
    assert new != old
    catalog.supersede(new)
    assert catalog.enter(0, b"f", attributes(2, size=2))[0] == old  # the first has come back, and is looked at again
    assert not catalog.flags(old) & SUPERSEDED


def test_what_is_stale_is_known_to_the_next_server(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    kept, *_ = catalog.enter(0, b"f", attributes(2, size=1))
    replaced, *_ = catalog.enter(0, b"g", attributes(3, size=1))
    assert catalog.stale() == []
    assert catalog.renew(kept, Version.of(attributes(2, size=2)))
    assert catalog.renew(kept, Version.of(attributes(2, size=3)))
    catalog.set_version(kept, Version.of(attributes(2, size=2)), REGULAR)
    assert Catalog(*fds).stale() == [kept]
    catalog.set_served(replaced)
    assert catalog.supersedes(replaced, attributes(4, size=1))
    assert Catalog(*fds).stale() == [kept, replaced]
    catalog.set_fresh(kept)
    catalog.set_fresh(kept)
    catalog.set_fresh(replaced)
    assert Catalog(*fds).stale() == []


def test_records_of_versions_that_are_forgotten_are_used_again(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    others = [catalog.enter(0, b"%d" % number, attributes(number + 10))[0] for number in range(1900)]
    nodes: set[int] = set()
    records: set[int] = set()
    for number in range(3000):  # more often than the index is built anew
        version = attributes(2, size=number, mtime_ns=number)
        record, changed, past = catalog.enter(0, b"f", version)
        assert not changed
        assert catalog.find(catalog.node(record)) == record
        assert catalog.version(record) == Version.of(version)
        assert catalog.flags(record) & ~LATER == REGULAR
        assert catalog.last_miss(record) == (0, 0)
        assert catalog.path(record) == b"f"
        catalog.set_served(record)
        catalog.set_last_miss(record, 7, 7)
        nodes.add(catalog.node(record))
        records.add(record)
        assert (past is None) == (number == 0)
        if past is not None:
            node = catalog.node(past)
            catalog.give_back(past, catalog.staleness(past))
            assert catalog.node(past) == node, "the kernel has not been told"
            catalog.set_fresh(past)
            catalog.give_back(past, catalog.staleness(past))
            assert (catalog.find(node) is None) == (number > 1), "the first leads to the others"
    assert len(nodes) == 3000
    assert len(records) == 3
    assert [catalog.enter(0, b"%d" % number, attributes(number + 10))[0] for number in range(1900)] == others


def test_a_directory_that_changed_is_recorded_by_who_sees_to_its_listing(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    record, *_ = catalog.enter(0, b"d", attributes(2, kind=stat.S_IFDIR, mtime_ns=1))
    assert catalog.enter(0, b"d", attributes(2, kind=stat.S_IFDIR, mtime_ns=2)) == (record, True, None)
    assert catalog.version(record).mtime_ns == 1


def test_a_symbolic_link_that_leads_elsewhere_is_another_node(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    before = attributes(2, kind=stat.S_IFLNK, mtime_ns=1)
    record, *_ = catalog.enter(0, b"l", before)
    assert catalog.enter(0, b"l", before) == (record, False, None)
    another, changed, superseded = catalog.enter(0, b"l", attributes(2, kind=stat.S_IFLNK, mtime_ns=2))
    assert (changed, superseded) == (False, record)
    assert another != record
    assert catalog.flags(record) & SUPERSEDED


def test_a_name_that_becomes_another_kind_and_is_it_again() -> None:
    with memory() as fds:
        catalog = Catalog(*fds)
        first, *_ = catalog.enter(0, b"d", directory(2))
        below, *_ = catalog.enter(first, b"f", attributes(3))
        file, changed, superseded = catalog.enter(0, b"d", attributes(4, size=7))
        assert (changed, superseded) == (False, first)
        assert catalog.node(file) != catalog.node(first)
        assert catalog.flags(file) & (REGULAR | DIRECTORY) == REGULAR
        # A directory is one node whatever it holds, and so are the files in it.
        assert catalog.enter(0, b"d", directory(5)) == (first, True, file)
        assert catalog.flags(first) & (REGULAR | DIRECTORY | SUPERSEDED) == DIRECTORY
        assert catalog.enter(first, b"f", attributes(3))[0] == below
        # Also where it was something else at first.
        file, *_ = catalog.enter(0, b"f", attributes(6))
        later, *_ = catalog.enter(0, b"f", directory(7))
        assert catalog.node(later) not in (catalog.node(file), catalog.node(first))
        assert catalog.enter(0, b"f", attributes(8, kind=stat.S_IFDIR, mtime_ns=9)) == (later, True, None)
        assert catalog.enter(0, b"f", attributes(8, size=10))[2] == later
        assert catalog.enter(0, b"f", directory(11))[0] == later


def test_a_node_takes_versions_until_bytes_of_one_are_handed_out(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    first, second, third = (Version.of(attributes(2, mtime_ns=time)) for time in (1, 2, 3))
    record, *_ = catalog.enter(0, b"f", attributes(2, mtime_ns=1))
    assert catalog.serves_if(record, lambda: False) is False
    assert catalog.renew(record, second)
    assert not catalog.serves(record, second), "the kernel has not been told"
    staleness = catalog.staleness(record)
    assert catalog.renew(record, third)
    assert not catalog.take(record, second, staleness), "the kernel may be told of the third version just now"
    assert catalog.version(record) == third
    assert catalog.take(record, second, catalog.staleness(record))
    assert catalog.serves(record, second)
    assert catalog.stale() == []
    assert not catalog.take(record, third, catalog.staleness(record))
    assert not catalog.renew(record, first)
    assert catalog.version(record) == second


def test_what_comes_to_be_stale_while_the_kernel_is_told_stays_so(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    record, *_ = catalog.enter(0, b"f", attributes(2))
    catalog.supersede(record)
    staleness = catalog.staleness(record)
    catalog.set_fresh(record)
    catalog.supersede(record)
    catalog.set_fresh(record, staleness)
    assert catalog.stale() == [record]
    catalog.set_fresh(record, catalog.staleness(record))
    assert catalog.stale() == []


def test_nodes_of_versions_are_the_same_on_every_node_of_a_cluster(fds: tuple[int, int]) -> None:
    """Whichever versions each of them has seen before."""
    here = Catalog(*fds)
    versions = [attributes(number, size=number, mtime_ns=-number) for number in range(2, 6)]
    nodes = []
    for version in versions:
        record, *_ = here.enter(0, b"f", version)
        here.set_served(record)
        nodes.append(here.node(record))
    assert len(set(nodes)) == 4
    with memory() as others:
        there = Catalog(*others)
        there.set_served(there.enter(0, b"f", versions[2])[0])
        assert there.node(there.enter(0, b"f", versions[3])[0]) == nodes[3]


def test_a_file_that_became_a_directory_is_one(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    file, *_ = catalog.enter(0, b"n", attributes(2))
    catalog.set_served(file)
    record, changed, _ = catalog.enter(0, b"n", directory(3))
    assert (catalog.flags(record) & ~LATER, changed) == (DIRECTORY, False)
    assert record != file


def test_hard_links_of_other_devices_are_other_files(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    nodes = {catalog.enter(0, b"%d" % d, attributes(7, links=2, device=d))[0] for d in range(5)}
    assert len(nodes) == 5


def test_a_link_that_is_the_last_has_a_node_of_its_own(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    both = {catalog.enter(0, name, attributes(7, links=2))[0] for name in (b"a", b"b")}
    last, *_ = catalog.enter(0, b"b", attributes(7))
    assert len(both) == 1
    assert last not in both
    assert catalog.path(last) == b"b"


def test_a_moved_link_is_read_by_its_other_name(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    home, *_ = catalog.enter(0, b"home", directory(2))
    record, *_ = catalog.enter(0, b"a", attributes(7, size=5, links=2))
    catalog.set_served(record)
    catalog.move(record, home, b"longer")
    for seen in (catalog, Catalog(*fds)):
        assert seen.path(record) == b"home/longer"
        assert seen.flags(record) == REGULAR | LINKED | SERVED
        assert seen.version(record) == Version.of(attributes(7, size=5, links=2))
        assert seen.enter(0, b"a", attributes(7, size=5, links=2))[:2] == (record, False)


# -- a catalogue that survives the server -------------------------------------------------------------------------


@given(
    misses=st.tuples(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1)),
    mtime=st.integers(-(1 << 63), (1 << 63) - 1),
)
def test_what_is_known_of_a_file_survives_the_server(misses: tuple[int, int], mtime: int) -> None:
    with memory() as fds:
        catalog = Catalog(*fds)
        record, *_ = catalog.enter(0, b"f", attributes(2, mtime_ns=mtime))
        catalog.set_last_miss(record, *misses)
        catalog.add_pinned_pages(record, 10)
        catalog.add_pinned_pages(record, -3)
        seen = Catalog(*fds)
        assert (seen.last_miss(record), seen.pinned_pages(record)) == (misses, 7)
        assert seen.version(record).mtime_ns == mtime
        seen.clear_pinned_pages()
        assert catalog.pinned_pages(record) == 0


def test_counters_and_records_do_not_overlap(fds: tuple[int, int]) -> None:
    catalog = Catalog(*fds)
    record, *_ = catalog.enter(0, b"f", attributes(2, size=9))
    before = (len(catalog), catalog.path(record), catalog.version(record), catalog.find(ROOT_NODE))
    for word in range(COUNTERS):
        catalog.counters[word] = (1 << 64) - 1
    seen = Catalog(*fds)
    assert (len(seen), seen.path(record), seen.version(record), seen.find(ROOT_NODE)) == before
    assert list(seen.counters) == [(1 << 64) - 1] * COUNTERS


def test_what_was_told_of_a_past_version_is_told_once(fds: tuple[int, int]) -> None:
    """Or a later server would have the name forgotten again, with all that is cached of the new version."""
    catalog = Catalog(*fds)
    record, *_ = catalog.enter(0, b"f", attributes(2))
    assert catalog.serves(record, catalog.version(record))
    assert catalog.supersedes(record, attributes(2, size=5))
    catalog.set_fresh(record, catalog.staleness(record))
    assert catalog.supersedes(record, attributes(2, size=5))
    assert catalog.stale() == []


def test_a_record_that_is_given_back_twice_is_one_versions(fds: tuple[int, int]) -> None:
    """By who met the change and by who was told of it."""
    catalog = Catalog(*fds)
    versions = [attributes(2, size=number, mtime_ns=number) for number in range(5)]
    records = []
    for version in versions[:3]:
        records.append(catalog.enter(0, b"f", version)[0])
        catalog.set_served(records[-1])
    past = records[1]
    catalog.set_fresh(past)
    for _ in range(2):
        catalog.give_back(past, catalog.staleness(past))
    assert catalog.enter(0, b"f", versions[3])[0] == past
    catalog.set_served(past)
    another, _, superseded = catalog.enter(0, b"f", versions[4])
    assert another not in records
    assert superseded == past
