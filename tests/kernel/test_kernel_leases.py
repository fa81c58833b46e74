"""Whether a file is open for writing."""

from __future__ import annotations

import mmap
import os
import signal
from pathlib import Path

from coordlfs.kernel import leases


def test_who_writes_is_seen(source: Path) -> None:
    path = source / "f"
    path.write_bytes(bytes(5000))
    fd = os.open(path, os.O_RDONLY)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        assert leases.nobody_writes(fd)
        with open(path, "rb+") as f:
            assert not leases.nobody_writes(fd)
            mapped = mmap.mmap(f.fileno(), 0)
        assert not leases.nobody_writes(fd), "it is mapped for writing"
        mapped.close()
        with open(path, "rb"):
            assert leases.nobody_writes(fd), "others may read"
        assert leases.nobody_writes(fd)
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # no lease is left that would have to be broken first
    finally:
        signal.signal(signal.SIGIO, before)
        os.close(fd)
