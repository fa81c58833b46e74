"""Whether somebody has a file open for writing, which only the grant of a lease tells.

The lease is given back at once. Whoever opens the file for writing in between waits for that, for microseconds, and the
kernel sends SIGIO: who calls this must ignore that signal.
"""

from __future__ import annotations

import fcntl

_SETLEASE = 1024


def nobody_writes(fd: int) -> bool:
    """Whether no process of this machine has the file open, or mapped, for writing; False if that cannot be told.

    `fd` is open for reading only.
    """
    try:
        fcntl.fcntl(fd, _SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, _SETLEASE, fcntl.F_UNLCK)
    except OSError:  # EAGAIN: somebody has; EACCES: neither the file's owner nor CAP_LEASE; EINVAL: no leases there
        return False
    return True
