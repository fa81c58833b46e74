"""A dataset's files as they are listed and cut into what is read at once."""

from __future__ import annotations

import os
from pathlib import Path

from coordlfs_tools.storage.files import File, listed
from coordlfs_tools.storage.measure import measure, parts, rate


def test_every_file_once_and_through_links(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    (data / "a").write_bytes(b"12345")
    (elsewhere / "b").write_bytes(b"123")
    (data / "class").symlink_to(elsewhere)
    (data / "again").symlink_to(elsewhere / "b")
    (data / "circle").symlink_to(data)
    os.link(data / "a", data / "hard")
    assert sum(file.size for file in listed(data)) == 8


def test_parts_are_bounded_and_no_smaller_than_a_page() -> None:
    assert len(parts([File("f", 1 << 20)], 4)) == 256
    many = parts([File("f", 1 << 50), File("g", 5)], 4, most=1000)
    assert 900 <= len(many) <= 1001
    assert many[-1].path == "g"


def test_a_file_whose_parts_seldom_begin_at_its_beginning(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as f:
        for _ in range(160):
            f.write(os.urandom(1 << 20))
    for seed in range(3):
        rates = measure(listed(tmp_path), 1, seconds=0.05, rounds=1, seed=seed)
        assert min(rates.storage + rates.cache) > 0


def test_something_is_read_in_however_little_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 5000)
    value, rest = rate(parts(listed(tmp_path)), 1, 0)
    assert value > 0
    assert len(rest) == 1
