"""Where the jobs of a group meet, and how they talk: a Unix socket in the user's own directory, frames of JSON.

The directory is /tmp/coordlfs-UID (or what COORDLFS_RUNTIME_DIR names), for the user alone; `XDG_RUNTIME_DIR` would
differ between a shell and a batch job of the same user. A packet of the SOCK_SEQPACKET socket is a message, whole or
not at all, so that even a finalizer may send one at any time; a descriptor may come with it. It does not know what the
messages mean.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import socket
import stat
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

PROTOCOL = 3  # of what jobs, workers and brokers say to each other: those of another do not understand it
MAX_PACKET = 1 << 15
LEAST_STAGE = 1 << 16  # bytes
_STARTING = 30.0  # seconds that a broker may take to start
_FDS = socket.CMSG_SPACE(4 * array("i").itemsize)
_CREDENTIALS = struct.Struct("3i")

Message = dict[str, Any]


class Refused(RuntimeError):
    """The group does not take this job; the message says why."""


class NoDescriptors(RuntimeError):
    """A process has no descriptor left."""

    def __init__(self, text: str | None = None) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        super().__init__(
            text
            or f"coordlfs: no descriptor is left: a process may have {limit}. "
            "Raise the limit (`ulimit -n`), or close what the dataset opens"
        )


@contextmanager
def descriptors() -> Iterator[None]:
    """Raises NoDescriptors where it is this that an error says."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            raise NoDescriptors from e
        raise


def directory() -> Path:
    """The user's own directory for sockets, made if it is not there. Raises RuntimeError where it is not safe."""
    path = Path(os.environ.get("COORDLFS_RUNTIME_DIR") or f"/tmp/coordlfs-{os.geteuid()}")
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise RuntimeError(f"{path} must be a directory of this user that nobody else may enter (mode 0700)")
    return path


def socket_path(group: str) -> Path:
    """The socket of a group. Names may be any text; what they are is told by the broker."""
    return directory() / f"{blake2b(group.encode('utf-8', 'surrogateescape'), digest_size=12).hexdigest()}.sock"


@contextmanager
def address(path: Path) -> Iterator[str]:
    """A name of `path` that a socket takes, which a path longer than 107 bytes is not."""
    above = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{above}/{path.name}"
    finally:
        os.close(above)


def peer(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def connect(path: Path) -> socket.socket:
    """Connect to a broker that runs. Raises ConnectionError or FileNotFoundError where there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with address(path) as name:
            sock.connect(name)
        if os.geteuid() and peer(sock)[1] not in (0, os.geteuid()):
            raise RuntimeError(f"{path} belongs to another user")
    except BaseException:
        sock.close()
        raise
    return sock


def connect_or_start(group: str) -> socket.socket:
    """Connect to the group's broker, after starting one if there is none. Raises RuntimeError."""
    path = socket_path(group)
    broker: subprocess.Popen[bytes] | None = None
    deadline = time.monotonic() + _STARTING
    while True:
        try:
            sock = connect(path)
        except (FileNotFoundError, ConnectionError):
            sock = None
        if sock is not None:
            if broker is not None:
                assert broker.stderr is not None
                broker.stderr.close()
                broker.wait()  # its child is the broker, or somebody else's is
            return sock
        if broker is None:
            broker = _start(path, group)
        elif broker.poll() is not None:
            assert broker.stderr is not None
            said = broker.stderr.read().decode(errors="replace").strip()
            broker.stderr.close()
            if broker.returncode:
                raise RuntimeError(f"the broker of group {group!r} did not start: {said or broker.returncode}")
            broker = None  # another job's was first
        if time.monotonic() > deadline:
            raise RuntimeError(f"the broker of group {group!r} did not answer within {_STARTING:g} s")
        time.sleep(0.005)


def _start(path: Path, group: str) -> subprocess.Popen[bytes]:
    # A process of its own, which imports no torch, outlives the job, and has none of the terminal's signals. -P: a
    # file in the working directory that is called like a module of the library must not be taken for it.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "coordlfs_loader.broker", os.fspath(path), group],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def lock(path: str) -> int | None:
    """The lock of who is the broker, as long as this process lives; None if somebody else is."""
    while True:
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(f"{path}.lock").st_ino == os.fstat(fd).st_ino:
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass
        os.close(fd)  # the last broker removed it meanwhile


def unlink(path: str) -> None:
    """Remove a broker's socket and lock. Only who holds the lock does."""
    for leftover in (path, f"{path}.lock"):
        with suppress(FileNotFoundError):
            os.unlink(leftover)


def sweep(group: str) -> None:
    """Remove what a broker left behind that was killed, unless there is another."""
    path = os.fspath(socket_path(group))
    fd = lock(path)
    if fd is not None:
        unlink(path)
        os.close(fd)


def send(sock: socket.socket, message: Message, fd: int | None = None, flags: int = 0) -> None:
    """Send a message, and a descriptor with it. Raises OSError."""
    data = json.dumps(message).encode()
    if fd is None:
        sock.send(data, flags)
    else:
        socket.send_fds(sock, [data], [fd], flags)


def receive(sock: socket.socket) -> tuple[Message, int | None] | None:
    """A message and the descriptor that came with it; None at the end.

    Raises OSError, ValueError for what is no message, NoDescriptors.
    """
    data, ancillary, flags, _ = sock.recvmsg(MAX_PACKET, _FDS, socket.MSG_CMSG_CLOEXEC)
    fds = array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    try:
        if not data:
            return None
        if flags & socket.MSG_CTRUNC and not fds:
            raise NoDescriptors
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > 1:
            raise ValueError("a packet is too large")
        try:
            message = json.loads(data)
        except RecursionError:
            raise ValueError("a packet is nested too deeply") from None
        if not isinstance(message, dict) or not isinstance(message.get("verb"), str):
            raise ValueError("a packet is no message")
        fd = fds.pop() if fds else None
        return message, fd
    finally:
        for fd_ in fds:
            os.close(fd_)


def integer(message: Message, key: str, low: int = 0, high: int = 1 << 62) -> int:
    """A field that must be an integer within bounds. Raises ValueError."""
    value = message.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{key} is not an integer from {low} to {high}")
    return value


def text(message: Message, key: str) -> str:
    """A field that must be text. Raises ValueError."""
    value = message.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is not text")
    return value
