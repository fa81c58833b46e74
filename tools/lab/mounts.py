"""Mounts for the length of a `with`: coordlfs through its public commands, and those it is compared with.

Knows nothing of what is read from them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordlfs_tools.lab.cgroups import Cgroup
from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.network import Host

from coordlfs.kernel.mounts import table, unmount

_LIMIT = 120.0  # seconds that a command may take
_QUIET = 4  # times that the figures are the same before nothing more is taken to come
COORDLFS = str(Path(sys.executable).with_name("coordlfs"))


@dataclass(frozen=True, slots=True)
class Mount:
    """A coordlfs mount that serves."""

    point: Path
    host: Host | None = None
    said: str = ""  # by `coordlfs mount`

    def status(self) -> dict[str, Any]:
        """The figures of `coordlfs status --json`."""
        figures: dict[str, Any] = json.loads(command("status", "--json", self.point).stdout)
        return figures

    def settled(self) -> dict[str, Any]:
        """The figures as soon as no item is on its way into the cache any more."""
        deadline = time.monotonic() + _LIMIT
        while (figures := self.status())["pending_items"]:
            if time.monotonic() > deadline:
                raise LabError(f"{figures['pending_items']} items are still on their way after {_LIMIT:.0f} s")
            time.sleep(0.2)
        return figures

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The processes of the mount get no time meanwhile; hits need none of them."""
        processes = self.status()["processes"]
        pids = [processes["supervisor"], processes["server"], *processes["keepers"]]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    @contextmanager
    def scraped(self, seconds: float) -> Iterator[None]:
        """Somebody asks for its metrics every so many seconds."""
        [url] = re.findall(r"^metrics: (\S+)$", self.said, re.MULTILINE)
        ended = threading.Event()

        def scrape() -> None:
            while not ended.wait(seconds):
                with urllib.request.urlopen(url, timeout=_LIMIT) as reply:
                    reply.read()

        thread = threading.Thread(target=scrape)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def wait_for_peers(self, count: int) -> None:
        """Return when so many other nodes are alive."""
        deadline = time.monotonic() + _LIMIT
        while self.status()["peers"]["alive"] != count:
            if time.monotonic() > deadline:
                raise LabError(f"{self.point} does not find {count} other nodes")
            time.sleep(0.2)

    def warm(self) -> None:
        """Fill the cache."""
        command("warm", self.point, host=self.host)  # its socket is the network's


class RequestCount:
    """Counts the requests that a mount's server receives, but for those that reading the status costs."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        before, self._start = _requests(mount), _requests(mount)
        self._status_costs = self._start - before

    def so_far(self) -> int:
        """Requests since the count was begun; to be called once."""
        return _requests(self._mount) - self._start - self._status_costs


def _requests(mount: Mount) -> int:
    requests = mount.status()["requests"]
    return sum(int(requests[kind]) for kind in ("read", "name", "refused", "ioctl"))


def command(
    *arguments: object, host: Host | None = None, group: Cgroup | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `coordlfs` with these arguments, in the network of `host` and in `group`.

    Raises LabError with what it says if it fails and `check` is left, and TimeoutExpired.
    """
    argv = [COORDLFS, *map(str, arguments)]
    done = subprocess.run(
        host.inside(argv) if host else argv,
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        preexec_fn=group.enter if group else None,
    )
    if check and done.returncode:
        raise LabError(f"{' '.join(argv)}: {(done.stderr + done.stdout).strip() or f'status {done.returncode}'}")
    return done


def mountpoints() -> list[bytes]:
    """Every mountpoint of this namespace, in the order of the mounts."""
    return [mount.point for mount in table()]


def is_mounted(point: Path) -> bool:
    """Whether anything is mounted on `point`.

    From the table, since to look at a mount that is dead or hangs would be worse than an answer.
    """
    return os.fsencode(point) in mountpoints()


def unmount_lazily(point: Path) -> None:
    """Detach whatever is mounted on `point`, one mount on top of the other."""
    with suppress(OSError):
        while is_mounted(point):
            unmount(os.fsencode(point), lazy=True)


@contextmanager
def _mountpoint() -> Iterator[Path]:
    """An empty directory, which at the end is unmounted if it must be, and removed."""
    point = Path(tempfile.mkdtemp(prefix="coordlfs-lab-"))
    try:
        yield point
    finally:
        unmount_lazily(point)
        point.rmdir()


@contextmanager
def coordlfs(
    source: Path | str,
    cache_size: int,
    group: Cgroup | None = None,
    *,
    options: Sequence[str] = (),
    host: Host | None = None,
) -> Iterator[Mount]:
    """`source` mounted with `cache_size` bytes of cache by processes of `group`; ended when the `with` ends.

    `host`: in whose network.
    """
    with _mountpoint() as point:
        done = command("mount", source, point, "--cache-size", cache_size, *options, host=host, group=group)
        try:
            yield Mount(point, host, done.stdout)
        finally:
            command("umount", point)


@contextmanager
def _served(program: str, *arguments: str) -> Iterator[Path]:
    """A mount by a program that stays in the foreground; MNT among its arguments stands for the mountpoint."""
    if shutil.which(program) is None:
        raise LabError(f"{program} is not installed: `apt-get install {program}`")
    with _mountpoint() as point:
        argv = [program, *(str(point) if a == "MNT" else a for a in arguments)]
        process = subprocess.Popen(argv, start_new_session=True)
        try:
            deadline = time.monotonic() + _LIMIT
            while not is_mounted(point):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise LabError(f"{' '.join(argv)} did not mount")
                time.sleep(0.02)
            yield point
        finally:
            if is_mounted(point):
                subprocess.run(["umount", str(point)], timeout=_LIMIT, check=False)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def bindfs(source: Path, *, writable: bool = False) -> Iterator[Path]:
    """bindfs, as fast as it goes: with threads and the kernel's cache."""
    how = [] if writable else ["-r", "-o", "kernel_cache"]
    with _served("bindfs", "-f", "--multithreaded", *how, str(source), "MNT") as point:
        yield point


@contextmanager
def rclone(source: Path, cache_mode: str) -> Iterator[Path]:
    """rclone mount with `--vfs-cache-mode` off or full, its cache empty."""
    with tempfile.TemporaryDirectory(prefix="coordlfs-lab-") as cache:
        options = ["--read-only", "--vfs-cache-mode", cache_mode, "--cache-dir", cache, "--config", ""]
        with _served("rclone", "mount", *options, str(source), "MNT") as point:
            yield point


@dataclass(frozen=True, slots=True)
class Pinned:
    """A directory of which coordlfs keeps pages in memory."""

    point: Path  # the directory itself

    def status(self) -> dict[str, Any]:
        """The figures of `coordlfs status --json`."""
        figures: dict[str, Any] = json.loads(command("status", "--json", self.point).stdout)
        return figures

    def settled(self) -> dict[str, Any]:
        """The figures as soon as all files are known, and as many pinned as fit, or as long as any more come to be."""
        deadline, quiet, before = time.monotonic() + _LIMIT, 0, -1
        while quiet < _QUIET:
            figures = self.status()
            is_still = figures["dataset"]["is_known"] and not figures["pending_items"]
            quiet = quiet + 1 if is_still and figures["pinned_items"] == before else 0
            before = figures["pinned_items"]
            if time.monotonic() > deadline:
                raise LabError(f"{before} items are pinned after {_LIMIT:.0f} s, and more come")
            time.sleep(0.2)
        return figures


@contextmanager
def pinned(
    directory: Path, cache_size: int, group: Cgroup | None = None, *, options: Sequence[str] = ()
) -> Iterator[Pinned]:
    """`directory` pinned, up to `cache_size` bytes, by processes of `group`; let go of when the `with` ends."""
    command("pin", directory, "--cache-size", cache_size, *options, group=group)
    try:
        yield Pinned(directory)
    finally:
        command("unpin", directory)


@contextmanager
def vmtouch(paths: Sequence[Path], group: Cgroup | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """`vmtouch -l` of these files, by a process of `group`: it locks them one after the other, and stays."""
    if shutil.which("vmtouch") is None:
        raise LabError("vmtouch is not installed: `apt-get install vmtouch`")
    with tempfile.NamedTemporaryFile(prefix="coordlfs-lab-") as names:
        names.write(b"\n".join(map(os.fsencode, paths)) + b"\n")
        names.flush()
        process = subprocess.Popen(
            ["vmtouch", "-q", "-l", "-b", names.name],
            stdout=subprocess.DEVNULL,
            preexec_fn=group.enter if group else None,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
