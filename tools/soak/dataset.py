"""The files of a soak, and how the source changes under its readers: each file has one fate for all of its life."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from random import Random

from coordlfs_tools.soak.content import content
from coordlfs_tools.soak.ledger import ABSENT, Ledger, Version

_LARGEST = 150_000  # bytes, but for a few that have several items
_LARGE = {5: 17_000_000, 11: 35_000_000}
_GROWS = 40_000


class Fate(Enum):
    """What happens to a file."""

    STEADY = "never changes"
    REPLACED = "another file is renamed over it"
    IN_PLACE = "appended to, truncated, overwritten"
    TRANSIENT = "deleted, and made again"
    FAILING = "never changes, and its source fails at times"


_CYCLE = [
    Fate.STEADY,
    Fate.REPLACED,
    Fate.STEADY,
    Fate.IN_PLACE,
    Fate.STEADY,
    Fate.STEADY,
    Fate.TRANSIENT,
    Fate.FAILING,
]


def fate(file: int) -> Fate:
    """What happens to a file, by its number."""
    return _CYCLE[file % len(_CYCLE)]


def name(file: int) -> str:
    """What it is called."""
    return f"{file:04}"


class Dataset:
    """`count` files beneath `root`; new ones are written in `beside`, on the same file system. One thread writes."""

    def __init__(self, root: Path, beside: Path, count: int, ledger: Ledger, seed: int) -> None:
        self.count = count
        self._root = root
        self._beside = beside
        self._ledger = ledger
        self._random = Random(f"dataset {seed}")

    def make(self) -> int:
        """Write the first version of every file; the bytes of all."""
        total = 0
        for file in range(self.count):
            version = Version(1, _LARGE.get(file) or self._random.randrange(1, _LARGEST))
            self._ledger.announce(file, version)
            self._put(file, version)
            total += version.size
        os.sync()
        return total

    def change(self) -> int:
        """Change one file in the way that is its fate; its number. The ledger is told before."""
        files = [f for f in range(self.count) if fate(f) in (Fate.REPLACED, Fate.IN_PLACE, Fate.TRANSIENT)]
        file = self._random.choice(files)
        version = self._ledger.newest(file)
        size = _LARGE.get(file) or self._random.randrange(1, _LARGEST)
        if fate(file) is Fate.IN_PLACE:
            self._change_in_place(file, version)
        elif fate(file) is Fate.TRANSIENT and version.size != ABSENT:
            self._ledger.announce(file, Version(version.generation, ABSENT))
            os.unlink(self._root / name(file))
        else:
            new = Version(version.generation + 1, size)
            self._ledger.announce(file, new)
            self._put(file, new)
        return file

    def _put(self, file: int, version: Version) -> None:
        (self._beside / "new").write_bytes(content(file, version.generation, 0, version.size))
        os.rename(self._beside / "new", self._root / name(file))

    def _change_in_place(self, file: int, old: Version) -> None:
        how = self._random.choice(["append", "truncate", "overwrite"])
        grows = self._random.randrange(1, _GROWS)
        generation = old.generation
        if how == "append" and old.size < 2 * _LARGEST:
            new, at, length = Version(generation, old.size + grows), old.size, grows
        elif how == "truncate" and old.size > 1:
            new, at, length = Version(generation, self._random.randrange(1, old.size)), 0, 0
        else:
            new, at, length = Version(generation + 1, old.size), 0, old.size
        self._ledger.announce(file, new)
        with open(self._root / name(file), "r+b", buffering=0) as f:
            if length:
                f.seek(at)
                f.write(content(file, new.generation, at, length))
            else:
                f.truncate(new.size)
