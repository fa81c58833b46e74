"""The kinds of sources, as the tests of the contract fill them: each with what puts files there and takes them away."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from coordlfs_tools.lab import buckets
from sides import age

from coordlfs.sources.address import Address, Options
from coordlfs.sources.contract import Source
from coordlfs.sources.directory import DirectorySource
from coordlfs.sources.objects.source import ObjectSource


class Filled(Protocol):
    """A source of some kind, and what it is filled by."""

    source: Source

    def put(self, path: str, data: bytes) -> None:
        """Write a file whole, with the directories that it needs."""

    def remove(self, path: str) -> None:
        """Take a file away."""


class FilledDirectory:
    """A directory on a disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.source: Source = DirectorySource(os.open(root, os.O_RDONLY))

    def put(self, path: str, data: bytes) -> None:
        """See `Filled`: as what replaces a whole file does it."""
        file = self._root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        written = self._root / "being written"
        written.write_bytes(data)
        age(written)
        written.replace(file)

    def remove(self, path: str) -> None:
        """See `Filled`."""
        (self._root / path).unlink()


class FilledBucket:
    """What lies below a prefix of a bucket, beside something else."""

    def __init__(self, bucket: buckets.Bucket) -> None:
        self.bucket = bucket
        bucket.put("data/setx", b"beside it")
        options = Options(endpoint=bucket.endpoint, anonymous=True, allow_http=True, timeout=2)
        self.source: Source = ObjectSource(Address("s3", bucket.name, "data/set"), options, lasts=0.0)

    def put(self, path: str, data: bytes) -> None:
        """See `Filled`."""
        self.bucket.put("data/set/" + path, data)

    def remove(self, path: str) -> None:
        """See `Filled`."""
        self.bucket.remove("data/set/" + path)


@contextmanager
def directory(place: Path) -> Iterator[Filled]:
    """An empty directory."""
    filled = FilledDirectory(place)
    yield filled
    os.close(filled.source.root)


class Kind(Protocol):
    """How a kind begins, with nothing in it."""

    def __call__(self, place: Path) -> AbstractContextManager[Filled]:
        """`place` is an empty directory to use."""


@contextmanager
def objects(place: Path) -> Iterator[Filled]:
    """An empty bucket, of a store of our own."""
    with buckets.serve(buckets.Bucket(page=7)) as bucket:
        yield FilledBucket(bucket)


KINDS: dict[str, Kind] = {"directory": directory, "objects": objects}
