"""The soak itself: a short one in CI; and that its judges would notice what it looks for."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from coordlfs_tools.soak.content import content, generations, is_all
from coordlfs_tools.soak.ledger import ABSENT, ANY, Ledger, Version
from coordlfs_tools.soak.verdict import ALL, Piece, origins, wrong
from hypothesis import given
from hypothesis import strategies as st
from mounts import PATIENCE

FILE = 7
VERSIONS = [Version(2, 30_000), Version(1, 50_000)]


@pytest.mark.alone  # it has the kernel drop its caches
@pytest.mark.usefixtures("_may_mount")
def test_a_short_soak(place: Path) -> None:
    """`python -m coordlfs_tools.soak --minutes 10` is the same for longer."""
    command = [sys.executable, "-m", "coordlfs_tools.soak", "--minutes", "0.25", "--files", "96"]
    command += ["--seed", "3", "--dir", str(place)]  # of which each of the faults below comes early
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[-1] == "PASS"
    assert any("0 with wrong bytes, 0 errors, 0 hangs" in line for line in said)
    [faults] = [line for line in said if line.startswith("done: ")]
    assert any(line.startswith("read from the disk tier") for line in said)
    for what in ("kills of servers", "kills of keepers", "changes", "source: ", "disk: "):
        assert what in faults


@given(st.integers(0, 4000), st.integers(1, 1 << 19), st.integers(0, 100_000), st.integers(0, 20_000))
def test_every_byte_says_where_it_belongs(file: int, generation: int, offset: int, length: int) -> None:
    data = content(file, generation, offset, length)
    assert len(data) == length
    assert is_all(file, generation, offset, data)
    assert content(file, generation, 0, offset + length)[offset:] == data
    if length >= 8:
        # In whole words, as less than one of them does not tell.
        at, words = offset // 8 * 8, content(file, generation, offset // 8 * 8, length // 8 * 8)
        assert generations(file, at, words, [generation + 1]) == [None] * len(generations(file, at, words, []))
        assert not is_all(file + 1, generation, offset, data)
        assert not is_all(file, generation, offset + 8, data)


@given(st.data(), st.sampled_from(VERSIONS))
def test_what_was_read_of_one_version_is_right(data: st.DataObject, version: Version) -> None:
    offset = data.draw(st.integers(0, version.size))
    asked = data.draw(st.integers(1, 60_000))
    got = content(FILE, version.generation, offset, max(0, min(asked, version.size - offset)))
    assert wrong(FILE, [Piece(offset, asked, got)], VERSIONS) is None
    others = [v for v in VERSIONS if v != version]
    if len(got) >= 8:
        assert wrong(FILE, [Piece(offset, asked, got)], others) is not None
        assert wrong(FILE, [Piece(offset, asked, got[:-1])], VERSIONS) is not None
        broken = bytearray(got)
        broken[data.draw(st.integers(0, len(got) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        assert wrong(FILE, [Piece(offset, asked, bytes(broken))], VERSIONS) is not None


@given(st.integers(1, 6), st.integers(1, 4095))
def test_a_mixture_is_wrong(pages: int, bytes_more: int) -> None:
    new, old = (content(FILE, generation, 0, 30_000) for generation in (2, 1))
    at = pages * 4096
    mixed = [Piece(0, ALL, new[:at] + old[at:])]
    assert wrong(FILE, mixed, VERSIONS) is not None
    assert origins(FILE, mixed[0], 3) == [(0, at, 2), (at, 30_000, 1)]
    torn = Piece(100, ALL, (new[: at + bytes_more // 8 * 8 + 8] + old[at + bytes_more // 8 * 8 + 8 :])[100:])
    assert wrong(FILE, [torn], VERSIONS) is not None
    end = min(at + 4096, 30_000)
    strange = [(at, end, None)] if (bytes_more // 8 * 8 + 8) % 4096 else []
    assert origins(FILE, torn, 3) == [
        (100, at if strange else end, 2),
        *strange,
        *([(end, 30_000, 1)] if end < 30_000 else []),
    ]
    pieces = [Piece(0, at, new[:at]), Piece(at, 1000, old[at : at + 1000])]
    assert wrong(FILE, pieces, VERSIONS) is not None
    assert wrong(FILE, [Piece(0, ALL, bytes(30_000))], VERSIONS) is not None


def test_the_ledger_knows_what_was_legal_when(tmp_path: Path) -> None:
    ledger, other = (Ledger(tmp_path / "ledger", 10, 2) for _ in range(2))
    old, new = Version(1, 100), Version(1, ABSENT)
    ledger.announce(3, old)
    assert other.newest(3) == old
    before = time.monotonic()
    ledger.announce(3, new)
    now = time.monotonic()
    assert other.legal(3, before, now) == [new, old]
    assert other.legal(3, now - 100, before) == [old]
    ledger.settle(3, after=1)
    assert other.legal(3, now, now) == [new, old]
    assert other.legal(3, now + 2, now + 2) == [new]
    assert other.legal(4, 0, now) == []
    assert not other.may_fail(3, 5, 0, now)
    ledger.fail(3, 5)
    later = time.monotonic()
    assert other.may_fail(3, 5, now, later)
    assert not other.may_fail(3, 6, now, later)
    assert not other.may_fail(3, 5, 0, before)
    ledger.mend(3, after=1)
    assert not other.may_fail(3, 5, later + 2, later + 3)
    ledger.fail(3, ANY)
    assert other.may_fail(3, 6, now, time.monotonic())


def test_the_ledger_counts_and_shows_who_waits(tmp_path: Path) -> None:
    ledger, other = (Ledger(tmp_path / "ledger", 10, 2) for _ in range(2))
    mine = ledger.reader(1)
    mine["files"] += 2
    mine["file"], mine["since"] = 4, time.monotonic() - 50
    assert other.total("files") == 2
    [(reader, file, seconds)] = other.waiting()
    assert (reader, file) == (1, 4)
    assert 50 <= seconds < 60
    assert not other.stopped
    ledger.stop()
    assert other.stopped
