"""What is pinned: finding the pinner of a directory, and asking it for its figures.

Its control socket is named after the directory's device and inode and after the user, so that it is found by the
directory, there is one for each, and nothing is left of it when its processes are gone. Who it is that listens is asked
of the kernel. It must not know how a directory comes to be pinned.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from typing import Any

from coordlfs.commands.client import Connection, relative
from coordlfs.errors import UserError
from coordlfs.kernel import paths as kernel_paths
from coordlfs.kernel import process

_PREFIX = b"coordlfs-pin-"
# Seconds that a pinner may take to answer, one that the user did not name, and any of a user whose last one did not.
_ANSWER, _ANSWER_UNASKED, _ANSWER_OF_SILENT = 120.0, 5.0, 0.02
# Seconds until it has taken a connection, by the same: until then it may be anybody's.
_CONNECTED, _CONNECTED_UNASKED = 5.0, 0.02


def _name(directory: str, user: int) -> bytes:
    st = os.stat(directory)
    return _PREFIX + b"%d-%x-%x" % (user, st.st_dev, st.st_ino)


def _user(name: bytes) -> int | None:
    """Whose socket it is by its name, which anybody may have given to one."""
    digits = name.removeprefix(_PREFIX).partition(b"-")[0]
    return int(digits) if digits.isdigit() else None


def listen(directory: str) -> socket.socket:
    """The control socket for a directory that is about to be pinned. Raises UserError if it is pinned already."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(b"\0" + _name(directory, os.geteuid()))
    except OSError as e:
        sock.close()
        if e.errno != errno.EADDRINUSE:
            raise
        if find(directory) is None:  # anybody may give a socket that name
            name = _name(directory, os.geteuid())
            raise UserError(
                f"{directory} cannot be pinned: {_who_listens(name)} has the name of its control socket,"
                f" {os.fsdecode(name)}: end it"
            ) from None
        raise UserError(f"{directory} is pinned already: `coordlfs unpin {directory}` first") from None
    sock.listen(16)
    return sock


def _who_listens(name: bytes) -> str:
    with suppress(OSError), closing(Connection(name, "")) as other:
        return f"process {other.pid} of user {other.user}, which is no pinner of this user's,"
    return "a process that is no pinner of this user's (`ss -xlp` shows which)"


class Pin(Connection):
    """A connection to a pinner that is root's or this user's; of root's, to anybody's. Raises OSError."""

    def __init__(self, name: bytes, directory: str, patience: float = _ANSWER) -> None:
        """`patience`: seconds that each answer may take."""
        super().__init__(name, directory, _CONNECTED if patience == _ANSWER else _CONNECTED_UNASKED)
        self._patience = patience
        if _user(name) != self.user or (self.user not in (0, os.geteuid()) and os.geteuid()):
            self.close()
            raise ConnectionRefusedError(errno.ECONNREFUSED, "it is another user's")

    def _await(self) -> None:
        """Wait for a reply. Who made the socket is gone, and while a pinner is replaced the next one answers."""
        if not process.is_readable(self._sock.fileno(), self._patience):
            raise UserError(f"{self.place} has not answered within {self._patience:.0f} s: see its log")

    def figures(self) -> dict[str, Any]:
        """The figures (docs/reference/status.md)."""
        return self.ask("stats")


def find(directory: str) -> Pin | None:
    """The pinner of a directory, None if there is none: this user's, or root's."""
    real = os.path.realpath(directory)
    for user in dict.fromkeys((os.geteuid(), 0)):
        with suppress(OSError):
            return Pin(_name(real, user), real)
    if os.geteuid() == 0:  # whoever's
        with suppress(OSError):
            place = _name(real, 0).partition(b"-0-")[2]
            for name in _names():
                if name.endswith(b"-" + place):
                    return Pin(name, real, _ANSWER_UNASKED)
    return None if os.path.lexists(real) else _by_name(real)


def _by_name(directory: str) -> Pin | None:
    """The pinner, of this user, of a directory that had this name when it was pinned, and was renamed."""
    for name in _names():
        if _user(name) == os.geteuid():
            with suppress(OSError, UserError), closing(Pin(name, directory, _ANSWER_UNASKED)) as pin:
                if pin.figures()["source_path"] == directory:
                    return Pin(name, directory)
    return None


def is_pinned(directory: str) -> bool:
    """Whether there is a pinner of a directory that this user may ask."""
    pin = find(directory)
    if pin is not None:
        pin.close()
    return pin is not None


def of(directory: str) -> Pin:
    """The pinner of a directory. Raises UserError if there is none."""
    pin = find(directory)
    if pin is None:
        raise UserError(f"{directory} is not pinned: `coordlfs status` lists what is")
    return pin


def stats(directory: str) -> dict[str, Any]:
    """The figures of a directory that is pinned. Raises UserError."""
    pin = of(directory)
    try:
        return pin.figures()
    finally:
        pin.close()


def refresh(directory: str, paths: list[str]) -> dict[str, int]:
    """Have the files and directories named (or all) compared with what is there; what was done. Raises UserError."""
    pin = of(directory)
    try:
        named = relative(pin.place, paths) or [b""]
        return pin.ask("refresh", paths=[kernel_paths.to_text(path) for path in named])
    finally:
        pin.close()


def everything() -> list[Callable[[], dict[str, Any]]]:
    """What gives the figures of each directory that is pinned in this network namespace. Each may raise UserError.

    A user whose pinner has not answered is not waited for again.
    """
    silent: set[int | None] = set()
    return [partial(_figures, name, silent) for name in _names()]


def _figures(name: bytes, silent: set[int | None]) -> dict[str, Any]:
    user = _user(name)
    try:
        pin = Pin(name, f"what user {user} pins", _ANSWER_OF_SILENT if user in silent else _ANSWER_UNASKED)
    except OSError as e:
        raise UserError(f"a directory that is pinned does not say more: {e.strerror}") from None
    silent.add(user)
    with closing(pin):
        figures = pin.figures()
    silent.discard(user)
    return figures


def _names() -> list[bytes]:
    """The control sockets that there are."""
    with open("/proc/net/unix", "rb") as f:
        names = [line.rstrip(b"\n").rpartition(b" @")[2] for line in f if b" @" + _PREFIX in line]
    return list(dict.fromkeys(names))  # those that are connected have the name as well
