"""`coordlfs pin`: what of a directory stays in memory, and how that begins and ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from mounts import (
    COORDLFS,
    PAGE,
    PATIENCE,
    coordlfs,
    eventually,
    is_alive,
    locked,
    page_count,
    read,
    write_files,
)
from pins import MakePin, drop, held, resident

SIZE = 100_000
PAGES = page_count(SIZE)


def test_as_much_as_fits_stays_in_memory(source: Path, pin: MakePin) -> None:
    names = write_files(source, 100, SIZE)
    drop(*(source / name for name in names))
    pinned = pin(source, "4M")
    fits = (4 << 20) // (PAGES * PAGE)
    figures = pinned.settle(lambda figures: figures["pinned_items"])
    assert figures["pinned_items"] == fits
    assert figures["dataset"] == {"items": 100, "bytes": 100 * SIZE, "is_known": True}
    assert locked(pinned.keepers) == fits * PAGES * PAGE
    drop(*(source / name for name in names))
    there = [name for name in names if resident(source / name)]
    assert sorted(there) == sorted(held(pinned.keepers, source))
    assert all(resident(source / name) == PAGES for name in there)
    read_for_it = pinned.settle(lambda figures: figures["source"]["bytes"])["source"]["bytes"]
    assert fits * SIZE <= read_for_it <= (fits + 2) * PAGES * PAGE  # and a directory's block or two
    for name in names:
        assert len(read(source / name)) == SIZE


def test_nothing_stays_once_it_is_let_go_of(source: Path, pin: MakePin) -> None:
    names = write_files(source, 20, SIZE)
    pinned = pin(source)
    pinned.full()
    pids = pinned.pids
    assert len(pids) == 3
    assert not coordlfs("unpin", source).stdout
    assert not any(map(is_alive, pids))
    drop(*(source / name for name in names))
    assert sum(resident(source / name) for name in names) == 0
    assert "is not pinned" in coordlfs("unpin", source, status=1).stderr
    assert "is not mounted" in coordlfs("status", source, status=1).stderr


def test_it_can_be_pinned_again_at_once(source: Path, pin: MakePin) -> None:
    write_files(source, 3, SIZE)
    for _ in range(3):
        pin(source).full()
        coordlfs("unpin", source)


def test_a_directory_is_pinned_once(source: Path, pin: MakePin) -> None:
    write_files(source, 3, SIZE)
    pin(source).full()
    again = coordlfs("pin", source, status=1)
    assert again.stderr == f"coordlfs: {source} is pinned already: `coordlfs unpin {source}` first\n"


def test_only_what_is_named(source: Path, pin: MakePin) -> None:
    for directory in ("train/cat", "train/dog", "test"):
        (source / directory).mkdir(parents=True)
        write_files(source / directory, 5, SIZE)
    pinned = pin(source, "64M", source / "train/cat", source / "test/item-00002")
    pinned.full()
    wanted = {"test/item-00002", *(f"train/cat/item-{number:05}" for number in range(5))}
    assert set(held(pinned.keepers, source)) == wanted
    (source / "test/new").write_bytes(bytes(SIZE))
    (source / "train/cat/new").write_bytes(bytes(SIZE))
    pinned.settle(lambda figures: figures["dataset"]["items"] == 7 and figures["pinned_items"] == 7)
    assert set(held(pinned.keepers, source)) == wanted | {"train/cat/new"}


def test_large_files_are_pinned_by_the_chunk(source: Path, pin: MakePin) -> None:
    (source / "large").write_bytes(os.urandom(50 << 20))
    (source / "empty").touch()
    drop(source / "large")
    pinned = pin(source, "40M")
    figures = pinned.settle(lambda figures: figures["pinned_items"])
    assert figures["pinned_items"] == 3
    assert figures["pinned_bytes"] == (16 + 16 + 2) << 20
    drop(source / "large")
    assert resident(source / "large") * PAGE == 34 << 20


def test_status(source: Path, pin: MakePin) -> None:
    write_files(source, 10, SIZE)
    pinned = pin(source)
    figures = pinned.full()
    shown = coordlfs("status", source).stdout
    assert f"{source} pinned" in " ".join(shown.split())
    assert "10 pinned, 0 on their way" in shown
    assert "not known" in shown
    listed = json.loads(coordlfs("status", "--json").stdout)
    assert [each["source_path"] for each in listed if each.get("mode") == "pin"].count(str(source)) == 1
    told = json.loads(coordlfs("status", "--json", source).stdout)
    assert told["processes"] == figures["processes"]
    assert (told["epoch"], told["epoch_history"], told["hit_rate"]) == (None, [], None)


def test_epochs_are_seen_by_openings(source: Path, pin: MakePin) -> None:
    names = write_files(source, 30, SIZE)
    pinned = pin(source)
    assert pinned.full()["epochs"] == 0

    def read_until(epochs: int) -> None:
        eventually(lambda: [read(source / name) for name in names] and pinned.stats()["epochs"] >= epochs)

    read_until(1)
    read_until(2)


def test_in_the_foreground(source: Path, place: Path) -> None:
    write_files(source, 3, SIZE)
    command = [*COORDLFS, "pin", str(source), "--cache-size", "1M", "--foreground"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"{source}: up to 1.0 MiB")
    eventually(lambda: json.loads(coordlfs("status", "--json", source).stdout)["pinned_items"] == 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "is not pinned" in coordlfs("unpin", source, status=1).stderr


def test_it_ends_with_the_process_in_the_foreground(source: Path) -> None:
    write_files(source, 3, SIZE)
    command = [*COORDLFS, "pin", str(source), "--cache-size", "1M", "--foreground"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    figures = json.loads(coordlfs("status", "--json", source).stdout)["processes"]
    process.kill()
    process.communicate()
    pids = [figures["supervisor"], figures["server"], *figures["keepers"]]
    eventually(lambda: not any(map(is_alive, pids)))


def test_what_cannot_be_pinned_is_said(source: Path, in_memory: Path, place: Path) -> None:
    def refused(*arguments: object) -> str:
        done = coordlfs("pin", *arguments, status=1)
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "does not exist" in refused(source / "absent")
    (source / "file").write_bytes(b"x")
    assert "is not a directory" in refused(source / "file")
    assert "is in memory already (it is tmpfs)" in refused(in_memory)
    assert "the kernel makes its files up (proc)" in refused(Path("/proc"))
    assert "the kernel makes its files up (sysfs)" in refused(Path("/sys/kernel"))
    assert "cannot be written" in refused(source, "--log-file", place / "absent" / "log")
    assert "does not lie in" in coordlfs("pin", source, place, status=2).stderr
    assert "does not exist" in refused(source, source / "absent")
    assert "is not a size" in coordlfs("pin", source, "--cache-size", "much", status=2).stderr


# -- processes that die --------------------------------------------------------------------------------------------


def test_a_keeper_that_dies_is_replaced(source: Path, pin: MakePin) -> None:
    write_files(source, 50, SIZE)
    pinned = pin(source)
    pinned.expect_errors = True
    before = pinned.full()
    (keeper,) = pinned.keepers
    os.kill(keeper, signal.SIGKILL)
    eventually(lambda: pinned.keepers not in ([], [keeper]))
    after = pinned.full()
    assert after["pinned_bytes"] == before["pinned_bytes"]
    assert len(held(pinned.keepers, source)) == 50
    assert after["source"]["bytes"] == before["source"]["bytes"]  # they were pinned as they were


def test_a_pinner_that_dies_is_replaced_and_its_keepers_keep_what_they_hold(source: Path, pin: MakePin) -> None:
    names = write_files(source, 50, SIZE)
    pinned = pin(source, "3M")
    pinned.expect_errors = True
    before = pinned.settle(lambda figures: figures["pinned_items"])
    holds = held(pinned.keepers, source)
    os.kill(before["processes"]["server"], signal.SIGKILL)
    eventually(lambda: pinned.stats()["processes"]["server"] != before["processes"]["server"])
    after = pinned.settle(lambda figures: figures["pinned_items"] == before["pinned_items"])
    assert after["server_starts"] == 2
    assert held(pinned.keepers, source) == holds
    (source / next(iter(holds))).unlink()  # it is known which are whose, and there is room for another one
    eventually(
        lambda: (
            len(held(pinned.keepers, source)) == len(holds) and next(iter(holds)) not in held(pinned.keepers, source)
        )
    )
    assert len(names) > len(holds)


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.15, 0.2, 0.25])  # seconds; it asks after some 0.15
def test_a_pinner_that_dies_while_it_is_let_go_of(source: Path, pin: MakePin, delay: float) -> None:
    write_files(source, 3, SIZE)
    pinned = pin(source)
    pinned.expect_errors = True
    server, pids = pinned.full()["processes"]["server"], pinned.pids
    with subprocess.Popen([*COORDLFS, "unpin", str(source)], stderr=subprocess.PIPE, text=True) as unpin:
        time.sleep(delay)
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)
        assert unpin.communicate(timeout=PATIENCE)[1] == ""
    assert unpin.returncode == 0
    assert not any(map(is_alive, pids))


def test_keepers_end_with_their_supervisor(source: Path, pin: MakePin) -> None:
    write_files(source, 5, SIZE)
    pinned = pin(source)
    pinned.expect_errors = True
    pinned.full()
    pids = pinned.pids
    os.kill(pinned.supervisor, signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, pids)))
    assert "is not pinned" in coordlfs("unpin", source, status=1).stderr


def test_it_ends_when_the_directory_is_removed(source: Path, pin: MakePin) -> None:
    (directory := source / "data").mkdir()
    write_files(directory, 2, SIZE)
    pinned = pin(directory)
    pinned.full()
    pids = pinned.pids
    shutil.rmtree(directory)
    eventually(lambda: not any(map(is_alive, pids)))


def test_a_directory_that_was_renamed_is_found_by_its_old_name(source: Path, pin: MakePin) -> None:
    write_files(source, 2, SIZE)
    pinned = pin(source)
    pinned.full()
    pids = pinned.pids
    source.rename(renamed := source.with_name(f"{source.name}-renamed"))
    try:
        assert json.loads(coordlfs("status", "--json", renamed).stdout)["pinned_items"] == 2
        assert json.loads(coordlfs("status", "--json", source).stdout)["pinned_items"] == 2
        coordlfs("unpin", source)
        assert not any(map(is_alive, pids))
    finally:
        renamed.rename(source)
