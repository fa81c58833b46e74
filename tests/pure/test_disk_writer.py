"""The writer of the disk tier on a real store: what is offered while memory takes items in, in whatever order."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mounts import MIB, eventually, noise
from sides import Side, side_of

from coordlfs.cache import items
from coordlfs.cache.disk_writer import DiskWriter, blocks_of
from coordlfs.cache.minio import MinIO, State
from coordlfs.disk.layout import BLOCK, Version
from coordlfs.disk.store import Store
from coordlfs.kernel import pages

FILES, SIZE = 80, 60_000


@contextmanager
def writing(side: Side, directory: Path, memory: MinIO, size: int) -> Iterator[DiskWriter]:
    """A writer to a new store, whose thread runs."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    store = Store(fd, bytes(16), size)
    os.close(fd)
    writer = DiskWriter(store, side.catalog, side.reader.source, memory, side.counters)
    thread = threading.Thread(target=writer.run)
    thread.start()
    try:
        yield writer
    finally:
        writer.close()
        thread.join(60)
        assert not thread.is_alive()
        store.close()


def known(side: Side, names: list[str]) -> list[tuple[int, bytes, Version]]:
    """Item, path and version of files in the root."""
    found = []
    for name in names:
        record, _ = side.namespace.lookup(0, name.encode())
        found.append((items.item_at(record, 0), name.encode(), Version(*side.catalog.version(record)[:3])))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_no_item_is_left_out_while_a_copy_takes_up_its_room(tmp_path: Path, seed: int) -> None:
    rng, store = random.Random(seed), tmp_path / "store"
    early, sleepy = seed % 3 / 2, 0.1 * (seed % 2)
    store.mkdir()
    source = tmp_path / "source"
    source.mkdir()
    for number in range(FILES):
        (source / f"{number}").write_bytes(noise(SIZE, number))
    memory = MinIO(30 * pages.count(SIZE))
    with side_of(source) as side, writing(side, store, memory, 3 * MIB) as writer:
        files = known(side, [f"{number}" for number in range(FILES)])
        coming: list[int] = []
        for _ in range(3):
            for item, path, version in rng.sample(files, FILES):
                if memory.state(item) is State.PINNED or writer.store.find(path, version, 0):
                    continue
                data = memoryview(noise(SIZE, int(path)))
                if memory.state(item) is State.ABSENT and memory.admit(item, pages.count(SIZE)):
                    coming.append(item)
                # It is pinned before it is offered, before it is written, or after that.
                if coming and rng.random() < early:
                    memory.pin(comes := coming.pop(), 0)
                    writer.pinned(comes)
                writer.offer(item, path, version, 0, data)
                if coming and rng.random() < 0.5:
                    memory.pin(comes := coming.pop(rng.randrange(len(coming))), 0)
                    writer.pinned(comes)
                if rng.random() < sleepy:
                    time.sleep(0.03)
            for item in coming:
                memory.pin(item, 0)
                writer.pinned(item)
            coming.clear()
            eventually(lambda: not writer.waiting)
        on_disk = {item for item, path, version in files if writer.store.find(path, version, 0)}
        nowhere = [item for item, _, _ in files if item not in on_disk and memory.state(item) is State.ABSENT]
        assert writer.is_full == bool(nowhere)
        if nowhere:
            assert not [item for item in on_disk if memory.state(item) is State.PINNED]
        assert len(on_disk) >= 45


@pytest.mark.parametrize("seed", range(4))
def test_pieces_in_any_order_make_whole_blocks(tmp_path: Path, seed: int) -> None:
    rng, store = random.Random(seed), tmp_path / "store"
    store.mkdir()
    source = tmp_path / "source"
    source.mkdir()
    size = 5 * BLOCK + 12_345
    content = noise(size, seed)
    (source / "large").write_bytes(content)
    with side_of(source) as side, writing(side, store, MinIO(0), 16 * MIB) as writer:
        [(item, path, version)] = known(side, ["large"])
        cuts = sorted({0, size, *(rng.randrange(size) for _ in range(12))})
        pieces = list(itertools.pairwise(cuts))
        rng.shuffle(pieces)
        for begin, end in pieces[rng.randrange(3) :]:  # what is missing is read of the source
            writer.offer(item, path, version, begin, memoryview(content[begin:end]))
        eventually(lambda: not writer.waiting)
        into = memoryview(pages.buffer(BLOCK))
        for block in blocks_of(item, size):
            found = writer.store.find(path, version, block)
            assert found is not None
            data = writer.store.read(found, into)
            assert bytes(data or b"") == content[block * BLOCK : (block + 1) * BLOCK]
        assert writer.store.bytes == size


def test_what_changes_while_it_waits_is_not_kept(tmp_path: Path) -> None:
    store, source = tmp_path / "store", tmp_path / "source"
    store.mkdir()
    source.mkdir()
    (source / "f").write_bytes(noise(2 * BLOCK, 1))
    with side_of(source) as side, writing(side, store, MinIO(0), 16 * MIB) as writer:
        [(item, path, version)] = known(side, ["f"])
        writer.offer(item, path, version, 0, memoryview(noise(2 * BLOCK, 1))[:5000])
        (source / "f").write_bytes(noise(2 * BLOCK, 2))  # before the rest is read
        eventually(lambda: not writer.waiting)
        assert writer.store.bytes == 0
        assert writer.store.find(path, version, 0) is None
