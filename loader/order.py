"""The order of an epoch: which indices each batch has.

Every job of a group draws it for itself, from the same seeds, and what they drew is compared by a digest. Workers of
other jobs read it, a batch at a time, from a sealed memfd: the number of batches, where each begins (64 bits each),
and the pickled list of indices of each. It does not know who prepares them.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import struct
from array import array
from collections.abc import Iterable
from hashlib import blake2b
from numbers import Number
from typing import Any

from coordlfs_loader import area
from coordlfs_loader.identity import identify

_TWO = struct.Struct("=QQ")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Order:
    """The order of an epoch, in memory until the object goes.

    Attributes: epoch, count (of batches), digest, fd.
    """

    def __init__(self, epoch: int, batches: Iterable[Any]) -> None:
        blobs, starts = [], array("Q")
        hashed = blake2b(digest_size=16)
        position = 0
        for batch in batches:
            blob = pickle.dumps(batch, 5)
            hashed.update(_content(batch, blob))
            starts.append(position)
            blobs.append(blob)
            position += len(blob)
        starts.append(position)
        self.epoch = epoch
        self.count = len(blobs)
        self.digest = hashed.hexdigest()
        self.fd = os.memfd_create("coordlfs-order", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        area.extend(self.fd, 8 * (1 + len(starts)) + position)
        with os.fdopen(os.dup(self.fd), "wb") as file:
            file.write(self.count.to_bytes(8, "little"))
            file.write(starts.tobytes())
            file.writelines(blobs)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def _content(batch: Any, blob: bytes) -> bytes:
    """What is equal for equal batches, and differs for others. Pickles need not be: those of numbers are."""
    kinds = set(map(type, batch)) if type(batch) is list else {type(batch)}
    if kinds <= {int}:
        return blob
    if all(issubclass(kind, Number | str) for kind in kinds):
        return repr(batch).encode("utf-8", "surrogatepass")
    # The text of an array leaves out what lies in its middle, that of an object says where it lies.
    return (identify(batch=batch).digest or repr(batch)).encode("utf-8", "surrogatepass")


def indices(fd: int, number: int) -> Any:
    """What the sampler yielded for a batch."""
    count = int.from_bytes(os.pread(fd, 8, 0), "little")
    first, last = _TWO.unpack(os.pread(fd, _TWO.size, 8 + 8 * number))
    return pickle.loads(os.pread(fd, last - first, 8 * (count + 2) + first))
