"""Which memory cgroup a process is charged to."""

from __future__ import annotations


def of_memory(pid: int) -> bytes | None:
    """The path of the memory cgroup of a process or thread, None if it is gone. Versions 1 and 2 alike."""
    unified = None
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as f:
            for line in f:
                _, controllers, path = line.rstrip(b"\n").split(b":", 2)
                if b"memory" in controllers.split(b","):
                    return path
                if not controllers:
                    unified = path
    except OSError:
        return None
    return unified
