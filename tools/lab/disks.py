"""Disks for the length of a `with`: file systems of any kind on loop devices, and disks that fail on command.

Knows nothing of what is kept on them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.faulty_fs import Faulty, served

LEAST = {"xfs": 300 << 20, "btrfs": 256 << 20}  # bytes that its mkfs asks for
_ALL_OF_IT = "-m", "0"  # nothing is kept for root
_LIMIT = 60.0  # seconds
IMAGE = "image"  # what a `faulty_disk` is called in its faults


def _run(*command: object) -> str:
    words = list(map(str, command))
    if shutil.which(words[0]) is None:
        raise LabError(f"{words[0]} is not installed")
    return subprocess.run(words, check=True, timeout=_LIMIT, capture_output=True, text=True).stdout.strip()


def _make(image: Path, kind: str, size: int, options: Sequence[object]) -> None:
    image.touch()
    os.truncate(image, size)
    _run(f"mkfs.{kind}", "-q", *(_ALL_OF_IT if kind.startswith("ext") else ()), *options, image)


@contextmanager
def file_system(place: Path, kind: str, size: int, *, make: Sequence[object] = (), mount: str = "rw") -> Iterator[Path]:
    """A file system of so many bytes, made in `place` (a directory that is not there yet), with options for each step.

    Raises LabError where the machine lacks the programs.
    """
    (place / "at").mkdir(parents=True)
    _make(place / IMAGE, kind, size, make)
    _run("mount", "-o", f"loop,{mount}", place / IMAGE, place / "at")
    try:
        yield place / "at"
    finally:
        _unmount(place / "at")


@contextmanager
def faulty_disk(
    place: Path, size: int, kind: str = "ext4", *, make: Sequence[object] = (), mount: str = "rw"
) -> Iterator[tuple[Faulty, Path]]:
    """As `file_system`, and a disk below it whose reads and writes of `IMAGE` fail when they are told to."""
    (place / "at").mkdir(parents=True)
    (place / "images").mkdir()
    _make(place / "images" / IMAGE, kind, size, make)
    with ExitStack() as stack:
        faulty = stack.enter_context(served(place / "images", place))
        loop = _run("losetup", "--show", "--direct-io=on", "-f", faulty.path / IMAGE)
        stack.callback(_run, "losetup", "-d", loop)
        _run("mount", "-o", mount, loop, place / "at")
        stack.callback(_unmount, place / "at")
        stack.callback(faulty.clear)
        yield faulty, place / "at"


def _unmount(point: Path) -> None:
    """Unmount, as soon as a process that is ending has let go."""
    deadline = time.monotonic() + _LIMIT
    while subprocess.run(["umount", point], capture_output=True).returncode:
        if time.monotonic() > deadline:
            raise LabError(f"{point} stays busy")
        time.sleep(0.1)
