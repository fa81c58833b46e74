"""Mounts of coordlfs for the tests: made through the command line, and gone at the end whatever happened.

A reader of a mount whose server hangs cannot be interrupted by Python, least of all one that faults on a mapping. So a
watchdog, a process of its own, kills the supervisor of a mount that lives too long: the kernel then fails every
request, the test fails, and the next one can run.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from coordlfs_tools.lab.cgroups import Cgroup as Cgroup
from coordlfs_tools.lab.machine import drop_caches as drop_caches  # of all tests, so that yours has to be `alone`
from coordlfs_tools.lab.mounts import is_mounted as is_mounted
from coordlfs_tools.lab.mounts import mountpoints as mountpoints
from coordlfs_tools.lab.mounts import unmount_lazily as unmount_lazily
from coordlfs_tools.lab.processes import children as children
from coordlfs_tools.lab.processes import doing, memory
from coordlfs_tools.lab.processes import is_alive as is_alive

from coordlfs.kernel import pages
from coordlfs.kernel.writeback import write_back

COORDLFS = [sys.executable, "-m", "coordlfs"]
PAGE = 4096
MIB = 1 << 20
CHUNK = 16 * MIB
NOBODY = 65534
# Seconds that anything may take: where all is well it costs nothing, and a machine may be slow, and busy beside. The
# watchdog of a mount follows, then the limit of a test (pyproject.toml).
PATIENCE = 240.0
_ROUNDS = int(os.environ.get("COORDLFS_TEST_ROUNDS", 30))  # see docs/contributing.md
_WATCHDOG = max(300.0, 10.0 * _ROUNDS)  # seconds that a mount may live


def coordlfs(
    *arguments: object, status: int | None = 0, timeout: float = PATIENCE, inside: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command; the test fails if it does not exit with `status` (None: any) within `timeout` seconds.

    `inside` names the network namespace in which it runs.
    """
    command = [*COORDLFS, *map(os.fsdecode, map(str, arguments))]
    if inside is not None:
        # And not `ip netns exec`, which would give it a mount namespace of its own.
        command = ["nsenter", f"--net=/run/netns/{inside}", *command]
    done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", timeout=timeout)
    if status is not None:
        assert done.returncode == status, f"{command} exited with {done.returncode}: {done.stdout}{done.stderr}"
    return done


def script(text: str, *arguments: object, timeout: float = PATIENCE, **options: Any) -> str:
    """Run a Python program in a process of its own; what it printed. The test fails if the program does."""
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, **options
    )
    assert done.returncode == 0, f"exited with {done.returncode}: {done.stdout}{done.stderr}"
    printed: str = done.stdout
    return printed


def eventually(condition: Callable[[], object], timeout: float = PATIENCE, what: str = "") -> None:
    """Wait until `condition` holds; the test fails if it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or condition}"
        time.sleep(0.01)


# -- processes and mounts as the kernel shows them ----------------------------------------------------------------


def mentions(text: str | Path) -> list[int]:
    """The coordlfs processes whose command line mentions `text`."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as f:
                command = f.read()
                if b"coordlfs." in command and os.fsencode(text) in command and is_alive(int(entry)):
                    found.append(int(entry))
    return found


# -- a mount ------------------------------------------------------------------------------------------------------


class Mount:
    """One mount under test.

    `expect_errors`: the test makes the server fail, so that its log and its restarts prove nothing.
    """

    def __init__(self, source: Path, path: Path, log: Path) -> None:
        self.source = source
        self.path = path
        self.log = log
        self.expect_errors = False
        self.processes: dict[str, Any] = self.stats()["processes"]
        self.supervisor: int = self.processes["supervisor"]
        command = f"sleep {_WATCHDOG}; kill -KILL {self.supervisor}"
        self._watchdog = subprocess.Popen(["sh", "-c", command], start_new_session=True)

    @property
    def pids(self) -> list[int]:
        """Every process of the mount that runs now."""
        return [pid for pid in [self.supervisor, *children(self.supervisor)] if is_alive(pid)]

    def stats(self) -> dict[str, Any]:
        """The figures, by the extended attribute."""
        figures: dict[str, Any] = json.loads(os.getxattr(self.path, "user.coordl.stats"))
        return figures

    def source_bytes(self) -> int:
        """Bytes read from the source so far."""
        return int(self.stats()["source"]["bytes"])

    def cached(self, name: str) -> str:
        """How a file stands with the cache: pinned, partial or no."""
        return os.getxattr(self.path / name, "user.coordl.cached").decode()

    def settle(self) -> dict[str, Any]:
        """Wait until nothing is on its way into the cache or out of it; the figures then."""
        quiet = 0
        before: tuple[int, int] | None = None
        deadline = time.monotonic() + PATIENCE
        while quiet < 3:
            figures = self.stats()
            now = figures["requests"]["read"], figures["pinned_items"]
            quiet = quiet + 1 if figures["pending_items"] == 0 and now == before else 0
            before = now
            assert time.monotonic() < deadline, f"the cache does not settle: {figures}"
            time.sleep(0.03)
        return figures

    def read_all(self, names: Sequence[str], seed: int = 0, readers: int = 4) -> float:
        """Read every file once, in random order, with several threads, and compare it with the source.

        How long a read took at most, in seconds.
        """
        order = list(names)
        random.Random(seed).shuffle(order)

        def work(part: list[str]) -> float:
            longest = 0.0
            for name in part:
                began = time.monotonic()
                data = read(self.path / name)
                longest = max(longest, time.monotonic() - began)
                assert data == read(self.source / name), name
            return longest

        with ThreadPoolExecutor(readers) as pool:
            return max(pool.map(work, [order[i::readers] for i in range(readers)]))

    def forget(self) -> None:
        """Have the kernel drop the pages of the files of the mount and of its source, but for what is pinned.

        Other mounts keep what they have, unlike with `drop_caches`. What is pinned stays anyhow; and is not opened,
        since whoever opens pinned files has begun an epoch.
        """
        for path in self.source.rglob("*"):
            if path.is_file() and not path.is_symlink():
                with suppress(OSError):  # it may be gone by now, or closed to all
                    forget(path)
                    ours = self.path / path.relative_to(self.source)
                    if os.getxattr(ours, "user.coordl.cached") != b"pinned":
                        forget(ours)

    @contextmanager
    def messages(self) -> Iterator[dict[str, int]]:
        """How many messages of each kind the body sends; the reading of the figures is not counted."""
        first, second = self.stats()["requests"], self.stats()["requests"]
        sent: dict[str, int] = {}
        yield sent
        last = self.stats()["requests"]
        for kind in ("read", "name", "refused", "ioctl"):
            sent[kind] = last[kind] - second[kind] - (second[kind] - first[kind])

    def end(self) -> None:
        """Unmount by one way or another; the test fails if anything is left, or went wrong unasked."""
        problems = []
        pids = self.pids
        with suppress(OSError):
            os.killpg(self._watchdog.pid, signal.SIGKILL)
        self._watchdog.wait()
        if is_mounted(self.path):
            if not self.expect_errors and (server := self.stats()["processes"]["server"]) != self.processes["server"]:
                problems.append(f"the server was restarted as {server}")
            with suppress(subprocess.TimeoutExpired):
                done = coordlfs("umount", self.path, status=None)
                if done.returncode:
                    problems.append(f"umount: {done.stderr}")
        if is_mounted(self.path):
            problems.append(f"{self.path} was still mounted")
            unmount_lazily(self.path)
        deadline = time.monotonic() + 60
        while any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in filter(is_alive, pids):
            problems.append(f"process {pid} was left: {doing(pid)}")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        if not self.expect_errors and any(word in log for word in ("ERROR", "CRITICAL", "Traceback")):
            problems.append(f"the log says:\n{log}")
        problems += [line for line in log.splitlines() if "imported only now" in line]
        assert not problems, "\n".join(problems)


MakeMount = Callable[..., Mount]

# -- data ---------------------------------------------------------------------------------------------------------


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that no mistake makes by chance."""
    return random.Random(f"{size} {seed}").randbytes(size)


def write_files(directory: Path, count: int, size: int) -> list[str]:
    """Files of `size` random bytes each, every one different; their names."""
    names = [f"item-{number:05}" for number in range(count)]
    for number, name in enumerate(names):
        (directory / name).write_bytes(noise(size, number))
    write_back(directory)
    return names


def read(path: Path | str | bytes) -> bytes:
    """A whole file by open, read and close, and nothing else (Python's `open` also asks whether it is a terminal)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        parts = []
        while part := os.read(fd, MIB):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def read_by_mmap(path: Path) -> bytes:
    """A whole file through a mapping."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        if not size:
            return b""
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
            return mapped[:]
    finally:
        os.close(fd)


def raises(code: int, action: Callable[[], object]) -> None:
    """The test fails unless `action` fails with the error number `code`."""
    with pytest.raises(OSError) as caught:
        action()
    assert caught.value.errno == code, f"{caught.value} instead of {errno.errorcode[code]}"


def resident(path: Path) -> int:
    """How many pages of a file are in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        found = pages.resident(fd)
        assert found is not None, "this kernel has no cachestat"
        return found
    finally:
        os.close(fd)


def forget(path: Path) -> None:
    """Have the kernel drop the pages of a file that nobody holds."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def locked(pids: list[int]) -> int:
    """Bytes that these processes have locked, as the kernel counts them."""
    return sum(memory(pid, "VmLck") for pid in pids)


def page_count(size: int) -> int:
    """How many pages a file of `size` bytes takes up."""
    return -(-size // PAGE)


# -- memory -------------------------------------------------------------------------------------------------------


_HOLD = """
import sys
held = bytearray(int(sys.argv[1]))
held[::4096] = b"x" * len(range(0, len(held), 4096))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(nbytes: int, group: Cgroup | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that has written to so much memory."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=group.enter if group else None,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
