"""Limits of processes: which of them are so low that coordlfs does less than it could, or nothing.

It says what a limit costs, and sets none.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

_MIB = 1 << 20
_UNIT = {resource.RLIMIT_FSIZE: (1024, "KiB"), resource.RLIMIT_AS: (1024, "KiB"), resource.RLIMIT_DATA: (1024, "KiB")}
_LEAST = (  # limit, as ulimit calls it, least value with which all goes well, what it is needed for
    (resource.RLIMIT_FSIZE, "-f", 64 * _MIB, "names and records of the files are kept in files in memory"),
    (resource.RLIMIT_AS, "-v", 2048 * _MIB, "the processes map what they know and cache"),
    (resource.RLIMIT_DATA, "-d", 512 * _MIB, "the processes need memory"),
    (resource.RLIMIT_NOFILE, "-n", 256, "each file that is being read takes a descriptor"),
    (resource.RLIMIT_NPROC, "-u", 256, "each slow read takes a thread"),
)


_FILES_NEEDED = 64  # with fewer a server comes up, and can open nothing


@dataclass(frozen=True, slots=True)
class Tight:
    """A limit that is too low: `name` it goes by, and in words what it is, what it has to be, and why."""

    name: str
    found: str
    cost: str
    remedy: str


def tight() -> Iterator[Tight]:
    """The limits of this process, which it cannot raise by itself, that are too low."""
    for limit, option, least, why in _LEAST:
        _, most = resource.getrlimit(limit)
        if limit == resource.RLIMIT_NPROC and os.geteuid() == 0:  # the kernel does not hold root to it
            continue
        if most != resource.RLIM_INFINITY and most < least:
            divisor, unit = _UNIT.get(limit, (1, ""))
            yield Tight(
                f"ulimit {option}",
                f"at most {most // divisor} {unit}".strip(),
                why,
                f"raise the hard limit: `ulimit -H {option} {least // divisor}` as root, or limits.conf",
            )
    for path in ("/sys/fs/cgroup/pids", "/sys/fs/cgroup"):
        yield from _pids(path)


def _pids(root: str) -> Iterator[Tight]:
    with suppress(OSError, ValueError), open("/proc/self/cgroup", errors="surrogateescape") as f:
        for line in f:
            _, controllers, group = line.rstrip("\n").split(":", 2)
            if (controllers == "pids") != root.endswith("pids") or (controllers and controllers != "pids"):
                continue
            with suppress(OSError, ValueError):
                with open(f"{root}{group}/pids.max") as file:
                    most = int(file.read())  # "max" is no number, and no limit
                with open(f"{root}{group}/pids.current") as file:
                    now = int(file.read())
                if most - now < 64:
                    yield Tight(
                        f"pids.max of cgroup {group}",
                        f"{now} of at most {most} threads and processes are there",
                        "each slow read takes a thread",
                        f"raise it to {now + 256} (systemd: TasksMax=, docker: --pids-limit)",
                    )


def too_tight() -> Tight | None:
    """The limit with which nothing can be served, though it could be mounted."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= _FILES_NEEDED:
        return None
    return next(limit for limit in tight() if limit.name == "ulimit -n")


def hint() -> str:
    """To end an error with: which limits may be the reason; empty if none is tight."""
    found = [f"{limit.name} ({limit.found}): {limit.remedy}" for limit in tight()]
    return f". The reason may be {'; or '.join(found)}" if found else ""
