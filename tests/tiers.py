"""What the tests of the disk tier share: a dataset of equal files, epochs of it, and damage to what is kept."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from pathlib import Path

from coordlfs_tools.lab import damage as lab_damage
from mounts import Mount, eventually, is_mounted, unmount_lazily

FILES, SIZE, ROOM = 120, 100_000, 102_400  # and what each takes, in whole pages


def settle(mount: Mount) -> dict[str, int]:
    """Wait until nothing is on its way into the disk tier; its figures."""
    eventually(lambda: mount.settle()["disk"]["waiting_blocks"] == 0, what="the disk tier does not settle")
    figures: dict[str, int] = mount.stats()["disk"]
    return figures


def epoch(mount: Mount, names: list[str], seed: int, readers: int = 4) -> int:
    """Read every file once, in random order, compare it with the source, and forget it; bytes read of the source."""
    before = mount.source_bytes()
    mount.read_all(names, seed, readers)
    settle(mount)
    mount.forget()
    return mount.source_bytes() - before


def killed(mount: Mount) -> None:
    """All processes of a mount are killed, as by a reset."""
    mount.expect_errors = True
    for pid in mount.pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    unmount_lazily(mount.path)
    eventually(lambda: not is_mounted(mount.path))


def damage(file: Path, rng: random.Random) -> None:
    """Inside mostly, and seldom at its end."""
    kinds = lab_damage.ENDS if rng.randrange(100) == 0 else lab_damage.INSIDE
    rng.choice(kinds)(file, rng)
