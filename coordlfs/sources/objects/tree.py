"""The directories of a bucket as they were listed: each once, for all who ask meanwhile, and again when that is old.

No request looks for a single name. It knows keys and what a store lists, and neither attributes nor bytes.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable

from coordlfs.sources.objects.names import Directory, Entry, shown
from coordlfs.sources.objects.store import Store

log = logging.getLogger(__name__)

_TRIED_AGAIN_AFTER = 10.0  # seconds that a store which does not answer is left alone


class Tree:
    """What lies below a prefix, which ends with a slash or is empty. Thread-safe; what fails raises OSError.

    `lasts`: seconds that a listing is good for, None if for ever. `since`: when nothing had changed yet, in ns.
    `oldest` of a question is when the listing that answers it may have begun at the earliest (monotonic): None for as
    long ago as listings last, or longer where the store does not answer.
    """

    def __init__(self, store: Store, prefix: str, lasts: float | None, since: int) -> None:
        self.hidden = 0  # keys that are not shown
        self._store = store
        self._prefix = prefix
        self._lasts = lasts
        self._since = since
        self._directories: dict[bytes, Directory] = {}
        self._being_listed: dict[bytes, threading.Lock] = {}
        self._lock = threading.Lock()

    def key(self, path: bytes) -> str:
        """The key of a file."""
        return self._prefix + path.decode()

    def find(self, path: bytes, oldest: float | None = None, slow: Callable[[], None] | None = None) -> Entry:
        """What a path leads to; `slow` is called before a listing has to be waited for."""
        if not path:
            return Entry(-1)
        parent, _, name = path.rpartition(b"/")
        entry = self.directory(parent, oldest, slow).find(name)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, "no such name")
        return entry

    def directory(self, path: bytes, oldest: float | None = None, slow: Callable[[], None] | None = None) -> Directory:
        """What a directory holds; NotADirectoryError if the path leads to a file."""
        known, now = self._directories.get(path), time.monotonic()
        if known is not None and self._is_good(known, oldest, now):
            return known
        if known is None and not self.find(path, oldest, slow).is_directory:
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        if slow is not None:
            slow()
        with self._lock:
            being_listed = self._being_listed.setdefault(path, threading.Lock())
        with being_listed:  # by one, and the others have what it gets
            known = self._directories.get(path)
            if known is not None and self._is_good(known, oldest, now):
                return known
            try:
                return self._list(path, known)
            except OSError:
                if known is None or oldest is not None:
                    raise
                known.tried = time.monotonic()
                return known

    def _is_good(self, known: Directory, oldest: float | None, now: float) -> bool:
        if oldest is not None:
            return known.since >= oldest
        if self._lasts is None or known.since >= now - self._lasts:
            return True
        return known.tried > known.since and known.tried >= now - _TRIED_AGAIN_AFTER

    def known(self, path: bytes) -> Directory | None:
        """What a directory held when it was last listed; None if it was not."""
        return self._directories.get(path)

    def changed_ns(self, path: bytes) -> int:
        """When names in a directory were last seen to come or go."""
        known = self._directories.get(path)
        return self._since if known is None else known.changed_ns

    def replace(self, path: bytes, entry: Entry) -> None:
        """An object has become another one, as a request showed."""
        parent, _, name = path.rpartition(b"/")
        if (known := self._directories.get(parent)) is not None:
            known.replace(name, entry)

    def remove(self, path: bytes) -> None:
        """An object is gone, as a request showed."""
        parent, _, name = path.rpartition(b"/")
        if (known := self._directories.get(parent)) is not None:
            known.remove(name)

    def _list(self, path: bytes, known: Directory | None) -> Directory:
        began = time.monotonic()
        prefix = self._prefix + (path.decode() + "/" if path else "")
        entries, hidden = shown(prefix, self._store.list_below(prefix))
        listed = Directory(entries, began, self._since, hidden)
        if known is not None:
            listed.succeeds(known, time.time_ns())
        more = listed.hidden - (known.hidden if known is not None else 0)
        if more > 0:
            log.warning("%d keys below '%s' have names that no file system can show", listed.hidden, prefix)
        with self._lock:
            self.hidden += more
        self._directories[path] = listed
        return listed
