"""The files that a process has open or mapped, whoever opened them: native code tells Python nothing of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

_KEPT = ("/memfd:", "/dev/", "/proc/", "/sys/", "/SYSV", "[", "anon_inode")


def held(pid: int) -> set[str]:
    """Regular files that the process reads from: its descriptors, but those only for writing, and its data mappings."""
    return {path for path in (*_descriptors(pid), *_mappings(pid)) if _is_file(path)}


def _is_file(path: str) -> bool:
    return path.startswith("/") and not path.startswith(_KEPT) and os.path.isfile(path)


def _descriptors(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError, StopIteration):
                with open(f"/proc/{pid}/fdinfo/{number}") as f:
                    flags = next(int(line.split()[1], 8) for line in f if line.startswith("flags:"))
                if flags & os.O_ACCMODE != os.O_WRONLY:
                    yield os.readlink(f"/proc/{pid}/fd/{number}")


def _mappings(pid: int) -> Iterator[str]:
    """A file of which any part is executable is a program or a library."""
    found: dict[str, bool] = {}
    with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as f:
        for line in f:
            fields = line.rstrip(b"\n").split(None, 5)
            if len(fields) == 6:
                path = os.fsdecode(fields[5].replace(rb"\012", b"\n"))
                found[path] = found.get(path, False) or b"x" in fields[1]
    yield from (path for path, runs in found.items() if not runs)
