"""Mounting and unmounting by every way; what is refused; what is left behind: nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mounts import (
    COORDLFS,
    MIB,
    PATIENCE,
    MakeMount,
    Mount,
    children,
    coordlfs,
    eventually,
    is_alive,
    is_mounted,
    mentions,
    mountpoints,
    noise,
    read,
    unmount_lazily,
    write_files,
)

from coordlfs.kernel import process


def _pin_some(mounted: Mount) -> None:
    for name in os.listdir(mounted.path):
        read(mounted.path / name)
    assert mounted.settle()["pinned_items"] > 0


def _assert_ended(mounted: Mount, pids: list[int]) -> None:
    eventually(lambda: not any(map(is_alive, pids)), what=f"all of {pids} end")
    assert not is_mounted(mounted.path)
    assert mentions(mounted.source) == []


# -- ways to unmount ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["coordlfs umount", "umount", "fusermount3 -u", "umount -l", "SIGTERM", "SIGINT"])
def test_unmounting_with_pins_held(source: Path, mount: MakeMount, way: str) -> None:
    write_files(source, 20, 10_000)
    mounted = mount(source)
    _pin_some(mounted)
    pids = mounted.pids
    assert len(pids) == 3
    if way == "coordlfs umount":
        coordlfs("umount", mounted.path)
        assert not any(map(is_alive, pids))  # it returns when everything has ended
    elif way.startswith("SIG"):
        os.kill(mounted.supervisor, signal.Signals[way])
    else:
        subprocess.run([*way.split(), mounted.path], check=True, timeout=PATIENCE)
    _assert_ended(mounted, pids)
    assert os.listdir(mounted.path) == []


def test_unmounting_while_it_is_read(source: Path, mount: MakeMount) -> None:
    names = write_files(source, 100, 100_000)
    mounted = mount(source, "5M")
    program = (
        "import os, sys\nwhile True:\n for p in sys.argv[1:]:\n  fd = os.open(p, 0); os.read(fd, 1 << 20); os.close(fd)"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", program, *(str(mounted.path / n) for n in names)], stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: mounted.stats()["requests"]["read"] > 60)
        pids = mounted.pids
        subprocess.run(["umount", "-l", mounted.path], check=True, timeout=PATIENCE)
        assert job.wait(PATIENCE) == 1  # its files are not there any more
    finally:
        job.kill()
        job.wait()
    _assert_ended(mounted, pids)


def _holding(mounted: Mount, how: str) -> Iterator[None]:
    path = mounted.path / "item-00000"
    if how == "directory":
        job = subprocess.Popen(["sleep", "100"], cwd=mounted.path)
        yield
        job.kill()
        job.wait()
        return
    fd = os.open(path, os.O_RDONLY)
    if how == "file":
        yield
        assert os.pread(fd, 20_000, 0) == noise(10_000, 0)
        os.close(fd)
        return
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        os.close(fd)
        yield
        assert mapped[:] == noise(10_000, 0)


@pytest.mark.parametrize("how", ["file", "mapping", "directory"])
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "unread"])
def test_a_busy_mount(source: Path, mount: MakeMount, how: str, pinned: bool) -> None:
    names = write_files(source, 5, 10_000)
    mounted = mount(source)
    if pinned:
        _pin_some(mounted)
    pids = mounted.pids
    with contextmanager(_holding)(mounted, how):
        refused = coordlfs("umount", mounted.path, status=1)
        assert len(refused.stderr.splitlines()) == 1
        holder = "sleep" if how == "directory" else str(os.getpid())
        assert holder in refused.stderr
        assert "--lazy" in refused.stderr
        assert read(mounted.path / names[1]) == noise(10_000, 1)  # it serves on
        coordlfs("umount", "--lazy", mounted.path)
        assert not is_mounted(mounted.path)
        time.sleep(0.2)
        assert is_alive(mounted.supervisor)  # for the reader, which `_holding` has read on
    _assert_ended(mounted, pids)


def test_a_mount_that_another_namespace_has(source: Path, mount: MakeMount) -> None:
    """Whoever makes a mount namespace gets a mount of his own; `umount` says at once who that is."""
    (source / "f").write_bytes(b"here")
    mounted = mount(source)
    pids = mounted.pids
    other = subprocess.Popen(
        [
            "unshare",
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            'echo; read line; cat "$1"',
            "sh",
            mounted.path / "f",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        said = coordlfs("umount", mounted.path, status=1, timeout=30).stderr
        assert f"namespace of process {other.pid} (sh)" in said
        assert not is_mounted(mounted.path)
        assert other.communicate(b"\n", timeout=PATIENCE)[0] == b"here"
    finally:
        other.kill()
        other.communicate()
    eventually(lambda: not any(map(is_alive, pids)))


# -- at several places, under other names ------------------------------------------------------------------------


@pytest.fixture
def scattered(source: Path, mount: MakeMount, place: Path) -> Iterator[tuple[Mount, Path, Path]]:
    """A mount that was moved, and whose parent was renamed; where it is bound as well; where a directory of it is."""
    (source / "d").mkdir()
    (source / "d/f").write_bytes(noise(10_000))
    bound, directory = place / "bound", place / "directory"
    for path in (place / "parent", place / "moved/mnt", bound, directory):
        path.mkdir(parents=True)
    mounted = mount(source, mountpoint=place / "parent/mnt")
    mounted.expect_errors = True
    mounted.path = place / "renamed/mnt"
    try:
        _mount("--move", place / "parent/mnt", place / "moved/mnt")
        _mount("--bind", place / "moved/mnt", bound)
        _mount("--bind", place / "moved/mnt/d", directory)
        (place / "moved").rename(place / "renamed")
        yield mounted, bound, directory
    finally:
        for path in (directory, bound, mounted.path):
            unmount_lazily(path)


def _mount(how: str, what: Path, where: Path) -> None:
    subprocess.run(["mount", how, what, where], check=True, timeout=PATIENCE)


def test_commands_find_a_mount_wherever_it_is(scattered: tuple[Mount, Path, Path], place: Path) -> None:
    mounted, bound, directory = scattered
    pids = mounted.pids
    for path in (mounted.path, bound):
        assert json.loads(coordlfs("status", path, "--json").stdout)["mountpoint"] == str(path)
        assert "1 of 1 items" in coordlfs("warm", path, path / "d").stdout
        assert "all equal" in coordlfs("verify", path).stdout
        assert "1 items" in coordlfs("drop", path, path / "d/f").stdout
    ours = [s for s in json.loads(coordlfs("status", "--json").stdout) if s["source_path"] == str(mounted.source)]
    assert [s["mountpoint"] for s in ours] == [str(mounted.path)]
    assert str(bound) in coordlfs("status", mounted.path).stdout.replace("\n", "")
    for command in ("status", "warm", "restart"):
        _refused(command, directory, status=1, says=f"a directory of the mount on {mounted.path}")
    _refused("status", place / "parent/mnt", status=1, says="is not mounted")
    # It goes on wherever it is left, and whoever unmounts it is told where that is.
    assert f"still mounted on {mounted.path}" in coordlfs("umount", bound).stderr
    assert f"still mounted on {directory}" in coordlfs("umount", mounted.path).stderr
    assert read(directory / "f") == noise(10_000)
    assert all(map(is_alive, pids))
    coordlfs("umount", directory)
    _assert_ended(mounted, pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_mount_ends_wherever_it_is(scattered: tuple[Mount, Path, Path], number: signal.Signals) -> None:
    mounted, bound, directory = scattered
    pids = mounted.pids
    os.kill(mounted.supervisor, number)
    _assert_ended(mounted, pids)
    assert not any(map(is_mounted, (mounted.path, bound, directory)))


def test_a_mount_is_restarted_wherever_it_is(scattered: tuple[Mount, Path, Path]) -> None:
    mounted, bound, directory = scattered
    assert "mounted again" not in coordlfs("restart", bound).stderr
    for path in (mounted.path / "d", bound / "d", directory):
        assert read(path / "f") == noise(10_000)


@pytest.mark.usefixtures("_may_mount")
def test_a_run_ends_where_its_command_has_renamed_the_parent(place: Path) -> None:
    (data := place / "parent/data").mkdir(parents=True)
    script = f"mv {place}/parent {place}/renamed"
    subprocess.run(
        [*COORDLFS, "run", data, "--cache-size", "1M", "--", "sh", "-c", script], check=True, timeout=PATIENCE
    )
    assert mentions(data) == []


@pytest.fixture
def _no_resend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COORDLFS_NO_RESEND", "1")


@pytest.mark.usefixtures("_no_resend")
def test_it_is_mounted_again_wherever_it_is(scattered: tuple[Mount, Path, Path], place: Path) -> None:
    mounted, bound, directory = scattered
    with _other_namespace() as other:
        said = coordlfs("restart", bound).stderr
        assert len(said.splitlines()) == 1
        assert str(directory) in said
        assert f"process {other.pid} (sleep)" in said
    for path in (mounted.path, bound):
        assert read(path / "d/f") == noise(10_000)
    assert not is_mounted(place / "parent/mnt")
    assert _is_dead(directory)  # and shows nothing else


@contextmanager
def _other_namespace() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a mount namespace of its own, which begins as this one is."""
    ours = os.readlink("/proc/self/ns/mnt")
    other = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sleep", "1000"])
    try:
        eventually(lambda: os.readlink(f"/proc/{other.pid}/ns/mnt") != ours)
        eventually(lambda: Path(f"/proc/{other.pid}/comm").read_text() == "sleep\n")
        yield other
    finally:
        other.kill()
        other.wait()


# -- in the foreground --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("_may_mount")
def test_the_foreground(source: Path, place: Path, number: signal.Signals) -> None:
    """It ends though its parent was renamed; and says for whom it stays, where that is another mount namespace."""
    write_files(source, 5, 10_000)
    mountpoint = place / "parent/mnt"
    mountpoint.parent.mkdir()
    command = [*COORDLFS, "mount", "--foreground", "--cache-size", "10M", str(source), str(mountpoint)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        eventually(lambda: is_mounted(mountpoint) and (mountpoint / "item-00000").exists())
        mounted = Mount(source, mountpoint, place / "none")
        _pin_some(mounted)
        pids = mounted.pids
        with _other_namespace() as other:
            mountpoint.parent.rename(parent := place / "renamed")
            job.send_signal(number)
            assert job.stderr is not None
            said = job.stderr.readline()
            assert f"namespace of process {other.pid} (sleep)" in said
        out, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, err
        assert "10.0 MiB of cache" in out
        assert err == ""
        assert not is_mounted(parent / "mnt")
        _assert_ended(mounted, pids)
        mounted.end()
    finally:
        job.kill()
        job.wait()
        unmount_lazily(mountpoint)


@pytest.mark.usefixtures("_may_mount")
def test_the_foreground_ends_when_it_is_unmounted(source: Path, place: Path) -> None:
    mountpoint = place / "mnt"
    job = subprocess.Popen([*COORDLFS, "mount", "--foreground", "--cache-size", "10M", source, mountpoint])
    try:
        eventually(lambda: is_mounted(mountpoint))
        time.sleep(0.5)
        coordlfs("umount", mountpoint)
        assert job.wait(PATIENCE) == 0
        assert mentions(source) == []
    finally:
        job.kill()
        job.wait()
        unmount_lazily(mountpoint)


# -- places -------------------------------------------------------------------------------------------------------


def test_mounted_in_place(source: Path, mount: MakeMount) -> None:
    names = write_files(source, 30, 50_000)
    before = {name: os.stat(source / name) for name in names}
    mounted = mount(source, mountpoint=source)
    for number, name in enumerate(names):
        assert read(source / name) == noise(50_000, number)
        assert os.stat(source / name).st_mtime_ns == before[name].st_mtime_ns
        assert os.stat(source / name).st_dev != before[name].st_dev
    assert mounted.settle()["pinned_items"] == 30
    with mounted.messages() as sent:
        assert read(source / names[0]) == noise(50_000, 0)
    assert sent["read"] == 0
    assert "all equal" in coordlfs("verify", source).stdout
    coordlfs("umount", source)
    assert read(source / names[0]) == noise(50_000, 0)
    assert os.stat(source / names[0]).st_dev == before[names[0]].st_dev


def test_mounted_on_a_mount(source: Path, mount: MakeMount) -> None:
    names = write_files(source, 20, 150_000)
    below = mount(source, "2M")
    above = mount(below.path, "1M")
    for _ in range(3):
        for number, name in enumerate(names):
            assert read(above.path / name) == noise(150_000, number)
        above.settle()
        below.settle()
    assert above.stats()["pinned_items"] > 0
    assert above.source_bytes() == below.source_bytes()  # it reads around the page cache, which keeps no second copy


def test_two_mounts_of_one_source(source: Path, mount: MakeMount) -> None:
    names = write_files(source, 10, 50_000)
    first, second = mount(source), mount(source)
    for mounted in (first, second):
        for number, name in enumerate(names):
            assert read(mounted.path / name) == noise(50_000, number)
        assert mounted.settle()["source"]["bytes"] == 500_000
    first.end()
    assert read(second.path / names[0]) == noise(50_000, 0)


def test_a_missing_mountpoint_is_made(source: Path, mount: MakeMount, place: Path) -> None:
    mounted = mount(source, mountpoint=place / "new name")
    assert is_mounted(mounted.path)


@pytest.mark.usefixtures("_may_mount")
def test_what_is_said(source: Path, place: Path) -> None:
    (place / "full").mkdir()
    (place / "full" / "hidden").touch()
    (source / "shown").touch()
    try:
        done = coordlfs("mount", source, place / "full")
        assert "auto" in done.stdout
        assert "60%" in done.stdout
        assert "not empty" in done.stderr
        assert os.listdir(place / "full") == ["shown"]
    finally:
        coordlfs("umount", place / "full")
    assert os.listdir(place / "full") == ["hidden"]


@pytest.mark.usefixtures("_may_mount")
def test_mounting_by_relative_paths_and_links(source: Path, place: Path) -> None:
    write_files(source, 1, 100)
    (place / "mnt").mkdir()
    (place / "link").symlink_to(source)
    (place / "to-mnt").symlink_to("mnt")
    try:
        for arguments in (["mount", "link", "to-mnt", "--cache-size", "1M"], ["umount", "to-mnt/"]):
            subprocess.run([*COORDLFS, *arguments], cwd=place, check=True, timeout=PATIENCE)
            if arguments[0] == "mount":
                assert is_mounted(place / "mnt")
                assert read(place / "mnt" / "item-00000") == noise(100)
        assert not is_mounted(place / "mnt")
    finally:
        unmount_lazily(place / "mnt")


# -- what is refused ----------------------------------------------------------------------------------------------


def _refused(*arguments: object, status: int, says: str, before: list[str] | None = None) -> None:
    """One line that says what to do, the status, and nothing left behind."""
    command = [*(before or []), *COORDLFS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == status, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert says in done.stderr
    assert done.stdout == ""


@pytest.fixture
def nothing_left(source: Path, place: Path) -> Iterator[None]:
    """The test fails if anything of a mount of `source` stays."""
    yield
    left = mentions(source), is_mounted(place / "mnt"), (place / "mnt").exists()
    with suppress(ProcessLookupError):
        for pid in left[0]:
            os.kill(pid, signal.SIGKILL)
    unmount_lazily(place / "mnt")
    assert left == ([], False, False)


@pytest.mark.usefixtures("nothing_left", "_may_mount")
class TestRefused:
    """Bad input: one line each."""

    def test_sources(self, source: Path, place: Path) -> None:
        (place / "file").touch()
        mnt = place / "mnt"
        _refused("mount", place / "missing", mnt, status=1, says="does not exist")
        _refused("mount", place / "file", mnt, status=1, says="not a directory")
        _refused("mount", "", mnt, status=2, says="empty path")
        os.chmod(source, 0o700)
        os.chown(source, 1234, 1234)
        weak = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
        _refused("mount", source, mnt, status=1, says="may not be read", before=weak)

    def test_mountpoints(self, source: Path, place: Path) -> None:
        (place / "file").touch()
        (source / "inside").mkdir()
        (place / "link").symlink_to(source)
        _refused("mount", source, place / "a" / "mnt", status=1, says="does not exist")
        _refused("mount", source, place / "file", status=1, says="not a directory")
        _refused("mount", source / "inside", source, status=1, says="inside")
        _refused("mount", source, source / "inside", status=1, says="inside")
        _refused("mount", source, place / "link" / "inside", status=1, says="inside")
        _refused("mount", source, source / "new", status=1, says="inside")
        assert os.listdir(source) == ["inside"]

    @pytest.mark.parametrize("size", ["many", "12X", "-1", "101%", "99P", "", "1G2", "0x10", "nan", "1e3", "٣M%"])
    def test_cache_sizes(self, source: Path, place: Path, size: str) -> None:
        _refused("mount", source, place / "mnt", f"--cache-size={size}", status=2, says="--cache-size")

    def test_without_permission(self, source: Path, place: Path) -> None:
        weak = ["setpriv", "--bounding-set", "-sys_admin"]
        _refused("mount", source, place / "mnt", status=1, says="not permitted", before=weak)

    def test_without_fuse(self, source: Path, place: Path) -> None:
        devices = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod /dev/urandom c 1 9"
        for device, says in (("true", "modprobe fuse"), ("mknod /dev/fuse c 10 250", "modprobe fuse")):
            hidden = [
                "unshare",
                "-m",
                "--propagation",
                "slave",
                "sh",
                "-c",
                f'{devices} && {device} && exec "$@"',
                "sh",
            ]
            _refused("mount", source, place / "mnt", status=1, says=says, before=hidden)

    def test_a_log_that_cannot_be_written(self, source: Path, place: Path) -> None:
        log = place / "missing" / "log"
        _refused("mount", source, place / "mnt", "--log-file", log, status=1, says="missing/log")

    def test_what_is_not_mounted(self, source: Path, place: Path) -> None:
        for command in ("umount", "status", "warm", "drop", "verify"):
            _refused(command, source, status=1, says="not mounted")
        _refused("umount", "/proc", status=1, says="not by coordlfs")
        _refused("umount", place / "missing", status=1, says="not mounted")

    def test_runs(self, source: Path, place: Path) -> None:
        _refused("run", source, status=2, says="command")
        _refused("run", source, "--", status=2, says="command")
        _refused("run", place / "missing", "--", "true", status=1, says="does not exist")
        _refused("run", source, "--cache-size=x", "--", "true", status=2, says="--cache-size")

    def test_runs_without_the_right_to_mount(self, source: Path) -> None:
        """It takes a user namespace, where these are allowed."""
        (source / "f").write_bytes(b"here")
        weak = ["setpriv", "--bounding-set", "-sys_admin", *COORDLFS, "run", str(source), "--cache-size", "1M"]
        done = subprocess.run([*weak, "--", "cat", source / "f"], capture_output=True, text=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout) == (0, "here"), done.stderr


def test_mounting_twice(source: Path, mount: MakeMount) -> None:
    mounted = mount(source)
    _refused("mount", source, mounted.path, status=1, says="already")
    assert len(mounted.pids) == 3


def test_mounting_twice_in_place(source: Path, mount: MakeMount) -> None:
    mount(source, mountpoint=source)
    _refused("mount", source, source, status=1, says="already")


@pytest.mark.usefixtures("_may_mount")
def test_without_leave_to_lock_memory(source: Path, place: Path) -> None:
    # As in a container that may mount and no more. It works, and what that costs is said at once.
    names = write_files(source, 5, 10 * MIB)
    weak = ["setpriv", "--bounding-set", "-ipc_lock,-sys_resource", "sh", "-c", 'ulimit -l 8192; exec "$@"', "sh"]
    command = [*weak, *COORDLFS, "mount", str(source), str(place / "mnt"), "--cache-size", "64M"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "ulimit -l" in done.stderr
        for number, name in enumerate(names):
            assert read(place / "mnt" / name) == noise(10 * MIB, number)
    finally:
        coordlfs("umount", place / "mnt", status=None)
        unmount_lazily(place / "mnt")


# -- run ----------------------------------------------------------------------------------------------------------


def _run(source: Path, *command: str, status: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COORDLFS, "run", source, "--cache-size", "50M", "--", *command],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=cwd,
    )
    assert done.returncode == status, done.stderr
    assert mentions(source) == []
    assert not is_mounted(source)
    return done


_PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


_COUNTS = """
import signal, sys
numbers = {int(number) for number in sys.argv[1:]}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
print("ready", flush=True)
while True:
    print(int(signal.sigwait(numbers)), flush=True)
"""


def _line(job: subprocess.Popen[str]) -> str:
    assert job.stdout is not None
    return job.stdout.readline().strip()


def _start_run(source: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    """A program that `coordlfs run` runs, in a process group of their own; for `_COUNTS`, once it counts."""
    job = subprocess.Popen(
        [*COORDLFS, "run", str(source), "--cache-size=1M", "--", sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    assert program != _COUNTS or _line(job) == "ready"
    return job


@pytest.mark.usefixtures("_may_mount")
class TestRun:
    """`coordlfs run SRC -- COMMAND`."""

    def test_the_command_reads_the_mount(self, source: Path) -> None:
        write_files(source, 10, 50_000)
        program = (
            "import os, sys\n"
            "for _ in range(2):\n"
            "    print([os.path.getsize(n) for n in sorted(os.listdir())] == [50000] * 10)\n"
            "    print(len(b''.join(open(n, 'rb').read() for n in os.listdir())))\n"
            "print(os.getxattr(sys.argv[1], 'user.coordl.stats')[:1])\n"
        )
        done = _run(source, sys.executable, "-c", program, str(source), cwd=source)
        assert done.stdout.split("\n") == ["True", "500000", "True", "500000", "b'{'", ""]
        assert "epoch 1" in done.stderr
        assert "488.3 KiB read from the source" in done.stderr

    def test_the_status_is_passed_on(self, source: Path) -> None:
        _run(source, "true")
        _run(source, "sh", "-c", "exit 3", status=3)
        _run(source, "sh", "-c", "kill -9 $$", status=137)
        missing = _run(source, "no-such-command", status=127)
        assert "no-such-command" in missing.stderr
        _run(source, "/etc/passwd", status=126)

    def test_nobody_else_sees_it(self, source: Path) -> None:
        (source / "f").write_bytes(b"bytes")
        command = [*COORDLFS, "run", str(source), "--cache-size=1M", "--", "sh", "-c", "echo up; read line; exit 7"]
        job = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert job.stdout is not None
            while "up" not in (line := job.stdout.readline()):
                assert line
            assert not is_mounted(source)
            assert mentions(source) != []
            (source / "g").write_bytes(b"written beside it")
            _, errors = job.communicate("go on\n", timeout=PATIENCE)
            assert job.returncode == 7, errors
        finally:
            job.kill()
            job.wait()
        assert mentions(source) == []

    def test_a_signal_reaches_the_command(self, source: Path) -> None:
        trap = "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done"
        job = subprocess.Popen(
            [*COORDLFS, "run", str(source), "--cache-size=1M", "--", "sh", "-c", trap],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert job.stdout is not None
            while "up" not in (line := job.stdout.readline()):
                assert line
            job.send_signal(signal.SIGTERM)
            assert job.wait(PATIENCE) == 9
            job.stdout.close()
        finally:
            job.kill()
            job.wait()
        assert mentions(source) == []

    def test_signals_reach_the_command_once(self, source: Path) -> None:
        """Whether they are sent to the wrapper alone or to its group."""
        numbers = (
            *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGALRM, signal.SIGINT, signal.SIGTERM),
            *(signal.SIGHUP, signal.SIGWINCH, signal.SIGCONT, signal.SIGRTMIN + 3),
        )
        job = _start_run(source, _COUNTS, *(str(int(number)) for number in numbers))
        try:
            for number in numbers:
                for send in (os.kill, os.killpg):
                    send(job.pid, number)
                    assert _line(job) == f"{int(number)}"
            job.send_signal(signal.SIGUSR1)
            assert _line(job) == f"{int(signal.SIGUSR1)}"  # and nothing a second time in between
            os.killpg(job.pid, signal.SIGKILL)
        finally:
            job.kill()
            job.communicate()
        eventually(lambda: mentions(source) == [])

    @pytest.mark.parametrize("stop", ["wrapper", "group", "command"])
    @pytest.mark.parametrize("go_on", ["wrapper", "group", "command"])
    def test_it_stops_and_goes_on_with_the_command(self, source: Path, stop: str, go_on: str) -> None:
        job = _start_run(source, "import os, sys\nprint(os.getpid(), flush=True)\nsys.exit(int(sys.stdin.readline()))")
        try:
            command = int(_line(job))
            whom = {"wrapper": job.pid, "group": -job.pid, "command": command}
            os.kill(whom[stop], signal.SIGSTOP if stop == "command" else signal.SIGTSTP)
            eventually(lambda: process.is_stopped(job.pid) and process.is_stopped(command))
            os.kill(whom[go_on], signal.SIGCONT)
            eventually(lambda: not process.is_stopped(job.pid) and not process.is_stopped(command))
            job.communicate("5\n", timeout=PATIENCE)
            assert job.returncode == 5
        finally:
            job.kill()
            job.communicate()

    def test_the_command_gets_what_it_would_get_without(self, source: Path) -> None:
        def hostile() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
            os.umask(0o027)
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))

        look = "grep -E '^Sig(Blk|Ign)' /proc/self/status; ulimit -Sa; ulimit -Ha; umask; nice; pwd; env -u _ | sort"
        bare = ["bash", "-c", look]
        variables = {"PATH": os.environ["PATH"], "PYTHONPATH": "/nowhere", "A": "b"}
        found = [
            subprocess.run(
                command, capture_output=True, text=True, timeout=60, env=variables, preexec_fn=prepare, cwd=source
            ).stdout
            for prepare in (None, hostile)
            for command in (bare, [*COORDLFS, "run", str(source), "--cache-size=1M", "--", *bare])
        ]
        assert found[0] == found[1] != found[2] == found[3]

    def test_it_ends_when_the_command_does(self, source: Path) -> None:
        """By a relative path, and with something of the command's left running that has a file open."""
        (source / "f").write_bytes(b"here")
        left = "import subprocess, sys\nsubprocess.Popen(['sh', '-c', 'exec 3<f; exec sleep 100 >/dev/null 2>&1'])"
        command = [*COORDLFS, "run", source.name, "--cache-size=1M", "--", sys.executable, "-c", f"{left}; print('up')"]
        job = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=source.parent, start_new_session=True
        )
        try:
            job.communicate(timeout=25)  # 30 s is what it waits where nothing tells it why
            assert job.returncode == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
        eventually(lambda: mentions(source) == [])

    def test_a_signal_comes_as_the_command_starts(self) -> None:
        early = """
import os, signal, subprocess, sys
from coordlfs.commands import job
from coordlfs.kernel import process

start = subprocess.Popen

def start_and_be_ended(command, **options):
    child = start(command, **options)
    os.kill(os.getpid(), signal.SIGTERM)
    return child

subprocess.Popen = start_and_be_ended
inherited = process.settle()
job.block_all_signals()
sys.exit(job.call(["sleep", "60"], inherited))
"""
        done = subprocess.run([sys.executable, "-c", early], timeout=PATIENCE)
        assert done.returncode == 128 + signal.SIGTERM  # the command's status, and not our own end


# -- kills --------------------------------------------------------------------------------------------------------

_READER = """
import os, random, sys, time, zlib
sums, until = {}, time.monotonic() + float(sys.argv[1])
passes = 0
while time.monotonic() < until:
    paths = sys.argv[2:]
    random.shuffle(paths)
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        data = b"".join(iter(lambda: os.read(fd, 1 << 20), b""))
        os.close(fd)
        assert sums.setdefault(path, zlib.crc32(data)) == zlib.crc32(data), path
    passes += 1
for path in sys.argv[2:]:
    print(sums[path])
"""


@pytest.mark.parametrize("victim", ["server", "keeper"])
def test_readers_survive_a_kill(source: Path, mount: MakeMount, victim: str) -> None:
    names = write_files(source, 200, 60_000)
    mounted = mount(source, "6M")
    mounted.expect_errors = True
    command = [sys.executable, "-c", _READER, "5", *(str(mounted.path / n) for n in names)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for _ in range(3):
            time.sleep(1)
            processes = mounted.stats()["processes"]
            pid = processes["server"] if victim == "server" else processes["keepers"][0]
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: not is_alive(pid))  # type: ignore[misc]
        for job in jobs:
            out, _ = job.communicate(timeout=PATIENCE)
            assert job.returncode == 0
            assert [int(s) for s in out.split()] == [zlib.crc32(noise(60_000, i)) for i in range(200)]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    # And the cache is what it was: full, and held.
    figures = mounted.settle()
    assert figures["capacity_bytes"] - figures["pinned_bytes"] < 61_440
    for name in names:
        read(mounted.path / name)
    assert mounted.settle()["pinned_items"] == figures["pinned_items"]
    pinned = [name for name in names if mounted.cached(name) == "pinned"]
    assert len(pinned) == figures["pinned_items"]
    with mounted.messages() as sent:
        for name in pinned:
            read(mounted.path / name)
    assert sent["read"] == 0


def test_figures_survive_the_server(source: Path, mount: MakeMount) -> None:
    names = write_files(source, 50, 60_000)
    mounted = mount(source)
    mounted.expect_errors = True
    _pin_some(mounted)
    before = mounted.stats()
    os.kill(before["processes"]["server"], signal.SIGKILL)
    eventually(lambda: mounted.stats()["pinned_items"] == 50)
    after = mounted.settle()
    for figure in ("pinned_bytes", "capacity_bytes", "known_files", "source"):
        assert {**after, "source": after["source"]["bytes"]}[figure] == (
            before["source"]["bytes"] if figure == "source" else before[figure]
        )
    assert {mounted.cached(name) for name in names} == {"pinned"}


def test_server_and_keeper_are_killed_at_once(source: Path, mount: MakeMount) -> None:
    # What the keeper held is pinned again, and not read again: its pages are still there.
    names = write_files(source, 50, 60_000)
    mounted = mount(source)
    mounted.expect_errors = True
    _pin_some(mounted)
    before = mounted.stats()
    for pid in (*before["processes"]["keepers"], before["processes"]["server"]):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: mounted.stats()["pinned_items"] == 50)
    after = mounted.settle()
    assert after["source"]["bytes"] == before["source"]["bytes"]
    assert after["pinned_bytes"] == before["pinned_bytes"]
    for number, name in enumerate(names):
        assert read(mounted.path / name) == noise(60_000, number)


def test_the_supervisor_is_killed(source: Path, mount: MakeMount) -> None:
    # Nothing serves after that; but nothing hangs, and nothing stays but the mountpoint, for `umount -l`.
    write_files(source, 5, 60_000)
    mounted = mount(source)
    mounted.expect_errors = True
    _pin_some(mounted)
    pids = mounted.pids
    os.kill(mounted.supervisor, signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, pids)))
    if is_mounted(mounted.path):
        with pytest.raises(OSError):
            os.listdir(mounted.path)
        _refused("status", mounted.path, status=1, says="does not answer")
        coordlfs("umount", mounted.path)
    assert not is_mounted(mounted.path)


def test_what_is_mounted_on_top_stays(source: Path, mount: MakeMount) -> None:
    """A server whose supervisor died unmounts its own mount, and not what covers it."""
    write_files(source, 5, 60_000)
    mounted = mount(source)
    mounted.expect_errors = True
    pids = mounted.pids
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", mounted.path], check=True, timeout=PATIENCE)
    try:
        (mounted.path / "mine").write_text("mine")
        os.kill(mounted.supervisor, signal.SIGKILL)
        eventually(lambda: not any(map(is_alive, pids)))
        assert (mounted.path / "mine").read_text() == "mine"
    finally:
        subprocess.run(["umount", mounted.path], check=True, timeout=PATIENCE)
    if is_mounted(mounted.path):  # it was out of reach
        assert _is_dead(mounted.path)
        coordlfs("umount", mounted.path)
    assert not is_mounted(mounted.path)


def _is_dead(path: Path) -> bool:
    try:
        os.getxattr(path, "user.coordl.stats")
    except OSError as e:
        return e.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


@contextmanager
def _who_mount(source: Path, mountpoint: Path, number: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Commands that mount one place, all at once; nothing of them is left."""
    log = mountpoint.with_name("l")
    command = [*COORDLFS, "mount", str(source), str(mountpoint), "--cache-size", "10M", "--log-file", str(log)]
    pipe = subprocess.PIPE
    jobs = [subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True) for _ in range(number)]
    try:
        yield jobs
    finally:
        for job in jobs:
            job.kill()
            job.wait()
        unmount_lazily(mountpoint)


@pytest.mark.usefixtures("_may_mount")
@pytest.mark.parametrize("seed", range(4))
def test_the_supervisor_is_killed_while_it_mounts(source: Path, place: Path, seed: int) -> None:
    """At any moment from its first on: the command says how it went, nothing is left, and it can be mounted again."""
    (source / "f").write_bytes(noise(5000))
    mountpoint = place / "mnt"
    with _who_mount(source, mountpoint, 1) as [job]:
        eventually(lambda: children(job.pid))
        [supervisor] = children(job.pid)
        time.sleep(random.Random(seed).uniform(0, 0.8))
        os.kill(supervisor, signal.SIGKILL)
        _, errors = job.communicate(timeout=PATIENCE)
        if job.returncode:
            assert len(errors.splitlines()) == 1
            assert not is_mounted(mountpoint)
        eventually(lambda: not is_mounted(mountpoint) and not mentions(source), what="it ends")
        coordlfs("mount", source, mountpoint, "--cache-size", "10M")
        assert read(mountpoint / "f") == noise(5000)
        coordlfs("umount", mountpoint)
        assert not mentions(source)


@pytest.mark.usefixtures("_may_mount")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_who_mounts_is_ended_before_it_serves(source: Path, place: Path, number: signal.Signals, seed: int) -> None:
    """At any moment: either it has said that it is mounted, or nothing is."""
    (source / "f").write_bytes(noise(5000))
    mountpoint = place / "mnt"
    with _who_mount(source, mountpoint, 1) as [job]:
        eventually(lambda: children(job.pid))
        time.sleep(random.Random(seed).uniform(0, 0.2 if number == signal.SIGKILL else 0.5))
        job.send_signal(number)
        said, errors = job.communicate(timeout=PATIENCE)
        if "is mounted on" in said:
            coordlfs("umount", mountpoint)
        else:
            assert job.returncode == -number
            assert not errors
            eventually(lambda: not is_mounted(mountpoint) and not mentions(source), what="it ends")
            assert number == signal.SIGKILL or not mountpoint.exists()


@pytest.mark.usefixtures("_may_mount")
def test_of_several_who_mount_at_once_one_does(source: Path, place: Path) -> None:
    mountpoint = place / "mnt"
    with _who_mount(source, mountpoint, 4) as jobs:
        told = [job.communicate(timeout=PATIENCE)[1] for job in jobs]
        assert sorted(job.returncode for job in jobs) == [0, 1, 1, 1]
        assert sum("is a coordlfs mount already" in errors for errors in told) == 3
        assert mountpoints().count(os.fsencode(mountpoint)) == 1
        coordlfs("umount", mountpoint)


def test_a_mountpoint_that_somebody_has_locked(source: Path, place: Path, mount: MakeMount) -> None:
    (source / "f").write_bytes(noise(5000))
    fd = os.open(source, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert read(mount(source, mountpoint=source).path / "f") == noise(5000)
    finally:
        os.close(fd)


@pytest.mark.parametrize("moment", ["server starts", "keeper starts", "unmounting", "in use"])
def test_the_supervisor_is_killed_at_a_bad_moment(source: Path, mount: MakeMount, moment: str) -> None:
    write_files(source, 5, 60_000)
    mounted = mount(source)
    mounted.expect_errors = True
    _pin_some(mounted)
    pids = mounted.pids
    held = os.open(mounted.path / "item-00000", os.O_RDONLY) if moment == "in use" else -1
    if moment.endswith("starts"):
        victim = mounted.processes["server"] if moment == "server starts" else mounted.processes["keepers"][0]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: set(children(mounted.supervisor)) - set(pids))
        pids += children(mounted.supervisor)
    elif moment == "unmounting":
        subprocess.run(["umount", mounted.path], check=True, timeout=PATIENCE)
    os.kill(mounted.supervisor, signal.SIGKILL)
    eventually(lambda: not is_mounted(mounted.path))
    if held >= 0:
        with suppress(OSError):  # what is cached is there as long as the file is open; but nothing hangs
            os.pread(held, 1000, 0)
        os.close(held)
    eventually(lambda: not any(map(is_alive, pids)) and not mentions(source))
    again = mount(source, mountpoint=mounted.path)
    assert read(again.path / "item-00001") == noise(60_000, 1)


def test_all_of_a_mount_is_killed_at_once(source: Path, mount: MakeMount) -> None:
    """Then nobody is left to unmount: the next mount does, and so does `umount`."""
    write_files(source, 5, 60_000)
    for way in ("mount", "umount"):
        mounted = mount(source, mountpoint=source.parent / f"{source.name}-mnt")
        mounted.expect_errors = True
        for pid in mounted.pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in mounted.pids:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda path=mounted.path: _is_dead(path))  # type: ignore[misc]
        if way == "umount":
            coordlfs("umount", mounted.path)
    assert not is_mounted(mounted.path)
    mounted.path.rmdir()


def test_no_keeper_is_started_that_is_not_needed(source: Path, mount: MakeMount) -> None:
    write_files(source, 50, 60_000)
    mounted = mount(source)
    mounted.expect_errors = True
    for _ in range(3):
        _pin_some(mounted)
        os.kill(mounted.stats()["processes"]["keepers"][0], signal.SIGKILL)
        eventually(lambda: mounted.stats()["pinned_items"] == 50)
        time.sleep(0.3)
        assert len(mounted.pids) == 3


def test_a_kernel_that_cannot_repeat_questions(source: Path, mount: MakeMount, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.9: the mount is made anew. What is open fails, what is opened then does not; nothing hangs."""
    monkeypatch.setenv("COORDLFS_NO_RESEND", "1")
    names = write_files(source, 50, 60_000)
    mounted = mount(source, "10M")
    mounted.expect_errors = True
    _pin_some(mounted)
    held = os.open(mounted.path / names[0], os.O_RDONLY)
    before = mounted.stats()
    for _ in range(2):
        os.kill(mounted.stats()["processes"]["server"], signal.SIGKILL)
        eventually(lambda: not _is_dead(mounted.path) and is_mounted(mounted.path))
        eventually(lambda: (mounted.path / names[0]).exists())
        for number, name in enumerate(names):
            assert read(mounted.path / name) == noise(60_000, number)
    assert os.fstat(held).st_dev != os.stat(mounted.path).st_dev
    os.close(held)
    eventually(lambda: len(mounted.pids) == 3)
    mounted.forget()
    _pin_some(mounted)
    after = mounted.stats()
    assert after["pinned_items"] == 50
    assert after["server_starts"] == 3
    assert after["known_files"] == before["known_files"]
    assert is_mounted(mounted.path)
    assert mountpoints().count(os.fsencode(mounted.path)) == 1


def test_a_mount_can_be_mounted_again_at_once(source: Path, mount: MakeMount, place: Path) -> None:
    (source / "f").write_bytes(noise(MIB))
    for _ in range(3):
        mounted = mount(source, mountpoint=place / "mnt")
        assert read(mounted.path / "f") == noise(MIB)
        mounted.settle()
        mounted.end()


def test_unmounting_beside_a_mount_that_hangs(source: Path, mount: MakeMount) -> None:
    """Whoever looks for processes with files of the one must ask nothing of the other."""
    (source / "empty").touch()  # its attributes are believed for a second only
    hangs, other = mount(source), mount(source)
    with open(hangs.path / "empty") as empty:
        holder = subprocess.Popen(["sleep", "1000"], stdin=empty, cwd=other.path)
    server = hangs.processes["server"]
    try:
        time.sleep(1.1)
        os.kill(server, signal.SIGSTOP)
        refused = coordlfs("umount", other.path, status=1)
        assert f"in use by process {holder.pid} (sleep)" in refused.stderr
        holder.kill()
        holder.wait()
        coordlfs("umount", other.path)
    finally:
        os.kill(server, signal.SIGCONT)
        holder.kill()
        holder.wait()
