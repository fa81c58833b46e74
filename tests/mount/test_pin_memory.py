"""Whose memory `coordlfs pin` takes, and that it gives it back: memory cgroups, pressure, limits, many files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mounts import (
    COORDLFS,
    MIB,
    PAGE,
    PATIENCE,
    Cgroup,
    coordlfs,
    eventually,
    holding,
    locked,
    page_count,
    read,
    write_files,
)
from pins import MakePin, Pinned, disk, drop, held, read_in, resident
from users import User, installation

SIZE = 100_000
PAGES = page_count(SIZE)
LIMIT = 24 * MIB  # of the job's memory


@pytest.fixture
def job(cgroup: Callable[[int], Cgroup]) -> Cgroup:
    """The memory cgroup of a job."""
    return cgroup(LIMIT)


def own_bytes(group: Cgroup) -> int:
    """Bytes of files that are charged to a cgroup."""
    stat = group.stat()
    return stat["file" if group.unified else "cache"]


def test_what_a_job_has_in_memory_is_charged_to_the_pinner_in_the_end(source: Path, pin: MakePin, job: Cgroup) -> None:
    """The job's limit is far below what is pinned: it would be ended if it were charged for it."""
    names = write_files(source, 400, SIZE)
    paths = [source / name for name in names]
    drop(*paths)
    read_in(job.enter, *paths[:150])
    assert own_bytes(job) >= 150 * SIZE
    pinned = pin(source)
    pinned.full()
    assert own_bytes(job) < MIB
    assert locked(pinned.keepers) == 400 * PAGES * PAGE
    read_in(job.enter, *paths)
    assert own_bytes(job) < MIB
    assert job.oom_kills() == 0


def test_a_job_that_reads_all_the_while_is_not_charged_for_what_is_pinned(
    source: Path, pin: MakePin, job: Cgroup
) -> None:
    names = write_files(source, 300, SIZE)
    paths = [source / name for name in names]
    drop(*paths)
    script = 'while :; do cat "$@" >/dev/null || exit 1; done'
    reader = subprocess.Popen(
        ["sh", "-c", script, "sh", *map(str, paths)], preexec_fn=job.enter, start_new_session=True
    )
    try:
        pinned = pin(source)
        figures = pinned.full()
        assert reader.poll() is None
    finally:
        os.killpg(reader.pid, signal.SIGKILL)
        reader.wait()
    assert figures["admission"]["errors"] == 0
    assert own_bytes(job) < MIB
    for path in paths:
        assert resident(path) == PAGES
    assert job.oom_kills() == 0


def test_what_was_read_here_is_pinned_as_it_is(source: Path, pin: MakePin) -> None:
    names = write_files(source, 100, SIZE)
    paths = [source / name for name in names]
    drop(*paths)
    read_in(None, *paths)
    pinned = pin(source)
    figures = pinned.full()
    assert figures["source"]["bytes"] < 10 * SIZE
    assert len(held(pinned.keepers, source)) == 100


def test_a_job_that_maps_a_file_keeps_it_until_it_is_done(source: Path, pin: MakePin, job: Cgroup) -> None:
    names = write_files(source, 5, SIZE)
    drop(*(source / name for name in names))
    hold = (
        "import mmap, sys\nf = open(sys.argv[1], 'rb')\nm = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
        "sum(m[::4096])\nprint('mapped', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", hold, str(source / names[0])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=job.enter) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mapped\n"
        pinned = pin(source)
        figures = pinned.settle(lambda figures: figures["admission"]["not_admitted"])
        assert figures["pinned_items"] == 4
        assert set(held(pinned.keepers, source)) == set(names[1:])
        holder.communicate(b"", timeout=PATIENCE)
    pinned.full()  # it is tried again


def test_memory_that_gets_short_is_given_back_and_taken_again(
    source: Path, place: Path, cgroup: Callable[[int], Cgroup]
) -> None:
    """In a memory cgroup, which is a small machine: its keepers are charged there as well."""
    names = write_files(source, 1500, SIZE)
    drop(*(source / name for name in names))
    machine = cgroup(500 * MIB)
    log = place / "log"
    command = [*COORDLFS, "pin", str(source), "--cache-size", "150M", "--log-file", str(log)]
    subprocess.run(command, check=True, preexec_fn=machine.enter, timeout=PATIENCE, stdout=subprocess.DEVNULL)
    pinned = Pinned(source, log)
    try:
        full = pinned.full()["pinned_bytes"]
        with holding(285 * MIB, machine) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            eventually(lambda: pinned.stats()["pinned_bytes"] < full - 10 * MIB)
            less = pinned.settle()
            assert less["memory"]["given_back_bytes"] > 0
            assert less["memory"]["limit_bytes"] < less["capacity_bytes"]
        pinned.full()
        assert machine.oom_kills() == 0
        assert len(pinned.keepers) == 1
    finally:
        pinned.end()


@pytest.fixture(scope="module")
def somebody() -> Iterator[User]:
    """An ordinary user."""
    with tempfile.TemporaryDirectory(prefix="coordlfs-users-", dir="/var/tmp") as root:
        os.chmod(root, 0o755)
        with installation(Path(root)) as place:
            yield User("nobody", place)


def test_an_ordinary_user_with_little_memory_to_lock(source: Path, place: Path, somebody: User) -> None:
    write_files(source, 200, SIZE)
    os.chown(place, somebody.uid, somebody.gid)
    user = replace(somebody, memlock=MIB)
    done = user.call("pin", source, "--cache-size", "64M", "--log-file", place / "log")
    assert done.stderr.count("\n") == 1
    expected = (
        r"coordlfs: a process may lock only 1\.0 MiB, so that no more than 6\.0 MiB "
        r".*above 256\.0 KiB are left out: .*ulimit -l"
    )
    assert re.match(expected, done.stderr)
    pinned = Pinned(source, place / "log")
    try:
        figures = pinned.settle(lambda figures: figures["fill"] > 0.9)
        assert 1 < len(pinned.keepers) <= 8
        assert locked(pinned.keepers) == figures["pinned_bytes"] <= 6 * MIB
        assert len(held(pinned.keepers, source)) == figures["pinned_items"]
        shown = re.sub(r"[│\s]+", " ", user.call("status").stdout)
        assert f"{source} pinned" in shown
        assert "no more than 6.0 MiB of 64.0 MiB are pinned" in shown
        user.call("unpin", source)
    finally:
        pinned.end()


_USE_UP = """
import ctypes
while ctypes.CDLL(None).inotify_init() >= 0:
    pass
print(flush=True)
ctypes.CDLL(None).pause()
"""


def test_a_user_who_may_have_no_more_inotify_instances(source: Path, place: Path, somebody: User) -> None:
    write_files(source, 3, SIZE)
    user = replace(somebody, name="games")  # whom no other test is
    os.chown(place, user.uid, user.gid)
    command = ["setpriv", f"--reuid={user.uid}", "--clear-groups", sys.executable, "-c", _USE_UP]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        user.call("pin", source, "--cache-size", "1M", "--revalidate", "1", "--log-file", place / "log")
        pinned = Pinned(source, place / "log")
        try:
            figures = pinned.full()
            assert figures["directories"] == {"watched": 0, "unwatched": 1}
            assert "max_user_instances" in pinned.log.read_text()
            (source / "item-00000").unlink()
            (source / "new").write_bytes(bytes(SIZE))
            eventually(lambda: set(held(pinned.keepers, source)) == {"item-00001", "item-00002", "new"})
            user.call("unpin", source)
        finally:
            pinned.end()
            other.kill()


def test_what_is_too_large_to_be_locked_is_said(source: Path, place: Path, somebody: User) -> None:
    write_files(source, 2, SIZE)
    (source / "large").write_bytes(bytes(3 * MIB))
    os.chown(place, somebody.uid, somebody.gid)
    user = replace(somebody, memlock=8 * MIB)
    done = user.call("pin", source, "--cache-size", "16M", "--log-file", place / "log")
    pinned = Pinned(source, place / "log")
    try:
        assert "so that files and chunks above 2.0 MiB are left out: `ulimit -l" in done.stderr
        pinned.settle(lambda figures: figures["pinned_items"] == 2)
        assert "large" not in held(pinned.keepers, source)
        user.call("unpin", source)
    finally:
        pinned.end()


def test_nobody_who_may_lock_nothing(source: Path, somebody: User) -> None:
    write_files(source, 2, SIZE)
    done = replace(somebody, memlock=0).call("pin", source, status=1)
    assert "no memory may be locked" in done.stderr
    assert "ulimit -l" in done.stderr


def test_another_user_may_not_let_go(source: Path, pin: MakePin, somebody: User) -> None:
    write_files(source, 2, SIZE)
    pinned = pin(source)
    pinned.full()
    done = somebody.call("unpin", source, status=1)
    assert "another user's" in done.stderr
    assert len(pinned.pids) == 3


def test_more_files_than_mappings(in_memory: Path, pin: MakePin) -> None:
    """200,000 files, on a disk that is in memory itself and keeps such files where it keeps their names."""
    with disk("ext4", in_memory, "-O", "inline_data", "-N", "220000") as point:
        for number in range(200):
            directory = point / f"{number:03}"
            directory.mkdir()
            for each in range(1000):
                (directory / str(each)).write_bytes(b"x")
        pinned = pin(point, "1G")
        figures = pinned.full()
        assert figures["pinned_items"] == 200_000
        assert len(pinned.keepers) == -(-200_000 // 64_530)
        assert locked(pinned.keepers) == 200_000 * PAGE
        assert read(point / "199" / "999") == b"x"
        coordlfs("unpin", point)
