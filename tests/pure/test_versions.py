"""What tells two states of a file apart: the same by either way of asking, in the 64 bits that the catalogue has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordlfs.catalogue import memfds
from coordlfs.catalogue.catalog import Catalog
from coordlfs.kernel import paths
from coordlfs.sources.versions import Version

_CENTURIES = 10**9 * 86400 * 36525  # ns


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(0, 1 << 40),
    mtime=st.integers(-_CENTURIES, 4 * _CENTURIES),
    mode=st.integers(0, 0o7777),
    owner=st.integers(0, 1 << 31),
)
def test_an_open_file_shows_the_version_that_its_name_shows(
    tmp_path: Path, size: int, mtime: int, mode: int, owner: int
) -> None:
    path = tmp_path / "f"
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)  # before its mode forbids that
    try:
        os.truncate(fd, size)
        if os.geteuid() == 0:
            os.chown(path, owner, owner // 2)
        path.chmod(mode)
        os.utime(path, ns=(0, mtime))
        found = os.fstat(fd)
        shown = (found.st_mode, found.st_uid, found.st_gid, found.st_ino, found.st_size, found.st_mtime_ns)
        assert paths.attributes(fd) == shown
        assert Version.of_open(fd) == Version.of(found) == Version.of(os.stat(path))
    finally:
        os.close(fd)


@pytest.mark.parametrize("year", [-69, 0, 292, 293, 476])  # from 1970; 64 bits of nanoseconds end in 2262
def test_a_version_of_any_time_is_shown_until_it_changes(year: int) -> None:
    def attributes(mtime_ns: int) -> os.stat_result:
        return os.stat_result((0o100644, 2, 1, 1, 0, 0, 5, 0, 0, 0), {"st_mtime_ns": mtime_ns})

    mtime = year * _CENTURIES // 100
    fds = memfds.allocate()
    try:
        catalog = Catalog(*fds)
        record, *_ = catalog.enter(0, b"f", attributes(mtime))
        assert catalog.enter(0, b"f", attributes(mtime)) == (record, False, None)
        assert catalog.enter(0, b"f", attributes(mtime + 1)) == (record, True, None)
        assert catalog.shows_bytes(record, attributes(mtime))
        assert not catalog.shows_bytes(record, attributes(mtime - 1))
        assert catalog.version(record) == Version.of(attributes(mtime))
        assert catalog.shows(record, Version.of(attributes(mtime)))
    finally:
        for fd in fds:
            os.close(fd)


def test_what_is_no_descriptor_has_no_attributes() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        paths.attributes(-1)
