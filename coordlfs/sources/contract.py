"""What the rest asks of a source, whatever kind it is: a directory, or a bucket of an object store.

Names are looked up and listed, bytes are read, and of both it is said which version they are of. Each kind has a module
of its own; `tests/pure/test_sources.py` holds all of them to this. It must not know how any of them does it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from typing import NamedTuple, Protocol

from coordlfs.sources.numbering import Numbering
from coordlfs.sources.versions import Version


class Part(NamedTuple):
    """Up to `size` bytes at `offset` of the file at `path`; `record` names it for what is kept of it meanwhile.

    `is_first`: one that has just changed is read when that is over, as far as can be told; see `versions.is_young`.
    """

    record: int
    path: bytes
    offset: int
    size: int
    is_first: bool = False


@dataclass(slots=True)
class Opened:
    """A file that is about to be read from the disk: `length` bytes at `offset`, with O_DIRECT."""

    record: int
    fd: int
    since: float
    offset: int
    length: int
    st: os.stat_result


class Listing(ABC):
    """Names of a directory, sorted, so that positions in it mean the same when it is read again.

    `fd` is a descriptor of the directory, for those who can do without `lstat`; -1 if there is none.
    """

    def __init__(self, names: list[bytes], fd: int = -1) -> None:
        self.names = names
        self.fd = fd

    def keep_positions(self, earlier: Listing) -> None:
        """Have the names of an earlier listing where they were there, gone or not, and others behind them."""
        if self.names != earlier.names:
            known = set(earlier.names)
            self.names = earlier.names + [name for name in self.names if name not in known]

    @abstractmethod
    def lstat(self, name: bytes) -> os.stat_result:
        """The attributes of one of the names. Raises OSError: FileNotFoundError if it is gone."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the directory; a second time, too."""


class Neighbours(Protocol):
    """Attributes of many names, of which those of one directory come one after another; for one thread.

    A change that was over before this was made is seen; see `Source.neighbours`.
    """

    def lstat(self, directory: bytes, name: bytes) -> os.stat_result:
        """As `Source.lstat` of the name in the directory, which is empty for the root; so is the root's own name."""

    def close(self) -> None:
        """Let go of the directory."""


class Source(Protocol):
    """What is mounted. Paths are bytes, relative to its root, which is empty; every error is an OSError. Thread-safe.

    A name that is not there is FileNotFoundError, NotADirectoryError where a file is taken for a directory.
    """

    root: int  # a descriptor of the directory that it is, for those who need no source to read it; -1 if it is none
    is_remote: bool  # whether it may take its time, or never answer, so that a thread of its own has to wait for it
    numbering: Numbering | None  # what is known of its inode numbers; None if these tell files apart for ever

    @property
    def retries(self) -> int:
        """Attempts that were made again."""

    def requests(self) -> dict[str, int]:
        """What was asked of a store, and how it went, as docs/reference/status.md names it; nothing of a directory."""

    def lstat(self, path: bytes, slow: Callable[[], None] | None = None) -> os.stat_result:
        """The attributes of a name, itself if it is a symbolic link. `slow` is called before what may wait."""

    def readlink(self, path: bytes) -> bytes:
        """Where a symbolic link leads."""

    def listing(self, path: bytes) -> Listing:
        """The entries of a directory as they are now."""

    def neighbours(self, age: float = 0.0) -> Neighbours:
        """What to ask for the attributes of many names: of what it says nothing is older than `age` seconds."""

    def xattr(self, path: bytes, name: bytes) -> bytes:
        """An extended attribute of a name, not followed if it is a symbolic link."""

    def xattrs(self, path: bytes) -> list[bytes]:
        """The names of the extended attributes."""

    def statvfs(self) -> os.statvfs_result:
        """Figures of what holds it."""

    def read(self, part: Part, into: mmap | memoryview, slow: Callable[[], None]) -> tuple[int, os.stat_result]:
        """Read a part of a file into page-aligned memory; how many bytes, and the attributes they belong to.

        Fewer than were asked for only at the end of the file, 0 behind it. `slow` is called before what will wait.
        """

    def fetch(self, part: Part, into: mmap | memoryview, slow: Callable[[], None]) -> tuple[memoryview, os.stat_result]:
        """As `read`, but the bytes may as well lie elsewhere than in `into`, where nobody changes them."""

    def expect(self, path: bytes) -> None:
        """The file at a path will be read soon: a source that takes its time may begin. Never waits."""

    def begin(self, part: Part, into: memoryview) -> Version | Opened | None:
        """Read a part that begins with a page, if it is in memory; never waits.

        Returns the version that the file has afterwards: if it is not the one that it had before, it may have been
        written to meanwhile, and `read` is to be called. So it is if None is returned, whatever the reason. Otherwise
        the disk has to be read, which is to be followed by `end`.
        """

    def end(self, opened: Opened) -> os.stat_result | None:
        """Let go of a file that was read; the attributes that the bytes belong to.

        None if it was written to meanwhile: they belong to no version, and `read` is to be called.
        """

    def forget(self, record: int) -> None:
        """Let go of what is kept of a file, because its name may lead elsewhere now."""
