"""A source that fails, delays or hangs on command: each reader gets its errno, and nobody else notices."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from coordlfs_tools.lab.faulty_fs import Faulty
from mounts import (
    COORDLFS,
    MIB,
    PATIENCE,
    MakeMount,
    Mount,
    coordlfs,
    eventually,
    is_alive,
    is_mounted,
    noise,
    raises,
    read,
    read_by_mmap,
    script,
)


@pytest.fixture
def faults(source: Path, place: Path, _may_mount: None) -> Iterator[Callable[[], Faulty]]:
    """Mounts `source` on the faulty file system, once its files are there."""
    made: list[Faulty] = []

    def make() -> Faulty:
        made.append(Faulty(source, place))
        return made[0]

    yield make
    for faulty in made:
        faulty.end()


CODES = [
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.ETIMEDOUT, errno.EMFILE),
    *(errno.ENFILE, errno.ENOMEM, errno.EREMOTEIO, errno.ENODATA, errno.EBUSY, errno.EOVERFLOW, errno.EHOSTDOWN),
]


def test_every_errno_arrives(source: Path, faults: Callable[[], Faulty], mount: MakeMount) -> None:
    """By every way to an error: the name is looked up, the file is opened, its bytes are read; hits go on meanwhile."""
    names = [f"{what}-{code}" for code in CODES for what in ("lookup", "open", "read")]
    for name in ("pinned", *names):
        (source / name).write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    assert read(mounted.path / "pinned") == noise(50_000)
    mounted.settle()
    expected = {name: int(name.partition("-")[2]) for name in names}
    faulty.set_all({f"{name.partition('-')[0]} {name}": {"errno": code} for name, code in expected.items()})
    got: dict[str, int | None] = {}

    def look(name: str) -> None:
        try:
            read(mounted.path / name)
        except OSError as e:
            got[name] = e.errno

    with ThreadPoolExecutor(len(names)) as readers:
        for _ in readers.map(look, names):
            assert read(mounted.path / "pinned") == noise(50_000)
    assert got == expected
    assert mounted.stats()["pinned_items"] == 1
    faulty.clear()
    for name in names:
        assert read(mounted.path / name) == noise(50_000)
    assert mounted.settle()["pinned_items"] == 1 + len(names)


@pytest.mark.parametrize("cache", ["0", "64M"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_an_error_of_reading(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount, cache: str, code: int
) -> None:
    (source / "f").write_bytes(noise(300_000))
    (source / "g").write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path, cache)
    faulty.set("read f", errno=code)
    for _ in range(2):
        raises(code, lambda: read(mounted.path / "f"))
    assert mounted.stats()["source"]["errors"] >= 2
    assert mounted.stats()["pinned_items"] == 0
    assert read(mounted.path / "g") == noise(50_000)
    faulty.clear()
    errors = mounted.stats()["source"]["errors"]
    for _ in range(2):
        assert read(mounted.path / "f") == noise(300_000)
        mounted.settle()
    assert mounted.stats()["source"]["errors"] == errors
    assert mounted.cached("f") == ("no" if cache == "0" else "pinned")


def test_an_error_in_the_middle_of_a_file(source: Path, faults: Callable[[], Faulty], mount: MakeMount) -> None:
    data = noise(5 * MIB)
    (source / "f").write_bytes(data)
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set("read f", errno=errno.EIO, **{"from": 3 * MIB})
    fd = os.open(mounted.path / "f", os.O_RDONLY)
    assert os.pread(fd, 100_000, MIB) == data[MIB : MIB + 100_000]
    raises(errno.EIO, lambda: os.pread(fd, 100, 4 * MIB))
    time.sleep(0.3)  # the keeper tries and fails as well
    assert os.pread(fd, 100_000, 0) == data[:100_000]
    faulty.clear()
    assert read(mounted.path / "f") == data
    os.close(fd)
    mounted.settle()
    assert read(mounted.path / "f") == data
    mounted.settle()
    assert mounted.cached("f") == "pinned"


def test_modes_are_enforced_where_the_source_has_no_acls(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount
) -> None:
    for name, mode in (("open", 0o644), ("closed", 0o600)):
        (source / name).write_text(name)
        (source / name).chmod(mode)
    mounted = mount(faults().path)
    program = (
        "import os, sys\n"
        "os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        print(os.read(os.open(path, 0), 10).decode())\n"
        "    except OSError as e:\n"
        "        print(e.errno)\n"
    )
    seen = script(program, mounted.path / "open", mounted.path / "closed")
    assert seen.split() == ["open", str(errno.EACCES)]


def test_a_mapping_of_what_cannot_be_read(source: Path, faults: Callable[[], Faulty], mount: MakeMount) -> None:
    (source / "f").write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set("read f", errno=errno.EIO)
    program = "import mmap, os, sys\nfd = os.open(sys.argv[1], 0)\nmmap.mmap(fd, 0, prot=mmap.PROT_READ)[:]"
    job = subprocess.run([sys.executable, "-c", program, mounted.path / "f"], timeout=PATIENCE)
    assert job.returncode == -signal.SIGBUS
    faulty.clear()
    assert read_by_mmap(mounted.path / "f") == noise(50_000)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_errors_of_names(source: Path, faults: Callable[[], Faulty], mount: MakeMount, code: int) -> None:
    for name in ("f", "g"):
        (source / name).write_bytes(noise(5000))
    faulty = faults()
    mounted = mount(faulty.path)
    for what, action in (
        ("lookup f", lambda: os.stat(mounted.path / "f")),
        ("readdir ", lambda: os.listdir(mounted.path)),
        ("open g", lambda: read(mounted.path / "g")),
        ("getxattr f", lambda: os.getxattr(mounted.path / "f", "user.any")),
    ):
        faulty.set(what, errno=code)
        raises(code, action)
        faulty.clear()
        if what.startswith("getxattr"):
            raises(errno.ENODATA, action)
        else:
            action()
    assert sorted(os.listdir(mounted.path)) == ["f", "g"]
    assert read(mounted.path / "f") == read(mounted.path / "g") == noise(5000)


def test_a_name_whose_attributes_fail_is_listed(source: Path, faults: Callable[[], Faulty], mount: MakeMount) -> None:
    for name in ("f", "g"):
        (source / name).write_bytes(noise(5000))
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set("lookup f", errno=errno.EIO)
    assert sorted(os.listdir(mounted.path)) == ["f", "g"]
    assert mounted.stats()["source"]["errors"] == 1
    raises(errno.EIO, lambda: os.stat(mounted.path / "f"))
    faulty.clear()
    assert read(mounted.path / "f") == noise(5000)


def test_warming_what_cannot_be_read(source: Path, faults: Callable[[], Faulty], mount: MakeMount) -> None:
    for name in ("f", "g"):
        (source / name).write_bytes(noise(300_000))
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set("read f", errno=errno.EIO)
    assert "1 of 2 items" in coordlfs("warm", mounted.path, status=None).stdout
    assert (mounted.cached("f"), mounted.cached("g")) == ("no", "pinned")
    assert "cannot be read" in coordlfs("verify", mounted.path, status=1).stdout
    faulty.clear()
    assert "2 of 2 items" in coordlfs("warm", mounted.path).stdout
    assert "all equal" in coordlfs("verify", mounted.path).stdout


def test_a_source_that_takes_its_time_holds_up_nobody_else(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount
) -> None:
    for name in ("slow", "pinned", "other"):
        (source / name).write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    read(mounted.path / "pinned")
    mounted.settle()
    faulty.set("read slow", delay=15)
    got: list[bytes] = []
    readers = [threading.Thread(target=lambda: got.append(read(mounted.path / "slow"))) for _ in range(4)]
    for thread in readers:
        thread.start()
    time.sleep(0.3)
    with mounted.messages() as sent:
        assert read(mounted.path / "pinned") == noise(50_000)
    assert sent["read"] == 0
    assert read(mounted.path / "other") == noise(50_000)
    assert not got, "they waited for the slow one"
    for thread in readers:
        thread.join()
    assert got == [noise(50_000)] * 4


def test_unmounting_while_the_source_takes_its_time(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount
) -> None:
    (source / "slow").write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set("read slow", delay=3)
    program = "import os, sys\nos.read(os.open(sys.argv[1], 0), 100)"
    job = subprocess.Popen([sys.executable, "-c", program, mounted.path / "slow"])
    try:
        time.sleep(0.5)
        pids = mounted.pids
        coordlfs("umount", "--lazy", mounted.path)
        assert job.wait(PATIENCE) == 0
    finally:
        job.kill()
        job.wait()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def _one_pinned(source: Path, faults: Callable[[], Faulty], mount: MakeMount, *others: str) -> tuple[Mount, Faulty]:
    """A mount of a source that fails on command, with `pinned` cached of files of 50 kB; the others are not known."""
    for name in ("pinned", *others):
        (source / name).write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    assert read(mounted.path / "pinned") == noise(50_000)
    mounted.settle()
    return mounted, faulty


@contextmanager
def _waiting(commands: list[list[str]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that wait for what never comes; they are killed in the end, and must end then."""
    processes = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands]
    try:
        time.sleep(1)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait(PATIENCE)


def test_what_never_answers_holds_up_nobody_else(source: Path, faults: Callable[[], Faulty], mount: MakeMount) -> None:
    """More readers of files that never come than any small pool of threads would have room for."""
    hung = [f"hung{number}" for number in range(160)]
    for name in ("pinned", "other", *hung):
        (source / name).write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    read(mounted.path / "pinned")
    mounted.settle()
    faulty.set_all({f"read {name}": {"delay": 3600} for name in hung})
    with _waiting([["cat", str(mounted.path / name)] for name in hung]) as readers:
        with mounted.messages() as sent:
            assert read(mounted.path / "pinned") == noise(50_000)
        assert sent["read"] == 0
        assert read(mounted.path / "other") == noise(50_000)
        assert mounted.cached("pinned") == "pinned"
        eventually(lambda: mounted.cached("other") == "pinned")  # what a keeper answers is heard
        coordlfs("drop", mounted.path, mounted.path / "pinned")
        assert all(reader.poll() is None for reader in readers)
    faulty.kill()  # a thread that waits for it could not end


@pytest.mark.parametrize("fault", ["lookup hung", "open hung", "read hung"])
def test_a_file_system_that_hangs_may_be_mounted_beneath_later(
    source: Path, place: Path, mount: MakeMount, fault: str
) -> None:
    """What is decided once for a local source does not hold for it: it is waited for where that holds up nobody."""
    (behind := place / "behind").mkdir()
    for path in (source / "pinned", source / "other"):
        path.write_bytes(noise(50_000))
    (behind / "hung").write_bytes(noise(3 * MIB))  # not on the fast path
    mounted = mount(source)
    read(mounted.path / "pinned")
    mounted.settle()
    nested = Faulty(behind, source)
    try:
        if fault != "lookup hung":
            nested.set("keep", seconds=3600)
            assert (mounted.path / "faulty/hung").stat().st_size == 3 * MIB
        nested.set(fault, delay=3600)
        with _waiting([["cat", str(mounted.path / "faulty/hung")]] * 4):
            assert read(mounted.path / "other") == noise(50_000)
            eventually(lambda: mounted.cached("other") == "pinned")
            coordlfs("refresh", mounted.path, mounted.path / "other")
        nested.kill()
        mounted.end()
    finally:
        nested.end()


def _with_one_that_hangs(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount, *names: str, size: int
) -> tuple[Mount, Faulty]:
    """A mount with `names`, of which `pinned` is, and with `hung`, reads of which never come."""
    for name in ("hung", *names):
        (source / name).write_bytes(noise(size))
    faulty = faults()
    mounted = mount(faulty.path)
    mounted.expect_errors = True
    read(mounted.path / "pinned")
    mounted.settle()
    faulty.set("read hung", delay=3600)
    return mounted, faulty


@contextmanager
def _hanging(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount
) -> Iterator[tuple[Mount, Faulty, subprocess.Popen[bytes]]]:
    """A mount with `pinned` and `other`, and a process that reads `hung`, which never comes."""
    mounted, faulty = _with_one_that_hangs(source, faults, mount, "pinned", "other", size=50_000)
    with _waiting([["cat", str(mounted.path / "hung")]]) as [reader]:
        yield mounted, faulty, reader


@pytest.mark.parametrize("way", ["SIGKILL", "restart"])
def test_a_server_with_a_thread_that_never_returns_is_replaced(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount, way: str
) -> None:
    """No signal ends a thread that waits for such a source; its process must not keep the next server away."""
    with _hanging(source, faults, mount) as (mounted, faulty, reader):
        if way == "restart":
            coordlfs("restart", mounted.path)
        else:
            os.kill(mounted.processes["server"], signal.SIGKILL)
        assert read(mounted.path / "other") == noise(50_000)
        assert mounted.stats()["processes"]["server"] != mounted.processes["server"]
        with mounted.messages() as sent:
            assert read(mounted.path / "pinned") == noise(50_000)
        assert sent["read"] == 0
        assert reader.poll() is None
        faulty.clear()
        faulty.kill()  # both servers' threads come back
        assert reader.wait(PATIENCE) == 1
        eventually(lambda: not is_alive(mounted.processes["server"]))
        faulty.restart()
    assert read(mounted.path / "hung") == noise(50_000)


def test_a_command_notices_that_the_server_it_waits_for_was_killed(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount
) -> None:
    """A thread that waits for the source keeps the dead server's sockets open: none of them says that it died."""
    with _hanging(source, faults, mount) as (mounted, faulty, _):
        command = [sys.executable, "-m", "coordlfs", "warm", str(mounted.path), str(mounted.path / "hung")]
        warm = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            time.sleep(2)
            assert warm.poll() is None
            os.kill(mounted.processes["server"], signal.SIGKILL)
            assert "broke off" in warm.communicate(timeout=PATIENCE)[1]
            assert warm.returncode == 1
        finally:
            warm.kill()
            warm.communicate()
        faulty.clear()
        faulty.kill()


def test_unmounting_what_never_answers(source: Path, faults: Callable[[], Faulty], mount: MakeMount) -> None:
    with _hanging(source, faults, mount) as (mounted, faulty, reader):
        refused = coordlfs("umount", mounted.path, status=1)
        assert f"{reader.pid} (cat)" in refused.stderr
        reader.kill()
        assert reader.wait(PATIENCE) == -signal.SIGKILL
        coordlfs("umount", mounted.path)
        assert not is_mounted(mounted.path)
        assert not is_alive(mounted.supervisor)
        faulty.kill()  # the thread that waited ends, and with it the last of the server
        eventually(lambda: not any(map(is_alive, mounted.processes["keepers"] + [mounted.processes["server"]])))


def test_a_server_without_descriptors_left(source: Path, mount: MakeMount) -> None:
    """EMFILE of the server itself passes, or arrives; cached files are read as ever."""
    for name in ("pinned", "other"):
        (source / name).write_bytes(noise(50_000))
    mounted = mount(source)
    read(mounted.path / "pinned")
    mounted.settle()
    server = mounted.processes["server"]
    limits = resource.prlimit(server, resource.RLIMIT_NOFILE)
    resource.prlimit(server, resource.RLIMIT_NOFILE, (3, limits[1]))
    raises(errno.EMFILE, lambda: read(mounted.path / "other"))
    with mounted.messages() as sent:
        assert read(mounted.path / "pinned") == noise(50_000)
    assert sent["read"] == 0
    threading.Timer(0.3, lambda: resource.prlimit(server, resource.RLIMIT_NOFILE, limits)).start()
    assert read(mounted.path / "other") == noise(50_000)  # it was tried again
    assert mounted.stats()["source"]["retries"] > 0


@pytest.mark.parametrize("fault", ["lookup hung", "readdir "])
def test_who_waits_for_names_can_be_interrupted(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount, fault: str
) -> None:
    mounted, faulty = _one_pinned(source, faults, mount, "hung")
    faulty.set(fault, delay=3600)
    waits = ["cat", str(mounted.path / "hung")] if fault == "lookup hung" else ["ls", str(mounted.path)]
    with _waiting([waits]) as [reader]:
        assert read(mounted.path / "pinned") == noise(50_000)
        reader.send_signal(signal.SIGINT)
        assert reader.wait(PATIENCE) == -signal.SIGINT
        assert mounted.stats()["requests"]["interrupted"] == 1
    faulty.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_who_reads_around_the_page_cache_can_be_interrupted(
    source: Path, place: Path, faults: Callable[[], Faulty], mount: MakeMount, number: signal.Signals
) -> None:
    # The kernel waits for such READs without looking at signals, and says nothing of them.
    mounted, faulty = _one_pinned(source, faults, mount, "hung")
    (source / "hung").write_bytes(noise(3 * MIB))
    faulty.set("read hung", delay=3600)
    program = os.fsencode(place / "d") + b"\xff\xfed"  # what /proc shows as its name is no text
    os.symlink("/bin/dd", program)
    with _waiting([[os.fsdecode(program), "iflag=direct", "bs=4M", f"if={mounted.path / 'hung'}"]]) as [reader]:
        reader.send_signal(signal.SIGSTOP)
        time.sleep(2)
        reader.send_signal(signal.SIGCONT)
        assert reader.poll() is None
        assert mounted.stats()["requests"]["interrupted"] == 0
        reader.send_signal(number)
        assert reader.wait(PATIENCE) == -number
        assert mounted.stats()["requests"]["interrupted"] == 3
    faulty.kill()


def test_a_command_about_what_never_answers_holds_up_nobody_else(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount
) -> None:
    mounted, faulty = _one_pinned(source, faults, mount, "hung")
    faulty.set("lookup hung", delay=3600)
    with _waiting([[*COORDLFS, "drop", str(mounted.path), str(mounted.path / "hung")]]):
        assert read(mounted.path / "pinned") == noise(50_000)
        assert mounted.stats()["pinned_items"] == 1  # which the loop answers that the command's names are not asked in
    faulty.kill()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("what", ["read f", "lookup f"])
def test_what_passes_is_not_noticed(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount, what: str, code: int
) -> None:
    (source / "f").write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set(what, errno=code, times=2)
    assert read(mounted.path / "f") == noise(50_000)
    assert mounted.stats()["source"]["retries"] >= 1


@pytest.mark.parametrize("change", [(72_422, 36_604), (36_700, 36_604), (300_000, 299_000)])
def test_a_change_that_is_announced_while_the_new_end_is_read(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount, change: tuple[int, int]
) -> None:
    # The kernel does not take a short reply for the end of a file about which it was notified since it asked.
    old, new = (noise(size, seed) for seed, size in enumerate(change))
    (source / "f").write_bytes(old)
    faulty = faults()
    mounted = mount(faulty.path)
    os.stat(mounted.path / "f")
    (source / "f").write_bytes(new)
    faulty.set("read f", delay=1)
    with ThreadPoolExecutor(1) as reader:
        got = reader.submit(read, mounted.path / "f")
        time.sleep(0.2)
        coordlfs("refresh", mounted.path, mounted.path / "f")
        assert not got.done()
        faulty.clear()  # what is asked for anew is not to wait
        assert got.result() == new


def test_a_source_that_is_unmounted_and_mounted_again(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount
) -> None:
    mounted, faulty = _one_pinned(source, faults, mount, "other", "third")
    assert read(mounted.path / "other") == noise(50_000)
    faulty.kill()
    with mounted.messages() as sent:
        assert read(mounted.path / "pinned") == noise(50_000)
    assert sent["read"] == 0
    raises(errno.ENOTCONN, lambda: read(mounted.path / "third"))
    faulty.detach()
    raises(errno.ENOTCONN, lambda: read(mounted.path / "third"))  # and not ENOENT: the directory that is left is not it
    faulty.restart()
    assert read(mounted.path / "third") == noise(50_000)
    assert read(mounted.path / "other") == noise(50_000)


def test_a_server_comes_up_while_the_source_is_gone(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount
) -> None:
    """And as often as it is killed, and a keeper as well: the mount stays, with what it has cached."""
    mounted, faulty = _one_pinned(source, faults, mount, "other")
    mounted.expect_errors = True
    faulty.kill()
    os.kill(mounted.processes["keepers"][0], signal.SIGKILL)
    eventually(lambda: mounted.stats()["processes"]["keepers"] not in ([], mounted.processes["keepers"]))
    eventually(lambda: mounted.stats()["pinned_items"] == 1)
    for _ in range(7):
        os.kill(server := mounted.stats()["processes"]["server"], signal.SIGKILL)
        eventually(lambda server=server: mounted.stats()["processes"]["server"] != server)  # type: ignore[misc]
    assert read(mounted.path / "pinned") == noise(50_000)
    raises(errno.ENOTCONN, lambda: read(mounted.path / "other"))
    faulty.restart()
    assert read(mounted.path / "other") == noise(50_000)


def test_what_never_comes_keeps_nothing_else_out_of_the_cache(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount
) -> None:
    """A keeper that pinned a file which is there in part would wait for the rest, and all that it is asked with it."""
    names = [f"other{number}" for number in range(40)]
    (source / "hung").write_bytes(noise(6 * MIB))
    for name in names:
        (source / name).write_bytes(noise(50_000))
    faulty = faults()
    mounted = mount(faulty.path)
    faulty.set("read hung", delay=3600, **{"from": 4 * MIB})
    with _waiting([["cat", str(mounted.path / "hung")]]) as [reader]:
        for name in names:
            assert read(mounted.path / name) == noise(50_000)
        eventually(lambda: mounted.stats()["pinned_items"] == 40)
        assert mounted.stats()["pending_items"] == 1
        assert reader.poll() is None
    faulty.kill()


def test_nobody_waits_for_a_mount_whose_supervisor_died(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount
) -> None:
    """Not even for what a thread of the server, which cannot end, still asks of the source."""
    with _hanging(source, faults, mount) as (mounted, faulty, reader):
        os.kill(mounted.supervisor, signal.SIGKILL)
        assert reader.wait(PATIENCE) == 1
        eventually(lambda: not is_mounted(mounted.path))
        again = mount(faulty.path, mountpoint=mounted.path)
        assert read(again.path / "pinned") == noise(50_000)
        faulty.kill()


def test_a_mount_whose_processes_were_all_killed_while_the_source_hung(
    source: Path, faults: Callable[[], Faulty], mount: MakeMount
) -> None:
    """A keeper waits for the server, and a thread of that for the source: once that is gone, so is everything.

    Until then the mount may be mute and not dead: a thread that cannot end keeps /dev/fuse open.
    """
    mounted, faulty = _with_one_that_hangs(source, faults, mount, "pinned", size=5 * MIB)
    warm = subprocess.Popen([sys.executable, "-m", "coordlfs", "warm", mounted.path, mounted.path / "hung"])
    try:
        eventually(lambda: mounted.stats()["pending_items"] == 1)
        time.sleep(0.5)
        pids = mounted.pids
        for number in (signal.SIGSTOP, signal.SIGKILL):  # so that none is left to notice that another is gone
            for pid in pids:
                os.kill(pid, number)
        assert warm.wait(PATIENCE) == 1
        with _waiting([["cat", str(mounted.path / "hung")]]) as [reader]:
            coordlfs("umount", "--lazy", mounted.path, timeout=30)
            assert not is_mounted(mounted.path)
            faulty.clear()
            faulty.kill()
            eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
            assert reader.wait(PATIENCE) == 1
    finally:
        warm.kill()
        warm.wait()
