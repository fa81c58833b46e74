"""Hints of a group: one of its jobs announces the order to the mount on which the dataset lies.

All jobs of a group walk through the same order, and one pool of workers reads for all of them. So only one announces:
the one that holds an abstract socket of the group's name, which another can have as soon as it has died.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from coordlfs_loader.hints import Hints

log = logging.getLogger("coordlfs_loader")

Path = str | bytes | os.PathLike[str]
_LISTS = ("samples", "imgs", "files", "paths", "filenames", "image_paths", "image_files")  # as datasets call them


def files_of(dataset: Any) -> Callable[[int], Path] | None:
    """What leads from an index of a dataset to its file; None for a dataset that does not show its files.

    Looked for as torchvision's datasets have it: a list as long as the dataset, of paths or of tuples that begin with
    one. Subsets are looked through.
    """
    indices, inner = getattr(dataset, "indices", None), getattr(dataset, "dataset", None)
    if indices is not None and inner is not None:
        of_inner = files_of(inner)
        return None if of_inner is None else lambda index: of_inner(indices[index])
    lists = (getattr(dataset, name, None) for name in _LISTS)
    return next((paths for found in lists if (paths := _paths(found, len(dataset))) is not None), None)


def _paths(found: Any, length: int) -> Callable[[int], Path] | None:
    """What leads from an index to a path, if `found` is a list of `length` paths, or of tuples that begin with one."""
    if not isinstance(found, Sequence) or isinstance(found, str | bytes) or not len(found) == length > 0:
        return None
    if isinstance(found[0], tuple) and found[0] and isinstance(found[0][0], str | bytes | os.PathLike):
        return lambda index: found[index][0]
    return found.__getitem__ if isinstance(found[0], str | bytes | os.PathLike) else None


_locks: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_locks):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)  # workers must not hold what their dead job held


class Announcer:
    """The hints of one job, if it is the one that announces. Nothing here fails or holds up the job."""

    def __init__(self, group: str, files: Callable[[int], Path]) -> None:
        self._files = files
        self._name = hashlib.sha256(f"coordlfs-hints {os.getuid()} {group}".encode()).hexdigest()
        self._lock: socket.socket | None = None
        self._hints: Hints | None = None
        self._looked = False
        self._sizes: list[int] = []

    def begin(self, epoch: int, batches: list[Any], start: int, taken: int) -> None:
        """This job begins an epoch with batch `start`, or goes on in its midst, `taken` batches further on."""
        try:
            order = [batch if isinstance(batch, list | tuple) else [batch] for batch in batches]
            order = order[start:] + order[:start]
            self._sizes = [len(batch) for batch in reversed(order[taken:])]
            indices = [index for batch in order for index in batch]
            if not self._is_chosen(indices):
                return
            assert self._hints is not None
            self._hints.begin(epoch, indices, self._number, len(indices) - sum(self._sizes))
        except Exception:  # an index of another kind, a path that cannot be had: the job need not know
            log.debug("no hints", exc_info=True)
            self._hints = None

    def advance(self) -> None:
        """This job takes a batch."""
        try:
            size = self._sizes.pop() if self._sizes else 0
            if self._hints is not None:
                self._hints.advance(size)
        except Exception:
            log.debug("no hints", exc_info=True)
            self._hints = None

    def end(self) -> None:
        """This job takes no more of this epoch."""
        if self._hints is not None:
            self._hints.end()

    def close(self) -> None:
        """Let another job announce."""
        if self._hints is not None:
            self._hints.close()
        if self._lock is not None:
            self._lock.close()
        self._hints = self._lock = None
        self._looked = False

    def _is_chosen(self, indices: list[Any]) -> bool:
        if self._lock is None:
            lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                lock.bind(f"\0coordlfs-hints-{self._name}")
            except OSError:
                lock.close()
                return False
            _locks.add(lock)
            self._lock = lock
        if not self._looked:
            self._looked = True
            self._hints = Hints.for_files(map(self._files, indices), int(self._name[:15], 16))
        return self._hints is not None

    def _number(self, index: Any) -> int:
        assert self._hints is not None
        return self._hints.number(self._files(index))
