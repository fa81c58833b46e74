"""A store of the disk tier that holds a dataset of small files, as a mount would have left it; but made in a minute."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from coordlfs.disk import places
from coordlfs.disk.layout import UNIT, Version
from coordlfs.disk.store import Block, Store
from coordlfs.kernel import pages
from coordlfs.sources import versions

_AT_ONCE = 1 << 13  # files


def fill(directory: Path, source: Path, paths: Iterable[str], size: int) -> None:
    """Keep files of `source`, of at most `UNIT` bytes each, in its store in `directory`, of `size` bytes."""
    root = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    claimed = places.claim(str(directory), os.fsencode(source), b"")
    store = Store(claimed, places.identity(os.fsencode(source), root), size)
    try:
        store.take_stock()
        rest = iter(paths)
        while blocks := list(_blocks(source, islice(rest, _AT_ONCE))):
            store.add([(_room(store, block), block) for block in blocks])
    finally:
        store.close()
        os.close(claimed)
        os.close(root)


def _room(store: Store, block: Block) -> int:
    first = store.take(block)
    if first is None:
        raise ValueError(f"the store has no room for {block.path!r}")
    return first


def _blocks(source: Path, paths: Iterable[str]) -> Iterator[Block]:
    memory = memoryview(pages.buffer(_AT_ONCE * UNIT))
    for i, path in enumerate(paths):
        with open(source / path, "rb", buffering=0) as f:
            room = memory[i * UNIT : (i + 1) * UNIT]
            f.readinto(room)
            version = versions.Version.of(os.fstat(f.fileno()))
        yield Block(os.fsencode(path), Version(*version[:3]), 0, room)
