"""A server's parts without a mount, for tests of its compiled code against the Python code that it does the work of.

A packet socket stands in for /dev/fuse, so that any message can be sent.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from coordlfs.cache.admission import Admission
from coordlfs.cache.announcements import Announcements
from coordlfs.cache.epochs import Epochs
from coordlfs.cache.interfaces import Invalidator
from coordlfs.cache.minio import MinIO
from coordlfs.cache.stash import Stash
from coordlfs.catalogue import memfds
from coordlfs.catalogue.catalog import Catalog
from coordlfs.catalogue.metrics import NAMES, Counters
from coordlfs.catalogue.records import Records
from coordlfs.kernel.notifier import Notifier
from coordlfs.serving.entries import Entries
from coordlfs.serving.fast_path import FastPath
from coordlfs.serving.namespace import Namespace
from coordlfs.serving.reading import Reader, Request
from coordlfs.serving.waits import Waits
from coordlfs.sources.directory import DirectorySource

PID = 4242
LARGEST = 300_000


@dataclass
class Side:
    """A server's parts, without a mount."""

    catalog: Catalog
    counters: Counters
    namespace: Namespace
    reader: Reader
    watch: int
    device: socket.socket
    theirs: socket.socket
    left: list[tuple[int, Request]] = field(default_factory=list)
    refused: list[tuple[int, Exception]] = field(default_factory=list)
    waits: Waits = field(default_factory=Waits)

    def path(self) -> FastPath:
        """The fast path of it, which has its failures in `left` and `refused`."""

        def leave(unique: int, asked: Request, *, interrupted: bool) -> None:
            self.left.append((unique, asked))

        def end_wait(wait: object) -> None:
            raise AssertionError("nobody looks for waits here")

        def refuse(unique: int, error: Exception) -> None:
            self.refused.append((unique, error))

        return FastPath(
            self.device.fileno(), Records(self.catalog), self.reader, refuse, leave, end_wait, self.watch, self.waits
        )

    def entries(self) -> Entries:
        """What answers READDIRPLUS."""
        return Entries(Records(self.catalog), self.namespace, self.counters)

    def figures(self) -> dict[str, int]:
        """All counters, but for the one that tells compiled code from Python."""
        return {name: self.counters[name] for name in NAMES if name != "turns"}

    def records(self) -> list[tuple[Any, ...]]:
        """All of the catalogue, but for what flags say of readers' cgroups."""
        return [
            (
                self.catalog.node(r),
                self.catalog.entry(r),
                self.catalog.flags(r),
                self.catalog.version(r),
                self.catalog.last_miss(r),
            )
            for r in range(len(self.catalog))
        ]


def admission_of(
    catalog: Catalog, policy: MinIO, stash: Stash, counters: Counters, invalidator: Invalidator
) -> Admission:
    """Admission of a mount that no reader announces anything to, and that stands alone."""
    epochs = Epochs()
    announced = Announcements(catalog, policy, epochs, counters)
    return Admission(
        *(catalog, policy, stash, epochs, counters, lambda: None),
        announced=announced,
        awaited=Waits(),
        invalidator=invalidator,
    )


@contextmanager
def side_of(directory: Path, capacity: int = 0, *, id_bits: int = 63) -> Iterator[Side]:
    """The parts for a mount of a directory; node ids of few bits collide."""
    with ExitStack() as stack:
        fds = memfds.allocate()
        for fd in fds:
            stack.callback(os.close, fd)
        root = os.open(directory, os.O_RDONLY)
        stack.callback(os.close, root)
        device, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (device, theirs):
            stack.enter_context(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * LARGEST)
        device.setblocking(False)
        theirs.settimeout(240)
        catalog = Catalog(*fds, id_bits=id_bits)
        counters = Counters(catalog.counters)
        source = DirectorySource(root, is_remote=False)
        notifier = Notifier(device.fileno())
        admission = admission_of(catalog, MinIO(capacity), Stash(1 << 20), counters, notifier)
        reader = Reader(catalog, source, admission, counters, notifier)
        watch = os.eventfd(0)
        stack.callback(os.close, watch)
        yield Side(catalog, counters, Namespace(catalog, source, reader, counters), reader, watch, device, theirs)


ENTRY_NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: b"/" not in name and b"\0" not in name)
TREES = st.dictionaries(
    ENTRY_NAMES.filter(lambda name: name not in (b".", b"..")),
    st.sampled_from(["file", "large", "empty", "directory", "link", "linked", "fifo"]),
    max_size=8,
)


def age(*files: Path) -> None:
    """Have files look as if nobody had changed them of late."""
    for file in files:
        os.utime(file, ns=(1, time.time_ns() - 60 * 10**9))


def make(directory: bytes, tree: dict[bytes, str]) -> None:
    """Write what `TREES` draws."""
    for name, kind in tree.items():
        path = directory + b"/" + name
        if kind == "directory":
            os.mkdir(path)
        elif kind == "link":
            os.symlink(b"elsewhere", path)
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            size = {"file": len(name) * 331, "large": LARGEST, "empty": 0, "linked": 10}[kind]
            with open(path, "wb") as f:
                f.write(os.urandom(size))
            os.utime(path, ns=(1, -(10**9) - 7))  # before 1970
            if kind == "linked":
                os.link(path, path + b"+")
