"""How a worker ended, in words: by which signal, and whether the kernel's out-of-memory killer sent it.

It knows nothing of groups.
"""

from __future__ import annotations

import re
import signal
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def oom_kills() -> dict[str, int]:
    """How many processes the OOM killer has killed so far: in this process's memory cgroup, and on the machine."""
    counts = {}
    for name, path in (("cgroup", _events()), ("machine", Path("/proc/vmstat"))):
        with suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE) if path else None
            if found:
                counts[name] = int(found[1])
    return counts


def _events() -> Path | None:
    """The file with the memory events of this process's cgroup."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(errors="surrogateescape").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                v2 = _CGROUPS / path.lstrip("/") / "memory.events"
                if v2.exists():
                    return v2
            elif "memory" in controllers.split(","):
                v1 = _CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control"
                if v1.exists():
                    return v1
    return None


def describe(exitcode: int, before: dict[str, int], after: dict[str, int]) -> str:
    """What became of a process, given `oom_kills` of before and after."""
    if exitcode >= 0:
        return f"exited with status {exitcode}"
    try:
        name = signal.strsignal(-exitcode) or str(-exitcode)
    except ValueError:
        name = str(-exitcode)
    if exitcode == -signal.SIGKILL:
        if after.get("cgroup", 0) > before.get("cgroup", 0):
            return "was killed by the OOM killer: the memory limit of its cgroup was reached"
        if "cgroup" not in after and after.get("machine", 0) > before.get("machine", 0):
            return "was killed by the OOM killer: the machine ran out of memory"
        if after.get("machine", 0) > before.get("machine", 0):
            return "was killed, probably by the OOM killer, which was at work meanwhile"
    return f"was killed by signal: {name}"
