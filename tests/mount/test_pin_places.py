"""Where `coordlfs pin` works: file systems of every kind, without /dev/fuse, and how it lets a disk be unmounted."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from coordlfs_tools.lab import cgroups, faulty_fs
from coordlfs_tools.lab.machine import disk_of
from mounts import (
    COORDLFS,
    MIB,
    NOBODY,
    PAGE,
    PATIENCE,
    Cgroup,
    MakeMount,
    coordlfs,
    eventually,
    page_count,
    unmount_lazily,
    write_files,
)
from pins import MakePin, Pinned, disk, drop, held, read_in, resident

SIZE = 100_000
PAGES = page_count(SIZE)


def pins_and_follows(directory: Path, pin: MakePin) -> None:
    """The test fails unless files of a directory are pinned, and changes are seen at once."""
    names = write_files(directory, 40, SIZE)
    (directory / "large").write_bytes(os.urandom(20 * MIB))
    drop(*(directory / name for name in [*names, "large"]))
    pinned = pin(directory, "64M", options=("--immutable",))
    figures = pinned.full()
    assert figures["pinned_items"] == 42
    for name in names:
        drop(directory / name)
        assert resident(directory / name) == PAGES
    (directory / names[0]).unlink()
    (directory / "new").write_bytes(os.urandom(SIZE))
    eventually(lambda: {names[0], "new"} & set(held(pinned.keepers, directory)) == {"new"})
    assert pinned.full()["pinned_bytes"] == (40 * PAGES * PAGE) + 20 * MIB
    coordlfs("unpin", directory)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_disk(kind: str, place: Path, pin: MakePin) -> None:
    with disk(kind, place) as point:
        (point / "data").mkdir()
        pins_and_follows(point / "data", pin)
        subprocess.run(["umount", point], check=True, timeout=PATIENCE)  # nothing of it is held


def test_a_subvolume(place: Path, pin: MakePin) -> None:
    with disk("btrfs", place) as point:
        subprocess.run(["btrfs", "-q", "subvolume", "create", point / "data"], check=True, timeout=PATIENCE)
        write_files(point / "data", 3, SIZE)
        pinned = pin(point)
        assert pinned.full()["pinned_items"] == 3
        coordlfs("unpin", point)


def test_an_overlay(source: Path, place: Path, pin: MakePin) -> None:
    lower, upper, work, merged = (place / name for name in ("lower", "upper", "work", "merged"))
    for directory in (lower, upper, work, merged):
        directory.mkdir()
    write_files(lower, 5, SIZE)
    layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], check=True)
    try:
        pins_and_follows(merged, pin)
    finally:
        unmount_lazily(merged)


def test_a_file_system_that_forgets_files_when_they_are_opened(source: Path, place: Path) -> None:
    """What libfuse does unless it is told otherwise: it would drop what is pinned, too."""
    write_files(source, 2, SIZE)
    with faulty_fs.served(source, place) as faulty:
        faulty.set("forget")
        assert "kernel_cache" in coordlfs("pin", faulty.path, status=1).stderr


def test_a_file_system_beneath_that_is_memory_is_left_out(source: Path, pin: MakePin) -> None:
    write_files(source, 2, SIZE)
    (source / "memory").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", source / "memory"], check=True)
    try:
        write_files(source / "memory", 2, SIZE)
        pinned = pin(source)
        assert pinned.full()["dataset"]["items"] == 2
        coordlfs("unpin", source)
    finally:
        unmount_lazily(source / "memory")


def test_file_systems_beneath_that_hold_no_data_or_are_ours_are_left_out(
    source: Path, pin: MakePin, mount: MakeMount, in_memory: Path
) -> None:
    write_files(source, 2, SIZE)
    write_files(in_memory, 2, SIZE)
    mounted = mount(in_memory)
    for name in ("proc", "mounted"):
        (source / name).mkdir()
    subprocess.run(["mount", "-t", "proc", "none", source / "proc"], check=True)
    subprocess.run(["mount", "--bind", mounted.path, source / "mounted"], check=True)
    try:
        assert pin(source).full()["dataset"]["items"] == 2
        coordlfs("unpin", source)
    finally:
        for name in ("proc", "mounted"):
            unmount_lazily(source / name)


_LISTEN = """
import socket, sys, time
answer = sys.argv[2].encode()
sock = socket.socket(socket.AF_UNIX)
sock.bind(chr(0) + sys.argv[1])
sock.listen()
print(flush=True)
while True:
    asked, _ = sock.accept()
    if not answer:
        time.sleep(1000)
    asked.sendall(answer + b"\\n")
"""


@contextmanager
def _listening(name: str, answer: str) -> Iterator[None]:
    """Another user listens where a pinner would, and answers so; not at all if that is empty."""
    with _running_as_nobody(_LISTEN, name, answer):
        yield


@contextmanager
def _running_as_nobody(program: str, *arguments: str) -> Iterator[None]:
    """Another user runs this, which has begun when it has printed a line."""
    command = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline()
        try:
            yield
        finally:
            listener.kill()


@pytest.mark.parametrize("answer", ["", "{}", "[1]", '{"mode": "pin"}', "[" * 100_000])
def test_who_pretends_to_be_a_pinner_holds_up_no_status(source: Path, pin: MakePin, answer: str) -> None:
    write_files(source, 2, SIZE)
    pinned = pin(source)
    with _listening(f"coordlfs-pin-{NOBODY}-1-{os.getpid():x}", answer):
        said = coordlfs("status")
    assert str(source) in said.stdout
    assert "Traceback" not in said.stderr
    assert pinned.full()["pinned_items"] == 2


_LISTEN_MANY = """
import socket, sys, time
held = []
for number in range(int(sys.argv[2])):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\\0{sys.argv[1]}{number:x}")
    sock.listen(0)
    held.append(sock)
    if number % 2:  # and is full
        held.append(socket.socket(socket.AF_UNIX))
        held[-1].connect(sock.getsockname())
print(flush=True)
time.sleep(1000)
"""


def test_many_that_pretend_hold_it_up_for_as_long_as_one(source: Path, pin: MakePin) -> None:
    write_files(source, 2, SIZE)
    pin(source)
    with _running_as_nobody(_LISTEN_MANY, f"coordlfs-pin-{NOBODY}-1-", "100"):
        begun = time.monotonic()
        assert str(source) in coordlfs("status").stdout
        assert time.monotonic() - begun < 50  # and not 5 seconds for each


def test_who_takes_the_name_of_the_control_socket_is_found_out(source: Path) -> None:
    st = source.stat()
    with _listening(f"coordlfs-pin-0-{st.st_dev:x}-{st.st_ino:x}", ""):
        said = coordlfs("pin", source, status=1).stderr
    assert "cannot be pinned" in said
    assert f"of user {NOBODY}, which is no pinner of this user's" in said


def test_a_mount_of_coordlfs(source: Path, mount: MakeMount) -> None:
    write_files(source, 2, SIZE)
    mounted = mount(source)
    assert "is a mount of coordlfs" in coordlfs("pin", mounted.path, status=1).stderr


def test_without_fuse(source: Path, pin: MakePin) -> None:
    """In a mount namespace without /dev/fuse, with no right but CAP_IPC_LOCK: as in an unprivileged container."""
    write_files(source, 10, SIZE)
    hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    drop_all = ["setpriv", "--bounding-set=-all,+ipc_lock", "--inh-caps=-all", "--no-new-privs"]
    inner = f"""
set -e
{hide}
test ! -e /dev/fuse
exec "$@"
"""
    work = """
import json, subprocess, sys, time
command, source = sys.argv[1:-1], sys.argv[-1]
subprocess.run([*command, "pin", source, "--cache-size", "8M"], check=True)
deadline = time.monotonic() + 120
while True:
    figures = json.loads(subprocess.run([*command, "status", "--json", source], check=True, capture_output=True).stdout)
    if figures["pinned_items"] == 10:
        break
    assert time.monotonic() < deadline, figures
    time.sleep(0.05)
subprocess.run([*command, "unpin", source], check=True)
print("pinned")
"""
    command = ["unshare", "-m", "sh", "-c", inner, "sh", *drop_all, COORDLFS[0], "-c", work, *COORDLFS, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("pinned\n")


def test_a_disk_that_is_pinned_is_busy_and_says_who_holds_it(place: Path, pin: MakePin) -> None:
    with disk("ext4", place) as point:
        write_files(point, 3, SIZE)
        pinned = pin(point)
        pinned.full()
        busy = subprocess.run(["umount", point], capture_output=True, text=True, timeout=PATIENCE)
        assert busy.returncode != 0
        assert "busy" in busy.stderr
        names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in pinned.keepers}
        assert names == {"coordlfs pin"}  # as fuser(1) and lsof(8) show it
        coordlfs("unpin", point)
        subprocess.run(["umount", point], check=True, timeout=PATIENCE)


def test_for_one_command(source: Path) -> None:
    names = write_files(source, 10, SIZE)
    drop(*(source / name for name in names))
    look = """
import json, subprocess, sys, time
def pinned():
    status = [*sys.argv[1:-1], "status", "--json", sys.argv[-1]]
    return json.loads(subprocess.run(status, check=True, capture_output=True).stdout)["pinned_items"]
while pinned() < 10:
    time.sleep(0.05)
sys.exit(7)
"""
    command = ["run", "--pin", source, "--cache-size", "8M", "--", COORDLFS[0], "-c", look, *COORDLFS, source]
    done = coordlfs(*command, status=7)
    assert f"{source}: 1000.0 KiB of 8.0 MiB (12.2%) pinned" in done.stderr
    assert "is not pinned" in coordlfs("unpin", source, status=1).stderr
    assert not done.stdout
    for option in ("--disk-cache", "--peers"):
        refused = coordlfs("run", "--pin", source, option, source, "--", "true", status=2).stderr
        assert refused == f"coordlfs: run --pin mounts nothing: leave out {option}\n"


def test_metrics(source: Path, pin: MakePin) -> None:
    import re
    import urllib.request

    write_files(source, 10, SIZE)
    said: list[str] = []
    pinned = pin(source, "8M", options=("--metrics", "0"), said=said.append)
    pinned.full()
    [url] = re.findall(r"metrics: (\S+)", said[0])
    with urllib.request.urlopen(url, timeout=PATIENCE) as reply:
        text = reply.read().decode()
    assert f'coordlfs_pinned_items{{mountpoint="{source}"}} 10.0' in text
    assert f'coordlfs_dataset_items{{mountpoint="{source}"}} 10.0' in text
    assert "coordlfs_hit_ratio{" not in text
    assert "coordlfs_epoch_misses{" not in text
    assert json.loads(coordlfs("status", "--json", source).stdout)["pinned_items"] == 10


def test_mount_says_what_would_do_without_it_to_a_person(source: Path, place: Path, mount: MakeMount) -> None:
    """And not to a program."""
    write_files(source, 1, SIZE)
    said: list[str] = []
    mount(source, said=said.append)
    assert "coordlfs pin" not in said[0]
    point = place / "for-a-person"
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        command = [*COORDLFS, "mount", str(source), str(point), "--cache-size", "1M"]
        subprocess.run(command, stdout=theirs, stderr=theirs, check=True, timeout=PATIENCE)
        text = terminal.read(4096).decode()
        os.close(theirs)
    coordlfs("umount", point)
    assert f"`coordlfs pin {source}` would do without a mount" in text


def test_what_jobs_read_meanwhile_is_not_read_again(source: Path, place: Path) -> None:
    """The pinner's disk is slow, and the job's is not: what the job has read is pinned as it is."""
    names = write_files(source, 100, SIZE)
    paths = [source / name for name in names]
    drop(*paths)
    log, disk_ = place / "log", disk_of(source)
    with cgroups.cgroup(disk_, bytes_per_second=500_000) as slow, cgroups.cgroup(disk_) as fast:
        if slow.unified:
            pytest.skip("version 2 of cgroups has no group of a disk alone")
        slow, fast = (Cgroup({"io": group.directories["io"]}, False, disk_) for group in (slow, fast))
        command = [*COORDLFS, "pin", str(source), "--cache-size", "64M", "--log-file", str(log)]
        subprocess.run(command, preexec_fn=slow.enter, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)
        pinned = Pinned(source, log)
        try:
            read_in(fast.enter, *reversed(paths))  # from the other end
            pinned.full()
            assert len(held(pinned.keepers, source)) == 100
        finally:
            pinned.end()
        assert fast.disk_bytes() > 10 * SIZE
        assert slow.disk_bytes() + fast.disk_bytes() < 115 * SIZE  # and blocks of the directory
