"""The store on a disk against a naive model: right bytes or none, exact room, and what outlives what happens to it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from mounts import MIB, noise

from coordlfs.disk import layout
from coordlfs.disk.layout import BLOCK, FILES, ROW, UNIT, Row, Version
from coordlfs.disk.space import Space
from coordlfs.disk.store import Block, Store
from coordlfs.kernel import pages

IDENTITY, SIZE = bytes(16), 4 * MIB
PATHS = [b"a", b"b/\xff", b"c" * 300, b"d/e/f"]
SIZES = [1, UNIT, UNIT + 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77]
INTO = memoryview(pages.buffer(BLOCK))


def opened(directory: Path, size: int = SIZE, identity: bytes = IDENTITY) -> Store:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return Store(fd, identity, size)
    finally:
        os.close(fd)


def content(path: bytes, version: Version, block: int) -> bytes:
    return noise(layout.length_of(version.size, block), layout.key_of(path, block) ^ version.mtime_ns)


def block_of(path: bytes, version: Version, block: int) -> Block:
    data = content(path, version, block)
    room = memoryview(pages.buffer(layout.units_of(len(data)) * UNIT))
    room[: len(data)] = data
    return Block(path, version, block, room)


def add(store: Store, *blocks: Block) -> list[Block]:
    """Those of the blocks that found room."""
    placed = [(first, block) for block in blocks if (first := store.take(block)) is not None]
    store.add(placed)
    return [block for _, block in placed]


def got(store: Store, path: bytes, version: Version, block: int) -> bytes | None:
    found = store.find(path, version, block)
    data = None if found is None else store.read(found, INTO)
    return None if data is None else bytes(data)


@pytest.fixture
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(dir="/var/tmp"))  # on a disk, unlike /tmp, perhaps
    yield made
    shutil.rmtree(made)


class Model(RuleBasedStateMachine):
    """What is in the store: the version of each block that is there."""

    @initialize(size=st.integers(1, 6))
    def begin(self, size: int) -> None:
        self.directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
        self.size = size * MIB
        self.store = opened(self.directory, self.size)
        self.store.take_stock()
        self.held: dict[tuple[bytes, int], Version] = {}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.directory)

    @rule(
        wanted=st.lists(
            st.tuples(st.sampled_from(PATHS), st.sampled_from(SIZES), st.integers(0, 2), st.integers(0, 1)),
            max_size=4,
            unique_by=lambda each: (each[0], each[2]),
        )
    )
    def add(self, wanted: list[tuple[bytes, int, int, int]]) -> None:
        blocks = [
            block_of(path, Version(size, mtime, 7), block)
            for path, size, block, mtime in wanted
            if layout.length_of(size, block) > 0
        ]
        for block in add(self.store, *blocks):
            self.held[block.path, block.block] = block.version

    @rule(path=st.sampled_from(PATHS), block=st.integers(0, 2), mtime=st.integers(0, 1))
    def remove(self, path: bytes, block: int, mtime: int) -> None:
        version = self.held.get((path, block))
        wanted = version is not None and version.mtime_ns != mtime
        unless = None if version is None else version._replace(mtime_ns=mtime)
        removed = self.store.remove(path, block, unless)
        assert removed == (layout.length_of(version.size, block) if wanted and version else 0)
        if wanted:
            del self.held[path, block]

    @rule(size=st.none() | st.integers(1, 6))
    def open_anew(self, size: int | None) -> None:
        """As after a kill; be it with another size, in which some may not be found any more."""
        self.store.close()
        self.size = size * MIB if size else self.size
        self.store = opened(self.directory, self.size)
        self.all_is_there(if_at_all=size is not None)
        stock = self.store.take_stock()
        assert stock.bad_rows == 0
        if size is None:
            assert stock.beyond == 0
        self.held = {key: version for key, version in self.held.items() if self.store.find(key[0], version, key[1])}
        assert (stock.rows, stock.bytes) == (len(self.held), self.store.bytes)

    def all_is_there(self, *, if_at_all: bool = False) -> None:
        for (path, block), version in self.held.items():
            found = got(self.store, path, version, block)
            assert found == content(path, version, block) or (found is None and if_at_all)
            assert self.store.find(path, version._replace(inode=8), block) is None

    @invariant()
    def holds_what_it_says(self) -> None:
        if not hasattr(self, "store"):
            return
        self.all_is_there()
        assert self.store.bytes == sum(layout.length_of(v.size, block) for (_, block), v in self.held.items())
        rows = [found.row for found in self.store.all()]
        assert {(self.store.name(row), row.block): row.version for row in rows} == self.held
        blocks = sum(f.lstat().st_blocks for f in [self.directory, *self.directory.iterdir()])
        assert blocks * 512 == self.store.taken <= self.size


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def test_all_of_the_size_is_used(directory: Path) -> None:
    """Exact to the block: what is taken is what was given, and nearly all of it holds data."""
    store = opened(directory, 64 * MIB)
    store.take_stock()
    for i in range(100):
        add(store, *(block_of(b"%d" % n, Version(110_000, 0, n), 0) for n in range(i * 10, i * 10 + 10)))
    assert store.taken <= 64 * MIB
    assert store.bytes + len(store.index) * UNIT > 0.99 * 64 * MIB
    taken = [f.stat().st_blocks * 512 for f in directory.iterdir()]
    assert sum(taken) <= 64 * MIB
    store.close()


def test_many_blocks_with_long_names_are_kept_together(directory: Path) -> None:
    """More rows and names than a piece of their files has room for, in one batch; again and again until all is full."""
    store = opened(directory, 24 * MIB)
    store.take_stock()
    held = 0
    for batch in range(8):
        blocks = [
            block_of(b"%d" % n + b"n" * 400, Version(3000, 0, n), 0) for n in range(batch * 1200, batch * 1200 + 1200)
        ]
        kept = add(store, *blocks)
        held += len(kept)
        assert len(store.index) == held
        assert store.taken <= 24 * MIB
        for block in kept[::100]:
            assert got(store, *block[:3]) == content(*block[:3])
    assert held < 9600
    assert store.bytes > 0.85 * (24 * MIB / (4096 + 64 + 404)) * 3000
    store.close()
    again = opened(directory, 24 * MIB)
    stock = again.take_stock()
    assert (stock.rows, stock.bad_rows) == (held, 0)
    assert all(again.name(found.row) is not None for found in again.all())
    again.close()


def filled(directory: Path, seed: int) -> dict[bytes, Version]:
    """A store with some files of several sizes; their versions."""
    store, rng = opened(directory, 16 * MIB), random.Random(seed)
    store.take_stock()
    files = {b"file %d" % n: Version(rng.choice(SIZES), n, n) for n in range(12)}
    for path, version in files.items():
        for block in range(-(-version.size // BLOCK)):
            assert add(store, block_of(path, version, block))
    store.close()
    return files


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 5), st.randoms(use_true_random=False))
def test_damage_never_shows(seed: int, rng: random.Random) -> None:
    """Flipped bits, zeroed sectors and files cut short: right bytes or none, and the store goes on."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        files = filled(directory, seed)
        for _ in range(rng.randrange(1, 40)):
            damage(directory / rng.choice(FILES), rng)
        store = opened(directory, 16 * MIB)
        stock = store.take_stock()
        assert stock.rows <= sum(-(-version.size // BLOCK) for version in files.values())
        bad = []
        for path, version in files.items():
            for block in range(-(-version.size // BLOCK)):
                found = store.find(path, version, block)
                data = None if found is None else store.read(found, INTO)
                if data is not None:
                    assert bytes(data) == content(path, version, block)
                elif found is not None:
                    bad.append(found)
        for found in bad:
            assert store.forget(found)
            assert not store.forget(found)
        # What was lost can be kept again, and all is right then.
        for path, version in files.items():
            for block in range(-(-version.size // BLOCK)):
                if store.find(path, version, block) is None:
                    assert add(store, block_of(path, version, block))
                assert got(store, path, version, block) == content(path, version, block)
        store.close()
    finally:
        shutil.rmtree(directory)


def damage(file: Path, rng: random.Random) -> None:
    size = file.stat().st_size
    with open(file, "r+b") as f:
        kind = rng.randrange(3)
        at = rng.randrange(max(1, size))
        if kind == 0 and size:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1 << rng.randrange(8)]))
        elif kind == 1 and size:
            at = at // 512 * 512
            f.seek(at)
            f.write(bytes(min(512, size - at)))
        elif kind == 2 and not rng.randrange(8):
            f.truncate(at)


def test_rows_that_overlap_are_none(directory: Path) -> None:
    store = opened(directory)
    store.take_stock()
    one, other = (block_of(path, Version(3 * UNIT, 0, 1), 0) for path in (b"x", b"y"))
    first = store.take(one)
    assert first is not None
    store.add([(first, one)])
    store.add([(first, other)])  # as no store does
    store.close()
    again = opened(directory)
    assert again.take_stock().bad_rows == 1
    assert sum(got(again, b.path, b.version, 0) is not None for b in (one, other)) <= 1
    again.close()


@pytest.mark.parametrize("change", ["format", "identity", "header", "magic"])
def test_what_is_foreign_is_emptied_and_said(directory: Path, change: str) -> None:
    files = filled(directory, 0)
    identity = IDENTITY
    with open(directory / "index", "r+b") as f:
        if change == "format":
            f.seek(8)
            f.write((layout.FORMAT + 1).to_bytes(4, "little"))
        elif change == "header":
            f.seek(20)
            f.write(b"?")
        elif change == "magic":
            f.write(b"otherone")
        else:
            identity = b"1" * 16
    store = opened(directory, identity=identity)
    assert store.emptied
    assert store.take_stock().rows == 0
    assert all(store.find(path, version, 0) is None for path, version in files.items())
    store.close()
    again = opened(directory, identity=identity)
    assert again.emptied is None
    again.close()


def test_rows_of_another_store_are_none(directory: Path) -> None:
    mine, theirs = directory / "mine", directory / "theirs"
    mine.mkdir()
    theirs.mkdir()
    filled(mine, 1)
    files = filled(theirs, 2)
    rows = (theirs / "index").read_bytes()[layout.HEADER :]
    with open(mine / "index", "r+b") as f:
        f.seek(layout.HEADER)
        f.write(rows)
    store = opened(mine, 16 * MIB)
    assert store.take_stock().rows == 0
    assert all(store.find(path, version, 0) is None for path, version in files.items())
    store.close()


_WRITER = """
import sys, os
sys.path[:0] = [sys.argv[2], os.path.dirname(sys.argv[2])]
from pathlib import Path
from pure.test_disk_store import *
store = opened(Path(sys.argv[1]), 32 * MIB)
store.take_stock()
print("ready", flush=True)
n = int(sys.argv[3])
while True:
    n += 1
    path, version = b"%d" % (n % 50), Version(SIZES[n % len(SIZES)], n, 1)
    done = add(store, *(block_of(path, version, block) for block in range(-(-version.size // BLOCK))))
    for block in done:
        print(n, block.block, flush=True)
"""


def test_a_writer_may_be_killed_at_any_moment(directory: Path) -> None:
    """What it said to be there is there, or what it wrote after that; and never anything else."""
    rng, n = random.Random(4), 0
    for _ in range(5):
        arguments = [str(directory), str(Path(__file__).parents[1]), str(n)]
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, *arguments], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(rng.randrange(2, 60))]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
        writer.wait()
        said = [tuple(map(int, line.split())) for line in lines if line[:1].isdigit() and line.endswith("\n")]
        store = opened(directory, 32 * MIB)
        stock = store.take_stock()
        assert stock.bad_rows == 0
        newest: dict[tuple[int, int], int] = {}
        for number, block in said:
            newest[number % 50, block] = number
        for (name, block), number in newest.items():
            version = Version(SIZES[number % len(SIZES)], number, 1)
            data = got(store, b"%d" % name, version, block)
            if data is None:
                found = store.index.find(b"%d" % name, block)
                assert found is not None
                assert found[1].version.mtime_ns > number, "what was durable is lost"
            else:
                assert data == content(b"%d" % name, version, block)
        n = max([n, *(number for number, _ in said)])
        store.close()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 256)), max_size=60), st.integers(1, 2000))
def test_free_units(steps: list[tuple[bool, int]], room: int) -> None:
    space = Space([(5, room)])
    held: list[tuple[int, int]] = []
    for takes, units in steps:
        taken = {unit for first, n in held for unit in range(first, first + n)}
        assert space.free == room - len(taken)
        if not takes and held:
            space.give(*held.pop(units % len(held)))
            continue
        longest = max((n for _, n in space.ranges()), default=0)
        first = space.take(units)
        assert (first is not None) == (units <= longest)
        if first is not None:
            assert taken.isdisjoint(range(first, first + units))
            assert first >= 5
            assert first + units <= 5 + room
            held.append((first, units))
    for first, n in held:
        space.give(first, n)
    assert space.ranges() == [(5, room)]


@given(
    st.integers(1, 1 << 62), st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, (1 << 64) - 1), st.integers(0, 511)
)
def test_a_row_is_itself_or_none(size: int, mtime: int, seed: int, bit: int) -> None:
    row = Row(1, 2, Version(size, mtime, 3), 0, 4, 5)
    raw = layout.pack_row(row, seed)
    assert len(raw) == ROW
    assert layout.parse_row(raw, seed) == row
    flipped = bytearray(raw)
    flipped[bit // 8] ^= 1 << bit % 8
    assert layout.parse_row(bytes(flipped), seed) is None
    assert layout.parse_row(raw, seed ^ 1) is None
    assert layout.parse_row(raw[:-1], seed) is None
