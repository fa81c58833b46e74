"""The processes of a distributed job on this machine, and how they wait for each other: by files, with a time limit.

Not by the program's own process group: not every rank of every program has a loader, and a barrier that one of them
never reaches would hang the job.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any

from . import device

_PATIENCE = 30.0  # seconds for which a rank waits for the others, once
_POLL = 0.001


def _distributed() -> Any:
    torch = device.torch()
    known = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if known else None


def rank() -> int:
    """This process among all of the job."""
    return int(os.environ.get("RANK") or (group.get_rank() if (group := _distributed()) else 0))


def world() -> int:
    """How many processes the job has."""
    return int(os.environ.get("WORLD_SIZE") or (group.get_world_size() if (group := _distributed()) else 1))


def local_world() -> int:
    """How many of them run on this machine: as torchrun says, else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world())


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or rank())


class Meetings:
    """Where the local ranks meet; `directory` is theirs alone."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._alone = False

    def meet(self, name: str) -> bool:
        """Return when all local ranks have come to the meeting called `name`, or not within a time; whether they did.

        Once someone stayed away nobody is waited for any more.
        """
        count = local_world()
        if count <= 1 or self._alone:
            return not self._alone
        with suppress(OSError):
            os.close(os.open(self._path(name, _local_rank()), os.O_CREAT | os.O_WRONLY, 0o600))
        deadline = time.monotonic() + _PATIENCE
        for other in range(count):
            while not os.path.exists(self._path(name, other)):
                if time.monotonic() > deadline:
                    self._alone = True
                    return False
                time.sleep(_POLL)
        return True

    def _path(self, name: str, rank: int) -> str:
        return f"{self._directory}/meet-{name}-{rank}"
