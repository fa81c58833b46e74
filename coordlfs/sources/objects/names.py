"""The directories that keys imply, and which keys no file system can show.

A key is a path. What lies below another key, has an empty component or one called `.` or `..`, a component of more
than 255 bytes or with control characters, by which obstore cannot ask, is hidden; so is an object whose name is a
directory's as well. It asks nobody: it is given what a store listed.
"""

from __future__ import annotations

import re
import threading
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import xxhash

LONGEST_NAME = 255  # bytes
_GONE = -2  # in place of a size
_CONTROL = re.compile(r"[\0-\x1f\x7f]")  # what obstore takes for one
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_NS_BELOW = 1_000_000  # in a millisecond: finer no store says when an object was modified


class Entry(NamedTuple):
    """What a listing says of a name: a directory has no size, -1, and nothing else."""

    size: int
    mtime_ns: int = 0
    etag: str = ""

    @property
    def is_directory(self) -> bool:
        """Whether it is one, and no object."""
        return self.size < 0

    @classmethod
    def of(cls, size: int, modified: datetime, etag: str | None) -> Entry:
        """An object, as a listing or the answer to a request shows it.

        The digits of the time below a millisecond are of the ETag, so that nodes, which tell each other the time, tell
        apart what was written twice in a second.
        """
        tag = bare(etag)
        digits = xxhash.xxh3_64_intdigest(tag.encode()) % _NS_BELOW
        return cls(size, (modified - _EPOCH) // _MILLISECOND * _NS_BELOW + digits, tag)


def bare(etag: str | None) -> str:
    """An ETag as all answers show it: some quote it in one kind of answer and not in another."""
    return (etag or "").removeprefix("W/").strip('"')


class Directory:
    """The names of a directory as they were listed at `since` (seconds, monotonic). Thread-safe.

    `changed_ns` is when names were last seen to come or go, `hidden` how many keys are not shown, `tried` when it was
    last tried to list it again. In columns: a million names are usual.
    """

    def __init__(self, entries: dict[bytes, Entry], since: float, changed_ns: int, hidden: int = 0) -> None:
        self.names = sorted(entries)
        self.since = self.tried = since
        self.changed_ns = changed_ns
        self.hidden = hidden
        self._sizes = array("q", (entries[name].size for name in self.names))
        self._times = array("q", (entries[name].mtime_ns for name in self.names))
        self._etags = [entries[name].etag for name in self.names]
        self._lock = threading.Lock()

    def find(self, name: bytes) -> Entry | None:
        """What is known of a name; None if it was not listed."""
        at = bisect_left(self.names, name)
        if at == len(self.names) or self.names[at] != name:
            return None
        with self._lock:
            entry = Entry(self._sizes[at], self._times[at], self._etags[at])
        return None if entry.size == _GONE else entry

    def replace(self, name: bytes, entry: Entry) -> None:
        """An object has become another one, as a request showed; a name that was not listed is not added."""
        at = bisect_left(self.names, name)
        if at < len(self.names) and self.names[at] == name:
            with self._lock:
                self._sizes[at], self._times[at], self._etags[at] = entry

    def remove(self, name: bytes) -> None:
        """An object is gone, as a request showed. Its name keeps its place, for who reads the listing just now."""
        self.replace(name, Entry(_GONE))

    def succeeds(self, earlier: Directory, now_ns: int) -> None:
        """Take over what an earlier listing had, where that is the same: the time of an object, and of the directory.

        Answers differ in how exactly they say the time of one and the same object.
        """
        is_same = self.names == earlier.names
        self.changed_ns = earlier.changed_ns if is_same else now_ns
        if is_same and self._etags == earlier._etags and self._sizes == earlier._sizes and all(self._etags):
            self._times = earlier._times[:]  # as nearly always, and in no time
            return
        for at, name in enumerate(self.names):
            before = earlier.find(name)
            if before is not None and (before.size, before.etag) == (self._sizes[at], self._etags[at]) and before.etag:
                self._times[at] = before.mtime_ns


class Found(NamedTuple):
    """What a store listed of one directory: keys with all that they begin with."""

    prefixes: Sequence[str]
    objects: Sequence[tuple[str, Entry]]


def shown(prefix: str, found: Found) -> tuple[dict[bytes, Entry], int]:
    """The names that a directory shows, of what was listed below `prefix`, and how many keys it hides.

    `prefix` ends with a slash, unless it is empty.
    """
    entries: dict[bytes, Entry] = {}
    hidden = 0
    for key in found.prefixes:
        if (name := _name(prefix, key.rstrip("/"))) is None:
            hidden += 1
        else:
            entries[name] = Entry(-1)
    for key, entry in found.objects:
        if key.removesuffix("/") + "/" == prefix:  # obstore drops the slash of a key that ends with one
            hidden += entry.size > 0  # else it marks a directory, which may be empty
        elif (name := _name(prefix, key)) is None or name in entries:
            hidden += 1
        else:
            entries[name] = entry
    return entries, hidden


def _name(prefix: str, key: str) -> bytes | None:
    """The name of what is right below a prefix; None if it can have none."""
    rest = key[len(prefix) :]
    if not key.startswith(prefix) or rest in ("", ".", "..") or "/" in rest or _CONTROL.search(rest):
        return None
    try:
        name = rest.encode()
    except UnicodeEncodeError:
        return None
    return name if len(name) <= LONGEST_NAME else None
