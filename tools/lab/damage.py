"""Damage to files that somebody relies on: flipped bits, zeroed sectors, holes, and ends that are cut off.

Knows nothing of what the files are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

SECTOR = 512


def flip(file: Path, random: Random) -> None:
    """One bit."""
    with open(file, "r+b") as f:
        f.seek(at := random.randrange(max(1, os.fstat(f.fileno()).st_size)))
        if byte := f.read(1):
            f.seek(at)
            f.write(bytes([byte[0] ^ 1 << random.randrange(8)]))


def zero(file: Path, random: Random) -> None:
    """A sector, or a few in a row."""
    size = file.stat().st_size
    at = random.randrange(max(1, size)) // SECTOR * SECTOR
    with open(file, "r+b") as f:
        f.seek(at)
        f.write(bytes(min(SECTOR * random.choice([1, 1, 8]), max(0, size - at))))


def swap(file: Path, random: Random) -> None:
    """A sector has what another one had: as a whole it is good, and in the wrong place."""
    with open(file, "r+b") as f:
        size = os.fstat(f.fileno()).st_size
        f.seek(random.randrange(max(1, size)) // SECTOR * SECTOR)
        data = f.read(SECTOR)
        at = random.randrange(max(1, size)) // SECTOR * SECTOR
        f.seek(at)
        f.write(data[: max(0, size - at)])


def cut(file: Path, random: Random) -> None:
    """The end is missing."""
    os.truncate(file, random.randrange(max(1, file.stat().st_size)))


def extend(file: Path, random: Random) -> None:
    """Something stands behind the end."""
    with open(file, "ab") as f:
        f.write(random.randbytes(random.randrange(1, 10_000)))


INSIDE: tuple[Callable[[Path, Random], None], ...] = flip, zero, swap
ENDS: tuple[Callable[[Path, Random], None], ...] = cut, extend
