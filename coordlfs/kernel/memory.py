"""How much memory this process may use: the machine's, or less where a memory cgroup says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice

_UNLIMITED = 1 << 62  # version 1 of cgroups writes "no limit" as a number about as large


@dataclass(frozen=True, slots=True)
class Memory:
    """In bytes: all there is for this process, and what can be had now without swapping."""

    total: int
    available: int


def _meminfo() -> Memory:
    fields = {}
    with open("/proc/meminfo", "rb") as f:
        for line in islice(f, 3):  # MemTotal, MemFree, MemAvailable
            name, _, value = line.partition(b":")
            fields[name] = int(value.split()[0]) * 1024
    return Memory(fields[b"MemTotal"], fields[b"MemAvailable"])


@cache
def _cgroup_mounts() -> dict[str, str]:
    """Where cgroups of version 2 and those of version 1 for memory are mounted; asked once: hosts have many mounts."""
    mounted = {}
    with open("/proc/self/mounts", errors="surrogateescape") as f:
        for line in f:
            _, point, fstype, options, *_ = line.split()
            if fstype == "cgroup2":
                mounted["v2"] = point
            elif fstype == "cgroup" and "memory" in options.split(","):
                mounted["v1"] = point
    return mounted


def _cgroup_directories(pid: int | str) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Directory, limit files and usage file of the process's memory cgroup and those above it.

    Above memory.high the kernel slows processes down, and reclaims what cannot be reclaimed here: a limit as well.
    """
    mounted = _cgroup_mounts()
    with open(f"/proc/{pid}/cgroup", errors="surrogateescape") as f:
        for line in f:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            version = "v2" if not controllers else "v1" if "memory" in controllers.split(",") else ""
            if version not in mounted:
                continue
            files = (
                (("memory.max", "memory.high"), "memory.current")
                if version == "v2"
                else (("memory.limit_in_bytes",), "memory.usage_in_bytes")
            )
            while True:
                yield mounted[version] + path, *files
                if path in ("/", ""):
                    break
                path = os.path.dirname(path)


def _number(path: str) -> int:
    with open(path) as f:
        text = f.read().strip()
    return _UNLIMITED if text == "max" else int(text)


def _limit(directory: str, files: tuple[str, ...]) -> int:
    return min(_number(f"{directory}/{file}") for file in files)


def _reclaimable(directory: str) -> int:
    with open(f"{directory}/memory.stat") as f:
        fields = dict(line.split() for line in f)
    return sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in ("inactive_file", "active_file"))


def limits() -> list[tuple[str, int]]:
    """The memory cgroups of this process that have a limit: directory, and bytes."""
    found = []
    for directory, limit_files, _ in _cgroup_directories("self"):
        with suppress(OSError):
            if (limit := _limit(directory, limit_files)) < _UNLIMITED:
                found.append((directory, limit))
    return found


def memory(pid: int | str = "self") -> Memory:
    """What this process may use, or another one. Raises OSError if that one is gone."""
    result = _meminfo()
    for directory, limit_files, usage_file in _cgroup_directories(pid):
        try:
            limit = _limit(directory, limit_files)
            if limit >= _UNLIMITED:
                continue
            usage = _number(f"{directory}/{usage_file}") - _reclaimable(directory)
        except OSError:  # the root has no such files, and a container may not see its ancestors
            continue
        total = min(result.total, limit)
        result = Memory(total, max(0, min(result.available, limit - usage)))
    return result


def stalled() -> float:
    """The share of the last ten seconds in which every task of the machine waited for memory; 0 if that is unknown.

    Pressure stall information: Documentation/accounting/psi.rst of Linux.
    """
    try:
        with open("/proc/pressure/memory") as f:
            full = next(line for line in f if line.startswith("full"))
    except (OSError, StopIteration):
        return 0.0
    return float(full.partition("avg10=")[2].split()[0]) / 100
