"""What pinning without a mount asks of the kernel: where pages are charged, what is done in a directory, who reads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Cgroup, eventually, script
from pins import drop, read_in

from coordlfs.kernel import disks, pages, process
from coordlfs.kernel.charges import Charges
from coordlfs.kernel.inotify import CHANGES, READS, DirectoryWatch
from coordlfs.kernel.pages import PAGE

MIB = 1 << 20


@pytest.fixture
def file(source: Path) -> Path:
    """A file of 100 pages, of which none is in memory."""
    path = source / "f"
    path.write_bytes(os.urandom(100 * PAGE))
    drop(path)
    return path


@pytest.fixture
def mapped(file: Path) -> Iterator[int]:
    """The address of a mapping of it."""
    fd = os.open(file, os.O_RDONLY)
    address = pages.map_file(fd, 0, 100 * PAGE)
    os.close(fd)
    yield address
    pages.unmap(address, 100 * PAGE)


def test_pages_that_this_process_has_read_are_its_own(mapped: int) -> None:
    charges = Charges()
    assert charges.are_own(mapped, 100 * PAGE), "none is faulted in"
    pages.populate(mapped, 100 * PAGE)
    assert charges.are_own(mapped, 100 * PAGE)


def test_pages_of_another_cgroup_are_not(file: Path, mapped: int, cgroup: Callable[[int], Cgroup]) -> None:
    read_in(cgroup(64 * MIB).enter, file)
    pages.populate(mapped, 100 * PAGE)
    charges = Charges()
    assert not charges.are_own(mapped, 100 * PAGE)
    assert not charges.are_own(mapped + 50 * PAGE, PAGE)


def test_one_page_of_another_is_enough(file: Path, mapped: int, cgroup: Callable[[int], Cgroup]) -> None:
    tail = ["dd", f"if={file}", "of=/dev/null", f"bs={PAGE}", "skip=99", "status=none"]
    subprocess.run(tail, preexec_fn=cgroup(64 * MIB).enter, check=True, timeout=60)
    charges = Charges()
    pages.populate(mapped, 50 * PAGE)
    assert charges.are_own(mapped, 50 * PAGE)
    pages.populate(mapped + 99 * PAGE, PAGE)
    assert not charges.are_own(mapped, 100 * PAGE)


def test_who_may_not_see_it_is_told_so() -> None:
    text = "from coordlfs.kernel.charges import Charges\ntry: Charges()\nexcept OSError as e: print(e.errno)"
    drop_all = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    done = subprocess.run([*drop_all, sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n", done.stderr


def test_what_is_resident_is_told_by_runs(file: Path, mapped: int) -> None:
    assert pages.resident_runs(mapped, 100 * PAGE) == []
    fd = os.open(file, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, PAGE, 7 * PAGE)
    os.pread(fd, 2 * PAGE, 20 * PAGE)
    os.close(fd)
    assert pages.resident_runs(mapped, 100 * PAGE) == [(7, 1), (20, 2)]
    pages.populate(mapped, 100 * PAGE)
    assert pages.resident_runs(mapped, 100 * PAGE) == [(0, 100)]


def test_what_is_done_in_a_directory(source: Path) -> None:
    (source / "sub").mkdir()
    (source / "old").write_bytes(b"x")
    changes, reads = DirectoryWatch(CHANGES), DirectoryWatch(READS)
    try:
        fd = os.open(source, os.O_RDONLY)
        of_changes, of_reads = changes.add(fd), reads.add(fd)
        assert changes.add(fd) == of_changes, "one directory has one watch"
        os.close(fd)
        (source / "old").read_bytes()
        assert changes.events() == ([], False)
        assert {(e.watch, e.name, e.is_directory) for e in reads.events()[0]} == {(of_reads, b"old", False)}
        for act in (
            lambda: (source / "new").write_bytes(b"x"),
            lambda: os.truncate(source / "old", 0),
            lambda: os.rename(source / "new", source / "newer"),
            lambda: (source / "newer").unlink(),
        ):
            act()
            found, is_lost = changes.events()
            assert found
            assert not is_lost
            assert {event.watch for event in found} == {of_changes}
        (source / "sub").rmdir()
        assert [(event.name, event.is_directory) for event in changes.events()[0]] == [(b"sub", True)]
    finally:
        changes.close()
        reads.close()


def test_more_than_the_kernel_keeps_is_said_to_be_lost(source: Path) -> None:
    changes = DirectoryWatch(CHANGES)
    try:
        fd = os.open(source, os.O_RDONLY)
        changes.add(fd)
        os.close(fd)
        most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
        paths = source / "a", source / "b"
        for path in paths:
            path.touch()
        for number in range(most + 100):  # in turn, as the same thing twice in a row is told once
            os.utime(paths[number % 2])
        is_lost = False
        while (told := changes.events())[0] or told[1]:
            is_lost = is_lost or told[1]
        assert is_lost
    finally:
        changes.close()


def test_waiting_for_a_disk_is_counted(source: Path) -> None:
    root = os.open(source, os.O_RDONLY)
    try:
        waited = disks.waiting(root)
        before = waited()
        assert before is not None

        def has_waited() -> bool:
            path = source / "large"
            path.write_bytes(os.urandom(8 * MIB))
            drop(path)
            path.read_bytes()
            return (waited() or 0) > before

        eventually(has_waited)
    finally:
        os.close(root)


def test_who_gives_way_is_nice_to_others() -> None:
    text = (
        "import os\nfrom coordlfs.kernel import process\nprocess.give_way()\nprint(os.getpriority(os.PRIO_PROCESS, 0))"
    )
    assert int(script(text)) == 10


def test_bytes_from_the_disk_are_counted_by_process(file: Path) -> None:
    before = process.disk_bytes(os.getpid())
    assert before is not None
    file.read_bytes()
    after = process.disk_bytes(os.getpid())
    assert after is not None
    assert after - before >= 100 * PAGE
    assert process.disk_bytes(1 << 22) is None
