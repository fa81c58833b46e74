"""The mounts that a soak reads: made by coordlfs's commands, known by their processes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordlfs_tools.lab.cgroups import Cgroup
from coordlfs_tools.lab.mounts import command, is_mounted, unmount_lazily
from coordlfs_tools.lab.processes import children, is_alive, words


@dataclass(frozen=True, slots=True)
class Target:
    """A mount. `fails`: its source is one that fails when it is told to. `disk`: bytes of its disk tier; 0 without."""

    point: Path
    log: Path
    supervisor: int
    fails: bool
    disk: int

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
            if any(word.startswith("coordlfs.") and word.endswith(suffix) for word in words(pid))
        ]

    def is_mounted(self) -> bool:
        """Whether anything is mounted at its mountpoint; nobody is asked but the kernel."""
        return is_mounted(self.point)


@contextmanager
def mounted(
    source: Path,
    point: Path,
    cache: int,
    options: Sequence[str],
    *,
    fails: bool,
    group: Cgroup | None,
    tier: tuple[Path, int] | None,
) -> Iterator[Target]:
    """`source` mounted on `point`, by processes of `group`; whatever happens, nothing of it is left.

    `tier`: a directory for its disk tier, and bytes.
    """
    point.mkdir()
    log = point.with_suffix(".log")
    if tier is not None:
        options = [*options, "--disk-cache", str(tier[0]), "--disk-size", str(tier[1])]
    command("mount", source, point, "--cache-size", cache, "--log-file", log, *options, group=group)
    supervisor = json.loads(command("status", "--json", point).stdout)["processes"]["supervisor"]
    try:
        yield Target(point, log, supervisor, fails, tier[1] if tier else 0)
    finally:
        end(supervisor, point)


def end(supervisor: int, point: Path) -> None:
    """Leave nothing of a mount, even if it hangs: with its processes, the kernel ends every request."""
    unmount_lazily(point)
    deadline = time.monotonic() + 10
    while is_alive(supervisor) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in [supervisor, *children(supervisor)] if is_alive(supervisor) else []:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
