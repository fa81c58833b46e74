"""Epochs that a loader announces, across servers: one that takes over goes on with the epoch that runs."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator

import pytest

from coordlfs.cache.announcements import Announcements
from coordlfs.cache.epochs import Epoch, Epochs
from coordlfs.cache.hints import Hint
from coordlfs.cache.minio import MinIO
from coordlfs.catalogue import memfds
from coordlfs.catalogue.catalog import Catalog
from coordlfs.catalogue.metrics import Counters


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    """An empty catalogue, which outlives servers."""
    fds = memfds.allocate()
    yield Catalog(*fds)
    for fd in fds:
        os.close(fd)


def server(catalog: Catalog) -> tuple[Epochs, Announcements]:
    """What a server begins with."""
    counters = Counters(catalog.counters)
    epochs = Epochs(Epoch(counters["epochs_before"]))
    return epochs, Announcements(catalog, MinIO(100), epochs, counters)


def hint(epoch: int) -> Hint:
    """What a loader says at first, or to a new server, of an epoch of 10 files."""
    return Hint(1, 1, epoch, 10, 0, 0, array("Q"))


def test_a_server_that_takes_over_goes_on_with_the_epoch_that_runs(catalog: Catalog) -> None:
    epochs, announcements = server(catalog)
    announcements.take(hint(7), 0, 0, 0.0)
    assert (epochs.current.number, epochs.told) == (1, True)

    epochs, announcements = server(catalog)
    seen = epochs.miss((0, 0), 5, 4096)
    assert seen is not None
    assert epochs.miss(seen, 5, 4096) is None  # as a keeper's READ that is answered again
    announcements.take(hint(7), 0, 0, 1.0)
    assert epochs.current.number == 1
    announcements.take(hint(8), 0, 0, 2.0)
    assert epochs.current.number == 2


def test_a_job_that_led_is_not_expected_for_ever(catalog: Catalog) -> None:
    _, announcements = server(catalog)
    announcements.take(hint(7), 0, 0, 0.0)

    epochs, announcements = server(catalog)
    for _ in range(20):
        assert epochs.told
        announcements.look_for_leader()
    assert not epochs.told
    seen = epochs.miss((0, 0), 5, 4096)
    assert seen is not None
    assert epochs.miss(seen, 5, 4096) == (2, 5)


def test_a_first_server_expects_nobody(catalog: Catalog) -> None:
    epochs, _ = server(catalog)
    assert not epochs.told
