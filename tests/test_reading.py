"""Races between a reader and whoever sees that a file changed, at the one moment that a mount rarely meets."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordlfs import memfds
from coordlfs.admission import Admission
from coordlfs.catalog import SUPERSEDED, Catalog
from coordlfs.epochs import Epochs
from coordlfs.metrics import Counters
from coordlfs.minio import MinIO
from coordlfs.notifier import Notifier
from coordlfs.reading import Reader
from coordlfs.source import Source
from coordlfs.stash import Stash
from coordlfs.versions import Version


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    """An empty one."""
    fds = memfds.allocate()
    yield Catalog(*fds)
    for fd in fds:
        os.close(fd)


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
    root = os.open(tmp_path, os.O_RDONLY)
    with open(os.devnull, "rb+") as device:
        admission = Admission(catalog, MinIO(0), Stash(0), Epochs(), counters, lambda: None)
        admission.notifier = notifier = Notifier(device.fileno())
        reader = Reader(catalog, Source(root, is_remote=False), admission, counters, notifier)
        (tmp_path / "new").write_bytes(b"new bytes")
        os.replace(tmp_path / "new", path)
        with pytest.raises(OSError) as caught:
            reader.modified(record, path.stat(), announce=False)
    os.close(root)
    assert given == [True], "a reader got the old bytes meanwhile"
    assert caught.value.errno == errno.ESTALE
    assert catalog.flags(record) & SUPERSEDED
    assert catalog.version(record) == Version.of(old)
