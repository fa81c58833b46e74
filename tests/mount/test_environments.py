"""Other people's machines: what a process is given by who starts it, and how little there may be of it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import ENVIRONMENTS, WEAK, Environment, leave_directory, limit, start
from mounts import MakeMount, eventually, is_alive, is_mounted, noise, read, unmount_lazily, write_files


@pytest.fixture
def foreign(place: Path) -> Path:
    """A directory of modules of another program, that break whoever imports them."""
    (directory := place / "foreign").mkdir()
    for name in ("numpy", "trio", "json", "queue", "logging", "socket", "subprocess", "argparse", "xxhash"):
        (directory / f"{name}.py").write_text("raise SystemExit('of another program')\n")
    return directory


# As the command is installed: `python` itself may find nothing where `PYTHONPATH` leads astray.
_COMMAND = Path(sys.executable).with_name("coordlfs")


def _start(where: Environment, foreign: Path, *command: object) -> subprocess.CompletedProcess[str]:
    return start(where, foreign, _COMMAND, *command)


@pytest.mark.usefixtures("_may_mount")
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_commands_depend_on_nothing_inherited(source: Path, place: Path, foreign: Path, name: str) -> None:
    where, mnt = ENVIRONMENTS[name], place / "mnt"
    names = write_files(source, 3, 50_000)
    in_own_namespace = "unshare" in where.before  # a mount would be gone with the command
    try:
        if not in_own_namespace:
            done = _start(where, foreign, "mount", source, mnt, "--cache-size", "1M", "--log-file", place / "log")
            assert done.returncode == 0, done.stderr
            for number, file in enumerate(names):
                assert read(mnt / file) == noise(50_000, number)
            for command in ("status", "refresh", "umount"):
                done = _start(where, foreign, command, mnt)
                assert (done.returncode, done.stderr) == (0, "")
            assert not is_mounted(mnt)
            assert "imported only now" not in (place / "log").read_text()
        (place / "expected").write_bytes(noise(50_000, 0))
        job = "run", source, "--cache-size", "1M", "--", "cmp", place / "expected", source / names[0]
        done = _start(where, foreign, *job)
        assert done.returncode == 0, done.stderr
    finally:
        unmount_lazily(mnt)


@pytest.mark.usefixtures("_may_mount")
def test_a_limit_that_cannot_do_is_named(source: Path, place: Path, foreign: Path) -> None:
    for kind, most, name in ((resource.RLIMIT_FSIZE, 1024, "ulimit -f"), (resource.RLIMIT_NOFILE, 32, "ulimit -n")):
        where = Environment(prepare=limit(kind, most, most), before=tuple(WEAK))
        done = _start(where, foreign, "mount", source, place / "mnt", "--cache-size", "1M")
        assert done.returncode == 1
        assert name in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not is_mounted(place / "mnt")
        assert name in _start(where, foreign, "doctor").stdout


def test_a_relative_path_in_a_directory_that_is_gone(source: Path, foreign: Path) -> None:
    where = Environment(prepare=leave_directory)
    for command in (["mount", "src", "mnt"], ["umount", "mnt"], ["run", "src", "--", "true"]):
        done = _start(where, foreign, *command)
        assert done.returncode == 1
        assert "working directory" in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


# -- no threads, no processes -------------------------------------------------------------------------------------


class Pids:
    """A pids cgroup, of version 1 or 2."""

    def __init__(self) -> None:
        root = Path("/sys/fs/cgroup/pids")
        if not root.exists():
            root = Path("/sys/fs/cgroup")
            (root / "cgroup.subtree_control").write_text("+pids")
        self.path = root / f"coordlfs-test-{os.getpid()}"
        self.path.mkdir()

    def enter(self, pid: int) -> None:
        """Move a process into it."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def allow(self, more: int | None) -> None:
        """Allow for so many more processes and threads than there are; None: as many as may be."""
        now = int((self.path / "pids.current").read_text())
        (self.path / "pids.max").write_text("max" if more is None else str(now + more))

    def remove(self) -> None:
        """Remove it, once it is empty."""
        eventually(lambda: not (self.path / "cgroup.procs").read_text().split())
        self.path.rmdir()


@pytest.fixture
def pids() -> Iterator[Pids]:
    """A pids cgroup."""
    group = Pids()
    yield group
    group.allow(None)
    group.remove()


def test_a_server_that_cannot_be_started_takes_nothing_away(pids: Pids, source: Path, mount: MakeMount) -> None:
    write_files(source, 2, 50_000)
    mounted = mount(source)
    mounted.expect_errors = True
    read(mounted.path / "item-00000")
    pids.enter(mounted.supervisor)
    pids.allow(0)
    os.kill(mounted.processes["server"], signal.SIGKILL)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read(mounted.path / "item-00001")), daemon=True)
    reader.start()
    eventually(lambda: mounted.log.read_text().count("no server can be started") > 5)
    assert is_mounted(mounted.path)
    assert not got
    pids.allow(None)
    reader.join(30)
    assert got == [noise(50_000, 1)]
    # Its processes leave the group with the mount, before that is removed.
    os.kill(mounted.supervisor, signal.SIGTERM)
    eventually(lambda: not is_alive(mounted.supervisor))


def test_the_supervisor_ends_without_a_server(pids: Pids, source: Path, mount: MakeMount) -> None:
    mounted = mount(source)
    mounted.expect_errors = True
    pids.enter(mounted.supervisor)
    pids.allow(0)
    os.kill(mounted.processes["server"], signal.SIGKILL)
    eventually(lambda: "no server can be started" in mounted.log.read_text())
    os.kill(mounted.supervisor, signal.SIGTERM)
    eventually(lambda: not is_alive(mounted.supervisor))
    assert not is_mounted(mounted.path)
