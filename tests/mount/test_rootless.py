"""Mounts of ordinary users: by way of fusermount3 and in namespaces of their own, pinned and in memory of their own.

The tests run as root, become an ordinary user for what is tested, and look on.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from mounts import (
    CHUNK,
    COORDLFS,
    MIB,
    PAGE,
    PATIENCE,
    Cgroup,
    coordlfs,
    eventually,
    is_alive,
    is_mounted,
    mentions,
    noise,
    raises,
    read,
    unmount_lazily,
    write_files,
)
from users import User, UserMount, installation, open_device

from coordlfs.cache.keeper import Keeper, _Request
from coordlfs.cache.keeper_protocol import REPLY, REQUEST, How, Outcome, Verb, parse_reply
from coordlfs.cache.residence import Residence

MakeUserMount = Callable[..., UserMount]
PINNED, IN_MEMORY = str(Residence.PAGE_CACHE), str(Residence.PRIVATE_MEMORY)


@pytest.fixture(scope="module")
def somebody(_may_mount: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """An ordinary user, with /dev/fuse as udev leaves it."""
    root = Path("/var/tmp") / f"coordlfs-users-{os.getpid()}"
    root.mkdir()
    try:
        with installation(root) as place, open_device():
            yield User("nobody", place)
    finally:
        for name in ("packages/coordlfs", "packages", "site", "python", "."):
            (root / name).rmdir()  # and not what is bound there, should it still be


@pytest.fixture
def home(somebody: User, place: Path) -> Path:
    """A directory that belongs to the user."""
    os.chown(place, somebody.uid, somebody.gid)
    return place


@pytest.fixture
def mount_as(source: Path, home: Path) -> Iterator[MakeUserMount]:
    """Mounts `source` as a user."""
    with ExitStack() as stack:

        def make(user: User, cache: str = "4M", *options: object, source: Path = source) -> UserMount:
            path = home / f"mnt{len(os.listdir(home))}"
            mounted = UserMount(user, source, path, "--cache-size", cache, *options)
            stack.callback(mounted.end)
            return mounted

        yield make


@pytest.fixture(params=[PINNED, IN_MEMORY])
def user(somebody: User, request: pytest.FixtureRequest) -> User:
    """The user with enough memory to lock for a cache of 4 MiB, or with none."""
    return replace(somebody, memlock=4 * MIB if request.param == PINNED else 0)


# -- the tree and its bytes ---------------------------------------------------------------------------------------


def test_the_tree_is_the_sources(user: User, source: Path, mount_as: MakeUserMount) -> None:
    sizes = (0, 1, PAGE, PAGE + 1, 300_000, CHUNK - 1, CHUNK + PAGE + 1)
    for size in sizes:
        (source / f"size-{size}").write_bytes(noise(size))
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "ü\n").write_bytes(noise(70_000))
    (source / "link").symlink_to("deep/er")
    os.link(source / "size-1", source / "hard")
    (source / "closed").write_bytes(b"secret")
    (source / "closed").chmod(0o600)
    mounted = mount_as(user, "40M" if not user.memlock else "4M")
    assert mounted.stats()["residence"] == (PINNED if user.memlock else IN_MEMORY)
    for _ in range(2):
        assert mounted.read(*(f"size-{size}" for size in sizes)) == [noise(size) for size in sizes]
        mounted.settle()
    raises(errno.EACCES, lambda: user.do(lambda: os.open(mounted.path / "closed", os.O_RDONLY)))
    assert user.do(lambda: sorted(os.listdir(mounted.path / "link"))) == ["ü\n"]
    (source / "closed").chmod(0o644)
    assert "all equal" in user.call("verify", mounted.path).stdout
    # Who did not mount sees nothing: neither root nor another user.
    raises(errno.EACCES, lambda: os.listdir(mounted.path))
    other = replace(user, name="daemon")
    raises(errno.EACCES, lambda: other.do(lambda: os.listdir(mounted.path)))
    assert "another user's" in other.call("status", mounted.path, status=1).stderr
    assert str(mounted.path) not in other.call("status", "--json").stdout
    assert "permitted" in other.call("umount", mounted.path, status=1).stderr
    assert is_mounted(mounted.path)


def test_a_disk_cache_is_the_users_own(user: User, source: Path, home: Path, mount_as: MakeUserMount) -> None:
    """In whatever residence memory is, and over a restart."""
    names = write_files(source, 60, 100_000)
    options = ("1M", "--disk-cache", home / "disk", "--disk-size", "8M")
    mounted = mount_as(user, *options)
    for _ in range(2):
        assert mounted.read(*names) == [noise(100_000, number) for number in range(60)]
        eventually(lambda: mounted.settle()["disk"]["waiting_blocks"] == 0)
    before = mounted.source_bytes()
    assert mounted.read(*names) == [noise(100_000, number) for number in range(60)]
    assert mounted.source_bytes() == before
    [store] = (home / "disk").iterdir()
    assert {store.stat().st_uid, *(f.stat().st_uid for f in store.iterdir())} == {user.uid}
    mounted.end()
    again = mount_as(user, *options)
    assert again.read(*names) == [noise(100_000, number) for number in range(60)]
    assert again.source_bytes() <= (60 - 58) * 100_000  # but for a copy that gave way, perhaps


def test_each_epoch_reads_what_is_not_cached(user: User, source: Path, mount_as: MakeUserMount) -> None:
    names = write_files(source, 60, 100_000)  # 25 pages each: 40 files fill 4 MiB but for 24 pages
    mounted = mount_as(user)
    order = random.Random(1)
    for epoch in range(3):
        before = mounted.source_bytes()
        for name in order.sample(names, len(names)):
            assert mounted.read(name) == [noise(100_000, names.index(name))]
        figures = mounted.settle()
        assert (figures["pinned_items"], figures["pinned_bytes"]) == (40, 40 * 25 * PAGE)
        assert mounted.source_bytes() - before == (20 if epoch else 60) * 100_000
    assert figures["epochs"] == 3
    assert figures["epoch"]["misses"] == 20
    assert figures["epoch"]["hit_rate"] == pytest.approx(2 / 3, abs=1e-3)
    assert list(mounted.cached(*names).values()).count("pinned") == 40
    from_memory = figures["requests"]["memory_bytes"]
    assert from_memory == 0 if user.memlock else from_memory >= 2 * 40 * 100_000


def test_epochs_are_told_where_nothing_misses(user: User, source: Path, mount_as: MakeUserMount) -> None:
    names = write_files(source, 20, 100_000)
    mounted = mount_as(user)
    mounted.read(*names)
    keeper = mounted.settle()["processes"]["keepers"][0]

    def watches() -> int:
        return sum(fd.read_text().count("inotify wd:") for fd in Path(f"/proc/{keeper}/fdinfo").iterdir())

    eventually(lambda: watches() == 15)
    for _ in range(2):
        time.sleep(0.1)  # epochs that miss nothing are told apart by the time between them
        mounted.read(*names)
        mounted.settle()
    assert mounted.stats()["epochs"] == 3
    assert mounted.source_bytes() == 20 * 100_000


def test_a_file_is_cached_whole_though_it_was_read_in_part(user: User, source: Path, mount_as: MakeUserMount) -> None:
    (source / "f").write_bytes(noise(3 * MIB + 5))
    mounted = mount_as(user)

    def look() -> bytes:
        fd = os.open(mounted.path / "f", os.O_RDONLY)
        return os.pread(fd, 10, MIB)

    assert user.do(look) == noise(3 * MIB + 5)[MIB : MIB + 10]
    eventually(lambda: mounted.cached("f") == {"f": "pinned"})
    before = mounted.source_bytes()
    assert before <= 3 * MIB + 5 + PAGE  # once, and no more
    assert mounted.read("f") == [noise(3 * MIB + 5)]
    assert mounted.source_bytes() == before


def test_the_commands(user: User, source: Path, mount_as: MakeUserMount) -> None:
    names = write_files(source, 30, 100_000)
    mounted = mount_as(user)
    assert "30 of 30 items" in user.call("warm", mounted.path).stdout
    before = mounted.source_bytes()
    assert mounted.read(*names) == [noise(100_000, i) for i in range(30)]
    assert mounted.source_bytes() == before
    assert "10 items" in user.call("drop", mounted.path, *(mounted.path / n for n in names[:10])).stdout
    assert mounted.stats()["pinned_items"] == 20
    mounted.read(*names[:10])
    assert mounted.settle()["pinned_items"] == 30
    assert mounted.source_bytes() == before + 10 * 100_000
    # A change is found by `refresh`, and the old bytes are never seen again.
    (source / names[3]).write_bytes(noise(100_000, 99))
    assert "1 had changed" in user.call("refresh", mounted.path).stdout
    assert mounted.read(names[3]) == [noise(100_000, 99)]
    assert mounted.settle()["pinned_items"] == 30
    assert mounted.read(names[3]) == [noise(100_000, 99)]
    before = mounted.source_bytes()
    said = user.call("restart", mounted.path).stdout
    assert "30 items cached" in said, said + mounted.log.read_text() + str(mounted.stats())
    assert mounted.read(*names) == [noise(100_000, 99 if i == 3 else i) for i in range(30)]
    assert mounted.source_bytes() == before, mounted.log.read_text() + str(mounted.stats())


def test_what_is_said_of_memory(user: User, source: Path, mount_as: MakeUserMount) -> None:
    write_files(source, 1, 10)
    mounted = mount_as(user)
    figures = mounted.stats()["locked_memory"]
    text = user.call("status", mounted.path).stdout
    assert figures["limit_bytes"] == user.memlock
    assert figures["wanted_bytes"] == 4 * MIB
    if user.memlock:
        assert mounted.said.stderr == ""
        assert figures["remedy"] is None
        assert "RLIMIT_MEMLOCK" not in text
    else:
        (line,) = mounted.said.stderr.splitlines()
        assert "only 0 B may be locked" in line
        assert "Allow 4.0 MiB" in line
        assert "LimitMEMLOCK" in line
        assert "LimitMEMLOCK" in figures["remedy"]
        assert "RLIMIT_MEMLOCK" in text
        assert "4.0 MiB would do" in text


# -- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "victim"), [(PINNED, "server"), (IN_MEMORY, "server"), (IN_MEMORY, "keepers"), (IN_MEMORY, "both")]
)
def test_kills(somebody: User, source: Path, mount_as: MakeUserMount, kind: str, victim: str) -> None:
    user = replace(somebody, memlock=4 * MIB if kind == PINNED else 0)
    names = write_files(source, 30, 100_000)
    (source / "large").write_bytes(noise(800_000))
    names.append("large")
    data = [noise(100_000, i) for i in range(30)] + [noise(800_000)]
    mounted = mount_as(user)
    mounted.read(*names)
    assert mounted.settle()["pinned_items"] == 31
    before = mounted.source_bytes()
    for _ in range(2):
        processes = mounted.stats()["processes"]
        killed = [] if victim == "keepers" else [processes["server"]]
        killed += [] if victim == "server" else processes["keepers"]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        assert mounted.read(*names) == data
        eventually(lambda: not any(map(is_alive, killed)))  # noqa: B023
        eventually(lambda: mounted.stats()["pinned_items"] == 31)
        assert mounted.read(*names) == data
        again = mounted.settle()["source"]["bytes"] - before
        if victim == "both" and not user.memlock:
            assert again in (0, 3_800_000, 7_600_000)  # the memory may have been theirs alone: then it began anew
        else:
            assert again == 0
    # The counts survive, and what is changed while a server is away is noticed by the next.
    (source / "large").write_bytes(noise(800_000, 1))
    user.call("refresh", mounted.path)
    assert mounted.read("large") == [noise(800_000, 1)]


def test_the_supervisor_is_killed(user: User, source: Path, mount_as: MakeUserMount) -> None:
    names = write_files(source, 5, 100_000)
    mounted = mount_as(user)
    mounted.read(*names)
    pids = mounted.pids
    os.kill(mounted.supervisor, signal.SIGKILL)
    assert mounted.gone(pids)
    again = UserMount(user, source, mounted.path, "--cache-size", "4M")
    try:
        assert again.read(*names) == [noise(100_000, i) for i in range(5)]
    finally:
        again.end()


def test_private_memory_is_released(
    somebody: User, source: Path, mount_as: MakeUserMount, cgroup: Callable[[int], Cgroup]
) -> None:
    names = write_files(source, 96, MIB)
    mounted = mount_as(replace(somebody, memlock=0), "96M")
    group = cgroup(512 * MIB)
    for pid in mounted.pids:
        group.add(pid)
    for name in names:
        mounted.read(name)
    assert mounted.settle()["pinned_items"] == 96
    hold = "import sys; held = bytearray(int(sys.argv[1])); held[::4096] = b'x' * len(held[::4096]); print(); input()"
    command = [sys.executable, "-c", hold, str(400 * MIB)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=group.enter) as neighbour:
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == b"\n"  # it got what it wanted
        eventually(lambda: mounted.stats()["memory"]["given_back_bytes"] > 0)
        figures = mounted.settle()
        assert 0 < figures["pinned_items"] < 96
        assert figures["pinned_bytes"] == figures["pinned_items"] * MIB
        assert neighbour.poll() is None
        before = mounted.source_bytes()
        kept = [name for name, how in mounted.cached(*names).items() if how == "pinned"]
        for name in kept[:40]:
            assert mounted.read(name) == [(source / name).read_bytes()]
        assert mounted.source_bytes() == before
        neighbour.communicate(b"\n")


_GROW = """
import sys, time
held = []
for _ in range(25):
    held.append(bytearray(16 << 20))
    held[-1][::4096] = b"x" * 4096
    time.sleep(0.01)
print(len(held), flush=True)
"""


def test_a_neighbour_that_grows_fast_is_not_killed(
    somebody: User, source: Path, mount_as: MakeUserMount, cgroup: Callable[[int], Cgroup]
) -> None:
    """Nor is the cache: it looks more often the less there is, since what it gives back is not free at once."""
    names = write_files(source, 50, 4 * MIB)
    mounted = mount_as(replace(somebody, memlock=0), "200M")
    group = cgroup(640 * MIB)
    for pid in mounted.pids:
        group.add(pid)
    for name in names:
        mounted.read(name)
    assert mounted.settle()["pinned_items"] == 50
    neighbour = subprocess.run([sys.executable, "-c", _GROW], stdout=subprocess.PIPE, preexec_fn=group.enter)
    assert (neighbour.returncode, neighbour.stdout) == (0, b"25\n")
    assert group.oom_kills() == 0
    assert mounted.stats()["memory"]["given_back_bytes"] > 0


def test_when_memory_runs_out_it_is_the_cache_that_goes(somebody: User, source: Path, mount_as: MakeUserMount) -> None:
    """What the kernel ends first is what holds the cache, all of it, and then the memory is free."""
    names = write_files(source, 3, MIB)
    mounted = mount_as(replace(somebody, memlock=0))
    mounted.read(*names)
    processes = mounted.settle()["processes"]
    adjustments = {pid: Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in mounted.pids}
    assert adjustments == {
        processes["supervisor"]: Path("/proc/self/oom_score_adj").read_text().strip(),
        processes["server"]: "1000",
        processes["keepers"][0]: "1000",
    }
    holders = [
        pid
        for pid in mounted.pids
        if any("coordlfs-cache" in os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir())
    ]
    assert sorted(holders) == sorted([processes["server"], *processes["keepers"]])


# -- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["coordlfs umount", "fusermount3 -u", "root's umount", "SIGTERM", "renamed", "--lazy"])
def test_ends(somebody: User, source: Path, home: Path, mount_as: MakeUserMount, way: str) -> None:
    names = write_files(source, 5, 100_000)
    mounted = mount_as(somebody)
    mounted.read(*names)
    assert mounted.settle()["pinned_items"] == 5
    pids = mounted.pids
    assert len(pids) == 3
    if way == "coordlfs umount":
        somebody.call("umount", mounted.path)
        assert not any(map(is_alive, pids))  # it waits
    elif way == "fusermount3 -u":
        somebody.run("fusermount3", "-u", mounted.path)
    elif way == "root's umount":
        subprocess.run(["umount", mounted.path], check=True)
    elif way == "SIGTERM":
        os.kill(mounted.supervisor, signal.SIGTERM)
    elif way == "renamed":
        home.rename(renamed := home.with_name(f"{home.name}-renamed"))
        os.kill(mounted.supervisor, signal.SIGTERM)
        eventually(lambda: not any(map(is_alive, pids)))
        assert not is_mounted(renamed / mounted.path.name)
        renamed.rename(home)
    else:
        somebody.call("umount", "--lazy", mounted.path)
    assert mounted.gone(pids)


@pytest.mark.parametrize("namespaces", [True, False])
def test_a_mount_in_use(somebody: User, source: Path, mount_as: MakeUserMount, namespaces: bool) -> None:
    user = replace(somebody, namespaces=namespaces)
    names = write_files(source, 5, 100_000)
    mounted = mount_as(user)
    mounted.read(*names)
    mounted.settle()
    assert mounted.stats()["umount_needs_coordlfs"] is not namespaces
    pids = mounted.pids
    reader = subprocess.Popen(
        ["sh", "-c", 'exec 3<"$1"; echo; read line', "sh", mounted.path / names[0]],
        user=user.uid,
        group=user.gid,
        extra_groups=[],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert reader.stdout is not None
        reader.stdout.readline()
        said = user.call("umount", mounted.path, status=1).stderr
        assert f"in use by process {reader.pid}" in said
        assert is_mounted(mounted.path)
    finally:
        reader.communicate(b"\n")
    assert mounted.read(*names) == [noise(100_000, i) for i in range(5)]
    if not namespaces:
        assert "busy" in somebody.run("fusermount3", "-u", mounted.path, status=1).stderr
    user.call("umount", mounted.path)
    assert not any(map(is_alive, pids))
    assert not is_mounted(mounted.path)


# -- run ----------------------------------------------------------------------------------------------------------


def test_run_in_a_namespace_of_its_own(somebody: User, source: Path, home: Path) -> None:
    user = replace(somebody, groups=(12,))
    write_files(source, 10, 50_000)
    for name, mode, group in (("closed", 0o600, 0), ("of a group", 0o640, 12)):
        (source / name).write_bytes(noise(1000))
        os.chown(source / name, 0, group)
        (source / name).chmod(mode)
    program = f"""
import os, sys
root = sys.argv[1]
assert (os.getuid(), os.getgid()) == ({user.uid}, {user.gid})
assert "fuse.coordlfs" in open("/proc/self/mounts").read()
assert "CapEff:\\t0000000000000000" in open("/proc/self/status").read()
for _ in range(2):
    print(sum(len(open(f"{{root}}/item-{{i:05}}", "rb").read()) for i in range(10)))
print(len(open(f"{{root}}/of a group", "rb").read()))
fd = os.open(f"{{root}}/closed", os.O_RDONLY)  # who may read it is the source's to say, when it is read
try:
    os.read(fd, 10)
except PermissionError:
    print("refused")
"""
    done = user.call("run", source, "--cache-size", "4M", "--", user.python, "-c", program, source)
    assert done.stdout.split() == ["500000", "500000", "1000", "refused"]
    assert "in 11 items" in done.stderr
    assert mentions(source) == []
    assert not is_mounted(source)
    assert user.call("run", source, "--", "sh", "-c", "exit 7", status=7)
    assert user.call("run", source, "--", "no such program", status=127)
    assert mentions(source) == []


# -- peers, and others who may look -------------------------------------------------------------------------------


def test_peers_serve_what_is_in_memory(somebody: User, source: Path, mount_as: MakeUserMount) -> None:
    user = replace(somebody, memlock=0)
    names = write_files(source, 60, 50_000)
    ports = []
    with ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            ports.append(sock.getsockname()[1])
    both = ",".join(f"127.0.0.1:{port}" for port in ports)
    nodes = [mount_as(user, "4M", "--listen", f"127.0.0.1:{port}", "--peers", both) for port in ports]
    eventually(lambda: all(node.stats()["peers"]["alive"] == 1 for node in nodes))
    data = [noise(50_000, i) for i in range(60)]
    for node in nodes * 2:
        assert node.read(*names) == data
        node.settle()
    figures = [node.stats() for node in nodes]
    assert sum(f["source"]["bytes"] for f in figures) == 60 * 50_000  # of two nodes, and each file once
    assert sum(f["pinned_items"] for f in figures) == 60
    assert all(f["peers"]["bytes"] > 0 and f["requests"]["memory_bytes"] > 0 for f in figures)
    assert all(f["peers"]["failures"] == f["peers"]["wrong_versions"] == 0 for f in figures)


def test_others_see_it_where_the_administrator_allows_that(somebody: User, source: Path, home: Path) -> None:
    (source / "open").write_bytes(b"for all")
    (source / "closed").write_bytes(b"for its owner")
    (source / "closed").chmod(0o600)
    os.chown(source / "closed", somebody.uid, somebody.gid)
    configuration = home / "fuse.conf"
    configuration.write_text("user_allow_other\n")
    script = """
set -e
mount --bind "$1/fuse.conf" /etc/fuse.conf
me="setpriv --reuid=nobody --regid=nogroup --clear-groups"
$me $4 -m coordlfs mount "$2" "$1/mnt" --cache-size 1M
trap '$me $4 -m coordlfs umount "$1/mnt"' EXIT
setpriv --reuid=daemon --regid=daemon --clear-groups cat "$1/mnt/open"
! setpriv --reuid=daemon --regid=daemon --clear-groups cat "$1/mnt/closed"
$me cat "$1/mnt/closed"
"""
    place = somebody.installation
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", home, source, place, somebody.python],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{place}/packages:{place}/site",
            "LD_LIBRARY_PATH": f"{place}/python/lib",
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("for allfor its owner")
    assert "Permission denied" in done.stderr
    assert mentions(source) == []


# -- errors -------------------------------------------------------------------------------------------------------


def test_errors_are_one_line_each(somebody: User, source: Path, home: Path) -> None:
    def refused(*arguments: object, says: str, user: User = somebody, path: str = os.environ["PATH"]) -> None:
        done = user.run(*user.coordlfs, *arguments, status=1, PATH=path)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert says in done.stderr
        assert mentions(source) == []

    target = home / "mnt"
    empty, weak = home / "empty", home / "weak"
    empty.mkdir()
    weak.mkdir()
    shutil.copyfile(shutil.which("fusermount3") or "", weak / "fusermount3")
    (weak / "fusermount3").chmod(0o755)
    refused("mount", source, target, says="there is no fusermount3", path=str(empty))
    refused("mount", source, target, says="not setuid root", path=str(weak))
    # As it fails on Ubuntu from 24.10 on. The kernel ignores the bit of a script, which it takes to be right.
    (weak / "fusermount3").write_text("#!/bin/sh\necho fusermount3: mount failed: Permission denied >&2\nexit 1\n")
    (weak / "fusermount3").chmod(0o4755)
    denied = "AppArmor's profile fusermount3 (/etc/apparmor.d/fusermount3), which allows @{HOME}/**/, /mnt/**/, "
    refused("mount", source, target, says=denied, path=f"{weak}:{os.environ['PATH']}")
    for directory, says in (("theirs", "may not be written"), ("sticky", "sticky bit")):
        (home / directory).mkdir()
        (home / directory).chmod(0o755 if directory == "theirs" else 0o1777)
        refused("mount", source, home / directory, says=says)
    refused("mount", source, source, says="may not be written")
    closed = home / "closed"
    closed.mkdir()
    closed.chmod(0o700)
    refused("mount", closed, target, says="may not be read")
    refused("run", source, "--", "true", says="cannot be made", user=replace(somebody, namespaces=False))
    with open_device(0o600):
        refused("mount", source, target, says="chmod 666 /dev/fuse")
        refused("run", source, "--", "true", says="chmod 666 /dev/fuse")
    # As many as it takes to start all processes, but not all threads of the server.
    for most in (4, 10):
        few = ["prlimit", f"--nproc={most}:{most}", *somebody.coordlfs]
        try:
            done = somebody.run(*few, "mount", source, target, "--cache-size", "1M", status=1)
        finally:
            unmount_lazily(target)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert f"ulimit -u (at most {most})" in done.stderr
    bounded = ["setpriv", "--no-new-privs", *somebody.coordlfs]
    done = somebody.run(*bounded, "mount", source, target, status=1)
    assert "no_new_privs" in done.stderr
    assert not target.exists()


def test_the_doctor_says_what_it_costs(somebody: User) -> None:
    import json

    def examine(user: User) -> dict[str, dict[str, str]]:
        return {check["name"]: check for check in json.loads(user.call("doctor", "--json").stdout)["checks"]}

    found = examine(replace(somebody, memlock=0))
    assert found["right to mount"]["state"] == "warning"
    assert "fusermount3" in found["right to mount"]["found"]
    assert found["user_allow_other"]["state"] == "warning"
    for name in ("user namespaces", "opening without a request", "FUSE_NOTIFY_RESEND", "open_tree"):
        assert found[name]["state"] == "ok", found[name]
    for name in ("locked memory", "pinning a page"):
        assert "private memory" in found[name]["cost"]
        assert "LimitMEMLOCK" in found[name]["remedy"]
    found = examine(replace(somebody, namespaces=False))
    assert found["user namespaces"]["state"] == "warning"
    assert "`coordlfs umount`" in found["user namespaces"]["cost"]


# -- a keeper that may lock little --------------------------------------------------------------------------------


def test_a_keeper_is_full_when_it_has_locked_what_it_may(place: Path) -> None:
    """Of several keepers each has its own limit, and says so, whatever was in one batch of requests."""
    nodes = []
    for number in range(4):
        (place / str(number)).write_bytes(noise(PAGE + 1))  # two pages
        nodes.append((place / str(number)).stat().st_ino)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    tree = os.open(place, os.O_RDONLY)
    with ours, theirs:
        keeper = Keeper(theirs, tree, limit=100, readahead=1 << 17, lockable=5 * PAGE)

        def ask(verb: Verb, *numbers: int) -> dict[int, Outcome]:
            keeper._serve(
                [
                    _Request(
                        REQUEST.pack(verb, How.KEEP, n, nodes[n % 4], 0, PAGE + 1 if n < 4 else CHUNK) + b"%d" % (n % 4)
                    )
                    for n in numbers
                ]
            )
            found: dict[int, Outcome] = {}
            while len(found) < len(numbers):
                outcome, _, item, _ = parse_reply(ours.recv(REPLY.size))
                if outcome is not Outcome.WATCHED:
                    found[item] = outcome
            return found

        try:
            # Larger than all that it may lock: no other keeper could take it either.
            assert ask(Verb.PIN, 4) == {4: Outcome.FAILED}
            assert ask(Verb.PIN, 0, 1, 2) == {0: Outcome.PINNED, 1: Outcome.PINNED, 2: Outcome.FULL}
            assert ask(Verb.PIN, 3) == {3: Outcome.FULL}
            assert ask(Verb.DROP, 0) == {0: Outcome.DROPPED}
            assert ask(Verb.PIN, 3) == {3: Outcome.PINNED}
            assert keeper.locked == 4 * PAGE
        finally:
            ask(Verb.DROP, 1, 3)
            os.close(tree)
            if keeper.watch is not None:
                os.close(keeper.watch.fd)
    assert keeper.locked == 0
    assert read(place / "0") == noise(PAGE + 1)


@pytest.mark.usefixtures("_may_mount")
def test_root_that_may_mount_and_lock_nothing(source: Path, place: Path) -> None:
    """As in a container that may mount and no more: the cache is in private memory there as well."""
    names = write_files(source, 6, MIB)
    weak = ["setpriv", "--bounding-set", "-ipc_lock,-sys_resource", "sh", "-c", 'ulimit -l 0; exec "$@"', "sh"]
    command = [*weak, *COORDLFS, "mount", str(source), str(place / "mnt"), "--cache-size", "4M"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        assert IN_MEMORY in done.stderr
        for _ in range(2):
            for number, name in enumerate(names):
                assert read(place / "mnt" / name) == noise(MIB, number)
        assert "4 items" in coordlfs("drop", place / "mnt").stdout
    finally:
        coordlfs("umount", place / "mnt")
