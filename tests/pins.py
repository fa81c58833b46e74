"""Directories that are pinned, for the tests: by the command line, and let go of at the end whatever happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from coordlfs_tools.lab.processes import doing
from mounts import MIB, PAGE, PATIENCE, children, coordlfs, eventually, is_alive

from coordlfs.commands import pinned
from coordlfs.kernel import pages


class Pinned:
    """One directory that is pinned.

    `expect_errors`: the test makes processes fail, so that the log and their restarts prove nothing.
    """

    def __init__(self, directory: Path, log: Path) -> None:
        self.directory = directory
        self.log = log
        self.expect_errors = False
        self.processes: dict[str, Any] = self.stats()["processes"]
        self.supervisor: int = self.processes["supervisor"]

    @property
    def pids(self) -> list[int]:
        """Every process of it that runs now."""
        return [pid for pid in [self.supervisor, *children(self.supervisor)] if is_alive(pid)]

    @property
    def keepers(self) -> list[int]:
        """Its keepers that run now."""
        keepers: list[int] = self.stats()["processes"]["keepers"]
        return keepers

    def stats(self) -> dict[str, Any]:
        """The figures."""
        return pinned.stats(str(self.directory))

    def settle(self, condition: Callable[[dict[str, Any]], object] = lambda figures: True) -> dict[str, Any]:
        """Wait until all files are known, nothing is on its way and `condition` holds; the figures then."""
        deadline = time.monotonic() + PATIENCE
        quiet, before = 0, None
        while quiet < 4:
            figures = self.stats()
            is_still = figures["dataset"]["is_known"] and not figures["pending_items"] and condition(figures)
            quiet = quiet + 1 if is_still and figures["pinned_items"] == before else 0
            before = figures["pinned_items"]
            assert time.monotonic() < deadline, f"it does not settle: {figures}\n{self.log.read_text()}"
            time.sleep(0.05)
        return figures

    def full(self) -> dict[str, Any]:
        """Wait until all files are pinned."""
        return self.settle(lambda figures: figures["pinned_items"] == figures["dataset"]["items"])

    def end(self) -> None:
        """Let go; the test fails if anything is left, or went wrong unasked."""
        problems = []
        pids = self.pids
        if is_alive(self.supervisor):
            done = coordlfs("unpin", self.directory, status=None)
            if done.returncode:
                problems.append(f"unpin: {done.stderr}")
        with suppress(AssertionError):
            eventually(lambda: not any(map(is_alive, pids)), 60)
        for pid in filter(is_alive, pids):
            problems.append(f"process {pid} was left: {doing(pid)}")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        if not self.expect_errors and any(word in log for word in ("ERROR", "CRITICAL", "Traceback")):
            problems.append(f"the log says:\n{log}")
        assert not problems, "\n".join(problems)


@contextmanager
def disk(kind: str, place: Path, *options: str) -> Iterator[Path]:
    """A file system of its own, on a disk that is a file of 400 MiB; `options` are for mkfs."""
    image, point = place / "image", place / "disk"
    point.mkdir()
    with image.open("wb") as f:
        f.truncate(400 * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", *options, image], check=True, timeout=PATIENCE)
    subprocess.run(["mount", "-o", "loop", image, point], check=True, timeout=PATIENCE)
    try:
        yield point
    finally:
        if os.path.ismount(point):
            subprocess.run(["umount", "-l", point], check=True, timeout=PATIENCE)


MakePin = Callable[..., Pinned]


def held(pids: Iterable[int], directory: Path) -> dict[str, int]:
    """Which files of a directory these processes have locked, by their paths in it, and how many pages of each."""
    found: dict[str, int] = {}
    prefix = f"{directory}/"
    for pid in pids:
        path, length = "", 0
        for line in Path(f"/proc/{pid}/smaps").read_text(errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            if "-" in fields[0] and not fields[0].endswith(":"):
                start, _, end = fields[0].partition("-")
                path, length = fields[5] if len(fields) > 5 else "", int(end, 16) - int(start, 16)
            elif line.startswith("VmFlags:") and " lo" in line and path.startswith(prefix):
                name = path.removeprefix(prefix)
                found[name] = found.get(name, 0) + length // PAGE
    return found


def drop(*paths: Path) -> None:
    """Have the kernel drop the pages of files that nobody holds."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident(path: Path) -> int:
    """How many pages of a file are in memory; by a mapping, since some file systems do not tell it otherwise."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        if not size:
            return 0
        address = pages.map_file(fd, 0, size)
        try:
            return sum(count for _, count in pages.resident_runs(address, size))
        finally:
            pages.unmap(address, size)
    finally:
        os.close(fd)


def read_in(group: Callable[[], None] | None, *paths: Path) -> None:
    """Have a process, which `group` puts into its cgroup, read files."""
    subprocess.run(["cat", *map(str, paths)], stdout=subprocess.DEVNULL, preexec_fn=group, check=True, timeout=PATIENCE)
