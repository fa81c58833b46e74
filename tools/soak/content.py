"""The bytes of the soak's files: every 8 of them say which file they are of, which version of it, and where in it.

So a reader tells what it got without anything to compare it with, and no mixture passes for a version. No I/O here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PAGE = 4096
_WORD = 8
_GENERATION, _FILE = 44, 32  # bits to the left of the word's place in the file; a generation is never 0


def words(file: int, generation: int, first: int, count: int) -> NDArray[np.uint64]:
    """So many words from number `first` on."""
    base = np.uint64(generation << _GENERATION | file << _FILE)
    return base | np.arange(first, first + count, dtype=np.uint64)


def content(file: int, generation: int, offset: int, length: int) -> bytes:
    """`length` bytes at `offset` of a version of a file.

    >>> content(3, 1, 4, 8) == content(3, 1, 0, 100)[4:12]
    True
    """
    first, end = offset // _WORD, -(-(offset + length) // _WORD)
    skipped = offset - first * _WORD
    return words(file, generation, first, end - first).tobytes()[skipped : skipped + length]


def generations(file: int, offset: int, data: bytes, known: list[int]) -> list[int | None]:
    """Of which of the versions `known` each page of `data` is, read at `offset`; None for a page that is of none."""
    found: list[int | None] = []
    at = 0
    while at < len(data):
        end = min(len(data), ((offset + at) // PAGE + 1) * PAGE - offset)
        page = data[at:end]
        found.append(next((g for g in known if page == content(file, g, offset + at, len(page))), None))
        at = end
    return found


def is_all(file: int, generation: int, offset: int, data: bytes) -> bool:
    """Whether `data`, read at `offset`, is of this version from the first byte to the last."""
    return data == content(file, generation, offset, len(data))


def describe(data: bytes) -> str:
    """What the first whole words of a page say of themselves, for who has to find out where they came from."""
    if not any(data):
        return "zeros"
    told = []
    for word in np.frombuffer(data[: len(data) // _WORD * _WORD], np.uint64)[:: PAGE // _WORD].tolist()[:4]:
        generation, file = word >> _GENERATION, word >> _FILE & (1 << _GENERATION - _FILE) - 1
        told.append(f"file {file}, generation {generation}, offset {(word & (1 << _FILE) - 1) * _WORD}")
    return "; ".join(told)
