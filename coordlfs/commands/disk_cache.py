"""`--disk-cache`: a directory for the second tier is examined and claimed before anything is mounted.

What lies in it is known by `coordlfs.disk`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from coordlfs import sizes
from coordlfs.commands.disk_doctor import LEAST
from coordlfs.disk import places
from coordlfs.errors import UserError
from coordlfs.kernel.paths import shown
from coordlfs.sources.directory import lies_elsewhere

_IN_USE = "the disk cache must lie beside the dataset and the mount"


def _is_beneath(directory: str, source: str) -> bool:
    """Whether a path that need not be there yet leads through the source, as one through a bind mount of it does."""
    try:
        st = os.stat(source)
    except OSError:  # it is a bucket
        return False
    while directory != "/":
        with suppress(OSError):
            if os.path.samestat(os.stat(directory), st):
                return True
        directory = os.path.dirname(directory)
    return False


@contextmanager
def claimed(
    directory: str | None, size: str, source: str, mountpoint: str, identity: bytes
) -> Iterator[dict[str, Any] | None]:
    """What the supervisor is to be told of the disk cache, claimed meanwhile; None without one. Raises UserError.

    `identity` tells the source from others of its name; see `places.identity`.
    """
    if directory is None:
        yield None
        return
    directory = os.path.realpath(directory)
    for place in (source, mountpoint):
        if (directory + "/").startswith(place.rstrip("/") + "/"):
            raise UserError(f"--disk-cache {directory} lies in {place}: {_IN_USE}")
    if _is_beneath(directory, source):
        raise UserError(f"--disk-cache {directory} lies in {source}, which is bound there: {_IN_USE}")
    fd = places.claim(directory, os.fsencode(source), os.fsencode(mountpoint))
    try:
        st = os.fstatvfs(fd)
        total, free = st.f_blocks * st.f_frsize, st.f_bavail * st.f_frsize
        nbytes = sizes.disk_size(size, total, free + places.taken(fd), LEAST)
        if lies_elsewhere(fd):
            print(
                f"coordlfs: --disk-cache {shown(directory)} lies on no local disk: is it faster than the source?",
                file=sys.stderr,
            )
        yield {"directory": fd, "path": directory, "size": nbytes, "identity": identity.hex()}
    finally:
        os.close(fd)
