"""What every source keeps to, whatever kind it is: `coordlfs.sources.contract`."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from source_kinds import KINDS, Filled

from coordlfs.kernel import pages
from coordlfs.kernel.pages import PAGE
from coordlfs.sources.contract import Part
from coordlfs.sources.versions import Version

MIB = 1 << 20
CONTENT = random.Random(2).randbytes(MIB + 5)


@pytest.fixture(params=KINDS)
def filled(request: pytest.FixtureRequest, source: Path) -> Iterator[Filled]:
    """An empty source of each kind."""
    with KINDS[request.param](source) as made:
        yield made


def read(
    filled: Filled, path: bytes, offset: int = 0, size: int = MIB, record: int = 1
) -> tuple[bytes, os.stat_result]:
    """As the data loop does."""
    into = pages.buffer(MIB + PAGE)
    n, st = filled.source.read(Part(record, path, offset, size), into, lambda: None)
    return into[:n], st


def names(filled: Filled, path: bytes) -> list[bytes]:
    """What a directory shows."""
    with closing(filled.source.listing(path)) as listing:
        return listing.names


def test_a_tree_is_shown(filled: Filled) -> None:
    for path in ("a", "d/b", "d/e/c", "d/ü", "d/with space+%25"):
        filled.put(path, path.encode())
    assert names(filled, b"") == [b"a", b"d"]
    assert names(filled, b"d") == sorted([b"b", b"e", "ü".encode(), b"with space+%25"])
    assert names(filled, b"d/e") == [b"c"]
    assert stat.S_ISDIR(filled.source.lstat(b"").st_mode)
    assert stat.S_ISDIR(filled.source.lstat(b"d/e").st_mode)
    for path in ("a", "d/e/c", "d/ü", "d/with space+%25"):
        st = filled.source.lstat(os.fsencode(path))
        assert stat.S_ISREG(st.st_mode)
        assert (st.st_size, st.st_nlink) == (len(path.encode()), 1)
        assert read(filled, os.fsencode(path))[0] == path.encode()


@pytest.mark.parametrize("path", [b"no", b"d/no", b"no/no", b"a/no", b"d/b/", b"D"])
def test_a_name_that_is_not_there(filled: Filled, path: bytes) -> None:
    filled.put("a", b"")
    filled.put("d/b", b"")
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        filled.source.lstat(path)
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        read(filled, path)
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        filled.source.listing(path)


def test_a_file_is_no_directory_and_a_directory_no_file(filled: Filled) -> None:
    filled.put("d/b", b"b")
    with pytest.raises(NotADirectoryError):
        filled.source.listing(b"d/b")
    with pytest.raises(FileNotFoundError):
        read(filled, b"d")
    with pytest.raises(OSError) as caught:
        filled.source.readlink(b"d/b")
    assert caught.value.errno == errno.EINVAL or isinstance(caught.value, FileNotFoundError)


def test_a_listing_and_neighbours_say_of_names_what_the_source_does(filled: Filled) -> None:
    for path in ("a", "d/b", "d/c"):
        filled.put(path, path.encode())
    with closing(filled.source.listing(b"d")) as listing, closing(filled.source.neighbours()) as neighbours:
        for directory, name in ((b"", b""), (b"", b"a"), (b"", b"d"), (b"d", b"b"), (b"d", b"c")):
            expected = filled.source.lstat(directory + b"/" + name if directory else name)
            assert neighbours.lstat(directory, name)[:] == expected[:]
            if directory:
                assert listing.lstat(name)[:] == expected[:]
        with pytest.raises(FileNotFoundError):
            neighbours.lstat(b"d", b"no")
    listing.close()


@pytest.mark.parametrize("size", [0, 1, PAGE, PAGE + 1, MIB, MIB + 5])
def test_bytes_are_right_at_every_offset(filled: Filled, size: int) -> None:
    filled.put("f", CONTENT[:size])
    for offset in (0, PAGE, 2 * PAGE, MIB):
        for wanted in (1, PAGE, MIB):
            data, st = read(filled, b"f", offset, wanted)
            assert data == CONTENT[:size][offset : offset + wanted]
            assert Version.of(st) == Version.of(filled.source.lstat(b"f"))
    filled.source.forget(1)


def test_what_is_replaced_is_another_version(filled: Filled) -> None:
    filled.put("f", b"first")
    before = Version.of(filled.source.lstat(b"f"))
    filled.put("f", b"other")
    with closing(filled.source.neighbours()) as neighbours:
        assert Version.of(neighbours.lstat(b"", b"f")) != before
    filled.source.forget(1)
    data, st = read(filled, b"f")
    assert (data, Version.of(st) != before) == (b"other", True)
    filled.source.forget(1)


def test_neighbours_see_what_is_new_and_what_is_gone(filled: Filled) -> None:
    filled.put("d/a", b"a")
    filled.put("d/b", b"b")
    assert names(filled, b"d") == [b"a", b"b"]
    directory = filled.source.lstat(b"d")
    filled.remove("d/a")
    filled.put("d/c", b"c")
    with closing(filled.source.neighbours()) as neighbours:
        assert neighbours.lstat(b"", b"d").st_mtime_ns != directory.st_mtime_ns, "the kernel is to list it again"
        with pytest.raises(FileNotFoundError):
            neighbours.lstat(b"d", b"a")
        assert neighbours.lstat(b"d", b"c").st_size == 1
    assert names(filled, b"d") == [b"b", b"c"]


def test_positions_stay_what_they_were(filled: Filled) -> None:
    for name in "bdf":
        filled.put(name, b"")
    with closing(filled.source.listing(b"")) as first:
        filled.remove("d")
        filled.put("a", b"")
        with closing(filled.source.neighbours()) as neighbours:
            neighbours.lstat(b"", b"a")
        with closing(filled.source.listing(b"")) as second:
            second.keep_positions(first)
            assert second.names == [b"b", b"d", b"f", b"a"]
            with pytest.raises(FileNotFoundError):
                second.lstat(b"d")


def test_attributes_of_its_own_that_it_has_not(filled: Filled) -> None:
    filled.put("f", b"")
    assert [name for name in filled.source.xattrs(b"f") if not name.startswith(b"security.")] == []
    with pytest.raises(OSError) as caught:
        filled.source.xattr(b"f", b"user.none")
    assert caught.value.errno in (errno.ENODATA, errno.EOPNOTSUPP)
    assert filled.source.statvfs().f_namemax == 255
