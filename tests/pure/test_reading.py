"""Races between a reader and whoever sees that a file changed, at moments that a mount rarely meets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sides import admission_of, age

from coordlfs.cache.minio import MinIO
from coordlfs.cache.stash import Stash
from coordlfs.catalogue import memfds
from coordlfs.catalogue.catalog import SUPERSEDED, Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import pages
from coordlfs.kernel.notifier import Notifier
from coordlfs.serving.reading import Reader, Request
from coordlfs.sources.directory import DirectorySource
from coordlfs.sources.versions import Version


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    """An empty one."""
    fds = memfds.allocate()
    yield Catalog(*fds)
    for fd in fds:
        os.close(fd)


@contextmanager
def _reader(catalog: Catalog, counters: Counters, directory: Path) -> Iterator[Reader]:
    root = os.open(directory, os.O_RDONLY)
    try:
        with open(os.devnull, "rb+") as device:
            notifier = Notifier(device.fileno())
            admission = admission_of(catalog, MinIO(0), Stash(0), counters, notifier)
            yield Reader(catalog, DirectorySource(root, is_remote=False), admission, counters, notifier)
    finally:
        os.close(root)


def test_a_file_that_is_replaced_just_as_it_is_first_read_is_another_file(catalog: Catalog, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    old = path.stat()
    record, *_ = catalog.enter(0, b"f", old)
    given: list[bool] = []

    class AtTheWorstMoment(Counters):
        def add(self, name: str, amount: int = 1) -> None:
            if name == "changed_files" and not given:
                given.append(catalog.serves(record, Version.of(old)))
            super().add(name, amount)

    counters = AtTheWorstMoment(catalog.counters)
    with _reader(catalog, counters, tmp_path) as reader:
        (tmp_path / "new").write_bytes(b"new bytes")
        os.replace(tmp_path / "new", path)
        assert not reader.modified(record, path.stat())
    assert given == [True], "a reader got the old bytes meanwhile"
    assert catalog.flags(record) & SUPERSEDED
    assert catalog.version(record) == Version.of(old)


def test_bytes_of_before_a_change_are_not_given_as_those_after_it(
    catalog: Catalog, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place / "f"
    path.write_bytes(b"old")
    age(path)
    record, *_ = catalog.enter(0, b"f", path.stat())
    look = Version.of_open

    def too_late(fd: int) -> Version:
        """The bytes have been read; they change, and another thread sees it first."""
        path.write_bytes(b"new")
        os.utime(path, ns=(1, 1))
        catalog.set_version(record, Version.of(path.stat()))
        return look(fd)

    monkeypatch.setattr(Version, "of_open", too_late)
    into = memoryview(pages.buffer(pages.PAGE))
    with _reader(catalog, Counters(catalog.counters), place) as reader:
        answer = reader.begin(Request(catalog.node(record), 0, pages.PAGE, os.getpid(), direct=False), into)
    assert bytes(into[:3]) == b"old", "it was read before"
    assert answer is None, "it was given all the same"
