"""Whether this machine takes back memory that looks idle (DAMON), and from whom it took pages.

Clouds set up DAMON so, however much memory is free. It judges by regions of physical memory, so that pages that were
read a moment ago go as well if what lay around them was idle. Knows nothing of what was counted on these pages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coordlfs.kernel import mounts

_SCHEMES = Path("/sys/kernel/mm/damon/admin/kdamonds")
_TRACEFS = Path("/sys/kernel/tracing")
_EVENT = Path("events/filemap/mm_filemap_delete_from_page_cache")
_NO_DISK = 1 << 20  # below it are the devices of major number 0: of FUSE, among others


def reclaims_idle_pages() -> bool:
    """Whether DAMON takes pages back that nobody used of late."""
    return any(scheme.read_text().strip() == "pageout" for scheme in _SCHEMES.glob("*/contexts/*/schemes/*/action"))


class Watch:
    """A trace of what DAMON's threads remove from the page cache."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def clear(self) -> None:
        """Forget what was taken so far."""
        self._trace.write_text("")

    def taken_from_fuse(self) -> int:
        """How many times pages of FUSE file systems that are mounted now were taken since the last `clear`."""
        devices = _fuse_devices()
        return sum(device in devices for device in re.findall(r"dev (\d+:\d+) ino", self._trace.read_text()))


def _daemons() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if entry.read_bytes().startswith(b"kdamond"):  # names of processes are any bytes
                found.append(int(entry.parent.name))
    return found


def _fuse_devices() -> set[str]:
    """MAJOR:MINOR of every FUSE file system that is mounted."""
    devices = [mount.device for mount in mounts.table() if mount.fstype.startswith(b"fuse")]
    return {f"{os.major(device)}:{os.minor(device)}" for device in devices}


@contextmanager
def watched() -> Iterator[Watch | None]:
    """A watch; None where there is no DAMON, or nobody may be watched: it needs root and tracefs."""
    daemons = _daemons()
    instance = _TRACEFS / "instances" / f"coordlfs-lab-{os.getpid()}"
    if os.geteuid() or not daemons or not (_TRACEFS / _EVENT).exists():
        yield None
        return
    try:
        with suppress(FileExistsError):  # left by a process that was killed
            instance.mkdir()
        pids = " || ".join(f"common_pid == {pid}" for pid in daemons)
        (instance / _EVENT / "filter").write_text(f"({pids}) && s_dev < {_NO_DISK}")
        (instance / _EVENT / "enable").write_text("1")
        watch = Watch(instance / "trace")
    except OSError:
        watch = None
    try:
        yield watch
    finally:
        with suppress(OSError):
            instance.rmdir()
