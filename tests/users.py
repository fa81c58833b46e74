"""Ordinary users for the tests, which run as root: accounts that every Linux has, and an installation they may read.

The checkout, its environment and Python itself may lie where nobody but root may go: they are bound to a place that is
open to all.
"""

from __future__ import annotations

import json
import os
import pickle
import pwd
import resource
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mounts import PATIENCE, children, eventually, is_alive, is_mounted, unmount_lazily

T = TypeVar("T")

# As root: have `unshare` say EPERM if it is to make a user namespace, as many a container does; become somebody; go on.
_FORBID_NAMESPACES = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
load, equal, any_of, answer = 0x20, 0x15, 0x45, 0x06
number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
program = b"".join(struct.pack("=HBBI", *step) for step in (
    (load, 0, 0, 0), (equal, 0, 3, number), (load, 0, 0, 16), (any_of, 0, 1, 0x10000000),
    (answer, 0, 0, 0x50000 | 1), (answer, 0, 0, 0x7FFF0000)))
code = ctypes.create_string_buffer(program)
filter = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
assert libc.prctl(22, 2, filter, 0, 0) == 0, os.strerror(ctypes.get_errno())
uid, gid = int(sys.argv[1]), int(sys.argv[2])
os.setgroups([]); os.setresgid(gid, gid, gid); os.setresuid(uid, uid, uid)
os.execv(sys.argv[3], sys.argv[3:])
"""


@contextmanager
def installation(place: Path) -> Iterator[Path]:
    """Binds Python, its packages and the checkout beneath `place`, which anybody may enter."""
    import coordlfs

    assert coordlfs.__file__ is not None
    bound = {
        "python": Path(sys.base_prefix),
        "site": Path(sysconfig.get_path("purelib")),
        "packages/coordlfs": Path(coordlfs.__file__).parent,
    }
    with ExitStack() as stack:
        for name, original in bound.items():
            (place / name).mkdir(parents=True)
            subprocess.run(["mount", "--bind", original, place / name], check=True)
            stack.callback(unmount_lazily, place / name)
        yield place


@contextmanager
def open_device(mode: int = 0o666) -> Iterator[None]:
    """/dev/fuse with a mode, by default udev's own, by which everybody may open it: for this mount namespace only."""
    number = os.stat("/dev/fuse").st_rdev
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coordlfs-device-")))
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", place], check=True)
        stack.callback(unmount_lazily, place)
        os.mknod(place / "fuse", stat.S_IFCHR, number)
        os.chmod(place / "fuse", mode)
        subprocess.run(["mount", "--bind", place / "fuse", "/dev/fuse"], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", "/dev/fuse"], check=True)
        yield


@dataclass
class User:
    """An ordinary user."""

    name: str
    installation: Path
    memlock: int | None = None  # RLIMIT_MEMLOCK of what it runs, in bytes
    groups: tuple[int, ...] = ()
    namespaces: bool = True  # whether it may make user namespaces

    @property
    def uid(self) -> int:
        return pwd.getpwnam(self.name).pw_uid

    @property
    def gid(self) -> int:
        return pwd.getpwnam(self.name).pw_gid

    @property
    def python(self) -> str:
        executable = os.path.realpath(sys.executable)
        return str(self.installation / "python" / os.path.relpath(executable, os.path.realpath(sys.base_prefix)))

    @property
    def coordlfs(self) -> list[str]:
        """The command."""
        return [self.python, "-m", "coordlfs"]

    def _limit(self) -> None:
        if self.memlock is not None:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (self.memlock, self.memlock))

    def run(
        self, *command: object, status: int | None = 0, timeout: float = PATIENCE, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as this user; the test fails if it exits with another status (None: any)."""
        words = [os.fsdecode(str(word)) for word in command]
        identity: dict[str, Any] = {"user": self.uid, "group": self.gid, "extra_groups": self.groups}
        if not self.namespaces:
            words = [sys.executable, "-c", _FORBID_NAMESPACES, str(self.uid), str(self.gid), *words]
            identity = {}
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd="/",
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": f"{self.installation}/packages:{self.installation}/site",
                "PYTHONDONTWRITEBYTECODE": "1",
                "LD_LIBRARY_PATH": f"{self.installation}/python/lib",
                **environment,
            },
            preexec_fn=self._limit,
            **identity,
        )
        if status is not None:
            assert done.returncode == status, f"{words} exited with {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def call(self, *arguments: object, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run `coordlfs` as this user."""
        return self.run(*self.coordlfs, *arguments, status=status)

    def do(self, action: Callable[[], T]) -> T:
        """Have a child of this process do something as this user; what that returned, or raised."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgroups(self.groups)
                os.setresgid(self.gid, self.gid, self.gid)
                os.setresuid(self.uid, self.uid, self.uid)
                result: tuple[bool, Any] = (True, action())
            except BaseException as e:
                result = (False, e)
            with open(writing, "wb") as f:
                f.write(pickle.dumps(result))
            os._exit(0)
        os.close(writing)
        with open(reading, "rb") as f:
            data = f.read()
        os.waitpid(child, 0)
        good, value = pickle.loads(data)
        if not good:
            raise value
        returned: T = value
        return returned


class UserMount:
    """A mount of an ordinary user; ends with the context."""

    def __init__(self, user: User, source: Path, path: Path, *options: object) -> None:
        self.user = user
        self.source = source
        self.path = path
        self.log = path.with_suffix(".log")
        self.said = user.call("mount", source, path, "--log-file", self.log, *options)
        self.supervisor: int = self.stats()["processes"]["supervisor"]

    def stats(self) -> dict[str, Any]:
        """The figures, by the extended attribute."""
        figures: dict[str, Any] = json.loads(self.user.do(lambda: os.getxattr(self.path, "user.coordl.stats")))
        return figures

    def source_bytes(self) -> int:
        """Bytes read from the source so far."""
        return int(self.stats()["source"]["bytes"])

    def read(self, *names: str) -> list[bytes]:
        """Files, of which the page cache has no more at the beginning than what is locked."""

        def action() -> list[bytes]:
            found = []
            for name in names:
                fd = os.open(self.path / name, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                found.append(b"".join(iter(lambda: os.read(fd, 1 << 20), b"")))  # noqa: B023
                os.close(fd)
            return found

        return self.user.do(action)

    def cached(self, *names: str) -> dict[str, str]:
        """How files stand with the cache."""
        return self.user.do(lambda: {n: os.getxattr(self.path / n, "user.coordl.cached").decode() for n in names})

    def settle(self) -> dict[str, Any]:
        """Wait until nothing is on its way into the cache; the figures then."""
        quiet, before = 0, None
        while quiet < 3:
            figures = self.stats()
            now = figures["requests"]["read"], figures["pinned_items"]
            quiet = quiet + 1 if figures["pending_items"] == 0 and now == before else 0
            before = now
        return figures

    @property
    def pids(self) -> list[int]:
        """Every process of the mount that runs now."""
        return [pid for pid in [self.supervisor, *children(self.supervisor)] if is_alive(pid)]

    def gone(self, pids: list[int]) -> bool:
        """Whether nothing of the mount, with processes `pids`, is left, once its processes have ended."""
        eventually(lambda: not any(map(is_alive, pids)))
        return not is_mounted(self.path)

    def end(self) -> None:
        """Leave nothing behind, whatever happened."""
        pids = self.pids
        unmount_lazily(self.path)
        eventually(lambda: not any(map(is_alive, pids)))
