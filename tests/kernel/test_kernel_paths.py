"""Opening beneath a directory: every path that stays there, at any length, and none that leads out."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlfs.kernel.paths import close_at_once, open_beneath, open_if_cached, shown

NAME = b"n" * 200  # of the deep directories


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a secret, and in it `root`, which is full of ways to it."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_text("secret")
    root = outside / "root"
    (root / "d" / "e").mkdir(parents=True)
    (root / "f").write_text("f")
    (root / "d" / "f").write_text("d/f")
    (root / "d" / "e" / "\udcff").write_text("d/e/\\xff")
    os.mkfifo(root / "fifo")
    for place in (root, root / "d"):
        (place / "up").symlink_to("..")
        (place / "out").symlink_to(outside)
        (place / "secret").symlink_to(outside / "secret")
        (place / "inside").symlink_to("f")
        (place / "proc").symlink_to("/proc/self/cwd")
        (place / "loop").symlink_to("loop")
    return outside


@pytest.fixture(scope="module")
def root(outside: Path) -> Iterator[int]:
    """A descriptor of the root."""
    fd = os.open(outside / "root", os.O_RDONLY)
    yield fd
    os.close(fd)


def descriptors(below: Path) -> list[str]:
    """What this process has open of a directory."""
    paths = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists them is closed by now
            paths.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [path for path in paths if path.startswith(str(below))]


@pytest.fixture(autouse=True)
def _closes_what_it_opens(outside: Path, root: int) -> Iterator[None]:
    yield
    assert descriptors(outside) == [str(outside / "root")]


def contents(root: int, path: bytes) -> bytes:
    """What the file at `path` holds."""
    fd = open_beneath(root, path, os.O_RDONLY)
    try:
        return os.read(fd, 1000)
    finally:
        os.close(fd)


def refusal(root: int, path: bytes, flags: int = os.O_RDONLY) -> int | None:
    """The errno that opening `path` fails with."""
    try:
        os.close(open_beneath(root, path, flags))
    except OSError as e:
        return e.errno
    return None


def test_files_are_opened(root: int) -> None:
    for path in (b"f", b"d/f", b"d/e/\xff", b"./d//e/\xff"):
        assert contents(root, path) == path.replace(b"\xff", b"\\xff").replace(b"./", b"").replace(b"//", b"/")


def test_the_empty_path_is_the_directory_itself(root: int) -> None:
    fd = open_beneath(root, b"", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.path.samestat(os.fstat(fd), os.fstat(root))
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (b"..", errno.EXDEV),
        (b"../secret", errno.EXDEV),
        (b"d/../../secret", errno.EXDEV),
        (b"/etc/passwd", errno.EXDEV),
        (b"/", errno.EXDEV),
        (b"inside", errno.ELOOP),
        (b"secret", errno.ELOOP),
        (b"loop", errno.ELOOP),
        (b"out/secret", errno.ELOOP),
        (b"up/f", errno.ELOOP),
        (b"d/up/f", errno.ELOOP),
        (b"proc/f", errno.ELOOP),
        (b"missing", errno.ENOENT),
        (b"f/f", errno.ENOTDIR),
        (b"x" * 256, errno.ENAMETOOLONG),
    ],
)
def test_what_is_refused(root: int, path: bytes, code: int) -> None:
    assert refusal(root, path) == code


def test_a_symbolic_link_itself_is_opened_with_o_path(root: int) -> None:
    fd = open_beneath(root, b"d/secret", os.O_PATH)
    try:
        assert os.readlink(b"", dir_fd=fd).endswith(b"/secret")
    finally:
        os.close(fd)
    assert refusal(root, b"out/secret", os.O_PATH) == errno.ELOOP


def test_a_fifo_without_writers_blocks_nobody(root: int) -> None:
    assert refusal(root, b"fifo") is None


COMPONENTS = st.sampled_from(
    [b"", b".", b"..", b"d", b"e", b"f", b"\xff", b"up", b"out", b"secret", b"inside", b"proc", b"loop", b"root"]
)


def climbs_out(parts: list[bytes]) -> bool:
    """Whether `..` leads above the root anywhere on the way."""
    steps = [{b"..": -1, b".": 0, b"": 0}.get(part, 1) for part in parts]
    return min(itertools.accumulate(steps), default=0) < 0


@settings(max_examples=400, deadline=None)
@given(parts=st.lists(COMPONENTS, max_size=7), flags=st.sampled_from([os.O_RDONLY, os.O_PATH]))
def test_no_path_leads_out(outside: Path, root: int, parts: list[bytes], flags: int) -> None:
    home, path = os.fsencode(outside / "root"), b"/".join(parts)
    plain = os.path.join(home, path)
    through_a_link = any(os.path.islink(os.path.join(home, *parts[: i + 1])) for i in range(len(parts)))
    code = refusal(root, path, flags)
    if path.startswith(b"/") or climbs_out(parts) or not os.path.lexists(plain):
        assert code is not None
    elif not through_a_link:
        assert code is None
    elif code is not None:
        assert code == errno.ELOOP
    if code is None:
        fd = open_beneath(root, path, flags)
        where = os.readlink(b"/proc/self/fd/%d" % fd)
        os.close(fd)
        assert (where + b"/").startswith(home + b"/")
        assert where == os.path.abspath(plain), "another file than the path names"


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(COMPONENTS, max_size=7))
def test_a_reference_is_what_would_be_opened_or_nothing(root: int, parts: list[bytes]) -> None:
    path = b"/".join(parts)
    refused = refusal(root, path, os.O_PATH)
    try:
        reference = open_if_cached(root, path, os.O_PATH)
    except OSError as e:
        if e.errno != refused:
            raise
    else:
        if reference is not None:
            assert refused is None
            assert not os.get_inheritable(reference)
            where = os.readlink(f"/proc/self/fd/{reference}")
            close_at_once(reference)
            fd = open_beneath(root, path, os.O_PATH)
            assert os.readlink(f"/proc/self/fd/{fd}") == where
            os.close(fd)


def test_names_that_the_kernel_knows_are_referenced_at_once(root: int) -> None:
    for path in (b"d/f", b"inside", b"missing"):
        refusal(root, path, os.O_PATH)
    for path in (b"", b"d/f", b"inside"):
        reference = open_if_cached(root, path, os.O_PATH)
        assert reference is not None, "Linux 5.12 brought it"
        close_at_once(reference)
    with pytest.raises(FileNotFoundError):
        open_if_cached(root, b"missing", os.O_PATH)


# -- paths longer than PATH_MAX -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def depth(root: int) -> int:
    """How many directories lie in each other, `NAME` in `NAME`; the lowest holds `f` and a link to it."""
    depth, at = 50, os.dup(root)
    for _ in range(depth):
        os.mkdir(NAME, dir_fd=at)
        below = os.open(NAME, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    fd = os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=at)
    os.write(fd, b"deep")
    os.close(fd)
    os.symlink("f", "link", dir_fd=at)
    os.symlink(".", "here", dir_fd=at)
    os.close(at)
    return depth


def test_paths_longer_than_path_max(root: int, depth: int) -> None:
    lowest = b"/".join([NAME] * depth)
    assert len(lowest) > 2 * 4096
    assert contents(root, lowest + b"/f") == b"deep"
    assert open_if_cached(root, lowest, os.O_PATH) is None
    assert refusal(root, lowest + b"/link") == errno.ELOOP
    assert refusal(root, lowest + b"/here/f") == errno.ELOOP
    assert refusal(root, lowest + b"/missing") == errno.ENOENT
    assert refusal(root, lowest + b"/f/f") == errno.ENOTDIR
    assert refusal(root, lowest + b"/" + b"../" * (depth + 1) + b"secret") == errno.EXDEV
    assert refusal(root, b"inside/" + lowest) in (errno.ELOOP, errno.ENOTDIR)


def test_paths_around_path_max(root: int, depth: int) -> None:
    names = b"/".join([NAME] * 20)
    for length in range(4080, 4110):
        gap = length - len(names)
        path = (b"./" * (gap // 2) if gap % 2 == 0 else b".//" + b"./" * (gap // 2 - 1)) + names
        assert len(path) == length
        assert refusal(root, path) is None
        assert refusal(root, path + b"/missing") == errno.ENOENT


def test_a_name_longer_than_path_max_is_too_long(root: int) -> None:
    assert refusal(root, b"d/" + b"x" * 5000) == errno.ENAMETOOLONG


@given(st.binary())
def test_names_are_shown_on_one_line_and_escaped_where_they_are_no_text(name: bytes) -> None:
    assert shown(name).isprintable()
    if (text := os.fsdecode(name)).isprintable():
        assert shown(name) == text
    assert shown(b"a\xff\n\x1b[31m\xc2\x9b\xe2\x80\xae\xc3\xa9") == "a\\xff\\n\\x1b[31m\\x9b\\u202eé"
