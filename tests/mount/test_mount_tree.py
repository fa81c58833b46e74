"""A mount shows what its source holds: every name, byte and attribute, held against it with system calls."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import socket
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mounts import CHUNK, MIB, NOBODY, PATIENCE, MakeMount, coordlfs, eventually, noise, raises, read, script

_EDGES = [0, 1, 4095, 4096, 4097, 8192, 128 << 10, (128 << 10) + 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 5]
_CHUNK_EDGES = [CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 4097]

# -- random trees -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attributes:
    """What any directory entry but a symbolic link has."""

    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    xattrs: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class File:
    """A regular file; `holes` are left out when it is written."""

    size: int
    seed: int
    sparse: bool
    attributes: Attributes


@dataclass(frozen=True)
class Special:
    """A FIFO or a socket."""

    kind: str
    attributes: Attributes


@dataclass(frozen=True)
class Symlink:
    """A symbolic link, which may lead nowhere."""

    target: bytes


@dataclass(frozen=True)
class HardLink:
    """Another name of the file that was made `back` files before; nothing if there is none."""

    back: int


@dataclass(frozen=True)
class Directory:
    """A directory."""

    entries: dict[bytes, Any]
    attributes: Attributes


_bytes_of_names = st.integers(1, 255).filter(lambda b: b != ord("/"))
_names = st.one_of(
    st.lists(_bytes_of_names, min_size=1, max_size=255).map(bytes),
    st.text("abc \n\\é漢", min_size=1, max_size=60).map(str.encode),
).filter(lambda name: name not in (b".", b".."))
_attributes = st.builds(
    Attributes,
    st.integers(0, 0o7777),
    st.tuples(st.integers(0, 70_000), st.integers(0, 70_000)),
    st.one_of(st.integers(0, 2**31 * 10**9), st.integers(-(2**31) * 10**9, 2**33 * 10**9)),
    st.dictionaries(
        st.text("abc.é", min_size=1, max_size=20).map("user.{}".format), st.binary(max_size=200), max_size=3
    ),
)
_small = st.one_of(st.sampled_from(_EDGES), st.integers(0, 300_000))
_sizes = st.one_of(
    *[_small] * 7, st.sampled_from(_CHUNK_EDGES)
)  # which take long to write, and have a test of their own
_leaves = st.one_of(
    st.builds(File, _sizes, st.integers(0, 9), st.booleans(), _attributes),
    st.builds(Special, st.sampled_from(["fifo", "socket"]), _attributes),
    st.builds(Symlink, st.one_of(st.lists(_bytes_of_names, min_size=1, max_size=300).map(bytes), _names)),
    st.builds(HardLink, st.integers(1, 3)),
)
_trees = st.builds(
    Directory,
    st.dictionaries(
        _names,
        st.recursive(
            _leaves,
            lambda inner: st.builds(Directory, st.dictionaries(_names, inner, max_size=5), _attributes),
            max_leaves=12,
        ),
        min_size=1,
        max_size=8,
    ),
    _attributes,
)


def build(path: bytes, node: Any, files: list[bytes]) -> None:
    """Write a tree to disk."""
    if isinstance(node, Symlink):
        os.symlink(node.target, path)
        return
    if isinstance(node, HardLink):
        if len(files) >= node.back:
            os.link(files[-node.back], path)
        return
    if isinstance(node, Directory):
        os.mkdir(path)
        for name, entry in node.entries.items():
            build(path + b"/" + name, entry, files)
    elif isinstance(node, Special):
        _make_special(path, node.kind)
    else:
        _write(path, node)
        files.append(path)
    attributes = node.attributes
    os.chown(path, *attributes.owner)
    if not isinstance(node, Special):
        for name, value in attributes.xattrs.items():
            os.setxattr(path, name, value)
    os.chmod(path, attributes.mode)
    os.utime(path, ns=(0, attributes.mtime_ns))


def _make_special(path: bytes, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
        return
    # A socket's address is shorter than a path may be: bind it from the directory that is to hold it.
    before = os.open(".", os.O_RDONLY)
    directory, name = os.path.split(path)
    try:
        os.chdir(directory)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(b"s")
        os.rename(b"s", name)
    finally:
        os.fchdir(before)
        os.close(before)


def _write(path: bytes, node: File) -> None:
    data = noise(node.size, node.seed)
    with open(path, "wb") as f:
        if node.sparse:
            for offset in range(0, node.size, 3 * 65536):
                f.seek(offset)
                f.write(data[offset : offset + 10_000])
            f.truncate(node.size)
        else:
            f.write(data)


# -- what a tree looks like ---------------------------------------------------------------------------------------


def walk(root: bytes) -> Iterator[bytes]:
    """Every path at and below `root`, relative to it."""
    yield b""
    for directory, names, files in os.walk(root):
        for name in sorted(names + files):
            yield os.path.relpath(os.path.join(directory, name), root)


def attributes_of(root: bytes, relative: bytes) -> dict[str, Any]:
    """Everything that can be known of a name without reading the file."""
    path = os.path.join(root, relative)
    found = os.lstat(path)
    looks = {name: getattr(found, name) for name in _SHOWN if name != "st_nlink" or not stat.S_ISSOCK(found.st_mode)}
    names = os.listxattr(path, follow_symlinks=False)
    looks["xattrs"] = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    if stat.S_ISLNK(found.st_mode):
        looks["target"] = os.readlink(path)
    if stat.S_ISDIR(found.st_mode):
        entries = list(os.scandir(path))
        looks["names"] = sorted(e.name for e in entries)
        looks["types"] = {e.name: (e.is_dir(follow_symlinks=False), e.is_symlink()) for e in entries}
    return looks


# But st_blocks, which a file system changes as it pleases.
_SHOWN = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_mtime_ns", "st_ctime_ns")


def assert_equal(theirs: bytes, ours: bytes) -> None:
    """Hold one tree against the other; they are the names of directories."""
    expected = sorted(walk(theirs))
    assert sorted(walk(ours)) == expected
    same: dict[int, tuple[bytes, int]] = {}
    for relative in expected:
        assert attributes_of(ours, relative) == attributes_of(theirs, relative), relative
        path = os.path.join(ours, relative)
        found = os.lstat(path)
        inode = os.lstat(os.path.join(theirs, relative)).st_ino
        # Names of one inode there are names of one inode here, and no others are.
        assert same.setdefault(found.st_ino, (relative, inode))[1] == inode, relative
        if stat.S_ISREG(found.st_mode):
            assert_bytes_equal(os.path.join(theirs, relative), path)
    assert len(same) == len({inode for _, inode in same.values()})


def assert_bytes_equal(theirs: bytes, ours: bytes) -> None:
    """Hold a file against the other, read in several ways."""
    data = read(theirs)
    assert read(ours) == data, ours
    fd = os.open(ours, os.O_RDONLY)
    try:
        places = random.Random(len(data))
        for _ in range(5):
            offset, size = places.randrange(len(data) + 5000), places.randrange(200_000)
            assert os.pread(fd, size, offset) == data[offset : offset + size], (ours, offset, size)
        if data:
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == data, ours
    finally:
        os.close(fd)


# -- tests --------------------------------------------------------------------------------------------------------


def test_random_trees_equal_their_source(source: Path, mount: MakeMount) -> None:
    # With and without cache: the small one is full after a few trees.
    mounts = [mount(source, cache) for cache in ("200M", "3M", "0")]
    numbers = itertools.count()

    # Not shrunk: a tree that fails once does so, as a rule, for what happened in time and not for what it holds.
    @settings(max_examples=15, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(_trees)
    def check(tree: Directory) -> None:
        name = b"%d" % next(numbers)
        theirs = os.fsencode(source) + b"/" + name
        build(theirs, tree, [])
        for mounted in mounts:
            assert_equal(theirs, os.fsencode(mounted.path) + b"/" + name)
        # Once more, now that names and bytes are known.
        assert_equal(theirs, os.fsencode(mounts[0].path) + b"/" + name)

    check()
    # The root itself has changed since those were mounted, and what the kernel knows of it may be a day old.
    mounted = mount(source, "100M")
    assert_equal(os.fsencode(source), os.fsencode(mounted.path))
    assert "all equal" in coordlfs("verify", mounted.path).stdout


def test_a_tree_written_before_the_mount(source: Path, mount: MakeMount) -> None:
    for number in range(50):
        directory = source / f"d{number % 7}" / f"e{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number}").write_bytes(noise(number * 1000, number))
    (source / "empty").mkdir()
    mounted = mount(source)
    assert_equal(os.fsencode(source), os.fsencode(mounted.path))
    assert os.statvfs(mounted.path).f_blocks == os.statvfs(source).f_blocks


@pytest.mark.parametrize("size", [*_CHUNK_EDGES, 2 * CHUNK + 1, 5 * CHUNK // 2])
def test_files_around_the_chunk_size(source: Path, mount: MakeMount, size: int) -> None:
    (source / "f").write_bytes(noise(size))
    mounted = mount(source, "100M")
    for _ in range(2):
        assert_bytes_equal(os.fsencode(source / "f"), os.fsencode(mounted.path / "f"))
        mounted.settle()
    assert mounted.cached("f") == "pinned"


def test_a_file_that_is_one_hole(source: Path, mount: MakeMount) -> None:
    with open(source / "hole", "wb") as f:
        f.truncate(40 * MIB)
    mounted = mount(source)
    assert read(mounted.path / "hole") == bytes(40 * MIB)
    assert os.stat(mounted.path / "hole").st_blocks == os.stat(source / "hole").st_blocks


def test_a_directory_of_a_hundred_thousand_entries(in_memory: Path, mount: MakeMount) -> None:
    names = {f"{number:06}-{'x' * (number % 50)}" for number in range(100_000)}
    for name in names:
        os.close(os.open(in_memory / name, os.O_CREAT | os.O_WRONLY, 0o600))
    mounted = mount(in_memory)
    for _ in range(2):
        listed = list(os.scandir(mounted.path))
        assert len(listed) == 100_000
        assert {e.name for e in listed} == names
    # Listed again, by a name now and then, and from the middle on.
    for name in random.Random(0).sample(sorted(names), 100):
        assert stat.S_IMODE(os.stat(mounted.path / name).st_mode) == 0o600


def test_what_is_mounted_beneath_the_source_shows(source: Path, mount: MakeMount) -> None:
    (source / "d").mkdir()
    (source / "d" / "covered").write_bytes(noise(1000, 1))
    (source / "beside").write_bytes(noise(200_000, 2))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "none", source / "d"], check=True, timeout=PATIENCE)
    try:
        (source / "d" / "seen").write_bytes(noise(300_000, 3))
        mounted = mount(source, "4M")
        for _ in range(2):
            assert sorted(os.listdir(mounted.path / "d")) == ["seen"]
            assert read(mounted.path / "d" / "seen") == noise(300_000, 3)
            assert read(mounted.path / "beside") == noise(200_000, 2)
            assert mounted.settle()["pinned_items"] == 2
        coordlfs("verify", mounted.path)
    finally:
        subprocess.run(["umount", "--lazy", source / "d"], check=True, timeout=PATIENCE)
    coordlfs("refresh", mounted.path)
    eventually((mounted.path / "d" / "covered").exists)
    assert os.listdir(mounted.path / "d") == ["covered"]
    assert read(mounted.path / "d" / "covered") == noise(1000, 1)


def test_listing_again_sends_nothing(source: Path, mount: MakeMount) -> None:
    for number in range(3000):
        (source / f"d{number % 3}").mkdir(exist_ok=True)
        (source / f"d{number % 3}" / f"{number}").touch()
    mounted = mount(source)
    seen = sorted(walk(os.fsencode(mounted.path)))
    for _ in range(2):  # the first time the kernel may have to learn what it did not remember
        with mounted.messages() as sent:
            assert sorted(walk(os.fsencode(mounted.path))) == seen
            for relative in seen:
                os.lstat(os.path.join(os.fsencode(mounted.path), relative))
    assert sent == {"read": 0, "name": 0, "refused": 0, "ioctl": 0}


def _descend(root: Path, depth: int, *, make: bool = False) -> int:
    """A descriptor of the directory `depth` levels down, each with a name of 203 bytes: no call takes such a path."""
    fd = os.open(root, os.O_RDONLY)
    for level in range(depth):
        name = f"{level:03}" + "n" * 200
        if make:
            os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


def test_paths_longer_than_path_max(source: Path, mount: MakeMount) -> None:
    os.close(_descend(source, 45, make=True))
    for depth in (18, 19, 20, 21, 45):  # 4,096 bytes are in between
        fd = _descend(source, depth)
        with open(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd), "wb") as f:
            f.write(noise(depth * 1000))
        os.symlink("leaf", "link", dir_fd=fd)
        os.setxattr(f"/proc/self/fd/{fd}", "user.depth", b"%d" % depth)
        os.close(fd)
    mounted = mount(source)
    try:
        for depth in (18, 19, 20, 21, 45):
            theirs, ours = _descend(source, depth), _descend(mounted.path, depth)
            assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
            assert os.readlink("link", dir_fd=ours) == "leaf"
            assert os.getxattr(f"/proc/self/fd/{ours}", "user.depth") == b"%d" % depth
            assert os.stat("leaf", dir_fd=ours).st_mtime_ns == os.stat("leaf", dir_fd=theirs).st_mtime_ns
            for _ in range(2):
                with open(os.open("leaf", os.O_RDONLY, dir_fd=ours), "rb") as f:
                    assert f.read() == noise(depth * 1000)
                mounted.settle()
            leaf = os.open("leaf", os.O_RDONLY, dir_fd=ours)
            assert os.getxattr(f"/proc/self/fd/{leaf}", "user.coordl.cached") == b"pinned"
            for fd in (theirs, ours, leaf):
                os.close(fd)
        assert "all equal" in coordlfs("verify", mounted.path).stdout
    finally:
        # Nor does shutil.rmtree take such a path.
        for depth in range(44, -1, -1):
            fd = _descend(source, depth)
            below = os.open(f"{depth:03}" + "n" * 200, os.O_RDONLY, dir_fd=fd)
            for name in os.listdir(below):
                os.unlink(name, dir_fd=below)
            os.rmdir(f"{depth:03}" + "n" * 200, dir_fd=fd)
            os.close(below)
            os.close(fd)


def test_the_longest_name_and_target(source: Path, mount: MakeMount) -> None:
    (source / ("n" * 255)).write_bytes(b"long")
    os.symlink("t" * 4095, source / "link")
    mounted = mount(source)
    assert read(mounted.path / ("n" * 255)) == b"long"
    assert os.readlink(mounted.path / "link") == "t" * 4095
    raises(errno.ENAMETOOLONG, lambda: os.stat(mounted.path / ("n" * 256)))
    raises(errno.ENOENT, lambda: os.stat(mounted.path / "missing"))


def test_dot_dot_leads_out_of_the_mount(source: Path, mount: MakeMount) -> None:
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "f").write_bytes(b"up")
    mounted = mount(source)
    assert read(mounted.path / "a" / "b" / ".." / "f") == b"up"
    assert os.path.samefile(mounted.path / "a" / ".." / "..", mounted.path.parent)


# -- the source is read-only here ---------------------------------------------------------------------------------


def test_whatever_writes_gets_erofs(source: Path, mount: MakeMount) -> None:
    (source / "f").write_bytes(b"bytes")
    (source / "d").mkdir()
    mounted = mount(source)
    f, d, new = mounted.path / "f", mounted.path / "d", mounted.path / "new"
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND):
        raises(errno.EROFS, lambda flags=flags: os.open(f, flags))  # type: ignore[misc]
    raises(errno.EROFS, lambda: os.open(new, os.O_CREAT | os.O_WRONLY))
    raises(errno.EROFS, lambda: os.mkdir(new))
    raises(errno.EROFS, lambda: os.symlink("f", new))
    raises(errno.EROFS, lambda: os.link(f, new))
    raises(errno.EROFS, lambda: os.mkfifo(new))
    raises(errno.EROFS, lambda: os.rename(f, new))
    raises(errno.EROFS, lambda: os.unlink(f))
    raises(errno.EROFS, lambda: os.rmdir(d))
    raises(errno.EROFS, lambda: os.chmod(f, 0o777))
    raises(errno.EROFS, lambda: os.chown(f, 1, 1))
    raises(errno.EROFS, lambda: os.utime(f))
    raises(errno.EROFS, lambda: os.truncate(f, 0))
    raises(errno.EROFS, lambda: os.setxattr(f, "user.a", b"b"))
    raises(errno.EROFS, lambda: os.removexattr(f, "user.a"))
    assert read(source / "f") == b"bytes"
    assert sorted(os.listdir(source)) == ["d", "f"]


# -- permissions --------------------------------------------------------------------------------------------------

_AS_NOBODY = """
import os, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
for path in sys.argv[1:]:
    try:
        if os.path.isdir(path):
            print("ok", *sorted(os.listdir(path)))
        else:
            fd = os.open(path, os.O_RDONLY)
            print("ok", os.read(fd, 100).decode())
    except OSError as e:
        print(e.errno)
"""


def test_modes_are_enforced_for_others(source: Path, mount: MakeMount) -> None:
    def make(name: str, mode: int, owner: int = 0) -> None:
        (source / name).write_text(name)
        os.chown(source / name, owner, owner)
        os.chmod(source / name, mode)

    make("open", 0o644)
    make("closed", 0o640)
    make("own", 0o400, NOBODY)
    make("own-closed", 0o044, NOBODY)
    for name, mode in (("private", 0o700), ("unlisted", 0o711), ("unsearched", 0o744)):
        (source / name).mkdir()
        make(f"{name}/f", 0o644)
        (source / name).chmod(mode)
    paths = [
        *("open", "closed", "own", "own-closed"),
        *("private", "private/f", "unlisted", "unlisted/f", "unsearched", "unsearched/f"),
    ]
    mounted = mount(source)
    for path in paths[:4]:
        read(mounted.path / path)  # pinned or not makes no difference
    mounted.settle()

    def seen_in(root: Path) -> list[str]:
        return script(_AS_NOBODY, *(root / p for p in paths)).split("\n")

    expected = seen_in(source)
    assert expected.count(str(errno.EACCES)) == 6  # closed, own-closed, private, its f, unlisted, unsearched's f
    assert seen_in(mounted.path) == expected


def test_acls_are_enforced(source: Path, mount: MakeMount) -> None:
    for name, rule in (("granted", f"u:{NOBODY}:r"), ("denied", f"u:{NOBODY}:-"), ("by-group", f"g:{NOBODY}:r")):
        (source / name).write_text(name)
        (source / name).chmod(0o600 if name != "denied" else 0o644)
        _setfacl(source / name, rule)
    mounted = mount(source)
    answers = {}
    for root in (source, mounted.path):
        paths = [root / name for name in ("granted", "denied", "by-group")]
        answers[root] = script(_AS_NOBODY, *paths)
    assert answers[source].split("\n")[:3] == ["ok granted", str(errno.EACCES), "ok by-group"]
    assert answers[mounted.path] == answers[source]


def _setfacl(path: Path, rule: str) -> None:
    subprocess.run(["setfacl", "-m", rule, path], check=True, timeout=PATIENCE)


def test_a_file_system_without_acls_beneath_one_that_has_them(source: Path, mount: MakeMount) -> None:
    """Others than the owner of a file may open, list and stat it, as in the source."""
    nested = source / "nested"
    nested.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "-o", "mode=755", "ramfs", nested], check=True, timeout=20)
    try:
        nested.chmod(0o755)
        (nested / "file").write_bytes(noise(10_000, 1))
        beneath = mount(source).path / "nested"
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        command += ["sh", "-c", 'ls -l "$0" && cat "$0/file" >/dev/null', str(beneath)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stderr) == (0, "")
        assert read(beneath / "file") == noise(10_000, 1)
    finally:
        subprocess.run(["umount", "--lazy", nested], check=True, timeout=20)


def test_a_file_system_with_acls_beneath_one_that_has_none(in_memory: Path, source: Path, mount: MakeMount) -> None:
    """Who is denied by an ACL is, though the modes would let him, and who is granted is."""
    subprocess.run(["mount", "-t", "ramfs", "-o", "mode=755", "ramfs", in_memory], check=True, timeout=20)
    try:
        (nested := in_memory / "nested").mkdir()
        subprocess.run(["mount", "--bind", source, nested], check=True, timeout=20)
        for name, rule in (("denied", f"u:{NOBODY}:---"), ("granted", f"u:{NOBODY}:r--")):
            (nested / name).write_text(name)
            (nested / name).chmod(0o644 if name == "denied" else 0o600)
            _setfacl(nested / name, rule)
        mounted = mount(in_memory)
        answers = [
            script(_AS_NOBODY, *(root / "nested" / name for name in ("denied", "granted"))).split("\n")[:2]
            for root in (in_memory, mounted.path)
        ]
        assert answers == [[str(errno.EACCES), "ok granted"]] * 2
    finally:
        subprocess.run(["umount", "-R", "--lazy", in_memory], check=True, timeout=20)
