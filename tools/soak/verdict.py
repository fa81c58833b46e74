"""Whether what a reader got is what it might have got: pure, so that it can be tested against everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coordlfs_tools.soak.content import PAGE, describe, generations, is_all
from coordlfs_tools.soak.ledger import ABSENT, Version

ALL = 1 << 62  # asked for by who reads until the end


class Piece(NamedTuple):
    """What one call brought: bytes `data` from `offset` on, of the `asked` ones."""

    offset: int
    asked: int
    data: bytes


def wrong(file: int, pieces: Sequence[Piece], legal: Sequence[Version]) -> str | None:
    """What is wrong with bytes of one open file, which have to be of one of the versions `legal`, whichever."""
    versions = [v for v in legal if v.size != ABSENT]
    if any(all(_fits(file, piece, version) for piece in pieces) for version in versions):
        return None
    known = list(dict.fromkeys(v.generation for v in versions))
    return f"{_said(file, pieces, known)}; legal: " + (
        ", ".join(f"generation {v.generation} of {v.size} bytes" for v in legal) or "nothing"
    )


def origins(file: int, piece: Piece, generation: int) -> list[tuple[int, int, int | None]]:
    """Where the bytes of a piece come from: page by page, and like neighbours together.

    Offset, end and generation, of which any up to `generation` is looked for; None for pages that are of none.
    """
    found: list[tuple[int, int, int | None]] = []
    at, known = piece.offset, list(range(generation, 0, -1))
    for of in generations(file, piece.offset, piece.data, known):
        end = min(piece.offset + len(piece.data), (at // PAGE + 1) * PAGE)
        if found and found[-1][2] == of:
            at, found[-1] = end, (found[-1][0], end, of)
        else:
            found.append((at, end, of))
            at = end
    return found


def _fits(file: int, piece: Piece, version: Version) -> bool:
    expected = max(0, min(piece.asked, version.size - piece.offset))
    return len(piece.data) == expected and is_all(file, version.generation, piece.offset, piece.data)


def _said(file: int, pieces: Sequence[Piece], known: list[int]) -> str:
    told = []
    for piece in pieces[:4]:
        of = generations(file, piece.offset, piece.data, known)
        at = of.index(None) if None in of else -1
        strange = "" if at < 0 else f", and of none from page {at} on: {describe(piece.data[at * 4096 :])}"
        which = ", ".join(str(g) for g in dict.fromkeys(of) if g is not None) or "none"
        told.append(f"{len(piece.data)} bytes at {piece.offset} of generation {which}{strange}")
    return "; ".join(told)
