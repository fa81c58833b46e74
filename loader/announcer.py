"""Hints of a group: one of its jobs announces the order to the mount on which the dataset lies.

All jobs of a group walk through the same order, and one pool of workers reads for all of them. So only one announces:
the one that holds an abstract socket of the group's name, which another can have as soon as it has died. What a hint
says is known by `hints`.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import socket
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from coordlfs_loader.hints import Hints

log = logging.getLogger("coordlfs_loader")

Path = str | bytes | os.PathLike[str]
_LISTS = ("samples", "imgs", "files", "paths", "filenames", "image_paths", "image_files")  # as datasets call them


_LEVELS = 32  # of subsets of subsets


def files_of(dataset: Any) -> Callable[[int], Path] | None:
    """What leads from an index of a dataset to its file; None for a dataset that does not show its files.

    Looked for as torchvision's datasets have it: a list as long as the dataset, of paths or of tuples that begin with
    one. Subsets are looked through. No code of the dataset runs but `__len__`, which a loader calls anyway: an
    attribute that is computed may raise anything, or download what it is to show.
    """
    levels: list[Sequence[int]] = []
    while len(levels) < _LEVELS:
        indices, inner = _held(dataset, "indices"), _held(dataset, "dataset")
        if indices is None or inner is None:
            break
        levels.append(indices)
        dataset = inner
    try:
        length = len(dataset)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return None
    lists = (_held(dataset, name) for name in _LISTS)
    paths = next((paths for found in lists if (paths := _paths(found, length)) is not None), None)
    if paths is None or not levels:
        return paths

    def through(index: int) -> Path:
        for indices in levels:
            index = indices[index]
        return paths(index)

    return through


def _held(dataset: Any, name: str) -> Any:
    """What lies in an attribute, in a slot, or in the class; None for one that is computed."""
    found = inspect.getattr_static(dataset, name, None)
    if isinstance(found, types.MemberDescriptorType):
        try:
            return found.__get__(dataset)
        except AttributeError:
            return None
    return None if hasattr(type(found), "__get__") else found


def _paths(found: Any, length: int) -> Callable[[int], Path] | None:
    """What leads from an index to a path, if `found` is a list of `length` paths, or of tuples that begin with one."""
    if type(found) not in (list, tuple) or not len(found) == length > 0:
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
        except KeyboardInterrupt:
            raise
        except BaseException:  # an index of another kind, a path that cannot be had: the job need not know
            log.debug("no hints", exc_info=True)
            self._hints = None

    def advance(self) -> None:
        """This job takes a batch."""
        try:
            size = self._sizes.pop() if self._sizes else 0
            if self._hints is not None:
                self._hints.advance(size)
        except KeyboardInterrupt:
            raise
        except BaseException:
            log.debug("no hints", exc_info=True)
            self._hints = None

    def end(self) -> None:
        """This job takes no more of this epoch."""
        try:
            if self._hints is not None:
                self._hints.end()
        except KeyboardInterrupt:
            raise
        except BaseException:
            log.debug("no hints", exc_info=True)
            self._hints = None

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
