"""The commands on a mount that is up: status, warm, drop, verify, and the extended attributes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from mounts import (
    CHUNK,
    COORDLFS,
    MIB,
    NOBODY,
    PAGE,
    PATIENCE,
    MakeMount,
    Mount,
    coordlfs,
    eventually,
    forget,
    is_alive,
    locked,
    noise,
    page_count,
    raises,
    read,
    resident,
    script,
    write_files,
)

from coordlfs.commands import client
from coordlfs.kernel import fiemap
from coordlfs.kernel.writeback import write_back
from coordlfs.sources import layout
from coordlfs.sources.directory import DirectorySource

# -- status -------------------------------------------------------------------------------------------------------


def test_the_figures(source: Path, mount: MakeMount) -> None:
    names = write_files(source, 10, 10_000)
    mounted = mount(source, "10M")
    for name in names[:4]:
        read(mounted.path / name)
    mounted.settle()
    figures: dict[str, Any] = json.loads(coordlfs("status", mounted.path, "--json").stdout)
    processes = figures["processes"]
    for pid in (processes["supervisor"], processes["server"], *processes["keepers"]):
        assert Path(f"/proc/{pid}").exists()
    assert len({processes["supervisor"], processes["server"], *processes["keepers"]}) == 3
    assert figures["capacity_bytes"] == 10 * MIB
    assert figures["pinned_bytes"] == 4 * page_count(10_000) * PAGE
    assert (figures["pinned_items"], figures["pending_items"]) == (4, 0)
    assert (figures["source"]["bytes"], figures["source"]["files"], figures["source"]["errors"]) == (40_000, 4, 0)
    assert (figures["epochs"], figures["hit_rate"]) == (1, 0.0)
    assert figures["source_path"] == str(source)
    assert figures["mountpoint"] == str(mounted.path)
    # The same by another way; only what counts messages, and the machine's memory, has moved on.
    shown = subprocess.run(
        ["getfattr", "--only-values", "-n", "user.coordl.stats", mounted.path],
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    by_xattr = json.loads(shown.stdout)
    for changing in ("requests",):
        del figures[changing], by_xattr[changing]
    for each in (figures, by_xattr):
        del each["source"]["bytes_per_second"]
        del each["memory"]["available_bytes"], each["hints"]["bound_bytes"]  # of the machine
    assert by_xattr == figures


def test_the_figures_of_several_mounts(source: Path, mount: MakeMount) -> None:
    write_files(source, 3, 10_000)
    mounts = [mount(source, f"{n}M") for n in (1, 2)]
    listed = {each["mountpoint"]: each for each in json.loads(_status_of_all(mounts, "--json"))}
    assert len(listed) == 2
    for mounted, size in zip(mounts, (1, 2), strict=True):
        assert listed[str(mounted.path)]["capacity_bytes"] == size * MIB
        assert listed[str(mounted.path)]["processes"]["supervisor"] == mounted.supervisor
    table = _status_of_all(mounts)
    assert "1.0 MiB" in table
    assert "2.0 MiB" in table


def _status_of_all(mounts: list[Mount], *arguments: str) -> str:
    """`coordlfs status` where no other mount or pin is seen, whatever else this machine is used for."""
    ours = [str(mounted.path) for mounted in mounts]
    hide = 'findmnt -rno TARGET -t fuse.coordlfs | grep -vxF -e $0 -e $1 | xargs -r umount -l; shift; exec "$@"'
    command = ["unshare", "-mn", "sh", "-c", hide, *ours, *COORDLFS, "status", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


def test_the_table(source: Path, mount: MakeMount) -> None:
    names = write_files(source, 10, 10_000)
    mounted = mount(source, "10M")
    for name in names:
        read(mounted.path / name)
    mounted.settle()
    table = coordlfs("status", mounted.path).stdout
    for shown in ("10 pinned", "120.0 KiB of 10.0 MiB", "97.7 KiB in 10 reads", "epoch 1: 10 of 10 items missed"):
        assert shown in table


def test_the_table_that_lives(source: Path, mount: MakeMount) -> None:
    write_files(source, 3, 10_000)
    mounted = mount(source, "10M")
    job = subprocess.Popen([*COORDLFS, "status", mounted.path, "--watch"], stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(1.5)
        read(mounted.path / "item-00000")
        time.sleep(2)
        assert job.poll() is None
        job.send_signal(signal.SIGINT)
        out, _ = job.communicate(timeout=PATIENCE)
    finally:
        job.kill()
        job.wait()
    assert "1 pinned" in out


def test_status_ends_with_its_mount(source: Path, mount: MakeMount) -> None:
    mounted = mount(source, "10M")
    with subprocess.Popen(
        [*COORDLFS, "status", mounted.path, "--watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        time.sleep(1)
        coordlfs("umount", mounted.path)
        _, errors = job.communicate(timeout=PATIENCE)
    assert job.returncode == 1
    assert "Traceback" not in errors
    assert "not mounted" in errors


# -- extended attributes ------------------------------------------------------------------------------------------


def test_extended_attributes_of_its_own(source: Path, mount: MakeMount) -> None:
    (source / "f").write_bytes(noise(5000))
    (source / "empty").touch()
    (source / "d").mkdir()
    (source / "link").symlink_to("f")
    os.setxattr(source / "f", "user.own", b"passed through")
    mounted = mount(source)
    assert os.getxattr(mounted.path / "f", "user.own") == b"passed through"
    assert os.listxattr(mounted.path / "f") == ["user.own"]
    assert os.listxattr(mounted.path) == []
    assert mounted.cached("f") == "no"
    read(mounted.path / "link")
    mounted.settle()
    assert mounted.cached("f") == mounted.cached("link") == "pinned"
    for path, name in (
        ("f", "user.coordl.unknown"),
        ("f", "user.coordl."),
        ("f", "user.coordl.stats"),
        ("d", "user.coordl.cached"),
        ("d", "user.coordl.stats"),
        ("", "user.coordl.unknown"),
        ("f", "user.unknown"),
        ("f", "trusted.unknown"),
    ):
        raises(errno.ENODATA, lambda path=path, name=name: os.getxattr(mounted.path / path, name))  # type: ignore[misc]


# -- warm ---------------------------------------------------------------------------------------------------------


def _tree(source: Path) -> dict[str, int]:
    sizes = {"a/1": 1, "a/2": 5000, "b/3": 300_000, "b/c/4": 3 * MIB + 1, "b/c/5": CHUNK + 7, "6": 110_000, "empty": 0}
    for name, size in sizes.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(noise(size))
    os.symlink("b/3", source / "link")
    write_back(source)
    return sizes


@pytest.mark.parametrize("in_place", [False, True])
def test_warm_reads_everything_once(source: Path, mount: MakeMount, in_place: bool) -> None:
    sizes = _tree(source)
    mounted = mount(source, "256M", mountpoint=source if in_place else None)
    done = coordlfs("warm", mounted.path)
    assert "7 of 7 items are cached" in done.stdout  # one file is empty, one has two chunks
    figures = mounted.stats()
    assert (figures["pinned_items"], figures["pending_items"]) == (7, 0)
    assert figures["source"]["bytes"] == sum(sizes.values())
    with mounted.messages() as sent:
        for name, size in sizes.items():
            assert read(mounted.path / name) == noise(size)
    assert sent["read"] == 0
    assert mounted.stats()["hit_rate"] in (None, 1.0)
    again = coordlfs("warm", mounted.path)
    assert "7 of 7 items are cached" in again.stdout
    assert mounted.source_bytes() == sum(sizes.values())


def test_warm_by_paths(source: Path, mount: MakeMount) -> None:
    sizes = _tree(source)
    mounted = mount(source, "256M")
    coordlfs("warm", mounted.path, mounted.path / "a", mounted.path / "b" / "3")
    assert {name: mounted.cached(name) for name in sizes if sizes[name]} == {
        **{name: "no" for name in sizes if sizes[name]},
        "a/1": "pinned",
        "a/2": "pinned",
        "b/3": "pinned",
    }
    coordlfs("warm", mounted.path, source / "a", status=2)
    coordlfs("warm", mounted.path, mounted.path / "missing", status=1)


def test_warm_takes_each_file_once(source: Path, mount: MakeMount) -> None:
    (source / "f").write_bytes(noise(300_000))
    os.link(source / "f", source / "g")
    os.symlink("f", source / "link")
    mounted = mount(source)
    assert coordlfs("warm", mounted.path).stdout.endswith("\n1 of 1 items are cached, 296.0 KiB\n")
    assert "1 of 1 items" in coordlfs("warm", mounted.path, mounted.path / "link").stdout


def test_warm_says_that_the_cache_is_full(source: Path, mount: MakeMount) -> None:
    write_files(source, 300, 40_000)
    mounted = mount(source, "4M")
    *_, done, full = coordlfs("warm", mounted.path).stdout.splitlines()
    pinned = mounted.stats()["pinned_items"]
    assert done.startswith(f"{pinned} of ")
    assert full == "the cache is full"
    states = {mounted.cached(name): name for name in os.listdir(source)}
    assert coordlfs("warm", mounted.path, mounted.path / states["pinned"]).stdout.endswith("40.0 KiB\n")
    without_room = coordlfs("warm", mounted.path, mounted.path / states["no"]).stdout
    assert without_room.endswith("0 of 1 items are cached, 0 B\nthe cache is full\n")


def test_files_are_warmed_as_they_lie_on_the_disk(source: Path) -> None:
    names = [b"d", b"a", b"c", b"b"]
    for name in names:
        path = source / os.fsdecode(name)
        path.write_bytes(noise(3 * MIB))
        write_back(source)
    with ExitStack() as stack:
        opened = DirectorySource(os.open(source, os.O_RDONLY))
        stack.callback(os.close, opened.root)
        places = {}
        for name in names:
            with (source / os.fsdecode(name)).open("rb") as f:
                places[name] = fiemap.first_block(f.fileno())
        if None in places.values():
            pytest.fail("FIEMAP tells nothing here")
        assert layout.by_extent(opened, sorted(names)) == sorted(names, key=lambda name: places[name] or 0)
        assert len(set(places.values())) == len(names)


def test_warm_fills_no_more_than_the_capacity(source: Path, mount: MakeMount) -> None:
    write_files(source, 100, 100_000)
    mounted = mount(source, "4M")
    coordlfs("warm", mounted.path)
    figures = mounted.stats()
    assert figures["pinned_items"] == 4 * MIB // (page_count(100_000) * PAGE)
    assert figures["source"]["bytes"] == figures["pinned_items"] * 100_000
    before = mounted.source_bytes()
    for name in os.listdir(mounted.path):
        read(mounted.path / name)
    assert mounted.source_bytes() - before == (100 - figures["pinned_items"]) * 100_000


def test_warm_without_a_cache(source: Path, mount: MakeMount) -> None:
    write_files(source, 3, 1000)
    mounted = mount(source, "0")
    assert "has no cache" in coordlfs("warm", mounted.path, status=1).stderr
    assert mounted.source_bytes() == 0


def test_warm_while_it_is_read(source: Path, mount: MakeMount) -> None:
    names = write_files(source, 300, 60_000)
    mounted = mount(source, "100M")
    job = subprocess.Popen([*COORDLFS, "warm", mounted.path], stdout=subprocess.DEVNULL)
    for number, name in enumerate(names):
        assert read(mounted.path / name) == noise(60_000, number)
    assert job.wait(PATIENCE) == 0
    figures = mounted.settle()
    assert figures["pinned_items"] == 300
    assert figures["source"]["bytes"] == 300 * 60_000


def test_names_of_any_bytes_are_warmed_and_dropped(source: Path, mount: MakeMount) -> None:
    name = b"\xff\xfe \n\"'\\"
    with open(os.fsencode(source) + b"/" + name, "wb") as f:
        f.write(noise(5000))
    mounted = mount(source)
    path = os.fsencode(mounted.path) + b"/" + name
    for command, state in (("warm", b"pinned"), ("drop", b"no"), ("warm", b"pinned")):
        subprocess.run([*COORDLFS, command, mounted.path, path], check=True, timeout=PATIENCE)
        assert os.getxattr(path, "user.coordl.cached") == state


# -- drop ---------------------------------------------------------------------------------------------------------


def test_drop_gives_everything_back(source: Path, mount: MakeMount) -> None:
    sizes = _tree(source)
    mounted = mount(source, "256M")
    for _ in range(2):
        before = mounted.source_bytes()
        for name, size in sizes.items():
            assert read(mounted.path / name) == noise(size)
        mounted.settle()
        assert mounted.source_bytes() - before == sum(sizes.values())
        assert mounted.stats()["pinned_items"] == 7
        done = coordlfs("drop", mounted.path)
        assert "7 items were dropped" in done.stdout
        figures = mounted.stats()
        assert (figures["pinned_items"], figures["pinned_bytes"]) == (0, 0)
        assert locked(figures["processes"]["keepers"]) == 0
        assert {mounted.cached(name) for name in sizes if sizes[name]} == {"no"}


def test_drop_by_paths(source: Path, mount: MakeMount) -> None:
    sizes = _tree(source)
    mounted = mount(source, "256M")
    coordlfs("warm", mounted.path)
    coordlfs("drop", mounted.path, mounted.path / "b")
    states = {name: mounted.cached(name) for name in sizes if sizes[name]}
    assert {name for name, state in states.items() if state == "no"} == {"b/3", "b/c/4", "b/c/5"}
    assert set(states.values()) == {"no", "pinned"}
    coordlfs("drop", mounted.path, source / "a", status=2)


def test_drop_makes_room_for_others(source: Path, mount: MakeMount) -> None:
    names = write_files(source, 40, 100_000)
    mounted = mount(source, "2M")
    for name in names[:20]:
        read(mounted.path / name)
    assert mounted.settle()["pinned_items"] == 20
    for name in names[20:]:
        read(mounted.path / name)
    assert mounted.settle()["pinned_items"] == 20
    assert {mounted.cached(name) for name in names[20:]} == {"no"}
    coordlfs("drop", mounted.path)
    coordlfs("warm", mounted.path, *(mounted.path / name for name in names[20:]))
    assert {mounted.cached(name) for name in names[20:]} == {"pinned"}


# -- verify -------------------------------------------------------------------------------------------------------


def test_verify_agrees(source: Path, mount: MakeMount) -> None:
    _tree(source)
    mounted = mount(source, "256M")
    for _ in range(2):
        assert "all equal" in coordlfs("verify", mounted.path).stdout
        mounted.settle()


@pytest.mark.parametrize("in_place", [False, True])
def test_verify_finds_every_difference(source: Path, mount: MakeMount, place: Path, in_place: bool) -> None:
    # The mount holds what was there before; the changes beneath it are such that it is not told.
    sizes = _tree(source)
    names = ("bytes", "last", "mode", "mtime", "xattr", "fine")
    for name in names:
        (source / name).write_bytes(noise(50_000))
    os.symlink("before", source / "to")
    beneath = os.open(source, os.O_RDONLY)
    mounted = mount(source, "256M", mountpoint=source if in_place else None)
    assert "all equal" in coordlfs("verify", mounted.path).stdout
    mounted.settle()

    def change(name: str, offset: int) -> None:
        fd = os.open(name, os.O_RDWR, dir_fd=beneath)
        was = os.fstat(fd)
        byte = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte[0] ^ 1]), offset)
        os.utime(fd, ns=(was.st_atime_ns, was.st_mtime_ns))
        os.close(fd)

    change("bytes", 0)
    change("last", 49_999)
    change("b/c/5", CHUNK + 3)
    os.chmod(f"/proc/self/fd/{beneath}/mode", 0o600)
    os.utime(f"/proc/self/fd/{beneath}/mtime", ns=(1, 1))
    os.setxattr(f"/proc/self/fd/{beneath}/xattr", "user.new", b"value")
    os.unlink("to", dir_fd=beneath)
    os.symlink("after", "to", dir_fd=beneath)
    os.close(os.open("added", os.O_CREAT | os.O_WRONLY, dir_fd=beneath))
    os.close(beneath)
    report = coordlfs("verify", mounted.path, status=1).stdout
    for name, what in (
        ("bytes", "bytes"),
        ("last", "bytes"),
        ("b/c/5", "bytes"),
        ("mode", "st_mode"),
        ("mtime", "st_mtime_ns"),
        ("to", "link"),
    ):
        assert [line for line in report.splitlines() if line.startswith(f"{name!r}: ") and what in line], (name, report)
    assert "added" in report or "names in it differ" in report
    assert "differ" in report.splitlines()[-1]
    assert not [line for line in report.splitlines() if line.startswith(("'fine'", "'6'", "'a/"))]
    assert len(sizes) == 7


def test_verify_fills_no_cache_of_the_source(source: Path, mount: MakeMount) -> None:
    (source / "f").write_bytes(noise(5 * MIB))
    write_back(source)
    forget(source / "f")
    mounted = mount(source)
    coordlfs("verify", mounted.path)
    assert resident(source / "f") == 0


# -- whom the commands obey ---------------------------------------------------------------------------------------


def test_others_may_look_but_not_touch(source: Path, mount: MakeMount) -> None:
    (source / "f").write_bytes(noise(5000))
    mounted = mount(source)
    assert read(mounted.path / "f") == noise(5000)
    mounted.settle()
    program = f"""
import json, os, socket, sys
from coordlfs.commands import client, mounted
from coordlfs.errors import UserError
os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
print(mounted.stats(sys.argv[1])["pinned_items"])
for act in (lambda: client.drop(sys.argv[1], []), lambda: client.drop(sys.argv[1], [sys.argv[1] + "/f"])):
    try:
        act()
        print("dropped")
    except (UserError, OSError) as e:
        print("refused")
"""
    assert script(program, mounted.path).split() == ["1", "refused", "refused"]
    assert mounted.cached("f") == "pinned"
    eventually(lambda: "refused" in mounted.log.read_text())


# -- paths that are no text, or look like markup ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [b"s\xff\xfe", "größe".encode(), b"imgs [v2]", b"[red]x", b"q[b]", b"\x1b[1m\n\xc2\x9b"]
)
@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_any_path_is_mounted_and_shown(
    source: Path, place: Path, mount: MakeMount, monkeypatch: pytest.MonkeyPatch, name: bytes, encoding: str
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    named = place / os.fsdecode(name)
    named.mkdir()
    (named / "f").write_bytes(noise(5000))
    mountpoint = place / os.fsdecode(name + b"[/y]".replace(b"/", b""))
    mounted = mount(named, mountpoint=mountpoint)
    assert read(mounted.path / "f") == noise(5000)
    shown = name.decode(errors="backslashreplace").translate({0x1B: "\\x1b", 0x0A: "\\n", 0x9B: "\\x9b"})
    text = coordlfs("status", mounted.path).stdout
    assert shown.encode("ascii", "ignore") in text.encode("ascii", "ignore")
    mounted.expect_errors = True
    os.kill(mounted.processes["server"], signal.SIGKILL)  # which is logged
    mounted.settle()
    said = [
        text,
        coordlfs("status").stdout,
        mounted.log.read_text(),
        coordlfs("mount", named, mountpoint, status=1).stderr,
    ]
    assert all(line.isprintable() for text in said for line in text.split("\n"))
    assert json.loads(coordlfs("status", mounted.path, "--json").stdout)["source_path"] == str(named)


def test_what_is_named_and_holds_nothing_is_an_error(source: Path, mount: MakeMount) -> None:
    (source / "empty").mkdir()
    write_files(source, 1, 10)
    mounted = mount(source)
    there, empty, unknown = (mounted.path / name for name in ("item-00000", "empty", "unknown\x1b[31m\n\udcff"))
    for command, paths in (
        *((command, paths) for command in ("warm", "drop") for paths in ([empty], [there, empty])),
        *((command, paths) for command in ("warm", "drop", "refresh") for paths in ([unknown], [there, unknown])),
    ):
        said = coordlfs(command, mounted.path, *paths, status=1).stderr
        assert len(said.splitlines()) == 1
        assert said.rstrip("\n").isprintable()
        assert (str(empty) if paths[-1] == empty else f"{mounted.path}/unknown\\x1b[31m\\n\\xff does not exist") in said
    for command in ("warm", "drop", "refresh"):
        coordlfs(command, mounted.path, "", status=2)
        coordlfs(command, mounted.path, there)


def test_a_client_in_another_locale(source: Path, place: Path, mount: MakeMount) -> None:
    """Names are bytes, whatever they mean to who names them."""
    if not Path("/usr/share/i18n/charmaps/ISO-8859-1.gz").exists():
        pytest.skip("there is nothing to make a locale of")
    subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", place / "latin"], check=True, timeout=60)
    names = [b"\xc3\xa9", b"\xe9", b"caf\xc3\xa9 \xff"]
    for name in names:
        (source / os.fsdecode(name)).write_bytes(noise(10_000))
    mounted = mount(source)
    environment = os.environ | {"LOCPATH": str(place), "LC_ALL": "latin", "PYTHONUTF8": "0"}
    for name in names:
        path = os.fsencode(mounted.path) + b"/" + name
        for command, says in (("warm", "1 of 1 items"), ("refresh", "2 known names"), ("drop", "1 items")):
            done = subprocess.run(
                [*COORDLFS, command, mounted.path, path], env=environment, capture_output=True, timeout=60
            )
            assert done.returncode == 0, done.stderr
            assert says in done.stdout.decode("latin-1")


@pytest.mark.parametrize("arguments", [("status", "mnt"), ("mount", "src", "mnt"), ("umount", "mnt"), ("warm", "mnt")])
def test_a_working_directory_that_is_gone(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = [
        "sh",
        "-c",
        'cd "$0" && rmdir "$0" && exec "$@"',
        gone,
        Path(sys.executable).parent / "coordlfs",
        *arguments,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "coordlfs: the working directory is gone: change to one that exists\n"


@pytest.mark.usefixtures("_may_mount")
def test_a_bounding_set_without_the_right_to_mount() -> None:
    drop = ["setpriv", "--bounding-set=-sys_admin"]
    code = "from coordlfs.kernel import process; print(process.may_gain_capability(process.CAP_SYS_ADMIN))"
    for before, says in ((drop, "False"), ([], "True")):
        done = subprocess.run([*before, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == says, done.stderr


def test_a_server_that_dies_with_the_request_to_replace_a_keeper(
    source: Path, mount: MakeMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(source, 3, 50_000)
    mounted = mount(source)
    mounted.expect_errors = True
    for name in ("item-00000", "item-00001", "item-00002"):
        read(mounted.path / name)
    mounted.settle()
    keeper, ask = mounted.processes["keepers"][0], client.Client.ask
    victims: list[int] = []

    def ask_the_dead(self: client.Client, verb: str, **arguments: Any) -> dict[str, Any]:
        if arguments == {"pid": keeper} and not victims:
            victims.append(mounted.stats()["processes"]["server"])
            os.kill(victims[0], signal.SIGKILL)
            eventually(lambda: not is_alive(victims[0]))
        return ask(self, verb, **arguments)

    monkeypatch.setattr(client.Client, "ask", ask_the_dead)
    assert client.restart(str(mounted.path))["pinned_items"] == 3
    processes = mounted.stats()["processes"]
    assert keeper not in processes["keepers"]
    assert processes["server"] not in (mounted.processes["server"], *victims)
