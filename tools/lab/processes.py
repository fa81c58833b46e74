"""Processes as /proc shows them. Knows nothing of whose they are, and asks no process anything."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none if there is no such process."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return []


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    fields = stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def parents() -> dict[int, int]:
    """The parent of every process; of those too that have ended and were not yet waited for."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := stat(int(entry))):
            found[int(entry)] = int(fields[1])
    return found


def children(parent: int) -> list[int]:
    """The processes whose parent is `parent`, but for those that have ended."""
    return [pid for pid, of in parents().items() if of == parent and is_alive(pid)]


def words(pid: int) -> list[str]:
    """The command line of a process; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    return []


def memory(pid: int, *kinds: str) -> int:
    """Bytes of a process, summed over kinds as /proc/PID/status names them (RssAnon). Raises OSError if it is gone."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines())
    return sum(int(fields[kind].split()[0]) * 1024 for kind in kinds)


def doing(pid: int) -> str:
    """Where in the kernel the threads of a process wait, and what they are called. Needs root."""
    told = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            stack = [line.split()[1].partition("+")[0] for line in (task / "stack").read_text().splitlines()]
            told.append(f"{(task / 'comm').read_text(errors='replace').strip()} in {' < '.join(stack[:5])}")
    return "; ".join(dict.fromkeys(told))
