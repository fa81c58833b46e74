"""Hints to coordlfs: telling a mount which files will be read next (the protocol is described in docs/hints.md).

Nothing here may fail or hold up a training job: where there is no mount, or it does not understand, everything goes on
without hints. Needs neither torch nor the coordlfs package.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import stat
import struct
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<4sIQQQQQQ")  # magic count job reader epoch length position start
_MAGIC = b"CLH1"
_COMMAND = 1 << 30 | 0xC1 << 8 | 1  # _IOC(_IOC_WRITE, 0xC1, 1, size of the message), less the size
_WINDOW = 4096  # files that are announced ahead
_FIRST, _MORE = (
    256,
    512,
)  # numbers in the first message, and in each that follows: at most, since each may cost a lookup
_LONGEST = 1 << 40  # files of an epoch
_STEP = 64  # files after which another message is sent
_EVERY = 0.05  # seconds after which one is sent in any case
_PAUSE = 5.0  # seconds without hints after one that failed
_HELD_UP = 0.05  # seconds that a message may take to be put together: what is not known by then comes with the next
_LOOKING = 0.5  # seconds that looking for a mount may take


def mount_of(path: str | bytes | os.PathLike[str]) -> str | None:
    """The root of the coordlfs mount that takes hints on which `path` lies, or None."""
    try:
        here = os.path.realpath(os.fspath(path))
        device = os.stat(here).st_dev
        while (parent := os.path.dirname(here)) != here and os.stat(parent).st_dev == device:
            here = parent
        return os.fsdecode(here) if json.loads(os.getxattr(here, "user.coordl.hint"))["version"] == 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Drawn(Sequence[Any]):
    """The order of a sampler, drawn as it is needed: no more of it is in memory than was announced and not read yet.

    Iterating gives what the sampler draws, also the exception that ends it, in its place. A slice draws ahead, unless
    that takes long, and has what is drawn by then. The length is that of the sampler as far as it is known: one that
    has no end is longer all the time. What is drawn may be a batch, a list or tuple; slices are of single files.
    """

    def __init__(self, sampler: Iterable[Any]) -> None:
        self._sampler = sampler
        self._drawing = iter(sampler)
        self._ready: deque[Any] = deque()
        self._files: deque[Any] = deque()  # of those
        self._first = 0  # the place of the first of these files
        self._expected: int | None = None  # not looked for yet
        self._ended: BaseException | None = None

    def __len__(self) -> int:
        drawn = self._first + len(self._files)
        return drawn if self._ended is not None else max(drawn, self._expected or 0)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._ready and not self._draw():
            assert self._ended is not None
            raise self._ended
        drawn = self._ready.popleft()
        for _ in files_in(drawn):
            self._files.popleft()
            self._first += 1
        return drawn

    @property
    def taken(self) -> int:
        """Files that were given so far."""
        return self._first

    def peek(self) -> Sequence[Any]:
        """The files that come next, at least one drawn; none at the end."""
        return files_in(self._ready[0]) if self._ready or self._draw() else ()

    def __getitem__(self, places: Any) -> Any:
        begin, end = places.start - self._first, places.stop - self._first
        until = time.monotonic() + _HELD_UP
        while len(self._files) < end and time.monotonic() < until and self._draw():
            pass
        return list(islice(self._files, max(0, begin), max(0, end)))

    def _draw(self) -> bool:
        """Draw once more; whether there was anything."""
        if self._ended is not None:
            return False
        try:
            drawn = next(self._drawing)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # to be raised when it is its turn
            self._ended = e
            return False
        self._ready.append(drawn)
        self._files.extend(files_in(drawn))
        if self._expected is None:
            self._expected = 0
            with suppress(Exception):
                self._expected = min(len(self._sampler) * len(files_in(drawn)), _LONGEST)  # type: ignore[arg-type]
        return True


def files_in(drawn: Any) -> Sequence[Any]:
    """The indices in what a sampler or batch sampler has drawn."""
    return drawn if isinstance(drawn, list | tuple) else (drawn,)


class Hints:
    """One reader's order, told to the mount at `root`. Not thread-safe.

    `job` is shared by the readers that go through their epochs together, as the ranks of a distributed job.

    >>> hints = Hints.for_files(paths)                     # doctest: +SKIP
    >>> hints.begin(0, ordered_paths)                      # doctest: +SKIP
    >>> for path in ordered_paths:                         # doctest: +SKIP
    ...     hints.advance()
    ...     read(path)
    >>> hints.end()                                        # doctest: +SKIP
    """

    def __init__(self, root: str, job: int | None = None) -> None:
        self.root = root
        self.job = secrets.randbits(63) if job is None else job & (1 << 63) - 1
        self.reader = secrets.randbits(63)
        self._device = os.stat(root).st_dev
        self._owner = os.getpid()
        self._epoch = 0
        self._order: Sequence[Any] = ()
        self._number: Callable[[Any], int] = self.number
        self._position = 0
        self._announced = 0
        self._told = 0  # the position that was told last
        self._told_at = 0.0
        self._told_length = 0
        self._quiet_until = 0.0

    @classmethod
    def for_files(
        cls, paths: Iterable[str | bytes | os.PathLike[str]], job: int | None = None, *, look_at: int = 16
    ) -> Hints | None:
        """Hints for files of which one of the first `look_at` lies on a mount that takes them; None if none does."""
        until = time.monotonic() + _LOOKING
        for path, _ in zip(paths, range(look_at), strict=False):
            root = mount_of(path) if time.monotonic() < until else None
            if root is not None:
                with suppress(OSError):
                    return cls(root, job)
        return None

    def close(self) -> None:
        """Announce nothing more; what was announced is forgotten by the mount when the process ends."""
        self._quiet_until = float("inf")

    def number(self, path: str | bytes | os.PathLike[str]) -> int:
        """The number of a file; 0 for one that is not a file of the mount."""
        try:
            st = os.stat(path)
        except (OSError, ValueError):
            return 0
        return st.st_ino if st.st_dev == self._device and stat.S_ISREG(st.st_mode) else 0

    # -- an epoch -----------------------------------------------------------------------------------------------

    def begin(
        self, epoch: int, order: Sequence[Any], number: Callable[[Any], int] | None = None, position: int = 0
    ) -> None:
        """This reader begins an epoch, and will read `order` from `position` on.

        `order` are paths, or what `number` gives a file's number for, which is asked window by window, since the kernel
        may have to ask for a file that it does not know.
        """
        self._epoch = epoch & (1 << 63) - 1
        self._order, self._number = order, number or self.number
        with suppress(OSError):
            self._device = os.stat(self.root).st_dev  # it may have been mounted anew
        self._position = self._announced = self._told = position
        self._send(_FIRST)

    def advance(self, count: int = 1) -> None:
        """The reader is about to read the next `count` files."""
        self._position = min(self._position + count, len(self._order))
        if self._position - self._told >= _STEP or time.monotonic() - self._told_at > _EVERY:
            self._send(_MORE)

    def end(self) -> None:
        """The reader has asked for all that it will read in this epoch."""
        if self._told < self._position or self._told_length != len(self._order):
            self._send(0)

    def _send(self, most: int) -> None:
        """Tell the position, and announce up to `most` files more."""
        self._announced = max(self._announced, self._position)
        count = max(0, min(most, self._position + _WINDOW - self._announced))  # the order may have no end
        now = time.monotonic()
        if now < self._quiet_until or os.getpid() != self._owner:
            return
        numbers = array("Q")
        if count:
            for file in self._order[self._announced : self._announced + count]:
                numbers.append(self._number(file))
                if time.monotonic() - now > _HELD_UP:
                    break
        if sys.byteorder == "big":
            numbers.byteswap()
        count, start, length = len(numbers), self._announced, len(self._order)
        fields = (self.job, self.reader, self._epoch, length, self._position, start)
        message = bytearray(_HEADER.pack(_MAGIC, count, *fields) + numbers.tobytes())
        self._told, self._told_at, self._told_length = self._position, now, length
        try:
            # Opened each time, which costs no message: a descriptor that is kept would keep the mount busy.
            root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(root, _COMMAND | len(message) << 16, message)
            finally:
                os.close(root)
            self._announced += count
        except OSError as e:
            # Nobody who trains wants to hear of it, unless he asks.
            log.debug("no hints to %s: %s", self.root, e)
            self._quiet_until = now + _PAUSE
