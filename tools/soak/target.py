"""The mounts that a soak reads: made by coordlfs's commands, known by their processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordlfs_tools.bench.machine import Group

COORDLFS = str(Path(sys.executable).with_name("coordlfs"))
_LIMIT = 90.0  # seconds that a command may take


@dataclass(frozen=True, slots=True)
class Target:
    """A mount. `fails`: its source is one that fails when it is told to."""

    point: Path
    log: Path
    supervisor: int
    fails: bool

    def status(self) -> dict[str, Any]:
        """The figures of `coordlfs status --json`."""
        figures: dict[str, Any] = json.loads(command("status", "--json", self.point).stdout)
        return figures

    def processes(self, module: str) -> list[int]:
        """Those of the mount's processes that run a module of this name of coordlfs, as soon as they are started."""
        suffix = "." + module
        return [
            pid
            for pid in children(self.supervisor)
            if any(word.startswith("coordlfs.") and word.endswith(suffix) for word in _words(pid))
        ]

    def is_mounted(self) -> bool:
        """Whether anything is mounted at its mountpoint; nobody is asked but the kernel."""
        return is_mounted(self.point)


def is_mounted(point: Path) -> bool:
    """From the table, since to look at a mount that is dead or hangs would be worse than an answer."""
    return any(line.split()[4] == str(point) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def command(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `coordlfs` with these arguments. Raises CalledProcessError, TimeoutExpired."""
    return subprocess.run([COORDLFS, *map(str, arguments)], capture_output=True, text=True, timeout=_LIMIT, check=check)


def _words(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return []


def children(parent: int) -> list[int]:
    """The processes whose parent is `parent`, but for those that have ended."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                state, of = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if int(of) == parent and state not in "ZX":
                    found.append(int(entry))
    return found


@contextmanager
def mounted(
    source: Path, point: Path, cache: int, options: Sequence[str], *, fails: bool, group: Group | None
) -> Iterator[Target]:
    """`source` mounted on `point`, by processes of `group`; whatever happens, nothing of it is left."""
    point.mkdir()
    log = point.with_suffix(".log")
    arguments = ["mount", str(source), str(point), "--cache-size", str(cache), "--log-file", str(log), *options]
    subprocess.run(
        [COORDLFS, *arguments],
        check=True,
        timeout=_LIMIT,
        capture_output=True,
        preexec_fn=group.join if group else None,
    )
    supervisor = json.loads(command("status", "--json", point).stdout)["processes"]["supervisor"]
    try:
        yield Target(point, log, supervisor, fails)
    finally:
        end(supervisor, point)


def end(supervisor: int, point: Path) -> None:
    """Leave nothing of a mount, even if it hangs: with its processes, the kernel ends every request."""
    if is_mounted(point):
        subprocess.run(["umount", "-l", str(point)], check=False, timeout=_LIMIT)
    deadline = time.monotonic() + 10
    while _words(supervisor) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in [supervisor, *children(supervisor)] if _words(supervisor) else []:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
